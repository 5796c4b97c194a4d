"""Checks of arrays in C and C++ that are filled with as much as the input brings: nothing asks how many fit."""

import re
from collections.abc import Iterable

from puna.guard.code.checks import check
from puna.guard.code.checks_facts import Facts, bare, called, facts, in_order, plain, within
from puna.guard.code.checks_outside import COUNTED, bounded, taken
from puna.guard.code.view import Node

_COPIES = re.compile(r"(?i)^(\w*_)?(mem(cpy|move)|tvb_memcpy|copy_?memory|bcopy|qemu_get_buffer|copy_from_user)$")
_BOUNDS = re.compile(r"(?i)^(\w+_)?(min|min_t|FFMIN|clamp|clamp_t|ARRAY_SIZE|sizeof|nitems|countof|NELEMS|strnlen)$")
_NEXT = re.compile(r"^(strsep|strtok(_r)?|fgets|getline|f?getc|getchar|getopt(_long)?|readdir|fscanf|sscanf)$")
_LENGTH = re.compile(r"(?i)(^|_)(len|length|size|count|n?bytes|sz)\d?$|(len|length|Size)$")


@check("array-filled-by-content", "loop", "assign")
def array_filled_by_content(function: Node) -> Iterable[Node]:
    """`while (*s && *s != '"') *p++ = *s++;` into an array of the function: only the text's content ends the loop."""
    known = facts(function)
    if not known.arrays:
        return
    for loop in known.of("loop"):
        if not _ended_by_content(loop):
            continue
        for node in [n for part in loop.body for n in part.walk() if n.kind == "assign"]:
            name, array = _filled(node, known)
            if not name or _in_place(node, name) or any(inner is not loop and within(known, node, inner)
                               and within(known, inner, loop) for inner in known.of("loop")):  # fmt: skip
                continue
            if _steps(loop, name) and not _compared_in(loop, name, known) and not _length_asked(known, array):
                yield node
                break


def _in_place(node: Node, name: str) -> bool:
    """`*p = lower(*p)`: the text itself is changed."""
    return any(n.kind == "unary" and n.name == "*" and n.args and n.args[0].path() == name for n in node.args[0].walk())


def _filled(node: Node, known: Facts) -> tuple[str, str]:
    """(what moves, array) of `a[i] = x`, `a[i++] = x`, `*p++ = x` where p was set to a."""
    target = node.base
    if target is None or node.name != "=" or not node.args:
        return "", ""
    if target.kind == "index" and len(target.args) == 1 and target.base is not None:
        moves = bare(target.args[0])
        moves = moves.args[0] if moves.kind == "unary" and moves.name == "++" and moves.args else moves
        array = target.base.path() if target.base.kind == "name" else ""
        return (moves.path(), array) if moves.kind == "name" and array in known.arrays else ("", "")
    if target.kind == "unary" and target.name == "*" and target.args:
        moves = target.args[0]
        moves = moves.args[0] if moves.kind == "unary" and moves.name == "++" and moves.args else moves
        if moves.kind == "name":
            for before in known.of("assign"):
                if before.base is not None and before.base.path() == moves.name and before.args and before.name == "=":
                    start = bare(before.args[0])
                    start = start.args[0] if start.kind == "unary" and start.name == "&" and start.args else start
                    array = start.base.path() if start.kind == "index" and start.base is not None else start.path()
                    if array in known.arrays:
                        return moves.name, array
    return "", ""


def _ended_by_content(loop: Node) -> bool:
    """Whether the loop looks at memory to see whether it goes on, and no number is counted against a limit."""
    tests = [n for a in loop.args for n in a.walk()]
    if any((in_order(n) and not _character(n)) or (n.kind == "unary" and n.name == "--") for n in tests):
        return False
    if any(n.kind == "assign" and n.name in ("/=", ">>=", "%=") for part in loop.body for n in part.walk()):
        return False
    return any((n.kind == "unary" and n.name == "*") or n.kind == "index" or _NEXT.match(called(n)) for n in tests)


def _character(comparison: Node) -> bool:
    """`*p >= '0'`: a comparison of what is read, not of a position."""
    return any(
        bare(a).kind in ("string", "index") or (bare(a).kind == "unary" and bare(a).name == "*")
        for a in comparison.args
    )


def _steps(loop: Node, name: str) -> bool:
    return any(
        (n.kind == "unary" and n.name == "++" and n.args and n.args[0].path() == name)
        or (n.kind == "assign" and n.name == "+=" and n.base is not None and n.base.path() == name)
        for n in loop.walk()
    )


def _compared_in(loop: Node, name: str, known: Facts) -> bool:
    """Whether the loop, or one around it, compares what moves (or how far it moved) with anything but 0."""
    loops = [loop, *(a for a in known.ancestors(loop) if a.kind == "loop")]
    for node in loops[-1].walk():
        if node.kind == "binary" and node.name in ("<", ">", "<=", ">=", "==", "!=") and len(node.args) == 2:
            for one, other in (node.args, node.args[::-1]):
                if plain(one, name) and not (bare(other).kind == "number" and bare(other).value == 0):
                    return True
        elif node.kind == "call" and any(plain(a, name) for a in node.args) and not _COPIES.match(called(node)):
            return True
    return False


def _length_asked(known: Facts, array: str) -> bool:
    """Whether a condition knows the array's length, or that of a text: `sizeof a`, its number, `strlen(s)`."""
    declared = known.arrays[array]
    if declared.kind == "name" and not declared.name.isupper():
        return True
    for test in known.tests:
        for node in test.walk():
            if called(node) in ("sizeof", "strlen", "wcslen", "strnlen", "size", "length", "ARRAY_SIZE"):
                return True
            if declared.kind == "number" and node.kind == "number" and isinstance(declared.value, int) and (
                node.value in (declared.value, declared.value - 1, declared.value - 2)
            ):  # fmt: skip
                return True
            if declared.kind == "name" and node.kind == "name" and node.name == declared.name:
                return True
    return False


@check("count-from-outside", "loop", "index")
def count_from_outside(function: Node) -> Iterable[Node]:
    """A number that was read from a file or a message says how often a loop writes into an array."""
    known = facts(function)
    for node, count, _ in taken(known, COUNTED):
        start = known.place[id(node)] + len(node.walk())
        for loop in known.of("loop"):
            at = known.place[id(loop)]
            if at < start or not loop.args:
                continue
            test = bare(loop.args[0])
            if not (in_order(test) and test.name in ("<", "<=") and bare(test.args[1]).path() == count):
                continue
            index = bare(test.args[0]).path()
            if bounded(known, count, start, at) or _given_on(known, count, start, at):
                break
            for write in [n for part in loop.body for n in part.walk()]:
                if _writes_fixed(write, index, known) and not _asked_in(loop, index, test):
                    yield write
                    break
            break


def _given_on(known: Facts, count: str, start: int, end: int) -> bool:
    """Whether something was made or checked with the number before."""
    return any(
        n.kind == "call" and any(m.path() == count for a in n.args for m in a.walk()) for n in known.nodes[start:end]
    ) or any(
        n.kind == "assign" and n.base is not None and n.base.path() == count and known.place[id(n)] >= start
        for n in known.nodes[start:end]
    )  # fmt: skip


def _writes_fixed(node: Node, index: str, known: Facts) -> bool:
    """`a[i] = x` or `p->a[i].b = x` where nothing in the function makes the array."""
    if node.kind != "assign" or node.base is None or not index:
        return False
    target: Node | None = node.base
    while target is not None and target.kind == "member":
        target = target.base
    if target is None or target.kind != "index" or target.base is None or len(target.args) != 1:
        return False
    if bare(target.args[0]).path() != index:
        return False
    path = target.base.path()
    if not path or (target.base.kind == "name" and path not in known.arrays):
        return False
    if any(n.base is not None and n.base.path() == path and n.name == "=" for n in known.of("assign")):
        return False
    return not any(
        called(n) not in ("memset", "memcpy", "sizeof") and any(m.path() == path for a in n.args for m in a.walk())
        for n in known.of("call")
    )


def _asked_in(loop: Node, index: str, test: Node) -> bool:
    """Whether the loop compares its index with something else, too."""
    inside = {id(n) for n in test.walk()}
    return any(
        in_order(n) and id(n) not in inside and any(plain(a, index) for a in n.args) for n in loop.walk()
    )  # fmt: skip


@check("copy-by-source-length", "call")
def copy_by_source_length(function: Node) -> Iterable[Node]:
    """`memcpy(buf, m->data, m->len)` into an array: the length comes with the data, and nothing asks what fits."""
    known = facts(function)
    for node in known.of("call"):
        if not _COPIES.match(called(node)) or len(node.args) < 3:
            continue
        target, source, size = bare(node.args[0]), bare(node.args[-2]), bare(node.args[-1])
        if not _fixed(target, known):
            continue
        given = _origin(size, known, known.place[id(node)])
        if given is None or given.kind != "member" or given.base is None or not _LENGTH.search(given.name):
            continue
        holder = given.base.path()
        if not holder or not any(
            n.kind == "member" and n.base is not None and n.base.path() == holder for n in source.walk()
        ):
            continue
        paths = {p for p in (given.path(), size.path()) if p}
        if not any(_looked_at(known, path, node) for path in paths):
            yield node


def _fixed(target: Node, known: Facts) -> bool:
    """An array of the function, or a member of one of its own structures."""
    while target.kind == "unary" and target.name == "&" and target.args:
        target = bare(target.args[0])
    if target.kind == "name":
        return target.name in known.arrays
    root = target
    while root.base is not None and root.kind in ("member", "index") and root.value != "->":
        root = root.base
    return root.kind == "name" and root is not target and root.name in known.types and not (
        known.types[root.name].endswith("*") or root.name in known.parameters
    )  # fmt: skip


def _origin(size: Node, known: Facts, end: int) -> Node | None:
    """The member that a size is, or was set to."""
    if size.kind == "member":
        return size
    if size.kind == "name":
        for node in reversed(known.nodes[:end]):
            if node.kind == "assign" and node.base is not None and node.base.path() == size.name and node.args:
                return bare(node.args[0])
    return None


def _looked_at(known: Facts, path: str, use: Node) -> bool:
    """Whether a condition, a call other than the copy, or arithmetic that limits touched the number."""
    inside = {id(n) for n in use.walk()}
    for node in known.nodes[: known.place[id(use)]]:
        if id(node) in inside:
            continue
        if node.kind == "binary" and node.name in ("<", ">", "<=", ">=", "==", "!=", "&", "%"):
            if any(n.path() == path for n in node.walk() if n.kind in ("name", "member")):
                return True
        elif node.kind == "call" and (_BOUNDS.match(called(node)) or called(node).isupper() or _asks(node)) and any(
            n.path() == path for a in node.args for n in a.walk()
        ):  # fmt: skip
            return True
    return any(above.kind in ("if", "loop") and any(n.path() == path for a in above.args for n in a.walk())
               for above in known.ancestors(use))  # fmt: skip


def _asks(node: Node) -> bool:
    return re.search(r"(?i)check|valid|ensure|verify|assert|require|fits|limit", called(node)) is not None
