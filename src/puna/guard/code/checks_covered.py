"""Checks of buffers in C and C++ that come with their length: what is read of them, and what was asked before."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from puna.guard.code.checks import check
from puna.guard.code.checks_facts import Facts, bare, called, facts, leaves, within
from puna.guard.code.view import Node

_LENGTH = re.compile(r"(?i)(^|_)(len|length|size|sz|bytes|count|n?bytes|remaining|avail)\d?$|(len|length|size)$")
WHOLE = re.compile(
    r"(?i)^(const )?(unsigned |signed )?(s?size_t|int|long|short|char|socklen_t|u?int\d+(_t)?|([us]|u|ut)\d+|BYTE|DWORD"
    r"|UINT|ULONG|USHORT|gs?size|gu?int\w*|png_size_t|tmsize_t|Py_ssize_t|unsigned|uint|CFIndex)( (int|long|char))*$"
)
_ASKS = re.compile(r"(?i)check|valid|ensure|require|assert|bounds|avail|enough|verify|need|min|clamp")


@dataclass(frozen=True)
class Pair:
    """A buffer and the variable that says how much it holds, as paths."""

    buffer: str
    length: str


@lru_cache(maxsize=2)
def parameter_pairs(function: Node) -> list[Pair]:
    """Pointer parameters that are followed by a whole number named like a length."""
    found = []
    for one, other in zip(function.args, function.args[1:], strict=False):
        pointer = one.type.rstrip().endswith(("*", "[]"))
        if (
            pointer
            and one.name
            and _LENGTH.search(other.name)
            and WHOLE.match(other.type.strip())
            and not WHOLE.match(other.name)
        ):
            found.append(Pair(one.name, other.name))
    return found


def _members(known: Facts) -> Iterator[Pair]:
    """`x->payload` and `x->payload_len` (or payload_packet_len), where the function mentions both."""
    paths = {n.path() for n in known.of("member")}
    for path in sorted(paths):
        holder, _, name = path.rpartition(".")
        if holder and len(name) > 3 and name.endswith(("len", "length", "size")):
            for end in range(3, len(name)):
                if f"{holder}.{name[:end]}" in paths:
                    yield Pair(f"{holder}.{name[:end]}", path)


def length_asked(known: Facts, length: str, start: int, end: int) -> bool:
    """Whether anything between looked at the length: a comparison with more than 0, a loop, a call that is given it."""
    for node in known.nodes[start:end]:
        if node.kind == "binary" and node.name in ("<", ">", "<=", ">=", "==", "!="):
            zero = any(bare(a).kind == "number" and bare(a).value == 0 for a in node.args) and node.name not in ("<=",)
            if not zero and _mentions(node, length):
                return True
        elif node.kind == "loop" or node.raw == "switch_statement" or node.kind == "conditional":
            if any(_mentions(a, length) for a in node.args[: 1 if node.kind != "loop" else None]):
                return True
        elif (node.kind == "call" and any(_mentions(a, length) for a in node.args)) or (
            node.kind == "assign"
            and ((node.base is not None and node.base.path() == length) or any(_mentions(a, length) for a in node.args))
        ):
            return True
    return False


def _mentions(node: Node, path: str) -> bool:
    return any(n.kind in ("name", "member") and n.path() == path for n in node.walk())


def aliases(known: Facts, buffer: str) -> dict[str, int]:
    """Names that were declared as the buffer, or a cast of it, and where."""
    found = {buffer: 0}
    for node in known.nodes:
        if (
            node.kind == "assign"
            and node.base is not None
            and node.args
            and node.name == "="
            and _uncast(node.args[0]).path() == buffer
            and _uncast(node.args[0]).kind in ("name", "member")
        ):
            found.setdefault(node.base.path(), known.place[id(node)])
    return found


def _uncast(node: Node) -> Node:
    """Without casts, C++'s too."""
    node = bare(node)
    while called(node) in ("reinterpret_cast", "static_cast", "const_cast") and node.args:
        node = bare(node.args[0])
    return node


def _offset(node: Node) -> tuple[str, int] | None:
    """(path, n) for `path + n`, `path`, or `n`."""
    node = bare(node)
    if node.kind == "number" and isinstance(node.value, int):
        return "", node.value
    if node.kind in ("name", "member"):
        return node.path(), 0
    if node.kind == "binary" and node.name == "+":
        path, total = "", 0
        for part in node.args:
            inner = _offset(part)
            if inner is None or (inner[0] and path):
                return None
            path, total = path or inner[0], total + inner[1]
        return path, total
    return None


_READER = re.compile(
    r"^[A-Z]*_?[IULBS]?(INT|SHORT|LONG|8|16|24|32|64)(LE|BE|_LE|_BE)?$|(?i:read|get|load|fetch|r[bl]|be|le|peek)_?\w*(8|16|24|32|64|byte|short|word|int|long)"
)


def fixed_reads(known: Facts, names: dict[str, int]) -> Iterator[tuple[Node, str, int]]:
    """(place, path, n) where `buffer[path + n]` is read, also by a reader: `get16(buffer + n)`, `get16(buffer, n)`.
    Ends where the buffer's own name is moved on."""
    moved: set[str] = set()
    for node in known.nodes:
        if (node.kind == "assign" and node.args and node.base is not None and node.base.path() in names) or (
            node.kind == "unary" and node.name in ("++", "--") and node.args and node.args[0].path() in names
        ):
            name = (node.base if node.kind == "assign" and node.base is not None else node.args[0]).path()
            if known.place[id(node)] != names[name]:
                moved.add(name)
        found: tuple[str, int] | None = None
        if node.kind == "index" and node.base is not None and len(node.args) == 1:
            above = known.parent.get(id(node))
            if node.base.path() in names.keys() - moved and not (
                above is not None and above.kind == "unary" and above.name == "&"
            ):
                found = _offset(node.args[0])
        elif node.kind == "call" and node.args and _READER.search(called(node)):
            first = bare(node.args[0])
            if len(node.args) == 2 and first.path() in names.keys() - moved and first.kind in ("name", "member"):
                found = _offset(node.args[1])
            elif (
                len(node.args) == 1
                and first.kind == "binary"
                and first.name == "+"
                and bare(first.args[0]).path() in names.keys() - moved
                and len(first.args) == 2
            ):
                found = _offset(first.args[1])
        above = known.parent.get(id(node))
        if found is not None and not (above is not None and above.kind == "assign" and above.base is node):
            yield node, *found


def _letter_before(known: Facts, node: Node, n: int) -> bool:
    """`p[0] == 's' && p[1] == ':'`: in a text that ends in NUL, the letter before shows that this one is there."""
    if node.kind != "index" or node.base is None:
        return False
    read = node.base.path()
    chain = next((a for a in known.ancestors(node) if a.kind == "binary" and a.name == "&&"), None)
    return chain is not None and any(
        test.kind == "binary"
        and test.name == "=="
        and any(
            one.kind == "index" and one.base is not None and one.base.path() == read
            and one.args and one.args[0].value == n - 1
            for one in test.args
        )
        for test in map(bare, chain.args)
    )  # fmt: skip


@check("length-unasked")
def length_unasked(function: Node) -> Iterable[Node]:
    """A buffer is read at a fixed place though nothing asked yet whether its length reaches there."""
    known = facts(function)
    for pair in parameter_pairs(function):
        names = aliases(known, pair.buffer)
        for node, path, n in fixed_reads(known, names):
            at = known.place[id(node)]
            if path or n < 1 or _letter_before(known, node, n):
                continue
            if not length_asked(known, pair.length, 0, at):
                yield node
            break
    for pair in _members(known):
        for node, path, n in fixed_reads(known, {pair.buffer: 0}):
            at = known.place[id(node)]
            if path or n > 64:
                continue
            if not length_asked(known, pair.length, 0, at) and length_asked(known, pair.length, at, len(known.nodes)):
                yield node
            break


@check("length-asked-short", "if", "binary")
def length_asked_short(function: Node) -> Iterable[Node]:
    """A test lets `x + n` bytes pass, and then the byte at `x + n` or behind it is read: one more is needed."""
    known = facts(function)
    for pair in [*parameter_pairs(function), *_members(known)]:
        guards = _guards(known, pair.length)
        if not guards:
            continue
        for node, path, n in fixed_reads(known, aliases(known, pair.buffer)):
            at = known.place[id(node)]
            before = [(p, have, place) for p, have, place in guards if place < at and p == path]
            if not before or n < max(have for _, have, _ in before):
                continue
            if not _moved(known, path, before[0][2], at) and not _asked_again(known, pair.length, guards, at):
                yield node
                break


def _guards(known: Facts, length: str) -> list[tuple[str, int, int]]:
    """(path, bytes, place): after `if (path + bytes > length) return` that many are there."""
    found = []
    for node in known.of("if"):
        if not (node.kind == "if" and leaves(node.body) and node.args) or node.orelse:
            continue
        test = bare(node.args[0])
        for part in test.args if test.kind == "binary" and test.name == "||" else [test]:
            part = bare(part)
            if part.kind != "binary" or part.name not in ("<", ">", "<=", ">=") or len(part.args) != 2:
                continue
            small, big = part.args if part.name in ("<", "<=") else part.args[::-1]
            needed = _offset(big)
            if bare(small).path() == length and bare(small).kind in ("name", "member") and needed is not None:
                found.append((needed[0], needed[1] + (part.name in ("<=", ">=")), known.place[id(node)]))
    return found


def _moved(known: Facts, path: str, start: int, end: int) -> bool:
    """Whether the offset was stepped or set anew between."""
    return bool(path) and any(
        (n.kind == "assign" and n.base is not None and n.base.path() == path)
        or (n.kind == "unary" and n.name in ("++", "--") and n.args and n.args[0].path() == path)
        for n in known.nodes[start:end]
    )


def _asked_again(known: Facts, length: str, guards: list[tuple[str, int, int]], end: int) -> bool:
    """Whether something else than the guards looked at the length before `end`."""
    guarded = {place for _, _, place in guards}
    for place in range(end):
        node = known.nodes[place]
        if (
            (node.kind in ("if", "loop", "conditional") or node.raw == "switch_statement")
            and place not in guarded
            and any(_mentions(a, length) for a in node.args)
        ):
            return True
        if node.kind == "assign" and node.base is not None and node.base.path() == length:
            return True
        if node.kind == "binary" and node.name == "&&" and _mentions(node, length):
            return True
        if node.kind == "call" and _ASKS.search(called(node)) and any(_mentions(a, length) for a in node.args):
            return True
    return False


@check("record-unmeasured", "loop", "cast", "member")
def record_unmeasured(function: Node) -> Iterable[Node]:
    """A loop runs while any byte is left, takes what is there for a structure and reads its members."""
    known = facts(function)
    for loop in known.of("loop"):
        if len(loop.args) != 1:
            continue
        test = bare(loop.args[0])
        left = ""
        if test.kind == "binary" and test.name in (">", "!=") and bare(test.args[1]).value == 0:
            left = bare(test.args[0]).path()
        elif test.kind == "name":
            left = test.name
        if not left or (not _LENGTH.search(left) and not re.search(r"(?i)left|remain|len|size", left)):
            continue
        inside = [n for part in loop.body for n in part.walk()]
        for node in inside:
            if node.kind == "assign" and node.base is not None and node.args and node.args[0].kind == "cast":
                cast, name = node.args[0], node.base.path()
                kind = cast.type or known.types.get(name, "")
                if not kind.endswith("*") or WHOLE.match(kind.rstrip("* ")) or kind.startswith("void"):
                    continue
                after = known.nodes[known.place[id(node)] :]
                members = (n for n in after if n.kind == "member" and n.base is not None and n.base.path() == name)
                use = next((n for n in members if within(known, n, loop)), None)
                start = known.place[id(loop.body[0])]
                if use is not None and not length_asked(known, left, start, known.place[id(use)]):
                    yield use
                    return
