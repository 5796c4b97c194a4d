"""Checks of lengths and indexes in C and C++: what was compared with what before memory is reached."""

import re
from collections.abc import Iterable

from puna.guard.code.checks import check
from puna.guard.code.checks_memory import Facts, bare, called, facts, leaves
from puna.guard.code.view import Node

_COUNT = re.compile(
    r"(?i)(^|_)(n|num|nr|max|count|size|len|length|number|total|limit)(_|$|[A-Z])|^(n|num|max)[A-Z_]\w*|(count|size|length|number|_max|_num|_cnt)s?$|^MAX_|_MAX$"
)
_COUNTED_CALL = re.compile(r"^(size|length|count|ARRAY_SIZE|NELEMS|G_N_ELEMENTS|nitems|_countof|num_\w+)$")
_WIRE = re.compile(
    r"^(ntoh[sl]l?|(be|le)(16|32|64)_?to_?(cpu|h|host)p?|(be|le)(16|32|64)toh|get_unaligned_\w+|av_rb\w+|AV_R[BL]\d+|avio_r[bl]\d+|Stream_Read_U?INT\d+|ReadBlob\w*(Long|Short)|ReadProfile\w*(Long|Short)|ReadProperty\w*(Long|Short)|r_read_[bl]e\d+|GUINT\d+_FROM_[BL]E|bytestream2?_get_\w+|rfbClientSwap\d+IfLE|Swap\d+IfLE|READ_\w*(16|32)|DNS_RR_LEN|UINT)$"
)
_TEXT_NUMBER = re.compile(r"^(atoi|atol|atoll|strtol|strtoul|strtoll|strtoull)$")
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
_ALLOCATES = re.compile(r"(?i)alloc|^kmalloc|^vmalloc|^kzalloc|^mallocf?$|_mallocf?$|^alloca$|^_alloca$")
_SAFE_ALLOCATES = re.compile(r"(?i)array|calloc|overflow|checked|^size_|^AcquireQuantum|reallocarray|_n$|^mxCalloc")


def _order(node: Node) -> bool:
    return node.kind == "binary" and node.name in ("<", ">", "<=", ">=") and len(node.args) == 2


def _is_count(node: Node, known: Facts) -> bool:
    node = bare(node)
    if node.kind == "call":
        if called(node) == "static_cast" and node.args:
            return _is_count(node.args[0], known)
        return bool(_COUNTED_CALL.search(called(node)))
    if node.kind == "member":
        return bool(_COUNT.search(node.name))
    return False


@check("bound-off-by-one")
def bound_off_by_one(function: Node) -> Iterable[Node]:
    """An index may equal the number of elements: `if (i > count) return;` before `a[i]`, or `i <= count` in a loop
    over `a[i]`."""
    known = facts(function)
    for node in known.nodes:
        if node.kind == "if" and leaves(node.body) and node.args:
            for test in _alternatives(node.args[0]):
                if _order(test) and test.name in ("<", ">"):
                    small, big = test.args if test.name == "<" else (test.args[1], test.args[0])
                    index = bare(big)
                    if index.kind == "name" and _too_far(small, index.name, known, node):
                        yield test
        elif node.kind == "loop" and node.args and _order(node.args[-1]) and node.args[-1].name == "<=":
            test = node.args[-1]
            index = bare(test.args[0])
            if index.kind == "name" and _spans_array(test.args[1], index.name, node, known):
                yield test


def _alternatives(test: Node) -> list[Node]:
    test = bare(test)
    if test.kind == "binary" and test.name == "||":
        return [part for arg in test.args for part in _alternatives(arg)]
    return [test]


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


def _taken(known: Facts, pattern: re.Pattern[str]) -> Iterable[tuple[Node, str, str]]:
    """(node, path, call) of all assigned from a call, or written by a macro, that gives a number from outside."""
    for node in known.nodes:
        if node.kind == "assign" and node.base is not None and node.args and node.name == "=":
            for below in node.args[0].walk():
                if below.kind == "call" and pattern.search(called(below)):
                    path = node.base.path()
                    if path:
                        yield node, path, called(below)
                    break
        elif node.kind == "call" and called(node).startswith("Stream_Read_U") and len(node.args) == 2:
            path = node.args[1].path()
            if path and pattern.search(called(node)):
                yield node, path, called(node)


def _bounded(known: Facts, path: str, start: int, end: int) -> bool:
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


@check("length-from-outside")
def length_from_outside(function: Node) -> Iterable[Node]:
    """A length or index that came from outside reaches memory with nothing compared: the size of a copy, an index."""
    known = facts(function)
    for node, path in _carried(
        known, [(n, p) for pattern in (_WIRE, _TEXT_NUMBER) for n, p, _ in _taken(known, pattern)]
    ):
        start = known.place[id(node)] + len(node.walk())
        for at in range(start, len(known.nodes)):
            use = known.nodes[at]
            if use.kind == "assign" and use.base is not None and use.base.path() == path and use.name == "=":
                break
            if _reaches(use, path):
                if not _bounded(known, path, start, at) and not _loop_bounded(known, path, use):
                    yield use
                break


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
                and _plain(step.args[0], path)
            ):
                if not _bounded(known, path, start, known.place[id(step)]) and not _loop_bounded(known, path, step):
                    found.append((step, step.base.path()))
                break
    return found


def _loop_bounded(known: Facts, path: str, use: Node) -> bool:
    return any(
        above.kind in ("loop", "if") and any(n.path() == path for a in above.args for n in a.walk())
        for above in known.ancestors(use)
    )


def _reaches(use: Node, path: str) -> bool:
    """Whether memory is reached with `path` as size, index or step of a pointer."""
    if use.kind == "call" and use.base is not None and use.base.name in _COPIES:
        at = _COPIES[use.base.name]
        return len(use.args) > at and _plain(use.args[at], path)
    if use.kind == "index" and len(use.args) == 1:
        return _plain(use.args[0], path)
    return False


def _plain(node: Node, path: str) -> bool:
    """The value itself, or it in a sum or product."""
    node = bare(node)
    if node.kind == "binary" and node.name in ("+", "*", "-"):
        return any(_plain(a, path) for a in node.args)
    return node.kind in ("name", "member", "index") and node.path() == path


@check("allocation-product")
def allocation_product(function: Node) -> Iterable[Node]:
    """The size of an allocation is a product with a factor from outside the function that nothing bounds."""
    known = facts(function)
    for node in known.nodes:
        if node.kind != "call":
            continue
        name = called(node)
        sizes = node.args if _ALLOCATES.search(name) and not _SAFE_ALLOCATES.search(name) else []
        if node.name == "[]" and node.new:
            sizes = node.args
        if any(_unbounded_product(size, known, known.place[id(node)]) for size in sizes):
            yield node


def _unbounded_product(size: Node, known: Facts, at: int) -> bool:
    for product in size.walk():
        if product.kind == "call" and called(product) in ("sizeof", "strlen", "min", "MIN", "std::min"):
            continue
        if product.kind != "binary" or product.name != "*" or len(product.args) < 2:
            continue
        free = [f for f in (bare(a) for a in product.args) if _varies(f)]
        if not free:
            continue
        for factor in free:
            names = [n.path() for n in factor.walk() if n.kind in ("name", "member") and n.path()]
            if not any(_bounded_before(known, path, at) for path in names):
                return True
    return False


def _varies(factor: Node) -> bool:
    if factor.kind in ("number", "string", "constant") or called(factor) in ("sizeof", "alignof"):
        return False
    if factor.kind == "name":
        return not factor.name.isupper() and not re.match(r"k[A-Z]", factor.name)
    if factor.kind == "member":
        return not factor.name.isupper()
    if factor.kind == "binary":
        return any(_varies(bare(a)) for a in factor.args)
    return factor.kind in ("index", "unary") or (factor.kind == "call" and not called(factor).isupper())


def _bounded_before(known: Facts, path: str, at: int) -> bool:
    """Compared with something other than 0 or NULL, or known to be small, before the place `at`."""
    for node in known.nodes[:at]:
        if node.kind == "binary" and node.name in ("<", ">", "<=", ">=", "==", "!=") and len(node.args) == 2:
            parts = [bare(a) for a in node.args]
            if any(p.kind == "constant" or (p.kind == "number" and p.value == 0) for p in parts):
                continue
            if any(n.path() == path for p in parts for n in p.walk()):
                return True
        if node.kind == "assign" and node.base is not None and node.base.path() == path and node.args:
            value = bare(node.args[0])
            if not _varies(value) or re.search(
                r"(?i)^(min|strlen|MIN|MAX|clamp|size|length|sizeof|align)", called(value)
            ):
                return True
    kind = known.types.get(path, "")
    return kind in ("char", "short", "uint8_t", "u8", "uint16_t", "u16", "bool", "byte")


@check("index-upper-only")
def index_upper_only(function: Node) -> Iterable[Node]:
    """A signed index is tested against its upper bound only: a negative one passes."""
    known = facts(function)
    for node in known.nodes:
        if not (node.kind == "if" and leaves(node.body) and node.args):
            continue
        for test in _alternatives(node.args[0]):
            if not _order(test) or test.name not in (">=", ">"):
                continue
            index = bare(test.args[0])
            if index.kind == "binary" and index.name in ("-", "+"):
                index = bare(index.args[0])
            path = index.path() if index.kind == "name" else ""
            if not path or not re.match(
                r"(signed )?(int|long|short|ssize_t|ptrdiff_t|int\d+_t|s32|s16|Py_ssize_t)$", known.types.get(path, "")
            ):
                continue
            if (
                known.types.get(path)
                and _negative_possible(known, path)
                and not _low_tested(known, path)
                and _indexes(known, path, node)
            ):
                yield test


def _negative_possible(known: Facts, path: str) -> bool:
    values = [n for n in known.nodes if n.kind == "assign" and n.base is not None and n.base.path() == path and n.args]
    if path in known.parameters:
        return not values
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
        if other.kind == "unary":
            return True
        if comparison.name in ("==", "!="):
            return True
    return False


def _indexes(known: Facts, path: str, guard: Node) -> bool:
    inside = {id(n) for n in guard.walk()}
    return any(
        n.kind == "index" and len(n.args) == 1 and _plain(n.args[0], path)
        for n in known.nodes[known.place[id(guard)] :]
        if id(n) not in inside
    )


@check("index-grows")
def index_grows(function: Node) -> Iterable[Node]:
    """An index is stepped on in a loop and written through, and no condition in the function ever looks at it."""
    known = facts(function)
    for loop in known.nodes:
        if loop.kind != "loop":
            continue
        for node in [n for part in loop.body for n in part.walk()]:
            if node.kind != "index" or node.base is None or len(node.args) != 1 or node.base.path() not in known.arrays:
                continue
            target = bare(node.args[0])
            stepped = target.kind == "unary" and target.name == "++" and target.raw == "update_expression"
            name = target.args[0].path() if stepped and target.args else ""
            if not name or known.compared(name) or known.tested.get(name):
                continue
            if any(
                n.kind == "assign" and n.base is not None and n.base.path() == name and _inside(known, n, loop)
                for n in known.nodes
            ):
                continue
            if _constant_rounds(loop):
                continue
            yield node
            break


def _inside(known: Facts, node: Node, loop: Node) -> bool:
    return any(above is loop for above in known.ancestors(node))


def _constant_rounds(loop: Node) -> bool:
    return any(
        n.kind == "number" or (n.kind == "name" and n.name.isupper()) or called(n) in ("sizeof", "size")
        for a in loop.args
        for n in a.walk()
    )


_UNREAD = re.compile(r"^Stream_Read_(U?INT(8|16|32|64))|^Stream_Read$|^Stream_Seek(_U?INT\d+)?$")
_READ_TESTED = re.compile(
    r"^Stream_(GetRemaining\w+|CheckAndLog\w+|Ensure\w+|SafeSeek\w*|New|EnsureRemaining\w+|StaticInit)$"
)


@check("stream-unread")
def stream_unread(function: Node) -> Iterable[Node]:
    """Winpr streams: fields are read before anything asked how many bytes remain; after a step of unknown length it
    must be asked again."""
    known = facts(function)
    asked = False
    for node in known.nodes:
        name = called(node)
        if _READ_TESTED.search(name):
            asked = True
        elif _UNREAD.search(name):
            if not asked:
                yield node
                return
            if name in ("Stream_Seek", "Stream_Read") and node.args and bare(node.args[-1]).kind != "number":
                asked = False


_JOINS = re.compile(
    r"(?i)(concat|join|append|make|build)_?\w*path|path\w*_(join|concat|append)|^g_build_(file)?name$|^path_(cat|join)$|^PathCombine"
)


@check("path-unchecked")
def path_unchecked(function: Node) -> Iterable[Node]:
    """A file's path is joined from a folder and a name that the caller gave, and nothing looked at the name."""
    known = facts(function)
    for node in known.nodes:
        if not _JOINS.search(called(node)) or len(node.args) < 2:
            continue
        for argument in node.args[1:]:
            path = bare(argument).path()
            if path in known.parameters and path not in known.tested and not _passed_to_test(known, path, node):
                yield node
                break


def _passed_to_test(known: Facts, path: str, node: Node) -> bool:
    for other in known.nodes[: known.place[id(node)]]:
        tests = other.kind == "call" and re.search(
            r"(?i)valid|check|clean|saniti|correct|basename|strchr|strstr|normali|allowed|safe", called(other)
        )
        if tests and any(a.path() == path for a in other.args):
            return True
    return False


@check("bound-overflows")
def bound_overflows(function: Node) -> Iterable[Node]:
    """`p + length > end` is computed with a length from outside: the sum wraps round and the test passes."""
    known = facts(function)
    wire = {path for _, path, _ in _taken(known, _WIRE)}
    for node in known.nodes:
        if _order(node) and node.name in (">", ">="):
            total, end = bare(node.args[0]), bare(node.args[1])
            if (
                total.kind == "binary"
                and total.name == "+"
                and re.search(r"(?i)end$|^end", end.path().rsplit(".", 1)[-1])
                and any(
                    bare(a).path() in wire or (bare(a).kind == "name" and re.search(r"(?i)len|size", bare(a).name))
                    for a in total.args[1:]
                )
            ):
                yield node


@check("overflow-tested-late")
def overflow_tested_late(function: Node) -> Iterable[Node]:
    """A product is computed and only then compared with INT_MAX: it has wrapped round already."""
    known = facts(function)
    for node in known.nodes:
        if not _order(node) or node.name != ">":
            continue
        path, limit = bare(node.args[0]).path(), node.args[1]
        if not path or not any(
            n.kind == "name" and re.fullmatch(r"U?(INT|LONG|SIZE|SSIZE)(32)?_MAX", n.name) for n in limit.walk()
        ):
            continue
        for before in known.nodes[: known.place[id(node)]]:
            if before.kind == "assign" and before.base is not None and before.base.path() == path and before.args:
                value = bare(before.args[0])
                product = value.kind == "binary" and value.name == "*" and all(_varies(bare(a)) for a in value.args)
                at = known.place[id(before)]
                if product and not any(_bounded_before(known, bare(a).path(), at) for a in value.args):
                    yield node


@check("index-steps")
def index_steps(function: Node) -> Iterable[Node]:
    """An index moves by a step that isn't constant, in a loop, and nothing ever compares it with a length."""
    known = facts(function)
    for loop in known.nodes:
        if loop.kind != "loop":
            continue
        steps = {
            n.base.path(): n
            for part in loop.body
            for n in part.walk()
            if n.kind == "assign"
            and n.name == "+="
            and n.base is not None
            and n.base.kind == "name"
            and n.args
            and _varies(bare(n.args[0]))
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
