"""Checks that a pattern can't express, written in Python and named by rules (`check: name`). Each looks at one
function and gives the nodes at fault."""

from collections.abc import Callable, Iterable

from puna.guard.code.view import Node

Check = Callable[[Node], Iterable[Node]]
CHECKS: dict[str, Check] = {}


def check(name: str) -> Callable[[Check], Check]:
    """Register a check under the name that rules use."""

    def register(function: Check) -> Check:
        if name in CHECKS:
            raise ValueError(f"two checks are called {name!r}")
        CHECKS[name] = function
        return function

    return register
