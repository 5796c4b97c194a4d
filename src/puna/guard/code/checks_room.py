"""Checks of how much room there is in C and C++: sizes of what is made, lengths that don't fit where they are kept."""

import re
from collections.abc import Iterable
from itertools import pairwise

from puna.guard.code.checks import check
from puna.guard.code.checks_covered import length_asked, parameter_pairs
from puna.guard.code.checks_facts import Facts, bare, called, calls_of, facts, in_order
from puna.guard.code.checks_overflow import ALLOCATES, only_value
from puna.guard.code.view import Node

_WIDE = re.compile(
    r"(const )?((unsigned |signed )?(int|long|short)|float|double|u?int(16|32|64)_t|size_t|wchar_t|struct \w+) ?\*"
)
_BYTES = re.compile(r"(?i)size|byte|len|cap|room|total|sz")


@check("elements-unmeasured", "call")
def elements_unmeasured(function: Node) -> Iterable[Node]:
    """`int *a = malloc(n)` and a loop that sets a[0] to a[n - 1]: room for n bytes only."""
    known = facts(function)
    for node in known.of("assign"):
        value = bare(node.args[0]) if node.args and node.name == "=" else node
        name = node.base.path() if node.base is not None else ""
        if called(value) != "malloc" or len(value.args) != 1 or not _WIDE.fullmatch(known.types.get(name, "")):
            continue
        size = bare(value.args[0])
        if _counts_text(known, size):
            yield value
            continue
        if size.kind != "name" or _BYTES.search(size.name) or _computed(known, size.name):
            continue
        for loop in known.of("loop"):
            bound = next((t for a in loop.args for t in a.walk() if in_order(t) and t.name == "<"), None)
            if bound is None or bare(bound.args[1]).path() != size.name:
                continue
            index = bare(bound.args[0]).path()
            inside = [n for part in loop.body for n in part.walk() if n.kind == "index" and n.base is not None]
            if index and any(n.base is not None and n.base.path() == name and bare(n.args[0]).path() == index
                             for n in inside if n.args):  # fmt: skip
                yield value
                break


def _counts_text(known: Facts, size: Node) -> bool:
    """Whether the size is the length of a text, and perhaps one more."""
    size = (only_value(known, size.name) or size) if size.kind == "name" else size
    if size.kind == "binary" and size.name == "+" and bare(size.args[1]).kind == "number":
        size = bare(size.args[0])
    return called(size) in ("strlen", "wcslen")


def _computed(known: Facts, name: str) -> bool:
    """Whether the number was put together with a size."""
    return any(
        n.base is not None and n.base.path() == name and any(called(m) == "sizeof" for a in n.args for m in a.walk())
        for n in known.of("assign")
    )


_SHORT = re.compile(r"(unsigned |signed )?(char|short)( int)?|u?int(8|16)_t|[us](8|16)|BYTE|WORD|USHORT|guint(8|16)")


@check("length-narrowed", "assign", "call")
def length_narrowed(function: Node) -> Iterable[Node]:
    """`unsigned short n = strlen(s)`: of a long text's length only the last 8 or 16 bits are kept."""
    known = facts(function)
    for node in known.of("assign"):
        name = node.base.path() if node.base is not None and node.args and node.args[0].kind != "cast" else ""
        if not name or not _SHORT.fullmatch(known.types.get(name, "")):
            continue
        value = bare(node.args[0])
        for call in value.args if value.kind == "binary" and value.name == "+" else [value]:
            if called(call) in ("strlen", "wcslen") and call.args and not _bounded_text(known, call):
                if not any(in_order(c) for c, _ in known.compared(name)):
                    yield node
                break


def _bounded_text(known: Facts, call: Node) -> bool:
    """Whether the text's length is compared elsewhere, or it is in an array."""
    text = bare(call.args[0])
    if text.kind == "string" or text.path() in known.arrays:
        return True
    return any(
        n is not call and called(n) in ("strlen", "strnlen") and n.args and bare(n.args[0]).path() == text.path()
        for n in known.of("call")
    )


@check("append-whole-room", "call")
def append_whole_room(function: Node) -> Iterable[Node]:
    """`strncat(d, s, sizeof(d))`: the number says how much may be added, not how much there is room for."""
    known = facts(function)
    for call in calls_of(function, ("strncat", "wcsncat")):
        if len(call.args) != 3:
            continue
        target, size = bare(call.args[0]).path(), bare(call.args[2])
        less = (
            size.kind == "binary" and size.name == "-" and len(size.args) == 2 and bare(size.args[1]).kind == "number"
        )
        whole = bare(size.args[0]) if less else size
        whole_room = called(whole) == "sizeof" and whole.args and bare(whole.args[0]).path() == target
        if target and whole_room and (not less or _written_before(known, target, call)):
            yield call


def _written_before(known: Facts, target: str, call: Node) -> bool:
    return any(
        called(n) in ("strcpy", "strcat", "strncpy", "strncat", "snprintf", "sprintf", "getcwd")
        and n.args
        and bare(n.args[0]).path() == target
        for n in known.of("call")
        if known.place[id(n)] < known.place[id(call)]
    )


_DIRECTIVE = re.compile(r"%(\*)?(\d+)?(?:hh|h|ll|l|z|j|t|L)?(\[\^?\]?[^\]]*\]|[a-zA-Z%])")


@check("scan-into-array", "call", "string")
def scan_into_array(function: Node) -> Iterable[Node]:
    """`sscanf(text, "%s", word)` into an array of the function, with no width for the word."""
    known = facts(function)
    for call in calls_of(function, ("sscanf", "swscanf", "vsscanf")):
        if len(call.args) < 3:
            continue
        source, template = bare(call.args[0]), bare(call.args[1])
        if template.kind != "string" or source.path() in known.arrays:
            continue
        takes = [d for d in _DIRECTIVE.finditer(str(template.value)) if not d[1] and d[3] != "%"]
        for directive, target in zip(takes, call.args[2:], strict=False):
            if directive[3][0] in "s[" and directive[2] is None and bare(target).path() in known.arrays:
                yield call
                break


_TEXTS = re.compile(r"^(v?f?s?n?printf|str\w+|fopen|open|puts|fputs|unlink|l?stat|exec\w+|access|std.string)$")


@check("link-unterminated", "call")
def link_unterminated(function: Node) -> Iterable[Node]:
    """readlink fills an array without a final NUL, and it is used as text."""
    known = facts(function)
    for call in calls_of(function, ("readlink", "readlinkat")):
        if len(call.args) < 3:
            continue
        name = bare(call.args[-2]).path()
        if name not in known.arrays:
            continue
        start = known.place[id(call)]
        ended = any(
            (n.kind == "assign" and n.base is not None and n.base.kind == "index" and n.base.base is not None
             and n.base.base.path() == name)
            or (n.kind == "assign" and n.base is not None and n.base.path() == name and n.args)
            or (called(n) in ("memset", "bzero") and n.args and bare(n.args[0]).path() == name)
            for n in known.nodes
        )  # fmt: skip
        for use in known.of("call") if not ended else ():
            text = any(bare(a).path() == name for a in use.args) and _TEXTS.match(called(use))
            if text and known.place[id(use)] > start and not any(n.path().endswith("len") for n in use.args):
                yield use
                break


@check("cleared-by-other-size", "call", "member")
def cleared_by_other_size(function: Node) -> Iterable[Node]:
    """`memset(c->iv, 0, sizeof(c->key))`."""
    for call in calls_of(function, ("memset", "bzero", "explicit_bzero")):
        size = bare(call.args[-1]) if call.args else call
        target = bare(call.args[0]) if call.args else call
        if called(size) != "sizeof" or not size.args or target.kind != "member":
            continue
        other = bare(size.args[0])
        holders = [n.base.path() if n.base is not None else "" for n in (target, other)]
        if other.kind == "member" and other.name != target.name and holders[0] == holders[1] != "":
            yield call


@check("header-subtracted", "call", "binary")
def header_subtracted(function: Node) -> Iterable[Node]:
    """`memcpy(out, p + 8, length - 8)` with a buffer's length that nothing asked: one shorter than 8 wraps round."""
    known = facts(function)
    for pair in parameter_pairs(function):
        for node in known.of("binary"):
            if node.name != "-" or len(node.args) != 2 or bare(node.args[0]).path() != pair.length:
                continue
            taken = bare(node.args[1])
            fixed = called(taken) == "sizeof" or (taken.kind == "number" and taken.value) or taken.name.isupper()
            if not fixed or length_asked(known, pair.length, 0, _statement(known, node)):
                continue
            if _sizes(known, node):
                yield node
                return


def _statement(known: Facts, node: Node) -> int:
    """Where the statement begins that the node is in."""
    above = [node, *known.ancestors(node)]
    inner = next((n for n, outer in pairwise(above) if outer.kind in ("function", "block")), node)
    return known.place[id(inner)]


_COPIES = re.compile(r"(?i)mem(cpy|move|dup)|^bcopy$|copy|hmac|hash|crc|crypt")


def _sizes(known: Facts, difference: Node) -> bool:
    """Whether memory is made or copied by the difference, or by the variable that it goes into."""
    above = known.parent[id(difference)]
    while above.kind in ("cast", "other") and len(above.args) == 1:
        above = known.parent[id(above)]
    if above.kind == "call":
        return bool(_COPIES.search(called(above)) or ALLOCATES.search(called(above)))
    if above.kind != "assign" or above.base is None or above.base.kind != "name":
        return False
    name = above.base.path()
    if any(in_order(c) for c, _ in known.compared(name)):
        return False
    return any(
        (_COPIES.search(called(n)) or ALLOCATES.search(called(n))) and any(bare(a).path() == name for a in n.args)
        for n in known.of("call")
    )


@check("array-freed", "call")
def array_freed(function: Node) -> Iterable[Node]:
    """An array of the function is given to free, by its name or by a pointer that may be set to it."""
    known = facts(function)
    calls = [n for n in known.of("call") if called(n) in ("free", "delete") and len(n.args) == 1]
    if calls and any(n.raw.startswith("preproc") for n in known.nodes):
        return  # one of several declarations, or ways, may be left out
    for call in calls:
        target = bare(call.args[0])
        if target.kind != "name" or target.name in known.parameters:
            continue
        if target.name in known.arrays:
            if not known.types[target.name].rstrip("[]").endswith("*"):
                yield call
            continue
        for node in known.of("assign"):
            sets = node.args and node.base is not None and node.base.path() == target.name
            value = bare(node.args[0]) if sets else call
            if value.kind == "name" and value.name in known.arrays and "*" not in known.types[value.name]:
                guarded = any(c.kind == "binary" for c, other in known.compared(target.name)
                              if bare(other).path() == value.name)  # fmt: skip
                if not guarded and not _under_test(known, call, node):
                    yield call
                    break


def _under_test(known: Facts, call: Node, made: Node) -> bool:
    """Whether the call is under a condition (a flag may tell where the memory is from), or the pointer is set anew."""
    start, end = known.place[id(made)], known.place[id(call)]
    path = made.base.path() if made.base is not None else ""
    again = [
        n
        for n in known.of("assign")
        if n.base is not None and n.base.path() == path and start < known.place[id(n)] < end
    ]
    return any(a.kind in ("if", "loop") for a in known.ancestors(call)) or any(not known.nested(n) for n in again)
