"""Checks of lengths and names in C and C++ that come from outside and reach memory or files untested."""

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache

from puna.guard.code.checks import check
from puna.guard.code.checks_facts import Facts, bare, called, facts, in_order, plain
from puna.guard.code.view import Node

WIRE = re.compile(
    r"^(ntoh[sl]l?|(be|le)(16|24|32|64)_?to_?(cpu|h|host)p?|(be|le)(16|24|32|64)(toh|dec)|archive_[bl]e\d+dec"
    r"|get_unaligned_\w+|av_rb\w+|AV_R[BL]\d+|avio_r[bl]\d+|bytestream2?_get_[bl]e\d+\w*|Stream_Read_U?INT\d+"
    r"|ReadBlob\w*(Long|Short)|ReadProfile\w*(Long|Short)|ReadProperty\w*(Long|Short)|r_read_[bl]?[bl]e\d+"
    r"|GUINT\d+_FROM_[BL]E|rfbClientSwap\d+IfLE|Swap\d+IfLE|READ_\w*(16|32)|DNS_RR_LEN|UINT|getmbi"
    r"|(?i:(qemu_|tvb_|php_ifd_|png_)?(get|read|load|fetch|extract|peek)_?(u|s|ui|i|g?u?int)?_?(ntoh|letoh|be|le)?_?"
    r"(16|24|32|64|short|long|dword|word|s|l|_u_?int_?(16|31|32))_?(u|s|be|le|bits)?(_be|_le)?))$"
)
_INTO = re.compile(
    r"^(n2[sl]3?|c2l|GETSHORT|GETLONG|NS_GET(16|32)|GET(16|32)|opj_read_bytes\w*|Stream_Read_U?INT(16|32|64))$"
)
COUNTED = re.compile(
    WIRE.pattern + r"|^(get_bits\w*|get_[su]e_golomb\w*|bitstream_read\w*|gf_bs_read_(u\d+|int)|read_bits\w*|getbits)$"
)


TEXT_NUMBER = re.compile(r"^(atoi|atol|atoll|strtou?ll?|strto[iu]max|sto(i|l|ul|ll|ull))$")


_COPIES = {
    "memcpy": 2,
    "memmove": 2,
    "strncpy": 2,
    "read": 2,
    "recv": 2,
    "bcopy": 2,
    "memset": 2,
    "ReadFromRFBServer": 2,
}


_NUMBERS = re.compile(r"(unsigned |signed )?(int|long|short|size_t|u?int\d+_t|[us]\d+|unsigned)( (int|long))?")
_READ = {"read": 1, "recv": 1, "fread": 0, "get": 0}


def read_into(known: Facts) -> dict[str, Node]:
    """Numbers that a read puts its bytes into: `read(fd, &n, sizeof(n))`, and by which call."""
    found = {}
    for call in known.of("call"):
        at = _READ.get(called(call))
        if at is None or len(call.args) < 2:
            continue
        if call.base is not None and call.base.kind == "member":
            at = 0  # in.read(reinterpret_cast<char*>(&n), sizeof n)
        target = bare(call.args[at])
        while called(target) == "reinterpret_cast" and target.args:
            target = bare(target.args[0])
        if target.kind == "unary" and target.name == "&" and target.args and target.args[0].kind == "name":
            found[target.args[0].name] = call
    return found


@lru_cache(maxsize=8)
def taken(known: Facts, pattern: re.Pattern[str]) -> list[tuple[Node, str, str]]:
    """(node, path, call) of all assigned from a call, read as bytes, or written by a macro, that gives a number from
    outside."""
    return list(_all_taken(known, pattern))


def _all_taken(known: Facts, pattern: re.Pattern[str]) -> Iterator[tuple[Node, str, str]]:
    if pattern is not TEXT_NUMBER:
        for path, call in read_into(known).items():
            if _NUMBERS.fullmatch(known.types.get(path, "")):
                yield call, path, called(call)
    for node in known.nodes:
        if node.kind == "assign" and node.base is not None and node.args and node.name == "=":
            for below in node.args[0].walk():
                if below.kind == "call" and pattern.search(called(below)):
                    path = node.base.path()
                    if path:
                        yield node, path, called(below)
                    break
        elif node.kind == "call" and pattern is not TEXT_NUMBER and _INTO.match(called(node)) and len(node.args) > 1:
            for given in node.args:
                if given.kind == "unary" and given.name == "&" and given.args:
                    yield node, given.args[0].path(), called(node)
            if called(node) != "opj_read_bytes" and node.args[1].kind == "name":
                yield node, node.args[1].name, called(node)
        elif node.kind == "call" and called(node) in ("scanf", "sscanf", "fscanf") and pattern.search("atoi"):
            for given in node.args[1:]:
                if given.kind == "unary" and given.name == "&" and given.args[0].path():
                    yield node, given.args[0].path(), "atoi"


def bounded(known: Facts, path: str, start: int, end: int) -> bool:
    """Whether a comparison of order, a min/clamp or a mask touched the value between."""
    for node in known.nodes[start:end]:
        compares = node.kind in ("binary", "call", "conditional") and (
            node.name in ("<", ">", "<=", ">=", "==", "!=", "&", "%", ">>")
            or re.search(r"(?i)min|clamp|check|valid|overflow|assert|require", called(node) or "-")
            or called(node).isupper()
        )
        if compares and any(n.kind in ("name", "member", "index") and n.path() == path for n in node.walk()):
            return True
        if (
            node.kind == "assign"
            and node.base is not None
            and node.base.path() == path
            and node.name in ("&=", "%=", ">>=")
        ):
            return True
    return False


@check("length-from-outside", "call")
def length_from_outside(function: Node) -> Iterable[Node]:
    """A length or index that came from outside reaches memory with nothing compared: the size of a copy, an index."""
    known = facts(function)
    numbers = [(n, p) for pattern in (WIRE, TEXT_NUMBER) for n, p, _ in taken(known, pattern)]
    for node, path in _carried(known, [*numbers, *_composed(known)]):
        start = known.place[id(node)] + len(node.walk())
        for at in range(start, len(known.nodes)):
            use = known.nodes[at]
            if use.kind == "assign" and use.base is not None and use.base.path() == path and use.name == "=":
                break
            if _reaches(use, path, known):
                if not bounded(known, path, start, at) and not loop_bounded(known, path, use):
                    yield use
                break


def _composed(known: Facts) -> Iterable[tuple[Node, str]]:
    """Numbers that are put together from bytes: `n = p[0] << 8 | p[1]`."""
    for node in known.of("assign"):
        value = bare(node.args[0]) if node.args and node.name == "=" else node
        if node.base is None or value.kind != "binary" or value.name not in ("|", "+"):
            continue
        parts = value.walk()
        bytes_read = any(n.kind == "index" or (n.kind == "unary" and n.name == "*") for n in parts)
        shifted = any(n.kind == "binary" and n.name == "<<" for n in parts)
        if shifted and bytes_read and node.base.path() and not any(n.kind == "call" for n in parts):
            yield node, node.base.path()


_FROM_USER = re.compile(r"^(__)?(copy_from_user|get_user|copy_from_sockptr)$|^copyin$")


@check("index-from-user", "call", "index")
def index_from_user(function: Node) -> Iterable[Node]:
    """Linux: a number in a structure that came from user space is an index, and nothing compares it."""
    known = facts(function)
    for call in known.of("call"):
        if not _FROM_USER.match(called(call)) or len(call.args) < 2:
            continue
        target = bare(call.args[1] if called(call) == "copyin" else call.args[0])
        root = (target.args[0] if target.kind == "unary" and target.name == "&" else target).path()
        start = known.place[id(call)] + len(call.walk())
        for use in known.nodes[start:] if root else ():
            if use.kind != "index" or len(use.args) != 1:
                continue
            path = bare(use.args[0]).path()
            if not (path == root or path.startswith(root + ".")) or loop_bounded(known, path, use):
                continue
            if not bounded(known, path, start, known.place[id(use)]) and not known.compared(path):
                yield use
                return


def _carried(known: Facts, taken: list[tuple[Node, str]]) -> list[tuple[Node, str]]:
    """`taken`, and what such a value was added to before anything bounded it: `offset += 4 + length`."""
    found = list(taken)
    for node, path in taken:
        start = known.place[id(node)] + len(node.walk())
        for step in known.nodes[start:]:
            if step.kind == "assign" and step.base is not None and step.base.path() == path and step.name == "=":
                break
            if (
                step.kind == "assign"
                and step.name == "+="
                and step.base is not None
                and step.args
                and plain(step.args[0], path)
            ):
                if not bounded(known, path, start, known.place[id(step)]) and not loop_bounded(known, path, step):
                    found.append((step, step.base.path()))
                break
    return found


def loop_bounded(known: Facts, path: str, use: Node) -> bool:
    return any(
        above.kind in ("loop", "if") and any(n.path() == path for a in above.args for n in a.walk())
        for above in known.ancestors(use)
    )


def _reaches(use: Node, path: str, known: Facts) -> bool:
    """Whether memory is reached with `path` as size, index or step of a pointer."""
    if use.kind == "call" and use.base is not None and use.base.name in _COPIES:
        at = _COPIES[use.base.name]
        return len(use.args) > at and plain(use.args[at], path)
    if use.kind == "call" and re.search(r"(?i)^(\w*_)?(mem(cpy|move)|copy\w*memory)$", called(use)):
        return len(use.args) > 2 and plain(use.args[2], path)
    if use.kind == "index" and len(use.args) == 1:
        return plain(use.args[0], path)
    if use.kind == "assign" and use.name == "+=" and use.base is not None and use.args:
        return bare(use.args[0]).path() == path and known.types.get(use.base.path(), "").endswith("*")
    return False


@check("bound-overflows", "binary")
def bound_overflows(function: Node) -> Iterable[Node]:
    """`p + length > end` is computed with a length from outside: the sum wraps round and the test passes."""
    known = facts(function)
    wire = {path for _, path, _ in taken(known, WIRE)}
    given = {a.name for a in function.args if re.search(r"(?i)len|size", a.name) and a.type in ("size_t", "uint32_t")}
    for node in known.of("binary"):
        if in_order(node) and node.name in (">", ">="):
            total, end = bare(node.args[0]), bare(node.args[1])
            if (
                total.kind == "binary"
                and total.name == "+"
                and re.search(r"(?i)end$|^end", end.path().rsplit(".", 1)[-1])
                and any(bare(a).path() in wire or bare(a).path() in given for a in total.args[1:])
            ):
                yield node
