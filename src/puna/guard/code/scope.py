"""Where something happens, a call as rules see it, and what the walk reports."""

from dataclasses import dataclass, field

from puna.guard.code.value import Value
from puna.guard.code.view import Node

Env = dict[str, Value]


@dataclass(slots=True)
class Scope:
    """The function (or module, or class body) in which something happens."""

    function: Node | None = None
    klass: Node | None = None
    outer: "Scope | None" = None
    top: Node | None = None  # of the module: all of the source
    returns: list[Value] = field(default_factory=list)
    fields: Env = field(default_factory=dict)  # of a class: what its methods stored in `self` so far
    tests: list[Node] = field(
        default_factory=list
    )  # conditions met so far, for rules that ask whether something was tested
    _calls: frozenset[str] | None = None

    def calls(self) -> frozenset[str]:
        """The paths of everything that is called in the function."""
        if self._calls is None:
            within = self.function or self.top
            nodes = within.walk() if within is not None else []
            self._calls = frozenset(
                n.base.path() or n.base.name for n in nodes if n.kind == "call" and n.base is not None
            )
        return self._calls


@dataclass(slots=True)
class Call:
    """A call as rules see it."""

    node: Node
    paths: tuple[str, ...]
    receiver: Value | None
    args: list[Value]
    keys: list[str | None]
    scope: Scope
    used: bool = True

    def argument(self, position: int | None, key: str | None) -> Value | None:
        """By keyword, else by position among those without one."""
        if key is not None:
            for name, value in zip(self.keys, self.args, strict=False):
                if name == key:
                    return value
                if name is None and value.keys is not None and (found := value.item(key)) is not None:
                    return found  # an options object: f({key: value})
        if position is None:
            return None
        plain = [v for k, v in zip(self.keys, self.args, strict=False) if k is None]
        return plain[position] if -len(plain) <= position < len(plain) else None


class Listener:
    """What the walk reports; `matching.Matcher` listens."""

    def call(self, call: Call) -> None: ...
    def assign(self, node: Node, target: Value, value: Value, scope: Scope) -> None: ...
    def pair(self, node: Node, key: str, value: Value, scope: Scope) -> None: ...
    def compare(self, node: Node, left: Value, right: Value, scope: Scope) -> None: ...
    def text(self, node: Node, value: Value, scope: Scope) -> None: ...
    def result(self, node: Node, value: Value, scope: Scope) -> None: ...
    def enter(self, scope: Scope) -> None: ...
    def imported(self, node: Node, scope: Scope) -> None: ...
    def catch(self, node: Node, scope: Scope) -> None: ...
