"""Checks of text copied into buffers in C and C++: strcpy and its family, sprintf, scanf's and snprintf's results."""

import re
from collections.abc import Iterable

from puna.guard.code.checks import check
from puna.guard.code.checks_facts import Facts, bare, called, facts
from puna.guard.code.view import Node

COPIES = frozenset(
    (
        "strcpy",
        "strcat",
        "wcscpy",
        "wcscat",
        "stpcpy",
        "lstrcpy",
        "lstrcpyA",
        "lstrcpyW",
        "lstrcat",
        "_tcscpy",
        "_tcscat",
        "_mbscpy",
        "StrCpy",
        "g_stpcpy",
    )
)
PRINTS = frozenset(("sprintf", "vsprintf", "wsprintf", "wsprintfA", "_stprintf"))
_CONVERSION = re.compile(r"%[-+ #0]*+(\d{1,9}|\*)?(\.(\d{1,9}|\*))?(hh|h|ll|l|z|j|t|L)?([diouxXeEfFgGcspn%])")
_WIDTH = {"d": 11, "i": 11, "u": 10, "o": 11, "x": 8, "X": 8, "c": 1, "p": 18, "%": 1}
_LONG = {"d": 20, "i": 20, "u": 20, "o": 22, "x": 16, "X": 16}
KNOWN_SIZES = {
    "INET_ADDRSTRLEN": 16,
    "INET6_ADDRSTRLEN": 46,
    "BUFSIZ": 8192,
    "PATH_MAX": 4096,
    "MAX_PATH": 260,
    "NAME_MAX": 255,
}


def _array(node: Node, known: Facts) -> Node | None:
    """The declared length, if `node` is the start of an array of the function."""
    node = bare(node)
    return known.arrays.get(node.name) if node.kind == "name" else None


def _length(declared: Node | None) -> int | None:
    if declared is None:
        return None
    if declared.kind == "number" and isinstance(declared.value, int):
        return declared.value
    return KNOWN_SIZES.get(declared.name) if declared.kind == "name" else None


_LENGTHS = re.compile(r"(?i)str_?n?_?len$|wcslen$|^(sizeof|size|length)$")  # strlen, xmlStrlen, g_utf8_strlen


def _measured(source: Node, known: Facts, room: int | None = None) -> bool:
    """Whether the function takes the length of `source` (or of a text that holds it) or made room for it."""
    own = known.arrays.get(source.walk()[0].path()) or next(
        (known.arrays[n.name] for n in source.walk() if n.kind == "name" and n.name in known.arrays), None
    )
    fills = _length(own)
    if room is not None and fills is not None:
        return fills <= room
    paths = {n.path() for n in source.walk() if n.kind in ("name", "member", "index") and n.path()}
    for node in known.of("call"):
        if _LENGTHS.search(called(node)) and any(
            n.path() in paths
            for n in [
                *(m for a in node.args for m in a.walk()),
                *([node.base.base] if node.base and node.base.base else []),
            ]
        ):
            return True
    return False


def _written_out(value: Node) -> bool:
    """Whether the text stands in the source: a literal, one of two, one to be translated."""
    value = bare(value)
    if value.kind == "conditional":
        return all(_written_out(a) for a in value.args[1:])
    if called(value) in ("_", "gettext", "N_", "T_"):
        return all(bare(a).kind == "string" for a in value.args)
    return value.kind == "string" or value.name == "__func__"


def _moves(text: Node) -> set[str]:
    """`s` of `s` and of `s + n`."""
    text = bare(text)
    parts = text.args if text.kind == "binary" and text.name in ("+", "-") else [text]
    return {bare(n).path() for n in parts if bare(n).kind == "name"}


def _copy_unbounded(node: Node, known: Facts) -> bool:
    """Whether a call of the strcpy family may write more than fits."""
    if (
        called(node) not in COPIES
        or len(node.args) < 2
        or (node.base is not None and node.base.kind == "member" and node.base.path().count(".") > 1)
    ):
        return False
    source = bare(node.args[1])
    room = _length(_array(node.args[0], known))
    if source.kind == "string":
        return room is not None and called(node).endswith("cpy") and len(str(source.value)) >= room
    if source.kind == "name" and source.name.isupper():  # a macro: its text is known where it is written
        return False
    if _moves(source) & _moves(node.args[0]):
        return False  # within one text
    if _written_out(source) or (room is None and _made_here(source)):
        return False
    if room is not None and _bound_beyond(source, room, known):
        return True
    if called(node).endswith("cat") and source.path() in known.arrays:
        return not _measured(source, known) or room is not None
    return not _measured(source, known, room)


def _bound_beyond(source: Node, room: int, known: Facts) -> bool:
    """`if (strlen(s) > 128)`: the length is compared, but with more than the array holds."""
    limits = []
    for node in known.of("binary"):
        if node.name in ("<", ">", "<=", ">=", "==", "!=") and len(node.args) == 2:
            for one, other in (node.args, node.args[::-1]):
                if called(bare(one)) == "strlen" and bare(one).args and bare(bare(one).args[0]).path() == source.path():
                    limit = bare(other)
                    limits.append(limit.value if limit.kind == "number" and isinstance(limit.value, int) else 0)
    return bool(source.path()) and bool(limits) and min(limits) > room


def longest(template: str) -> int | None:
    """The most characters that a printf format gives with its final NUL; None if there is no limit."""
    total = len(_CONVERSION.sub("", template)) + 1
    for found in _CONVERSION.finditer(template):
        width, precision, size, kind = found[1], found[3], found[4], found[5]
        if kind == "s":
            if precision is None or precision == "*":
                return None
            most = int(precision)
        elif kind in "eEfFgG":
            most = 330 if kind in "fF" else 24
        else:
            most = (_LONG if size in ("l", "ll", "z", "j", "t") else _WIDTH).get(kind, 20)
        total += max(most, int(width) if width and width != "*" else 0)
    return total


def _usual(template: str) -> int:
    """What a format takes with numbers of 6 digits at most, with its final NUL."""
    total = len(_CONVERSION.sub("", template)) + 1
    for found in _CONVERSION.finditer(template):
        width = int(found[1]) if found[1] and found[1] != "*" else 0
        total += max(int(found[3]) if found[5] == "s" and found[3] else min(_WIDTH.get(found[5], 6), 6), width)
    return total


def _texts(template: str, values: list[Node]) -> list[Node]:
    """The values of a format's %s, without those that stand in the source."""
    takes = [found for found in _CONVERSION.finditer(template) if found[5] != "%"]
    if any("*" in found[0] for found in takes) or len(takes) != len(values):
        return [v for v in values if not _written_out(v)]
    return [v for found, v in zip(takes, values, strict=True) if found[5] == "s" and not _written_out(v)]


def _made_here(value: Node) -> bool:
    """A text that a function of the program gives: mostly a name out of a table."""
    made = value.kind == "call" and value.base is not None and value.base.kind == "name"
    return made and called(value) not in _OUTSIDE


_OUTSIDE = (
    "getenv",
    "secure_getenv",
    "gets",
    "fgets",
    "strtok",
    "strtok_r",
    "strsep",
    "getlogin",
    "readline",
    "basename",
)


def _print_unbounded(node: Node, known: Facts) -> bool:
    if called(node) not in PRINTS or len(node.args) < 2 or (node.base is not None and node.base.kind == "member"):
        return False
    template = bare(node.args[1])
    if template.kind != "string":
        return False  # another rule's: it isn't constant
    most = longest(str(template.value))
    declared = _array(node.args[0], known)
    room = _length(declared)
    if most is None:
        values = [bare(v) for v in node.args[2:]]
        if values and all(v.kind == "number" or v.name.isupper() or _written_out(v) for v in values):
            return False
        if room is None and all(v.kind != "string" and _made_here(v) for v in _texts(str(template.value), values)):
            return False
        texts = [v for v in values if v.kind in ("name", "member", "index")]
        return ".*s" not in str(template.value) and not (texts and all(_measured(v, known) for v in texts))
    return room is not None and _usual(str(template.value)) > room


@check("copy-unbounded", "call")
def copy_unbounded(function: Node) -> Iterable[Node]:
    """strcpy and its family into something whose size isn't known here."""
    known = facts(function)
    return [n for n in known.of("call") if _copy_unbounded(n, known) and _array(n.args[0], known) is None]


@check("copy-into-array", "call")
def copy_into_array(function: Node) -> Iterable[Node]:
    """strcpy into an array of the function, or memcpy into one with a length that nothing compared."""
    known = facts(function)
    for node in known.of("call"):
        if not node.args or not (_array(node.args[0], known) is not None or _fixed(node.args[0], known)):
            continue
        if _copy_unbounded(node, known) or (
            called(node) in ("memcpy", "memmove", "CopyMemory", "RtlCopyMemory", "bcopy", "copy_from_user")
            and len(node.args) == 3
            and _size_free(node.args[2], known, node)
        ):
            yield node


def _fixed(target: Node, known: Facts) -> bool:
    """C++: `a.data()` of a std::array."""
    target = bare(target)
    if called(target) != "data" or target.base is None or target.base.base is None:
        return False
    return known.types.get(target.base.base.path(), "").startswith("std::array")


def _size_free(size: Node, known: Facts, at: Node) -> bool:
    """A length that is neither constant nor compared with anything before."""
    size = bare(size)
    names = [n for n in size.walk() if n.kind in ("name", "member") and n.path()]
    if any(called(n) in ("sizeof", "min", "MIN", "std") for n in size.walk()) or size.kind in ("number", "conditional"):
        return False
    if size.kind == "call":
        return called(size) in ("strlen", "wcslen", "size", "length") and not _compared_call(size, known)
    paths = [n.path() for n in names if not re.search(r"^[A-Z0-9_]+$|_[A-Z]+$|^k[A-Z]", n.name)]
    if not paths:
        return False
    place = known.place[id(at)]
    for path in paths:
        if any(t + len(known.nodes[t].walk()) <= place for t in known.tested.get(path, ())):
            return False
        for node in known.nodes[:place]:
            if node.kind == "assign" and node.base is not None and node.base.path() == path and node.args:
                value = bare(node.args[0])
                if value.kind == "number" or re.search(r"(?i)min|clamp|sizeof", called(value)):
                    return False
    return True


def _compared_call(size: Node, known: Facts) -> bool:
    inner = {n.path() for n in size.walk() if n.kind in ("name", "member") and n.path()} - {called(size)}
    return any(
        called(n) == called(size) and known.in_test(n) and any(m.path() in inner for m in n.walk()) for n in known.nodes
    )


@check("print-unbounded", "call")
def print_unbounded(function: Node) -> Iterable[Node]:
    """sprintf whose output has no limit, or one that is more than the buffer holds."""
    known = facts(function)
    return [n for n in known.of("call") if _print_unbounded(n, known)]


@check("print-result-trusted", "call")
def print_result_trusted(function: Node) -> Iterable[Node]:
    """snprintf gives the length that it would have written; used as an index or offset it may lie past the end."""
    known = facts(function)
    for node in known.of("assign"):
        if node.base is None or not node.args:
            continue
        name = called(bare(node.args[0]))
        if not re.fullmatch(r"(\w+_)?v?_?\w{0,3}snprintf(_s)?", name):
            continue
        path = node.base.path()
        if not path:
            continue
        if node.name == "+=" and any(n.path() == path for n in node.args[0].walk() if n.kind == "name"):
            if not any(c.name in ("<", ">", "<=", ">=") for c, _ in known.compared(path)):
                yield node
            continue
        place = known.place[id(node)] + len(node.walk())
        for use in known.nodes[place:]:
            if (
                use.kind == "binary"
                and use.name in ("<", ">", "<=", ">=")
                and any(n.path() == path for n in use.walk())
            ):
                break
            if (use.kind == "index" and len(use.args) == 1 and any(n.path() == path for n in use.args[0].walk())) or (
                use.kind == "call"
                and any(
                    a.kind == "binary" and a.name == "+" and any(bare(b).path() == path for b in a.args)
                    for a in use.args
                )
            ):
                yield use
                break


@check("stream-into-array", "binary")
def stream_into_array(function: Node) -> Iterable[Node]:
    """`cin >> buf` with an array of characters, and no width set."""
    known = facts(function)
    if any(called(n) in ("width", "setw") for n in known.of("call")):
        return
    for node in known.of("binary"):
        if node.name == ">>" and node.args and node.args[0].path().rsplit(".", 1)[-1] == "cin":
            for target in node.args[1:]:
                if (
                    target.kind == "name"
                    and target.name in known.arrays
                    and known.types[target.name].startswith("char")
                ):
                    yield node
