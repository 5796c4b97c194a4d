"""Checks of steps in C and C++ through strings, lists, tables and containers that go past the end."""

import re
from collections.abc import Iterable, Iterator

from puna.guard.code.checks import check
from puna.guard.code.checks_facts import Facts, alternatives, bare, called, facts, in_order, plain, within
from puna.guard.code.checks_null import null_tested
from puna.guard.code.view import Node


@check("escape-past-end", "if", "binary", "unary", "string")
def escape_past_end(function: Node) -> Iterable[Node]:
    """`if (*p++ == '\\\\') p++;`: a backslash at the very end of the text makes the step go past the final NUL."""
    known = facts(function)
    for node in known.of("if"):
        if not node.args or node.orelse:
            continue
        test = bare(node.args[0])
        if test.kind != "binary" or test.name != "==" or bare(test.args[1]).value != "\\":
            continue
        target = bare(test.args[0])
        if not (target.kind == "unary" and target.name == "*" and target.args[0].kind == "unary"):
            continue
        path = target.args[0].args[0].path()
        first = node.body[0] if node.body else None
        while first is not None and first.kind == "block" and first.body:
            first = first.body[0]
        if path and first is not None and first.kind == "unary" and first.name == "++" and first.args[0].path() == path:
            yield first


@check("list-walked-blind", "loop", "assign", "member")
def list_walked_blind(function: Node) -> Iterable[Node]:
    """`while (p->kind == X) p = p->next;` where p was tested for NULL before the loop, but not after each step."""
    known = facts(function)
    for loop in known.of("loop"):
        if len(loop.args) != 1:
            continue
        used = {n.base.path() for n in loop.args[0].walk() if n.kind == "member" and n.base is not None}
        for node in [n for part in loop.body for n in part.walk()]:
            if node.kind != "assign" or node.base is None or not node.args or node.base.path() not in used:
                continue
            path, value = node.base.path(), bare(node.args[0])
            if value.kind != "member" or value.base is None or value.base.path() != path:
                continue
            asked = {p for a in loop.args for n in a.walk() for p in [n.path()] if not _compared_inside(loop, p)}
            if value.path() in asked or _null_test_in(loop, path) or not _null_test_before(loop, path, known):
                continue
            yield node


def _compared_inside(loop: Node, path: str) -> bool:
    """Whether the condition only reaches through `path`, which says nothing of whether it is NULL."""
    return any(n.kind == "member" and n.base is not None and n.base.path() == path for a in loop.args for n in a.walk())


def _null_test_in(loop: Node, path: str) -> bool:
    for node in loop.walk():
        if path in null_tested(node):
            return True
        if node.kind == "binary" and node.name in ("&&", "||") and any(bare(a).path() == path for a in node.args):
            return True
        if node.kind in ("if", "conditional") and node.args and bare(node.args[0]).path() == path:
            return True
        if (
            (in_order(node) or node.name in ("==", "!="))
            and node.kind == "binary"
            and any(bare(a).path() == path for a in node.args)
        ):
            return True
    return False


def _null_test_before(loop: Node, path: str, known: Facts) -> bool:
    for node in known.nodes[: known.place[id(loop)]]:
        zero = node.kind == "binary" and node.name in ("==", "!=") and bare(node.args[1]).value in (0, None)
        if path in null_tested(node) or (zero and bare(node.args[0]).path() == path):
            return True
    return False


@check("find-unchecked", "assign", "call", "member")
def find_unchecked(function: Node) -> Iterable[Node]:
    """C++: `it = m.find(k)` and then `it->second` before anything compared it with `m.end()`."""
    known = facts(function)
    for node in known.of("assign"):
        if node.base is None or not node.args or not node.base.path():
            continue
        value = bare(node.args[0])
        if called(value) not in ("find", "lower_bound", "upper_bound", "find_if") or value.base is None:
            continue
        if value.base.kind != "member" and called(value) != "find_if":
            continue
        path = node.base.path()
        for use in known.nodes[known.place[id(node)] + len(node.walk()) :]:
            if use.kind == "binary" and use.name in ("==", "!=") and any(bare(a).path() == path for a in use.args):
                break
            if use.kind == "call" and any(bare(a).path() == path for a in use.args):
                break
            if use.kind in ("if", "loop") and use.args and _tests_itself(use.args[0], path):
                break
            if use.kind == "assign" and use.base is not None and use.base.path() == path:
                break
            if (
                use.kind == "member"
                and use.name in ("first", "second")
                and use.base is not None
                and use.base.path() == path
            ):
                yield use
                break


def _tests_itself(test: Node, path: str) -> bool:
    return any(bare(part).path() == path for part in alternatives(test))


_ATTRIBUTE = re.compile(r"^(nla_(get|data|len|memcpy|strlcpy|parse_nested)\w*|RTA_DATA)$")


@check("attribute-unchecked", "call", "index")
def attribute_unchecked(function: Node) -> Iterable[Node]:
    """Netlink: the value of an attribute is read that the message may lack, though others are asked for."""
    known = facts(function)
    asked = [(_entry(n), known.place[id(n)]) for n in known.nodes if n.kind == "index" and known.in_test(n)]
    names = {name for name, _ in asked if name}
    for node in known.of("call"):
        if _ATTRIBUTE.match(called(node)):
            for argument in node.args[:2]:
                name = _entry(bare(argument))
                if name and name not in names and any(a.split("[")[0] == name.split("[")[0] for a in names):
                    yield node


def _entry(node: Node) -> str:
    """`info->attrs[NAME]` with its key; "" for anything else."""
    if node.kind == "index" and node.base is not None and len(node.args) == 1:
        key = bare(node.args[0])
        if key.kind == "name" and key.name.isupper():
            return f"{node.base.path()}[{key.name}]"
    return ""


_KEPT = re.compile(
    r"^(k[mvz]?[mzc]alloc|alloc_\w*(workqueue|netdev|page|skb|disk)\w*|create_\w*workqueue|kstrdup|kmemdup|kcalloc)$"
)


@check("allocation-untested", "assign", "call")
def allocation_untested(function: Node) -> Iterable[Node]:
    """Memory or an object is made and kept beyond the function, and nothing in it asks whether there was any."""
    known = facts(function)
    for node in known.of("assign"):
        if node.base is None or not node.args or node.name != "=" or known.in_test(node):
            continue
        name, path = called(bare(node.args[0])), node.base.path()
        if not path or not _KEPT.match(name):
            continue
        if path in known.tested or path in known.types or any(_passes_on(n, path) for n in known.nodes):
            continue
        yield node


def _passes_on(node: Node, path: str) -> bool:
    if node.kind == "return":
        return any(n.path() == path for a in node.args for n in a.walk())
    return node.kind == "call" and any(bare(a).path() == path for a in node.args)


@check("second-index-free", "loop", "index", "unary")
def second_index_free(function: Node) -> Iterable[Node]:
    """A loop's condition bounds one index, its body reads by another that steps on as well and is never compared."""
    known = facts(function)
    for loop in known.of("loop"):
        if not any(in_order(n) for a in loop.args for n in a.walk()):
            continue
        for node, name in _stepped_reads(loop, known):
            if (
                (name in known.parameters or _from_parameter(name, known))
                and not _bounds(known, name)
                and within(known, node, loop)
            ):
                yield node
                return


def _bounds(known: Facts, name: str) -> bool:
    """Whether the variable itself is compared by order."""
    return any(in_order(n) and any(plain(a, name) for a in n.args) for n in known.nodes)


def _stepped_reads(loop: Node, known: Facts) -> Iterator[tuple[Node, str]]:
    """(place, name) of every `a->b[name++]` that is read and not written in the loop."""
    for node in [n for part in loop.body for n in part.walk()]:
        if node.kind == "index" and len(node.args) == 1 and node.base is not None and node.base.kind == "member":
            step = bare(node.args[0])
            above = known.parent.get(id(node))
            written = above is not None and above.kind == "assign" and above.base is node
            if step.kind == "unary" and step.name == "++" and step.args and step.args[0].kind == "name" and not written:
                yield node, step.args[0].name


def _from_parameter(name: str, known: Facts) -> bool:
    return any(
        n.kind == "assign" and n.base is not None and n.base.path() == name and n.args
        and bare(n.args[0]).kind == "name" and bare(n.args[0]).name in known.parameters
        for n in known.nodes
    )  # fmt: skip


@check("end-unasked", "loop", "unary")
def end_unasked(function: Node) -> Iterable[Node]:
    """A loop reads on through a pointer that came with its end, and nothing compares the two."""
    known = facts(function)
    for one, other in zip(function.args, function.args[1:], strict=False):
        if not (one.type.endswith("*") and other.type.endswith("*") and re.search(r"(?i)end$", other.name)):
            continue
        if any(n.kind == "name" and n.name == other.name for n in known.nodes):
            continue
        for loop in known.of("loop"):
            if loop.kind == "loop":
                for node in loop.walk():
                    if (
                        node.kind == "unary"
                        and node.name == "*"
                        and node.args[0].kind == "unary"
                        and node.args[0].name == "++"
                        and node.args[0].args[0].path() == one.name
                    ):
                        yield node
                        return


@check("inner-loop-unbounded", "loop", "unary", "binary")
def inner_loop_unbounded(function: Node) -> Iterable[Node]:
    """The outer loop asks whether the pointer has reached the end; the inner one reads on through it and doesn't."""
    known = facts(function)
    for outer in known.of("loop"):
        if not outer.args:
            continue
        limits = {
            bare(a).path()
            for test in outer.args
            for n in test.walk()
            if in_order(n)
            for a in n.args
            if known.types.get(bare(a).path(), "").endswith("*")
        }
        for inner in [n for part in outer.body for n in part.walk() if n.kind == "loop"] if limits else []:
            for node in inner.walk():
                step = node.args[0] if node.kind == "unary" and node.name == "*" else node
                if not (step.kind == "unary" and step.name == "++" and node is not step):
                    continue
                path = step.args[0].path()
                if path in limits and not _compared_within(outer, path) and not _compared_in(inner, path):
                    yield node
                    return


def _compared_in(loop: Node, path: str) -> bool:
    for node in loop.walk():
        looks = node.kind == "call" or (node.kind == "binary" and (in_order(node) or node.name in ("==", "!=", "-")))
        if looks and any(bare(a).path() == path for a in node.args):
            return True
    return False


def _compared_within(loop: Node, path: str) -> bool:
    """Whether the loop's body compares the pointer, or gives it to something that may."""
    return any(_compared_in(part, path) for part in loop.body)
