"""Checks that a pattern can't express, written in Python and named by rules (`check: name`). Each looks at one
function and gives the nodes at fault."""

from collections.abc import Callable, Iterable

from puna.guard.code.checks_facts import facts
from puna.guard.code.view import Node

Check = Callable[[Node], Iterable[Node]]
CHECKS: dict[str, Check] = {}


def check(name: str, *needs: str) -> Callable[[Check], Check]:
    """Register a check under the name that rules use. `needs`: kinds of nodes without which it finds nothing, so that
    functions that lack them are passed over."""
    wanted = frozenset(needs)

    def register(function: Check) -> Check:
        if name in CHECKS:
            raise ValueError(f"two checks are called {name!r}")

        def run(node: Node) -> Iterable[Node]:
            return function(node) if facts(node).kinds.keys() >= wanted else ()

        CHECKS[name] = run
        return function

    return register
