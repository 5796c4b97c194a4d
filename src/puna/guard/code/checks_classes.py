"""Checks of C++'s containers and owning pointers."""

import re
from bisect import bisect_left
from collections.abc import Iterable

from puna.guard.code.checks import check
from puna.guard.code.checks_facts import Facts, bare, called, calls, calls_of, facts, in_order, leaves
from puna.guard.code.view import Node

_CHANGES = ("erase", "push_back", "emplace_back", "clear", "pop_back", "push_front")


@check("container-changed-walking", "loop", "call")
def container_changed_walking(function: Node) -> Iterable[Node]:
    """A container grows or shrinks inside a loop over it: `for (auto& x : v) v.erase(x.id)`."""
    known = facts(function)
    for loop in known.of("loop"):
        path = loop.args[0].path() if loop.raw == "for_range_loop" and loop.args else ""
        for call in [n for part in loop.body for n in part.walk()] if path else ():
            if called(call) not in _CHANGES or call.base is None or call.base.base is None:
                continue
            if call.base.base.path() == path and not _left_after(known, call, loop):
                yield call
                return


def _left_after(known: Facts, call: Node, loop: Node) -> bool:
    """Whether the loop is left once the call was made."""
    below, above = call, known.parent[id(call)]
    while below is not loop:
        for run in (above.body, above.orelse):
            if any(n is below for n in run) and leaves(run) and run[-1].raw != "continue_statement":
                return True
        below, above = above, known.parent.get(id(above), loop)
    return False


@check("moved-used", "call")
def moved_used(function: Node) -> Iterable[Node]:
    """A pointer is reached through in a statement after the one that moved it away."""
    known = facts(function)
    uses: dict[str, list[Node]] = {}
    for node in known.of("name") if "move" in calls(function) else ():
        uses.setdefault(node.name, []).append(node)
    for call in calls_of(function, ("move",)):
        name = bare(call.args[0]) if len(call.args) == 1 else call
        if name.kind != "name" or call.base is None or call.base.path() not in ("std.move", "move"):
            continue
        below, above = call, known.parent[id(call)]
        while above.kind not in ("block", "function", "if", "loop", "conditional", "return", "other"):
            below, above = above, known.parent[id(above)]
        if above.kind not in ("block", "function") or any(n.name == name.name for n in _written(below)):
            continue
        end = known.place[id(below)] + len(below.walk())
        at = bisect_left(uses[name.name], end, key=lambda n: known.place[id(n)])
        use = uses[name.name][at] if at < len(uses[name.name]) else None
        if use is None or not any(n is above for n in known.ancestors(use)):
            continue
        through = known.parent[id(use)]
        arrow = through.kind == "member" and through.value == "->"
        if arrow or (through.kind == "unary" and through.name == "*" and "ptr" in known.types.get(name.name, "")):
            yield through


def _written(statement: Node) -> list[Node]:
    return [n.base for n in statement.walk() if n.kind == "assign" and n.base is not None]


@check("size-less-one", "loop", "binary", "index")
def size_less_one(function: Node) -> Iterable[Node]:
    """`for (size_t i = 0; i < v.size() - 1; i++)`: of an empty container the bound is the largest number."""
    known = facts(function)
    for loop in known.of("loop"):
        test = loop.args[-1] if loop.args else loop
        if not in_order(test) or test.name not in ("<", "<="):
            continue
        bound, index = bare(test.args[1]), bare(test.args[0]).path()
        if bound.kind != "binary" or bound.name != "-" or bare(bound.args[1]).kind != "number":
            continue
        size = bare(bound.args[0])
        if called(size) not in ("size", "length") or size.base is None or size.base.base is None:
            continue
        path = size.base.base.path()
        if not re.search(r"size_t|unsigned|uint", known.types.get(index, "")) or _size_asked(known, path, size):
            continue
        inside = [n for part in loop.body for n in part.walk() if n.kind == "index" and n.base is not None]
        if any(n.base is not None and n.base.path() == path for n in inside):
            yield test


def _size_asked(known: Facts, path: str, size: Node) -> bool:
    """Whether another condition asks how much the container holds."""
    return any(
        n is not size
        and called(n) in ("size", "length", "empty")
        and n.base is not None
        and n.base.base is not None
        and n.base.base.path() == path
        and (known.in_test(n) or known.place[id(n)] < known.place[id(size)])
        for n in known.of("call")
    )
