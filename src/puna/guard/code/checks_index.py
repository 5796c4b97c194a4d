"""Checks of indexes in C and C++: tests that let one pass which lies outside, and indexes that nothing tests."""

import re
from collections.abc import Iterable

from puna.guard.code.checks import check
from puna.guard.code.checks_facts import Facts, alternatives, bare, called, facts, in_order, leaves, plain, within
from puna.guard.code.checks_outside import COUNTED, TEXT_NUMBER, taken
from puna.guard.code.checks_overflow import varies
from puna.guard.code.view import Node

_COUNT = re.compile(
    r"(?i)(^|_)(n|num|nr|max|count|size|len|length|number|total|limit)(_|$|[A-Z])|^(n|num|max)[A-Z_]\w*|(count|size|length|number|_max|_num|_cnt)s?$|^MAX_|_MAX$"
)


_COUNTED_CALL = re.compile(r"^(size|length|count|ARRAY_SIZE|NELEMS|G_N_ELEMENTS|nitems|_countof|num_\w+)$")


def _is_count(node: Node, known: Facts) -> bool:
    node = bare(node)
    if node.kind == "call":
        if called(node) == "static_cast" and node.args:
            return _is_count(node.args[0], known)
        return bool(_COUNTED_CALL.search(called(node)))
    if node.kind == "member":
        return bool(_COUNT.search(node.name))
    return False


@check("bound-off-by-one", "binary", "index")
def bound_off_by_one(function: Node) -> Iterable[Node]:
    """An index may equal the number of elements: `if (i > count) return;` before `a[i]`, or `i <= count` in a loop
    over `a[i]`."""
    known = facts(function)
    for node in known.of("if"):
        if leaves(node.body) and node.args:
            for test in alternatives(node.args[0]):
                if in_order(test) and test.name in ("<", ">"):
                    small, big = test.args if test.name == "<" else (test.args[1], test.args[0])
                    index = bare(big)
                    spans = index.kind == "name" and not re.search(r"(?i)end|len|size|last|stop", index.name)
                    if spans and _too_far(small, index.name, known, node):
                        yield test
    yield from _grown_late(known)
    for node in known.of("loop"):
        if node.args and in_order(node.args[-1]) and node.args[-1].name == "<=":
            test = node.args[-1]
            index = bare(test.args[0])
            if index.kind == "name" and _spans_array(test.args[1], index.name, node, known):
                yield test


def _grown_late(known: Facts) -> Iterable[Node]:
    """`if (l->count > l->capacity) grow(l); l->items[l->count++] = x;`: where they are equal there is no room."""
    for node in known.of("if"):
        test = bare(node.args[0]) if node.args else node
        if not in_order(test) or test.name not in ("<", ">") or node.orelse:
            continue
        used = bare(test.args[0] if test.name == ">" else test.args[1]).path()
        grows = any(re.search(r"(?i)alloc|grow|resize|expand", called(n)) for part in node.body for n in part.walk())
        if not used or not grows:
            continue
        for use in known.of("index"):
            place = bare(use.args[0]) if len(use.args) == 1 else use
            steps = place.kind == "unary" and place.name == "++" and place.args and place.args[0].path() == used
            if steps and place.start < place.args[0].end <= place.end and known.place[id(use)] > known.place[id(node)]:
                above = known.parent[id(use)]
                if above.kind == "assign" and above.base is use:
                    yield test
                    break


def _too_far(limit: Node, index: str, known: Facts, guard: Node) -> bool:
    """Whether `limit` is a number of elements and `index` reaches into something afterwards, unadjusted."""
    if not _is_count(limit, known):
        return False
    place = known.place[id(guard)]
    if len([1 for c, _ in known.compared(index) if c.name in ("<", ">", "<=", ">=")]) > 2:
        return False
    inside = {id(n) for n in guard.walk()}
    for node in known.nodes[place:]:
        if id(node) in inside:
            continue
        if node.kind == "assign" and node.base is not None and node.base.path() == index:
            return False
        if node.kind == "unary" and node.name in ("--", "++") and node.args and node.args[0].path() == index:
            return False
        if node.kind == "index" and len(node.args) == 1 and bare(node.args[0]).path() == index:
            return True
    return False


def _spans_array(limit: Node, index: str, loop: Node, known: Facts) -> bool:
    """`limit` is the declared length of an array (or a container's size()) that the loop's body indexes."""
    limit = bare(limit)
    for part in loop.body:
        for node in part.walk():
            if (
                node.kind == "index"
                and node.base is not None
                and len(node.args) == 1
                and bare(node.args[0]).path() == index
            ):
                declared = known.arrays.get(node.base.path())
                if declared is not None and declared.kind == limit.kind:
                    if declared.kind == "number" and declared.value == limit.value:
                        return True
                    if declared.kind == "name" and declared.name == limit.name:
                        return True
                if (
                    limit.kind == "call"
                    and called(limit) in ("size", "length")
                    and limit.base is not None
                    and limit.base.base is not None
                    and limit.base.base.path() == node.base.path()
                ):
                    return True
    return False


@check("index-upper-only", "if", "binary", "index")
def index_upper_only(function: Node) -> Iterable[Node]:
    """A signed index is tested against its upper bound only: a negative one passes."""
    known = facts(function)
    yield from _below_only(known)
    for node in known.of("if"):
        if not (node.kind == "if" and leaves(node.body) and node.args):
            continue
        for test in alternatives(node.args[0]):
            if not in_order(test) or test.name not in (">=", ">"):
                continue
            if test.args[0].kind == "cast":
                continue
            index = bare(test.args[0])
            if index.kind == "binary" and index.name in ("-", "+"):
                index = bare(index.args[0])
            path = index.path() if index.kind == "name" else ""
            limit = bare(test.args[1])
            if not path or not _SIGNED.match(known.types.get(path, "")):
                continue
            if (
                known.types.get(path)
                and _negative_possible(known, path, limit.kind == "number" or limit.name.isupper())
                and not _low_tested(known, path)
                and _indexes(known, path, node)
            ):
                yield test


def _below_only(known: Facts) -> Iterable[Node]:
    """`if (i < 10) a[i] = x;` with a number out of text or a message."""
    outside = {path for pattern in (COUNTED, TEXT_NUMBER) for _, path, _ in taken(known, pattern)}
    for node in known.of("if") if outside else ():
        test = bare(node.args[0])
        if not in_order(test) or test.name not in ("<", "<="):
            continue
        path = bare(test.args[0]).path()
        if path not in outside or not _SIGNED.match(known.types.get(path, "")) or _low_tested(known, path):
            continue
        inside = [n for part in node.body for n in part.walk()]
        if any(n.kind == "index" and len(n.args) == 1 and plain(n.args[0], path) for n in inside):
            yield test


_SIGNED = re.compile(r"(signed )?(int|long|short|ssize_t|ptrdiff_t|int\d+_t|s32|s16|Py_ssize_t)$")


def _negative_possible(known: Facts, path: str, constant: bool) -> bool:
    """`constant`: whether the limit is one."""
    values = [n for n in known.nodes if n.kind == "assign" and n.base is not None and n.base.path() == path and n.args]
    if path in known.parameters:
        return not values and constant
    sources = [bare(n.args[0]) for n in values]
    return (
        bool(sources)
        and all(v.kind == "call" or v.kind == "number" for v in sources)
        and any(v.kind == "call" and not re.search(r"(?i)len|size|count|strto|read$", called(v)) for v in sources)
        and not any(
            n.kind == "unary" and n.name in ("++", "--") and n.args and n.args[0].path() == path for n in known.nodes
        )
    )


def _low_tested(known: Facts, path: str) -> bool:
    for comparison, other in known.compared(path):
        other = bare(other)
        if other.kind == "number" and other.value in (0, 1, -1):
            return True
        if other.kind == "unary" or (comparison.name == "<" and other.kind == "name" and other.name.isupper()):
            return True
        if comparison.name in ("==", "!="):
            return True
    return False


def _indexes(known: Facts, path: str, guard: Node) -> bool:
    inside = {id(n) for n in guard.walk()}
    return any(
        n.kind == "index" and len(n.args) == 1 and plain(n.args[0], path)
        for n in known.nodes[known.place[id(guard)] :]
        if id(n) not in inside
    )


@check("index-grows", "loop", "index")
def index_grows(function: Node) -> Iterable[Node]:
    """An index is stepped on in a loop and written through, and no condition in the function ever looks at it."""
    known = facts(function)
    for loop in known.of("loop"):
        for node in [n for part in loop.body for n in part.walk()]:
            if node.kind != "index" or node.base is None or len(node.args) != 1 or node.base.path() not in known.arrays:
                continue
            target = bare(node.args[0])
            stepped = target.kind == "unary" and target.name == "++" and target.raw == "update_expression"
            name = target.args[0].path() if stepped and target.args else ""
            if not name or known.compared(name) or known.tested.get(name):
                continue
            if any(
                n.kind == "assign" and n.base is not None and n.base.path() == name and within(known, n, loop)
                for n in known.nodes
            ):
                continue
            if _counted_rounds(loop):
                continue
            yield node
            break


def _counted_rounds(loop: Node) -> bool:
    """Whether a number says how often the loop runs (mostly no more often than the array is long), other than the
    length of a text."""
    tests = [n for a in loop.args for n in a.walk()]
    if any(
        n.kind == "number" or (n.kind == "name" and n.name.isupper()) or called(n) in ("sizeof", "size") for n in tests
    ):
        return True
    return any(in_order(n) for n in tests) and not any(called(n) in ("strlen", "wcslen") for n in tests)


@check("index-steps", "loop", "index")
def index_steps(function: Node) -> Iterable[Node]:
    """An index moves by a step that isn't constant, in a loop, and nothing ever compares it with a length."""
    known = facts(function)
    for loop in known.of("loop"):
        steps = {
            n.base.path(): n
            for part in loop.body
            for n in part.walk()
            if n.kind == "assign"
            and n.name == "+="
            and n.base is not None
            and n.base.kind == "name"
            and n.args
            and varies(bare(n.args[0]))
        }
        for name in steps:
            if known.compared(name) or known.tested.get(name) or name in known.parameters:
                continue
            for node in [n for part in loop.body for n in part.walk()]:
                if node.kind == "index" and len(node.args) == 1:
                    target = bare(node.args[0])
                    if target.kind == "unary" and target.name == "++" and target.args and target.args[0].path() == name:
                        yield node
                        break


@check("index-by-parameter", "index")
def index_by_parameter(function: Node) -> Iterable[Node]:
    """An array of the function is written at an index that is a parameter, and nothing ever looks at the index."""
    known = facts(function)
    for node in known.of("index"):
        above = known.parent.get(id(node))
        if node.base is None or node.base.path() not in known.arrays or len(node.args) != 1:
            continue
        name = bare(node.args[0])
        written = above is not None and above.kind == "assign" and above.base is node
        if not (written and name.kind == "name" and name.name in known.parameters):
            continue
        looked_at = known.compared(name.name) or name.name in known.tested
        if not looked_at and not any(n.base is not None and n.base.path() == name.name for n in known.of("assign")):
            yield node


@check("index-before-start", "index", "binary")
def index_before_start(function: Node) -> Iterable[Node]:
    """`p->data[p->len - 2]` where nothing ever looks at the length: one of 0 or 1 reaches in front of the array."""
    known = facts(function)
    for node in known.of("index"):
        place = bare(node.args[0]) if len(node.args) == 1 else node
        if place.kind != "binary" or place.name != "-" or len(place.args) != 2 or bare(place.args[1]).kind != "number":
            continue
        length = bare(place.args[0])
        path = length.path() if length.kind in ("name", "member") else ""
        if not re.search(r"(?i)(len|length|size)$", path) or length.name.isupper():
            continue
        if not known.compared(path) and not known.tested.get(path) and not _made_positive(known, path):
            yield node
            return


def _made_positive(known: Facts, path: str) -> bool:
    """Whether the function itself sets the number to something that isn't read from elsewhere."""
    return any(n.base is not None and n.base.path() == path and n.name == "=" for n in known.of("assign"))
