"""Checks of copies and loops in C and C++ that read past the end of where the data comes from."""

import re
from collections.abc import Iterable

from puna.guard.code.checks import check
from puna.guard.code.checks_covered import aliases, parameter_pairs
from puna.guard.code.checks_facts import Facts, bare, called, facts, in_order
from puna.guard.code.view import Node

_COPIES = ("memcpy", "memmove", "bcopy")
_READER = re.compile(r"(?i)short|int|long|byte|word|u8|16|32|64")
_LIMITS = re.compile(r"(?i)check|min|valid|clamp|assert")
_CONTENT = ("value", "data", "ptr", "payload", "contents")


@check("copy-past-source", "call", "binary")
def copy_past_source(function: Node) -> Iterable[Node]:
    """`memcpy(out, packet + at, n)` where n was compared with the room in `out` at most, never with the packet's
    length."""
    known = facts(function)
    for pair in parameter_pairs(function):
        if known.types.get(pair.buffer, "").count("*") != 1:
            continue
        names = set(aliases(known, pair.buffer))
        ends = _ends(known, names, pair.length)
        for node in known.of("call"):
            if called(node) not in _COPIES or len(node.args) != 3:
                continue
            source, size = bare(node.args[1]), bare(node.args[2])
            if source.kind != "binary" or source.name != "+" or not names & {bare(a).path() for a in source.args}:
                continue
            computed = size.kind == "name" and not size.name.isupper() and size.name not in {*known.parameters, *ends}
            if computed and not _held_against(known, size.name, ends, node):
                yield node
                return


def _ends(known: Facts, names: set[str], length: str) -> set[str]:
    """The length, and all that was computed from it or from the buffer's place (not from what it holds)."""
    found = {length}
    for node in known.of("assign"):
        for part in [n for a in node.args for n in a.walk()] if node.base is not None else ():
            place = part.kind == "name" and part.name in names and known.parent[id(part)].kind == "binary"
            if (place or part.path() in found) and node.base is not None:
                found.add(node.base.path())
    return found


def _held_against(known: Facts, size: str, ends: set[str], use: Node) -> bool:
    """Whether a comparison, a difference or a call before the copy has the size and one of `ends` in it."""
    for node in known.nodes[: known.place[id(use)]]:
        if node.kind == "binary" and node.name not in ("<", ">", "<=", ">=", "==", "!=", "-"):
            continue
        if node.kind in ("binary", "call", "conditional"):
            paths = {n.path() for n in node.walk() if n.kind in ("name", "member")}
            limits = node.kind == "call" and (called(node).isupper() or _LIMITS.search(called(node)) is not None)
            if size in paths and (paths & ends or (limits and len(node.args) > 1)):
                return True
    return any(
        above.kind in ("if", "loop") and any(n.path() == size for a in above.args for n in a.walk())
        for above in known.ancestors(use)
    )


@check("copy-of-whole-room", "call", "member")
def copy_of_whole_room(function: Node) -> Iterable[Node]:
    """`memcpy(buf, x->value, sizeof(buf))` where no condition asks how long the value is."""
    known = facts(function)
    for node in known.of("call"):
        if called(node) not in _COPIES or len(node.args) != 3:
            continue
        target, source, size = map(bare, node.args)
        whole = called(size) == "sizeof" and size.args and bare(size.args[0]).path() == target.path()
        if not whole or target.name not in known.arrays or source.kind != "member" or source.base is None:
            continue
        holder = source.base.path()
        lengths = [
            n
            for n in known.of("member")
            if n.base is not None and n.base.path() == holder and re.search(r"(?i)len|size", n.name)
        ]
        if source.name in _CONTENT and not any(known.in_test(n) for n in lengths):
            yield node
            return


@check("loop-offset-unasked", "loop", "assign")
def loop_offset_unasked(function: Node) -> Iterable[Node]:
    """`for (i = 0; i < n; i++) { x = get16(buf, at); at += 2; }` where nothing in the loop asks for the buffer's
    length, nor compares the place."""
    known = facts(function)
    for pair in parameter_pairs(function):
        names = set(aliases(known, pair.buffer))
        for loop in known.of("loop"):
            tests = [n for a in loop.args for n in a.walk()]
            inside = [n for part in loop.body for n in part.walk()]
            if not any(in_order(n) for n in tests) or any(n.path() == pair.length for n in [*tests, *inside]):
                continue
            asked = {n.path() for t in [*tests, *filter(in_order, inside)] for n in t.walk()}
            steps = {n.base.path() for n in inside if n.kind == "assign" and n.name == "+=" and n.base is not None}
            for node in inside if steps - asked else ():
                place = _place(node, names, known)
                if place is not None and any(n.path() in steps - asked for n in place.walk() if n.kind == "name"):
                    yield node
                    return


def _place(node: Node, names: set[str], known: Facts) -> Node | None:
    """Where `buf[at]`, `get16(buf, at)` or `get16(buf + at)` reads."""
    if node.kind == "index" and node.base is not None and node.base.path() in names and len(node.args) == 1:
        above = known.parent.get(id(node))
        written = above is not None and above.kind == "assign" and above.base is node
        return None if written else node.args[0]
    if node.kind != "call" or not node.args or not _READER.search(called(node)):
        return None
    first = bare(node.args[0])
    if len(node.args) == 2 and first.path() in names:
        return node.args[1]
    sums = first.kind == "binary" and first.name == "+" and bare(first.args[0]).path() in names
    return first if sums else None
