"""Checks of C and C++ against room that the function itself shows: arrays and memory of constant length, pointers to
them, and where those begin and end."""

import re
from collections.abc import Iterable
from math import prod

from puna.guard.code.checks import check
from puna.guard.code.checks_facts import Facts, bare, called, calls, calls_of, facts, in_order
from puna.guard.code.view import Node

_WIDTHS = {
    **dict.fromkeys(("char", "int8_t", "uint8_t", "BYTE"), 1),
    "short": 2,
    **dict.fromkeys(("wchar_t", "int", "unsigned", "float", "int32_t", "uint32_t"), 4),
    **dict.fromkeys(("long", "double", "int64_t", "uint64_t", "size_t"), 8),
}
_COPIES = {"memcpy": 2, "memmove": 2, "memset": 2, "strncpy": 2, "wmemset": 2, "snprintf": 1, "fgets": 1, "bcopy": 2}
_MAKES = ("malloc", "alloca", "ALLOCA", "_alloca")


def number(node: Node) -> int | None:
    """The value of a constant expression: numbers, sizeof of a plain type, their sums, differences and products."""
    node = bare(node)
    if node.kind == "number":
        return node.value if isinstance(node.value, int) else None
    if called(node) == "sizeof":
        return _WIDTHS.get(str(node.value).strip("() ").removeprefix("unsigned ").removeprefix("signed "))
    if node.kind == "binary" and node.name in ("+", "-", "*"):
        values = [number(a) for a in node.args]
        known = [v for v in values if v is not None]
        if len(known) < len(values):
            return None
        if node.name == "*":
            return prod(known)
        return sum(known) if node.name == "+" else known[0] - sum(known[1:])
    return None


def _width(kind: str) -> int | None:
    """Bytes that one of the kind takes."""
    if kind.rstrip().endswith("*"):
        return 8
    return _WIDTHS.get(re.sub(r"\b(const|unsigned|signed|volatile)\b", "", kind).strip() or "unsigned")


def room(known: Facts, name: str) -> int | None:
    """The most bytes that the array holds, or the memory that the pointer is set to; None if anything else may be."""
    declared = known.arrays.get(name)
    if declared is not None:
        count, width = number(declared), _width(known.types[name].removesuffix("[]"))
        return count * width if count is not None and width is not None else None
    if name in known.parameters or "*" not in known.types.get(name, ""):
        return None
    found: list[int] = []
    for node in known.of("assign"):
        if node.base is None or node.base.path() != name or not node.args:
            continue
        value = bare(node.args[0])
        if node.name != "=":
            return None
        if value.kind == "constant" or (value.kind == "number" and value.value == 0):
            continue
        size = None
        if value.kind == "name" and value.name in known.arrays:
            size = room(known, value.name)
        elif called(value) in _MAKES and len(value.args) == 1:
            size = number(value.args[0])
        elif value.new and value.name == "[]" and len(value.args) == 1:
            count, width = number(value.args[0]), _width(known.types[name].removesuffix("*"))
            size = count * width if count is not None and width is not None else None
        if size is None:
            return None
        found.append(size)
    return max(found) if found else None


def _moved(known: Facts, name: str) -> bool:
    return any(n.name in ("++", "--") and n.args and n.args[0].path() == name for n in known.of("unary"))


@check("room-exceeded", "call")
def room_exceeded(function: Node) -> Iterable[Node]:
    """A copy of a constant size, or of a text of known length, into memory that is known to be shorter."""
    known = facts(function)
    for call in calls_of(function, (*_COPIES, "strcpy", "wcscpy")):
        name = called(call)
        target = bare(call.args[0]).name if call.args and bare(call.args[0]).kind == "name" else ""
        if not target:
            continue
        at = _COPIES.get(name)
        if at is not None and len(call.args) > at:
            size = number(call.args[at])
        elif at is None and len(call.args) == 2:
            size = _text_size(known, bare(call.args[1]), call)
        else:
            continue
        if size is None or size < 2:
            continue
        holds = room(known, target)
        if holds is not None and size > holds and not _moved(known, target) and not _listed(known, call, target):
            yield call


def _listed(known: Facts, call: Node, target: str) -> bool:
    """Found by the check for arrays of bytes (size-beyond-array)."""
    return target in known.arrays and bare(call.args[-1]).kind == "number" and called(call) in ("memcpy", "memset")


def _text_size(known: Facts, source: Node, at: Node) -> int | None:
    """How long a text with its end is: one that memset made of one character."""
    if source.kind != "name":
        return None
    for node in known.of("call"):
        if known.place[id(node)] > known.place[id(at)]:
            break
        if called(node) in ("memset", "wmemset") and len(node.args) == 3 and bare(node.args[0]).path() == source.name:
            filler, count = bare(node.args[1]), number(node.args[2])
            if count is not None and filler.value not in (0, "\0", ""):
                return count + 1
    return None


@check("room-exceeded-by-loop", "loop", "index")
def room_exceeded_by_loop(function: Node) -> Iterable[Node]:
    """`for (i = 0; i < 100; i++) data[i] = source[i];` where data has room for 50."""
    known = facts(function)
    for loop in known.of("loop"):
        test = loop.args[-1] if loop.args else loop
        if not in_order(test) or test.name not in ("<", "<="):
            continue
        index, most = bare(test.args[0]).path(), _rounds(known, test.args[1], loop)
        if most is None or not index:
            continue
        for node in [n for part in loop.body for n in part.walk() if n.kind == "assign" and n.base is not None]:
            target = node.base
            if target is None or target.kind != "index" or target.base is None or len(target.args) != 1:
                continue
            name = target.base.path()
            if bare(target.args[0]).path() != index or name in known.parameters:
                continue
            width, holds = _width(known.types.get(name, "").removesuffix("[]").removesuffix("*")), room(known, name)
            left = [n for part in loop.body for n in part.walk() if n.kind in ("exit", "return")]
            if width and holds is not None and (most + (test.name == "<=")) * width > holds and not left:
                yield node
                break


def _rounds(known: Facts, bound: Node, loop: Node) -> int | None:
    most = number(bound)
    if most is not None:
        return most
    bound = bare(bound)
    more = 0
    if bound.kind == "binary" and bound.name == "+" and len(bound.args) == 2 and number(bound.args[1]) is not None:
        bound, more = bare(bound.args[0]), number(bound.args[1]) or 0
    if bound.kind == "name":
        values = [n for n in known.of("assign") if n.base is not None and n.base.path() == bound.name and n.args]
        bound = bare(values[0].args[0]) if len(values) == 1 else bound
    if called(bound) in ("strlen", "wcslen") and bound.args:
        size = _text_size(known, bare(bound.args[0]), loop)
        return size - 1 + more if size is not None else None
    return None


@check("end-after-loop", "loop", "index", "assign")
def end_after_loop(function: Node) -> Iterable[Node]:
    """`for (i = 0; i < 10 && s[i]; i++) b[i] = s[i]; b[i] = 0;` with `char b[10]`: where the text is long, i is 10."""
    known = facts(function)
    for loop in known.of("loop") if known.arrays else ():
        for test in (n for a in loop.args for n in a.walk() if in_order(n) and n.name == "<"):
            index, most = bare(test.args[0]).path(), number(test.args[1])
            bound = bare(test.args[1])
            if called(bound) == "sizeof" and bound.args and bare(bound.args[0]).path() in known.arrays:
                most = number(known.arrays[bare(bound.args[0]).path()])
            filled = {_at(n, index) for part in loop.body for n in part.walk()}
            end = known.place[id(loop)] + len(loop.walk())
            for node in known.of("assign") if index and most is not None else ():
                if known.place[id(node)] < end:
                    continue
                if node.base is not None and node.base.path() == index:
                    break  # it starts anew
                name, value = _at(node, index), bare(node.args[0]) if node.args else node
                ends = value.kind in ("number", "string") and value.value in (0, "\0", "", "\\0")
                if ends and name in filled and name in known.arrays and number(known.arrays[name]) == most:
                    yield node
                    break


def _at(node: Node, index: str) -> str:
    """`a` of `a[index] = ...`, else ""."""
    target = node.base if node.kind == "assign" else None
    if target is None or target.kind != "index" or target.base is None or len(target.args) != 1:
        return ""
    place = bare(target.args[0])
    moved = place.args[0] if place.kind == "unary" and place.name == "++" and place.args else place
    return target.base.path() if moved.path() == index else ""


@check("before-array", "binary")
def before_array(function: Node) -> Iterable[Node]:
    """`p = buf - 8` with an array of the function: a place in front of it."""
    known = facts(function)
    for node in known.of("binary") if known.arrays else ():
        if node.name == "-" and len(node.args) == 2 and bare(node.args[0]).name in known.arrays:
            less, above = number(node.args[1]), known.parent[id(node)]
            if bare(node.args[0]).kind == "name" and less is not None and less > 0 and above.kind in ("assign", "call"):
                yield node


_BYTES = re.compile(r"^(const )?((un)?signed )?(char|void|u?int8_t|u8|BYTE|guint8|std::byte|byte)\b|^auto|^[A-Z]\w*PTR")


@check("pointer-scaled", "binary", "call")
def pointer_scaled(function: Node) -> Iterable[Node]:
    """`p + i * sizeof(*p)` where p isn't a pointer to bytes: the compiler has multiplied already."""
    known = facts(function)
    for node in known.of("binary") if "sizeof" in calls(function) else ():
        if node.name not in ("+", "-") or len(node.args) != 2 or node.args[0].kind == "cast":
            continue
        kind = known.types.get(node.args[0].name, "") if node.args[0].kind == "name" else ""
        if not re.search(r"\w ?\*$", kind) or _BYTES.match(kind):
            continue
        product = bare(node.args[1])
        if product.kind == "binary" and product.name == "*" and any(called(bare(a)) == "sizeof" for a in product.args):
            yield node


@check("scope-left", "assign", "block")
def scope_left(function: Node) -> Iterable[Node]:
    """A pointer is set to an array of an inner block and reached through after that block."""
    known = facts(function)
    for node in known.of("assign") if known.arrays else ():
        value = bare(node.args[0]) if node.args and node.name == "=" and not node.type else node
        pointer = node.base.path() if node.base is not None and node.base.kind == "name" else ""
        if value.kind != "name" or value.name not in known.arrays or value.name in known.static or not pointer:
            continue
        if "*" not in known.types.get(pointer, ""):
            continue
        declared = next((n for n in known.of("assign") if n.base is not None and n.base.path() == value.name), node)
        owner = known.parent.get(id(known.parent[id(declared)]))
        if (
            owner is None
            or owner.kind not in ("block", "if", "loop")
            or owner.raw.startswith(("preproc", "case", "label"))
        ):
            continue
        end = known.place[id(owner)] + len(owner.walk())
        here = next((n for n in known.of("assign") if n.base is not None and n.base.path() == pointer and n.type), node)
        if known.place[id(here)] > known.place[id(owner)] or pointer in known.parameters:
            continue
        for use in known.nodes[end:]:
            if use.kind == "name" and use.name == pointer:
                above = known.parent[id(use)]
                if not (above.kind == "assign" and above.base is use):
                    yield use
                return
