"""Checks of the first thing that C and C++ do with a buffer, or an answer, that came from elsewhere."""

import re
from collections.abc import Iterable, Iterator

from puna.guard.code.checks import check
from puna.guard.code.checks_covered import WHOLE, Pair, aliases, fixed_reads, length_asked, parameter_pairs
from puna.guard.code.checks_facts import Facts, bare, called, facts
from puna.guard.code.view import Node

_DATA = re.compile(r"^(data|value|buf|buffer|ptr|base|bytes|payload|contents)$")
_SIZE = re.compile(r"^(size|len|length|nbytes|data_?len|bufsize)$")
_OPAQUE = re.compile(r"(?i)handle|opaque|ctx|context|user|arg|priv|self|cookie")
_MAPPED = re.compile(r"^GstMapInfo$")  # filled by a call: nothing is known of `size` until it is asked


@check("bytes-unasked", "call")
def bytes_unasked(function: Node) -> Iterable[Node]:
    """So many bytes of a buffer as memcmp or memcpy takes at once are read before its length is asked."""
    known = facts(function)
    for pair in parameter_pairs(function):
        yield from _taken_whole(known, pair, set(aliases(known, pair.buffer)))


def _taken_whole(known: Facts, pair: Pair, names: set[str]) -> Iterator[Node]:
    """`memcmp(buf, "magic", 5)`, `memcpy(&head, buf, sizeof(head))`."""
    for node in known.of("call"):
        if called(node) not in ("memcmp", "memcpy", "memmove") or len(node.args) != 3:
            continue
        read = node.args[:2] if called(node) == "memcmp" else node.args[1:2]
        if any(bare(a).path() in names for a in read):
            size = bare(node.args[2])
            named = size.kind == "name" and size.name.isupper()
            constant = size.kind == "number" or named or called(size) == "sizeof"
            if constant and not _looked_at(known, pair, node):
                yield node
            return


def _looked_at(known: Facts, pair: Pair, node: Node) -> bool:
    """Whether anything before the node looked at the length."""
    at = known.place[id(node)]
    return length_asked(known, pair.length, 0, at) or any(place < at for place in known.tested.get(pair.length, ()))


@check("member-unasked", "member")
def member_unasked(function: Node) -> Iterable[Node]:
    """`x->data[3]` is read first and `x->len` compared afterwards; or never, where a call has just filled x."""
    known = facts(function)
    holders: dict[str, set[str]] = {}
    for node in known.of("member"):
        if node.base is not None and node.base.path():
            holders.setdefault(node.base.path(), set()).add(node.name)
    for holder, names in holders.items():
        data, size = [n for n in names if _DATA.match(n)], [n for n in names if _SIZE.match(n)]
        fresh = _MAPPED.match(known.types.get(holder, "")) is not None
        if len(data) != 1 or (len(size) != 1 and not fresh):
            continue
        length = f"{holder}.{size[0] if size else 'size'}"
        for read in _fixed(known, f"{holder}.{data[0]}"):
            at = known.place[id(read)]
            before = length_asked(known, length, 0, at) or any(place < at for place in known.tested.get(length, ()))
            if not before and (fresh or length_asked(known, length, at, len(known.nodes))):
                yield read
            break


def _fixed(known: Facts, buffer: str) -> Iterator[Node]:
    """Reads at constant places, also by a macro: `GET32(map.data + 8)`."""
    for node, path, n in fixed_reads(known, {buffer: 0}):
        if not path and n <= 64:
            yield node
    for node in known.of("binary"):
        above = known.parent.get(id(node))
        step = (
            node.name == "+" and bare(node.args[0]).path() == buffer and above is not None and called(above).isupper()
        )
        if step and all(n.kind in ("number", "binary") for n in bare(node.args[1]).walk()):
            yield node


@check("record-unasked", "cast", "member")
def record_unasked(function: Node) -> Iterable[Node]:
    """A buffer that came with its length is taken for a structure and read, and nothing looked at the length."""
    known = facts(function)
    for pair in parameter_pairs(function):
        if _OPAQUE.search(pair.buffer):
            continue
        for name, place in aliases(known, pair.buffer).items():
            kind = known.types.get(name, "")
            if name == pair.buffer or not kind.endswith("*") or WHOLE.match(kind.rstrip("* ")) or "void" in kind:
                continue
            for node in known.nodes[place:]:
                if node.kind == "member" and node.base is not None and node.base.path() == name:
                    if "auto" not in kind and not length_asked(known, pair.length, 0, known.place[id(node)]):
                        yield node
                        return
                    break


_SHAPED = re.compile(r"^(scalar|vec|matrix|tensor)<|^dim_size$")
_SHAPE_ASKS = re.compile(r"^(OP_REQUIRES\w*|D?CHECK\w*|TF_RETURN\w*|TF_LITE_ENSURE\w*|Validate\w*|Check\w*|Ensure\w*)$")


@check("tensor-shape-unasked", "assign", "call")
def tensor_shape_unasked(function: Node) -> Iterable[Node]:
    """TensorFlow: an input's values are taken by a shape that nothing asked for."""
    known = facts(function)
    for node in known.of("assign"):
        name = node.base.path() if node.base is not None and node.base.kind == "name" else ""
        if not name or not node.args or called(bare(node.args[0])) != "input":
            continue
        for use in known.nodes[known.place[id(node)] + len(node.walk()) :]:
            asks = use.kind == "call" and _SHAPE_ASKS.match(called(use)) is not None
            if (asks and any(n.path() == name for n in use.walk())) or (use.path() == name and known.in_test(use)):
                break
            if use.kind != "call" or use.base is None or use.base.base is None or use.base.base.path() != name:
                continue
            above = known.parent.get(id(use))
            element = above is not None and above.kind == "call" and above.base is use and bool(above.args)
            if _SHAPED.match(use.base.name) or (use.base.name.startswith("flat<") and element):
                yield use
                return
