"""Checks that a pattern can't express, written in Python and named by rules (`check: name`). Each looks at one
function and gives the nodes at fault."""

from collections.abc import Callable, Iterable

from puna.guard.code.view import Node

Check = Callable[[Node], Iterable[Node]]
CHECKS: dict[str, Check] = {}


def check(name: str) -> Callable[[Check], Check]:
    """Register a check under the name that rules use."""

    def register(function: Check) -> Check:
        CHECKS[name] = function
        return function

    return register


@check("used-after-free")
def used_after_free(function: Node) -> Iterable[Node]:
    """C: a name used after free(name) in the same run of statements, with nothing assigned to it between."""
    for block in [n.body for n in function.walk() if n.body] + [n.orelse for n in function.walk() if n.orelse]:
        freed: set[str] = set()
        for statement in block:
            for node in statement.walk():
                if node.kind == "assign" and node.base is not None and node.name == "=":
                    freed.discard(node.base.path())
                elif node.kind == "unary" and node.name == "&" and node.args:
                    freed.discard(node.args[0].path())
            for node in statement.walk():
                path = node.path() if node.kind in ("name", "member") else ""
                if path in freed and not (
                    statement.kind == "assign" and statement.base is not None and statement.base.path() == path
                ):
                    yield node
                    freed.discard(path)
            if (
                statement.kind == "call"
                and statement.base is not None
                and statement.base.path() in ("free", "delete", "kfree")
                and statement.args
            ):
                path = statement.args[0].path()
                if path:
                    freed.add(path)
