"""Checks of sums, differences and shifts in C and C++ whose result doesn't fit where it goes."""

import re
from collections.abc import Iterable

from puna.guard.code.checks import check
from puna.guard.code.checks_facts import Facts, bare, called, facts, in_order, within
from puna.guard.code.checks_outside import WIRE, taken
from puna.guard.code.checks_overflow import ALLOCATES, varies
from puna.guard.code.view import Node

_UNSIGNED = re.compile(
    r"^(const )?(unsigned|u(8|16|32|64)|uint\d*(_t)?|size_t|u_int|ulong|__u\d+|DWORD|UINT\w*|ut\d+|guint\w*|gsize)\b"
)
_WIDE = re.compile(
    r"^(const )?(u?int64(_t)?|(__)?[us]64|(unsigned )?long long( int)?|off_t|loff_t|off64_t|sector_t|[us]t64)$"
)
_NARROW = re.compile(
    r"^(const )?((unsigned |signed )?(int|short)|unsigned|u?int(32|16)(_t)?|(__)?[us](32|16)|uint|DWORD|gu?int(32)?)$"
)
_SIZES = re.compile(r"^(size|length|strlen|wcslen|sizeof|count)$")


def _operand(node: Node) -> Node:
    return bare(node) if node.kind == "other" else node


@check("sum-tested-negative", "binary")
def sum_tested_negative(function: Node) -> Iterable[Node]:
    """`if (a + b < 0)` with signed numbers: where the sum overflows it isn't defined, and compilers drop the test."""
    known = facts(function)
    for node in known.of("binary"):
        if in_order(node) and node.name == "<" and bare(node.args[1]).value == 0 and node.args[1].kind == "number":
            total = bare(node.args[0])
            if isinstance(bare(node.args[1]).value, float):
                continue
            given = total.args and any(a.kind == "member" or a.name in known.parameters for a in map(bare, total.args))
            if (
                given
                and total.kind == "binary"
                and total.name == "+"
                and len(total.args) == 2
                and not _limited(known)
                and any(a.kind == "member" or _OFFSET.match(known.types.get(a.name, "")) for a in map(bare, total.args))
                and all(a.kind in ("name", "member") and not a.name.isupper() for a in map(bare, total.args))
            ):
                yield node


_OFFSET = re.compile(r"^(const )?(long( long)?|loff_t|off_t|off64_t|ssize_t|s?int64(_t)?|ptrdiff_t|MagickOffsetType)$")


def _limited(known: Facts) -> bool:
    """Whether the function knows of the largest numbers."""
    return any(re.fullmatch(r"S?SIZE_MAX|U?(INT|LONG)\w*_MAX", n.name) for n in known.of("name"))


@check("difference-tested-negative", "assign", "binary")
def difference_tested_negative(function: Node) -> Iterable[Node]:
    """A difference of unsigned numbers goes into a signed one and only that is compared with 0."""
    known = facts(function)
    for node in known.of("assign"):
        if node.base is None or not node.args or node.name != "=":
            continue
        value, name = _operand(node.args[0]), node.base.path()
        if not (value.kind == "binary" and value.name == "-" and re.fullmatch("int|long", known.types.get(name, ""))):
            continue
        kinds = [known.types.get(bare(a).path(), "") for a in value.args if bare(a).kind == "name"]
        if len(kinds) < 2 or not all(_UNSIGNED.match(k) for k in kinds if k):
            continue
        if not all(kinds[:2]):
            continue
        for use in known.nodes[known.place[id(node)] :]:
            if in_order(use) and use.name == "<" and bare(use.args[0]).path() == name and bare(use.args[1]).value == 0:
                yield use
                break


@check("difference-never-negative", "binary")
def difference_never_negative(function: Node) -> Iterable[Node]:
    """`if (a - b >= 0)` with unsigned numbers: it always is."""
    known = facts(function)
    for node in known.of("binary"):
        if not in_order(node) or node.name not in (">=", "<") or bare(node.args[1]).value != 0:
            continue
        value = bare(node.args[0])
        if value.kind == "binary" and value.name == "-" and len(value.args) == 2 and node.args[0].kind != "cast":
            kinds = [known.types.get(a.name, "") if a.kind == "name" else "" for a in map(bare, value.args)]
            if all(_UNSIGNED_WIDE.match(k) for k in kinds):
                yield node


@check("sizes-summed-narrow", "loop", "assign", "call")
def sizes_summed_narrow(function: Node) -> Iterable[Node]:
    """Lengths are added up in an int, in a loop, and memory of that size is made."""
    known = facts(function)
    for loop in known.of("loop"):
        for node in [n for part in loop.body for n in part.walk()]:
            if node.kind != "assign" or node.name != "+=" or node.base is None or node.base.kind != "name":
                continue
            name = node.base.name
            if not re.fullmatch("(unsigned )?int|short|u?int32_t|unsigned", known.types.get(name, "")):
                continue
            if not any(_SIZES.match(called(n)) for n in node.args[0].walk()) or _bounded_anywhere(known, name):
                continue
            for use in known.nodes[known.place[id(node)] :]:
                makes = use.kind == "call" and (ALLOCATES.search(called(use)) or use.new or called(use) in _HOLDERS)
                if makes and any(n.path() == name for a in use.args for n in a.walk()):
                    yield node
                    break


_HOLDERS = ("String", "reserve", "resize", "StringBuffer")


@check("product-widened", "assign", "binary")
def product_widened(function: Node) -> Iterable[Node]:
    """A product of 32-bit numbers goes into a 64-bit one: it is computed in 32 bits and has wrapped round before."""
    known = facts(function)
    for node in known.of("assign"):
        if node.base is None or not node.args or node.name not in ("=", "+="):
            continue
        if not _WIDE.match(known.types.get(node.base.path(), node.type or "")):
            continue
        value = _operand(node.args[0])
        if value.kind == "binary" and value.name in ("*", "<<") and _narrow_product(value, known):
            yield node


def _narrow_product(value: Node, known: Facts) -> bool:
    """Whether at least one factor is a variable, and every variable factor is known to have at most 32 bits."""
    factors = value.args if value.name == "*" else value.args[:1]
    variables = 0
    for factor in map(_operand, factors):
        if factor.kind == "cast" or factor.kind not in ("name", "number"):
            return False
        if factor.kind == "name" and varies(factor):
            if not _NARROW.match(known.types.get(factor.name, "")) or _bounded_anywhere(known, factor.name):
                return False
            variables += 1
    return variables > 1 or (variables == 1 and value.name == "<<" and bare(value.args[1]).kind != "number")


def _bounded_anywhere(known: Facts, name: str) -> bool:
    return any(c.name in ("<", ">", "<=", ">=") for c, _ in known.compared(name))


@check("shift-below-zero", "binary")
def shift_below_zero(function: Node) -> Iterable[Node]:
    """`1 << (n - 1)` where n is a parameter that nothing compares: n = 0 shifts by a negative number."""
    known = facts(function)
    for node in known.of("binary"):
        if node.name == "<<" and len(node.args) == 2:
            amount = bare(node.args[1])
            if amount.kind == "binary" and amount.name == "-" and bare(amount.args[1]).kind == "number":
                name = bare(amount.args[0])
                if name.kind == "name" and name.name in known.parameters and not _looked_at(known, name.name):
                    yield node


def _looked_at(known: Facts, name: str) -> bool:
    """Whether the variable is compared, tested by itself, or set anew."""
    return bool(known.compared(name)) or any(
        (n.kind == "assign" and n.base is not None and n.base.path() == name)
        or (n.kind in ("if", "loop", "conditional") and n.args and bare(n.args[0]).path() == name)
        or (n.kind == "unary" and n.name == "!" and n.args and n.args[0].path() == name)
        or (n.kind == "binary" and n.name in ("&&", "||") and any(bare(a).path() == name for a in n.args))
        for n in known.nodes
    )


_FILLS = re.compile(r"^(zend_parse_\w+|sscanf|fscanf|scanf|luaL_\w+)$")


@check("allocation-sum", "call", "binary")
def allocation_sum(function: Node) -> Iterable[Node]:
    """Memory is made for `n + 1` with an n from outside that has no upper bound: the sum wraps round to almost 0."""
    known = facts(function)
    outside: dict[str, int] = {}
    if not any(ALLOCATES.search(called(n)) for n in known.of("call")):
        return
    for at, node in enumerate(known.nodes):
        if node.kind == "call" and _FILLS.match(called(node)):
            for argument in node.args:
                if argument.kind == "unary" and argument.name == "&" and argument.args[0].kind == "name":
                    outside[argument.args[0].name] = at
        elif node.kind == "assign" and node.base is not None and node.args and node.name == "=":
            path = node.base.path()
            if path and any(n.kind == "call" and _FILE_NUMBER.search(called(n)) for n in node.args[0].walk()):
                outside[path] = at
            elif path in outside and not any(n.path() == path for n in node.args[0].walk()):
                del outside[path]
        elif node.kind == "call" and ALLOCATES.search(called(node)):
            for size in node.args:
                total = bare(size)
                if total.kind == "binary" and total.name == "+" and len(total.args) == 2:
                    path = bare(total.args[0]).path()
                    if path in outside and bare(total.args[1]).kind == "number" and not _upper_bound(known, path, at):
                        yield node


_FILE_NUMBER = re.compile(r"^(ntoh[sl]l?|(be|le)(16|32|64)_?to_?(cpu|h|host)p?|\w*Swap\d+IfLE|atoi|atol|strto\w+)$")


def _upper_bound(known: Facts, path: str, end: int) -> bool:
    """Whether a comparison before `end` bounds the value from above."""
    for comparison, other in known.compared(path):
        if known.place[id(comparison)] > end or bare(other).value == 0:
            continue
        return True
    return any(
        n.kind == "call" and re.search(r"(?i)min|clamp|check", called(n)) and any(m.path() == path for m in n.walk())
        for n in known.nodes[:end]
    )


@check("bound-sum-wraps", "binary")
def bound_sum_wraps(function: Node) -> Iterable[Node]:
    """`if (offset + length > size)` with two numbers from outside that nothing else bounds: the sum wraps round."""
    known = facts(function)
    orders = [n for n in known.of("binary") if in_order(n) and any(bare(a).name == "+" for a in n.args)]
    if not orders:
        return
    outside = {path for _, path, _ in taken(known, WIRE)}
    outside |= {a.name for a in function.args if re.fullmatch(r"size_t|u?int(32|64)_t|u(32|64)|loff_t|off_t", a.type)}
    outside |= _composed(known)
    for node in orders:
        if not known.in_test(node) or any(a.kind == "call" for a in known.ancestors(node)):
            continue
        for total, limit in (node.args, node.args[::-1]):
            total = bare(total)
            if total.kind == "binary" and total.name == "+" and len(total.args) == 2:
                paths = [bare(a).path() for a in total.args]
                wide = [p for p in paths if p in outside and _UNSIGNED_WIDE.match(known.types.get(p, ""))]
                if len(wide) < 2 or len(set(paths)) < 2 or not varies(bare(limit)) or bare(limit).path() in paths:
                    continue
                if not all(_alone_compared(known, p, node) for p in wide) and not _wrap_tested(known, paths):
                    yield node


def _wrap_tested(known: Facts, paths: list[str]) -> bool:
    """`a + b < a`: the sum is asked whether it wrapped round."""
    for node in known.of("binary"):
        if in_order(node):
            for total, other in (node.args, node.args[::-1]):
                total = bare(total)
                if total.kind == "binary" and total.name == "+" and bare(other).path() in paths and {
                    bare(a).path() for a in total.args
                } == set(paths):  # fmt: skip
                    return True
    return False


_UNSIGNED_WIDE = re.compile(
    r"^(const )?(size_t|u?int(32|64)_t|u(32|64)|unsigned( int| long)*|ut(32|64)|guint(32|64)?|gsize)$"
)


def _composed(known: Facts) -> set[str]:
    """Names that are put together from bytes: `n |= *p++ << 8`, `n = p[0] | p[1] << 8`."""
    found = set()
    for node in known.of("assign"):
        if node.base is not None and node.args and node.name in ("=", "|=", "+="):
            value = node.args[0].walk()
            shifted = any(n.kind == "binary" and n.name == "<<" for n in value)
            if shifted and any(n.kind == "index" or (n.kind == "unary" and n.name == "*") for n in value):
                found.add(node.base.path())
    return found


def _alone_compared(known: Facts, path: str, sum_test: Node) -> bool:
    """Whether another comparison bounds the number by itself."""
    return any(
        c is not sum_test and in_order(c) and any(bare(a).path() == path for a in c.args)
        for c, _ in known.compared(path)
    )


@check("offset-endless", "loop", "assign", "call")
def offset_endless(function: Node) -> Iterable[Node]:
    """A loop without a condition writes at an offset that grows, and nothing compares the offset."""
    known = facts(function)
    for loop in known.of("loop"):
        if any(not _always(a) for a in loop.args) or _counted(loop, known) or _grows(loop):
            continue
        for node in [n for part in loop.body for n in part.walk()]:
            if node.kind == "assign" and node.name == "+=" and node.base is not None and node.base.kind == "name":
                name = node.base.name
                if known.compared(name) or not node.args or not varies(bare(node.args[0])):
                    continue
                for use in known.of("call"):
                    if within(known, use, loop) and _writes_at(use, name):
                        yield use
                        return


def _grows(loop: Node) -> bool:
    """Whether the loop makes room."""
    return any(re.search(r"(?i)alloc|grow|reserve|room|resize|ensure|append|expand", called(n)) for n in loop.walk())


def _counted(loop: Node, known: Facts) -> bool:
    """Whether what the loop counts up is compared with something."""
    steps = [n.args[0].path() for n in loop.walk() if n.kind == "unary" and n.name == "++" and n.args]
    return any(known.compared(path) for path in steps if path)


def _always(node: Node) -> bool:
    return node.kind in ("number", "constant", "assign", "unary", "block")


def _writes_at(call: Node, name: str) -> bool:
    for argument in call.args:
        total = bare(argument)
        if total.kind == "binary" and total.name == "+" and any(bare(a).path() == name for a in total.args):
            return not any(bare(a).kind == "string" for a in total.args)
    return False
