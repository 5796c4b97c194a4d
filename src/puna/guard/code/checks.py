"""Checks that a pattern can't express, written in Python and named by rules (`check: name`). Each looks at one
function and gives the nodes at fault."""

from collections.abc import Callable, Iterable

from puna.guard.code.view import Node

Check = Callable[[Node], Iterable[Node]]
CHECKS: dict[str, Check] = {}
NEEDS: dict[Check, frozenset[str]] = {}  # kinds of nodes without which a check finds nothing


def check(name: str, *needs: str) -> Callable[[Check], Check]:
    """Register a check under the name that rules use. `needs`: kinds of nodes without which it finds nothing, so that
    functions that lack them are passed over."""
    wanted = frozenset(needs)

    def register(function: Check) -> Check:
        if name in CHECKS:
            raise ValueError(f"two checks are called {name!r}")

        CHECKS[name] = function
        NEEDS[function] = wanted
        return function

    return register
