"""Checks of arithmetic in C and C++ that wraps round before memory is reached by its result."""

import re
from collections.abc import Iterable

from puna.guard.code.checks import check
from puna.guard.code.checks_facts import Facts, bare, called, calls, facts, in_order
from puna.guard.code.checks_outside import COUNTED, TEXT_NUMBER, taken
from puna.guard.code.view import Node

ALLOCATES = re.compile(r"(?i)alloc|^kmalloc|^vmalloc|^kzalloc|^mallocf?$|_mallocf?$|^alloca$|^_alloca$")


_SAFE_ALLOCATES = re.compile(r"(?i)array|calloc|overflow|checked|^size_|^AcquireQuantum|reallocarray|_n$|^mxCalloc")


@check("allocation-product", "call", "binary")
def allocation_product(function: Node) -> Iterable[Node]:
    """The size of an allocation is a product with a factor from outside that nothing bounds, or of several factors
    that the caller gave."""
    known = facts(function)
    outside: set[str] | None = None
    for node in known.of("call"):
        name = called(node)
        sizes = node.args if ALLOCATES.search(name) and not _SAFE_ALLOCATES.search(name) else []
        if node.name == "[]" and node.new:
            sizes = node.args
        if len(sizes) == 1 and bare(sizes[0]).kind == "name":
            made = only_value(known, bare(sizes[0]).name)
            sizes = [made] if made is not None else sizes
        filled = name.startswith("std.vector")  # asked only for numbers that come from outside
        for size in node.args[:1] if filled else sizes:
            if any(n.kind == "binary" and n.name == "*" for n in size.walk()):
                if outside is None:
                    outside = {p for pattern in (COUNTED, TEXT_NUMBER) for _, p, _ in taken(known, pattern)}
                at = known.place[id(node)]
                if (not filled or _holds(size, outside)) and _unbounded_product(size, known, at, outside):
                    yield node
                    break


def _of_32_bits(node: Node, known: Facts) -> bool:
    return (
        re.fullmatch(
            r"(unsigned |signed )?(int|short|char)|u?int(8|16|32)_t|unsigned", known.types.get(node.path(), "")
        )
        is not None
    )


def only_value(known: Facts, name: str) -> Node | None:
    """What the variable is set to, if that happens once."""
    values = [n for n in known.of("assign") if n.base is not None and n.base.path() == name and n.args]
    changed = any(n.name in ("++", "--") and n.args and n.args[0].path() == name for n in known.of("unary"))
    return bare(values[0].args[0]) if len(values) == 1 and values[0].name == "=" and not changed else None


def _holds(size: Node, paths: set[str]) -> bool:
    return any(n.kind == "name" and n.name in paths for n in size.walk())


def _unbounded_product(size: Node, known: Facts, at: int, outside: set[str]) -> bool:
    free: list[str] = []
    for product in size.walk():
        if product.kind != "binary" or product.name != "*" or len(product.args) < 2:
            continue
        if any(called(above) in ("sizeof", "strlen", "min", "MIN", "std::min") for above in known.ancestors(product)):
            continue
        if all(a.kind == "cast" or _of_32_bits(a, known) for a in product.args) and any(
            a.kind == "cast" and re.search(r"size_t|64|long long", a.type) for a in product.args
        ):
            continue  # two numbers of 32 bits in 64
        for factor in (bare(a) for a in product.args):
            if varies(factor) and factor.kind != "call":
                names = [n.path() for n in factor.walk() if n.kind in ("name", "member") and n.path()]
                if names and not any(bounded_before(known, path, at) for path in names):
                    if any(path in outside for path in names):
                        return True
                    free += names[:1]
    given = {p for p in free if _given(p, known)}
    signed = any(p in known.parameters and re.fullmatch("int|long|short|signed", known.types[p]) for p in free)
    return len(given) > 1 or signed


def _given(path: str, known: Facts) -> bool:
    """Whether the caller gave the number: a parameter that is a whole number of at most 32 bits or of unknown size, or
    a member of something that it points to."""
    root = path.split(".")[0].split("[")[0]
    if "." in path:
        return root in known.parameters or known.types.get(root, "").endswith("*")
    kind = known.types.get(path, "")
    return root in known.parameters and re.search(r"size_t|64|long", kind) is None


def varies(factor: Node) -> bool:
    if factor.kind in ("number", "string", "constant") or called(factor) in ("sizeof", "alignof"):
        return False
    if factor.kind == "name":
        return not factor.name.isupper() and not re.match(r"k[A-Z]", factor.name)
    if factor.kind == "member":
        return not factor.name.isupper()
    if factor.kind == "binary":
        return any(varies(bare(a)) for a in factor.args)
    return factor.kind in ("index", "unary") or (factor.kind == "call" and not called(factor).isupper())


def bounded_before(known: Facts, path: str, at: int) -> bool:
    """Compared with something other than 0 or NULL, or known to be small, before the place `at`."""
    for node in known.nodes[:at]:
        if node.kind == "binary" and node.name in ("<", ">", "<=", ">=", "==", "!=") and len(node.args) == 2:
            parts = [bare(a) for a in node.args]
            if any(p.kind == "constant" or (p.kind == "number" and p.value == 0) for p in parts):
                continue
            sides = [any(n.path() == path for n in _values(p)) for p in parts]
            if any(sides) and not (all(sides) or _sum_only(node, path)):
                return True
        if node.kind == "assign" and node.base is not None and node.base.path() == path and node.args:
            value = bare(node.args[0])
            if node.type and value.kind == "number" and value.value == 0:
                continue  # a first value, for what is read into it
            if not varies(value) or re.search(
                r"(?i)^(min|strlen|MIN|MAX|clamp|size|length|sizeof|align)", called(value)
            ):
                return True
    kind = known.types.get(path, "")
    return kind in ("char", "short", "uint8_t", "u8", "uint16_t", "u16", "bool", "byte")


def _values(node: Node) -> list[Node]:
    """The node and what is below, without what only an address is taken of."""
    if node.kind == "unary" and node.name == "&":
        return []
    return [node, *(n for below in node.children() for n in _values(below))]


def _sum_only(comparison: Node, path: str) -> bool:
    """`a + path > limit`: the sum may have wrapped round, so that the test says nothing about `path`."""
    for side in map(bare, comparison.args):
        if (
            side.kind == "binary"
            and side.name == "+"
            and all(varies(bare(a)) for a in side.args)
            and any(bare(a).path() == path for a in side.args)
        ):
            return True
    return False


@check("allocation-unlimited", "call")
def allocation_unlimited(function: Node) -> Iterable[Node]:
    """Memory is made for as much as a number out of text says, and nothing limits the number from above."""
    known = facts(function)
    if not any(ALLOCATES.search(name) or name == "[]" for name in calls(function)):
        return
    numbers = {path: known.place[id(node)] for node, path, _ in taken(known, TEXT_NUMBER)}
    for call in known.of("call") if numbers else ():
        if not ALLOCATES.search(called(call)) and not (call.new and call.name == "[]"):
            continue
        place = known.place[id(call)]
        for size in call.args:
            paths = [n.path() for n in size.walk() if n.kind == "name" and numbers.get(n.name, place) < place]
            if any(not _limited(known, path, call) for path in paths):
                yield call
                break


def _limited(known: Facts, path: str, use: Node) -> bool:
    """Whether the number isn't large where it is used: a comparison says so, or a min, mask or remainder."""
    around = {id(n): n for n in known.ancestors(use)}
    for comparison, other in known.compared(path):
        if known.place[id(comparison)] > known.place[id(use)] or bare(other).value == 0:
            continue
        above = next((n for n in known.ancestors(comparison) if n.kind in ("if", "loop", "conditional")), comparison)
        left = any(n.path() == path for n in comparison.args[0].walk())
        lower = comparison.name in ((">", ">=") if left else ("<", "<="))
        if not (lower and id(above) in around and any(n is use for part in above.body for n in part.walk())):
            return True
    small = re.fullmatch(r"(unsigned |signed )?(char|short)|u?int(8|16)_t|[us](8|16)", known.types.get(path, ""))
    masks = any(
        (n.name in ("%", "&", "%=", "&=") or re.search(r"(?i)min|clamp|limit|check|valid", called(n) or "-"))
        and any(m.path() == path for m in n.walk())
        for kind in ("binary", "call", "assign")
        for n in known.of(kind)
        if called(n) not in ("scanf", "sscanf", "fscanf")
    )
    return small is not None or masks


@check("text-number-multiplied", "binary", "assign")
def text_number_multiplied(function: Node) -> Iterable[Node]:
    """`int ms = seconds * 1000` with a number out of text that nothing compares."""
    known = facts(function)
    numbers = {path for _, path, _ in taken(known, TEXT_NUMBER) if _INT.fullmatch(known.types.get(path, ""))}
    for node in known.of("assign") if numbers else ():
        value = bare(node.args[0]) if node.args and node.base is not None else node
        if value.kind != "binary" or value.name != "*" or len(value.args) != 2:
            continue
        if not _INT.fullmatch(known.types.get(node.base.path() if node.base is not None else "", "")):
            continue
        for one, other in (value.args, value.args[::-1]):
            path, factor = bare(one).path(), bare(other)
            large = (isinstance(factor.value, int) and factor.value >= 1000) or factor.path() in numbers - {path}
            looked_at = known.compared(path) or path in known.tested
            if path in numbers and large and not looked_at and bare(one).kind == "name":
                yield node
                break


_INT = re.compile(r"(const )?(unsigned |signed )?(int|short)|unsigned|u?int32_t")


@check("overflow-tested-late", "binary", "assign")
def overflow_tested_late(function: Node) -> Iterable[Node]:
    """A product is computed and only then compared with INT_MAX: it has wrapped round already."""
    known = facts(function)
    for node in known.of("binary"):
        if not in_order(node) or node.name != ">":
            continue
        path, limit = bare(node.args[0]).path(), node.args[1]
        if re.search(r"64|size_t|long|SIZE", known.types.get(path, "")):
            continue
        if not path or not any(
            n.kind == "name" and re.fullmatch(r"U?(INT|LONG|SIZE|SSIZE)(32)?_MAX", n.name) for n in limit.walk()
        ):
            continue
        for before in known.nodes[: known.place[id(node)]]:
            if before.kind == "assign" and before.base is not None and before.base.path() == path and before.args:
                value = bare(before.args[0])
                product = value.kind == "binary" and value.name == "*" and all(varies(bare(a)) for a in value.args)
                at = known.place[id(before)]
                if product and not any(bounded_before(known, bare(a).path(), at) for a in value.args):
                    yield node


_KERNEL = re.compile(r"^(devm_)?k[mvz]*alloc(_node)?$|^vz?alloc$")


@check("allocation-open-coded", "call", "binary")
def allocation_open_coded(function: Node) -> Iterable[Node]:
    """Linux: `kmalloc(n * sizeof(*p))` with an n that nothing bounds, where kmalloc_array would test the product."""
    known = facts(function)
    for node in known.of("call"):
        for size in map(bare, node.args[:2] if _KERNEL.match(called(node)) else []):
            if size.kind != "binary" or size.name != "*" or not any(called(bare(a)) == "sizeof" for a in size.args):
                continue
            factors = [bare(a) for a in size.args if called(bare(a)) != "sizeof"]
            counts = all(f.kind in ("name", "member") and not f.name.isupper() for f in factors)
            at = known.place[id(node)]
            if factors and counts and not any(bounded_before(known, f.path(), at) for f in factors):
                yield node
                break
