"""Checks of copies in C and C++: how much goes where, against how much there is room for."""

import re
from collections.abc import Iterable

from puna.guard.code.checks import check
from puna.guard.code.checks_facts import Facts, bare, called, facts, in_order, leaves
from puna.guard.code.checks_outside import TEXT_NUMBER, read_into, taken
from puna.guard.code.checks_overflow import ALLOCATES, only_value
from puna.guard.code.view import Node

_READS = {"read": (1, 2), "recv": (1, 2), "fread": (0, 2), "recvfrom": (1, 2), "readlink": (1, 2), "SSL_read": (1, 2)}
_SIGNED = re.compile(r"(signed )?(int|short|long|int(16|32)_t|s16|s32|ssize_t)")
_NUMBER = re.compile(r"^(atoi|atol|strtol|ntohl|be32toh|le32toh|get_\w*int\w*|read_\w*int\w*)$")
_TEXT = re.compile(r"(const )?(unsigned )?char ?(const )?\*")
_COPIES = ("memcpy", "memmove", "bcopy", "wmemcpy", "CopyMemory", "RtlCopyMemory", "copy_from_user")


@check("read-terminated", "assign", "call", "index")
def read_terminated(function: Node) -> Iterable[Node]:
    """`n = read(fd, buf, sizeof(buf)); buf[n] = 0;` writes one past the end when the buffer is filled."""
    known = facts(function)
    for node in known.of("assign"):
        if node.base is None or not node.args:
            continue
        value = bare(node.args[0])
        where = _READS.get(called(value))
        if where is None or len(value.args) <= where[1] or not node.base.path():
            continue
        buffer, size, count = bare(value.args[where[0]]).path(), bare(value.args[where[1]]), node.base.path()
        declared = known.arrays.get(buffer)
        whole = (called(size) == "sizeof" and size.args and bare(size.args[0]).path() == buffer) or (
            declared is not None and size.kind == declared.kind and size.kind in ("number", "name")
            and (size.value, size.name) == (declared.value, declared.name)
        )  # fmt: skip
        if declared is None or not whole:
            continue
        for use in known.nodes[known.place[id(node)] + len(node.walk()) :]:
            if in_order(use) and any(bare(a).path() == count for a in use.args) and _about(use, declared):
                break
            target = use.base if use.kind == "assign" else None
            if target is None or target.kind != "index" or target.base is None:
                continue
            if target.base.path() == buffer and bare(target.args[0]).path() == count:
                yield use
                break


def _about(comparison: Node, declared: Node) -> bool:
    """Whether one side is the array's length."""
    return any(
        called(side) == "sizeof" or (side.value is not None and side.value == declared.value)
        for side in map(bare, comparison.args)
    )


@check("length-without-end", "assign", "call")
def length_without_end(function: Node) -> Iterable[Node]:
    """`malloc(strlen(s))` and then strcpy: the final NUL has no room."""
    known = facts(function)
    for node in known.of("assign"):
        if node.base is None or not node.args:
            continue
        value = bare(node.args[0])
        if value.kind != "call" or not (ALLOCATES.search(called(value)) or value.name == "[]") or not value.args:
            continue
        size = bare(value.args[0])
        if size.kind == "name":
            size = only_value(known, size.name) or size
        if called(size) != "strlen" or not size.args or not node.base.path():
            continue
        for use in known.nodes[known.place[id(node)] :]:
            if (
                called(use) in ("strcpy", "strcat", "sprintf", "stpcpy")
                and use.args
                and bare(use.args[0]).path() == node.base.path()
            ):
                yield use
                break


def _refuses(known: Facts, comparison: Node) -> bool:
    """Whether the function is left where the comparison holds, or only goes on there."""
    above = next((n for n in known.ancestors(comparison) if n.kind in ("if", "loop", "conditional")), comparison)
    return above.kind == "if" and (leaves(above.body) or comparison.name in ("<", "<="))


def _addressed(comparison: Node, path: str) -> bool:
    """`read(fd, &n, 4) != 4` says nothing about n."""
    return any(n.kind == "unary" and n.name == "&" and n.args and n.args[0].path() == path for n in comparison.walk())


@check("copy-upper-only", "call", "binary")
def copy_upper_only(function: Node) -> Iterable[Node]:
    """A signed length is tested against its upper limit only and then given to a copy, where -1 is huge."""
    known = facts(function)
    for node in known.of("call"):
        if called(node) not in (*_COPIES, "read", "recv", "strncpy") or len(node.args) < 3:
            continue
        size = bare(node.args[2])
        path = size.path() if size.kind == "name" else ""
        if not path or not _SIGNED.fullmatch(known.types.get(path, "")):
            continue
        if path not in known.parameters and not _given(known, path):
            continue
        around = {id(n) for n in known.ancestors(node)}
        before = [c for c, _ in known.compared(path) if known.place[id(c)] < known.place[id(node)]]
        tests = [c for c in before if id(c) not in around and not _addressed(c, path)]
        upper = tests and all(in_order(c) and _upper(c, path) for c in tests) and any(map(known.in_test, tests))
        if upper and (path not in known.parameters or all(_refuses(known, c) for c in tests)):
            yield node


def _given(known: Facts, path: str) -> bool:
    """Whether the number comes from text or a message."""
    read = {p for _, p, _ in taken(known, TEXT_NUMBER)}
    return (
        path in read
        or path in read_into(known)
        or any(
            n.base is not None and n.base.path() == path and n.args and _NUMBER.match(called(bare(n.args[0])))
            for n in known.of("assign")
        )
    )


def _upper(comparison: Node, path: str) -> bool:
    left = bare(comparison.args[0]).path() == path
    limit = bare(comparison.args[1 if left else 0])
    if (limit.kind == "number" and limit.value == 0) or limit.kind == "unary":
        return False
    return comparison.name in ((">", ">=") if left else ("<", "<="))


_STRINGS = ("strchr", "strrchr", "strstr", "strlen", "strcpy", "strcmp", "strdup", "atoi", "strtol", "sscanf")


@check("string-with-length", "call")
def string_with_length(function: Node) -> Iterable[Node]:
    """A text comes with its length, which is only overwritten: string functions run past where the text ends."""
    known = facts(function)
    for one, other in zip(function.args, function.args[1:], strict=False):
        if not (_TEXT.fullmatch(one.type.strip()) and re.fullmatch(r"size_t|u?int32_t", other.type.strip())):
            continue
        for node in known.nodes:
            if node.kind == "name" and node.name == other.name:
                above = known.parent.get(id(node))
                if not (above is not None and above.kind == "assign" and above.base is node and above.name == "="):
                    break
            if called(node) in _STRINGS and node.args and bare(node.args[0]).path() == one.name:
                if any(n.kind == "name" and n.name == other.name for n in known.nodes):
                    yield node
                break


_BOUNDED = {"recv": 2, "read": 2, "memcpy": 2, "memmove": 2, "memset": 2, "strncpy": 2, "fgets": 1, "snprintf": 1}


@check("size-beyond-array", "call")
def size_beyond_array(function: Node) -> Iterable[Node]:
    """A constant size that is larger than the array of bytes that it is given for."""
    known = facts(function)
    for node in known.of("call"):
        at = _BOUNDED.get(called(node))
        if at is None or len(node.args) <= at:
            continue
        target = bare(node.args[1 if called(node) in ("recv", "read") else 0])
        declared = known.arrays.get(target.name) if target.kind == "name" else None
        size = bare(node.args[at])
        of_bytes = re.match(r"(const )?((un)?signed )?char|u?int8_t|BYTE", known.types.get(target.name, ""))
        if declared is None or of_bytes is None or size.kind != "number" or declared.kind != "number":
            continue
        if isinstance(size.value, int) and isinstance(declared.value, int) and size.value > declared.value:
            yield node


@check("copy-sized-by-source", "call")
def copy_sized_by_source(function: Node) -> Iterable[Node]:
    """strncpy(d, s, strlen(s)): bounded by the source, unless the destination was made for it or its length tested."""
    known = facts(function)
    for node in known.of("call"):
        copies = called(node) == "memcpy" and bare(node.args[0]).kind == "member"
        if (copies or called(node) in ("strncpy", "strncat")) and len(node.args) == 3:
            size, source = bare(node.args[2]), bare(node.args[1])
            if called(size) == "strlen" and size.args and source.path() and bare(size.args[0]).path() == source.path():
                others = [
                    n
                    for n in known.nodes
                    if called(n) == "strlen" and n is not size and n.args and bare(n.args[0]).path() == source.path()
                ]
                if not others:
                    yield node
