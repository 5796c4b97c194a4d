"""Checks of loops in C and C++ that go through records: what one round reads, against what the condition promises."""

import re
from collections.abc import Iterable, Iterator

from puna.guard.code.checks import check
from puna.guard.code.checks_facts import Facts, bare, called, facts, in_order, within
from puna.guard.code.view import Node

_READER = re.compile(
    r"(?i)^(\w*_)?(get|read|load|fetch|extract|peek|rd|[bl]e)_?(u|s|ui|i|u?int)?_?(be|le)?_?(16|24|32|64|16bits|32bits"
    r"|64bits|short|long|dword|word|ushort|ulong)(toh|dec|_to_cpu)?(u|s|be|le|_be|_le)?$"
)
_BYTES = re.compile(
    r"^(const )?((unsigned )?char|u_?char|u?int8(_t)?|u_int8_t|(__)?u8|ut8|guint8|UChar|(OPJ_)?BYTE|[Bb]ytef?) ?"
    r"(const )?\*$"
)
_NO_RECORD = re.compile(r"(const )?(void|char|unsigned char)")


@check("record-asked-short", "loop", "binary")
def record_asked_short(function: Node) -> Iterable[Node]:
    """`while (p < end)` promises one byte, and the loop reads several of them before it asks again."""
    known = facts(function)
    for loop in known.of("loop"):
        if len(loop.args) != 1 or not loop.body:
            continue
        for moves, limit in _promises(loop, known):
            start = known.place[id(loop.body[0])]
            end = start + sum(len(part.walk()) for part in loop.body)
            if not _moved(known, moves, start, end) and not _moved(known, limit, start, end):
                continue
            read = next(_reads(known, moves, start, end), None)
            if read is not None and not _asked(known, moves, limit, start, known.place[id(read)]):
                yield read
                break


def _promises(loop: Node, known: Facts) -> Iterator[tuple[str, str]]:
    """(what moves, limit) of a condition that holds while one byte is left; limit alone for a count of what is left."""
    test = bare(loop.args[0])
    if not in_order(test):
        return
    small, big = test.args if test.name in ("<",) else test.args[::-1]
    if test.name not in ("<", ">"):
        return
    moves, limit = bare(small), bare(big)
    if moves.kind in ("name", "member") and limit.kind != "number" and moves.path():
        paths = [n.path() for n in limit.walk() if n.kind in ("name", "member")]
        named = (p for p in paths if p == limit.path() or re.search(r"(?i)len|size|end", p))
        path = next(named, "")
        if path and not path.rsplit(".", 1)[-1].isupper() and _given(path, known):
            yield moves.path(), path


def _given(path: str, known: Facts) -> bool:
    """Whether the limit came with the buffer: a parameter, or put together from parameters alone."""
    if path.split(".")[0] in known.parameters:
        return "." not in path or any(known.types.get(a, "").endswith("*") for a in known.parameters)
    values = [n.args[0] for n in known.of("assign") if n.base is not None and n.base.path() == path and n.args]
    names = [n for v in values for n in v.walk() if n.kind in ("name", "member", "call", "number")]
    return bool(names) and all(n.kind == "name" and n.name in known.parameters for n in names)


def _moved(known: Facts, path: str, start: int, end: int) -> bool:
    """Whether the loop steps it by more than one."""
    return any(
        n.kind == "assign" and n.base is not None and n.base.path() == path and n.name in ("+=", "=", "-=")
        for n in known.nodes[start:end]
    )


def _reads(known: Facts, moves: str, start: int, end: int) -> Iterator[Node]:
    """Where several bytes at the place are read: `p[3]`, `buf[pos + 3]`, `get32(p)`, a member of a record there."""
    pointer = bool(_BYTES.match(known.types.get(moves, "").strip()))
    steps = [
        n.base.path() for n in known.nodes[start:end] if n.kind == "assign" and n.name == "+=" and n.base is not None
    ]
    moving = {moves} if pointer else {p for p in steps if _BYTES.match(known.types.get(p, ""))}
    records: set[str] = set()
    for node in known.nodes[start:end]:
        if node.kind == "assign" and node.base is not None and node.args and node.args[0].kind == "cast":
            kind = node.args[0].type
            record = kind.endswith("*") and not _BYTES.match(kind) and not _NO_RECORD.match(kind)
            if record and any(n.path() == moves and n.kind in ("name", "member") for n in node.args[0].walk()):
                records.add(node.base.path())
        elif node.kind == "member" and node.value == "->" and node.base is not None and node.base.path() in records:
            yield node
        elif node.kind == "index" and node.base is not None and len(node.args) == 1:
            above = known.parent.get(id(node))
            if above is not None and above.kind == "assign" and above.base is node:
                continue
            base = node.base.path()
            at_place = _constant(node.args[0], "") if base in moving else None
            if at_place is None and not pointer and _BYTES.match(known.types.get(base, "")):
                at_place = _constant(node.args[0], moves)
            if at_place is not None and at_place > 1:
                yield node
        elif node.kind == "call" and node.args and _READER.match(called(node)) and any(
            n.path() == moves for a in node.args for n in a.walk() if n.kind in ("name", "member")
        ):  # fmt: skip
            yield node


def _constant(node: Node, name: str) -> int | None:
    """n of `name + n`, or of n alone where name is empty."""
    node = bare(node)
    if not name:
        return node.value if node.kind == "number" and isinstance(node.value, int) else None
    if node.kind == "binary" and node.name == "+" and len(node.args) == 2:
        one, other = map(bare, node.args)
        if one.path() == name and other.kind == "number" and isinstance(other.value, int):
            return other.value
    return None


def _asked(known: Facts, moves: str, limit: str, start: int, end: int) -> bool:
    """Whether anything in the loop looked at the limit (or was given it) before."""
    for node in known.nodes[start:end]:
        looks = node.kind in ("binary", "call", "loop") and (
            node.kind != "binary" or node.name in ("<", ">", "<=", ">=", "==", "!=", "-")
        )
        if not looks:
            continue
        paths = {n.path() for a in node.args for n in a.walk() if n.kind in ("name", "member")}
        if limit in paths or (in_order(node) and moves in paths):
            return True
        if node.kind == "call" and called(node).isupper() and moves in paths:
            return True
    return False


@check("endpoint-unasked", "index", "member")
def endpoint_unasked(function: Node) -> Iterable[Node]:
    """Linux, USB: an endpoint is taken by number, and nothing asks how many the device has."""
    known = facts(function)
    if any(n.name in ("bNumEndpoints", "for_each_endpoint") or called(n).startswith("usb_find_") for n in known.nodes):
        return
    for node in known.of("index"):
        first = node.base is not None and node.base.kind == "member" and node.base.name == "endpoint" and node.args
        if first and bare(node.args[0]).kind == "number" and not any(within(known, node, a) for a in known.of("loop")):
            yield node
            return
