"""What the checks of C and C++ ask of a function: its nodes in order, its conditions, its declarations."""

import re
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache

from puna.guard.code.budget import Watched, running
from puna.guard.code.view import Node

LARGE = 2000  # nodes of a function whose checks look at the clock
LEAVES = ("return", "throw", "exit")


_ASSERTS = re.compile(
    r"(?i)assert|check|require|expect|ensure|verify|BUG_ON|WARN_ON|IS_ERR|^(UN)?LIKELY$|THROW_IF|validate"
)


_NO_NODES: list[Node] = []
_TESTING = frozenset({"if", "conditional", "loop", "binary", "unary", "call"})


class Facts:
    """One function, looked at once: nodes in source order; and, when first asked for, their parents, places,
    declarations, and what conditions test."""

    def __init__(self, function: Node) -> None:
        self.function = function
        self.nodes: list[Node] = []
        self.kinds: dict[str, list[Node]] = {}
        nodes, kinds = self.nodes, self.kinds
        whole = function.raw != "module"  # of a module only what stands outside its functions and classes
        stack = function.body[::-1]
        while stack:
            node = stack.pop()
            kind = node.kind
            if not whole and (kind == "function" or kind == "class"):
                continue
            nodes.append(node)
            same = kinds.get(kind)
            if same is None:
                kinds[kind] = [node]
            else:
                same.append(node)
            if node.orelse:
                stack += node.orelse[::-1]
            if node.body:
                stack += node.body[::-1]
            if node.base is not None:
                stack.append(node.base)
            if node.args:
                stack += node.args[::-1]
        budget = running.get()
        if budget is not None and len(nodes) > LARGE:
            self.nodes = Watched(nodes, budget)
            self.kinds = {kind: Watched(same, budget) for kind, same in kinds.items()}

    @cached_property
    def parent(self) -> dict[int, Node]:
        """What each node is directly in, by the node's id."""
        found = {id(node): self.function for node in self.function.body}
        for node in self.nodes:
            if node.args:
                for child in node.args:
                    found[id(child)] = node
            if node.base is not None:
                found[id(node.base)] = node
            if node.body:
                for child in node.body:
                    found[id(child)] = node
            if node.orelse:
                for child in node.orelse:
                    found[id(child)] = node
        return found

    @cached_property
    def place(self) -> dict[int, int]:
        """Where each node stands in `nodes`, by its id."""
        return {id(node): at for at, node in enumerate(self.nodes)}

    @cached_property
    def parameters(self) -> set[str]:
        return {a.name for a in self.function.args if a.name}

    @cached_property
    def types(self) -> dict[str, str]:
        """The declared types of parameters and variables, by name."""
        found = {a.name: a.type for a in self.function.args}
        for node in self._declared:
            assert node.base is not None
            found.setdefault(node.base.name, node.type)
        return found

    @cached_property
    def static(self) -> set[str]:
        return {node.base.name for node in self._declared if node.marks and node.base is not None}

    @cached_property
    def arrays(self) -> dict[str, Node]:
        """The sizes of the arrays that are declared here, by name."""
        return {
            node.base.name: node.value
            for node in self._declared
            if node.base is not None and node.type.endswith("[]") and isinstance(node.value, Node)
        }

    @cached_property
    def _declared(self) -> list[Node]:
        return [n for n in self.of("assign") if n.type and n.base is not None and n.base.kind == "name"]

    @cached_property
    def tests(self) -> list[Node]:
        """The conditions, and what is compared or asserted, in order."""
        if not self.kinds.keys() & _TESTING:
            return []
        found = [test for node in self.nodes if node.kind in _TESTING for test in _tests(node)]
        return [test for test in found if id(test) in self.place]

    @cached_property
    def testing(self) -> set[int]:
        return {id(test) for test in self.tests}

    @cached_property
    def tested(self) -> dict[str, list[int]]:
        """Where each path is tested, by the place of the condition."""
        found: dict[str, list[int]] = {}
        for test in self.tests:
            at = self.place[id(test)]
            for node in test.walk():
                path = node.path() if node.kind in ("name", "member", "index") else ""
                if path:
                    found.setdefault(path, []).append(at)
        return found

    def of(self, kind: str) -> list[Node]:
        """The nodes of one kind, in order."""
        return self.kinds.get(kind, _NO_NODES)

    def in_test(self, node: Node) -> bool:
        """Whether the node is (part of) a condition."""
        return id(node) in self.testing or any(id(above) in self.testing for above in self.ancestors(node))

    def ancestors(self, node: Node) -> Iterator[Node]:
        above = self.parent.get(id(node))
        while above is not None:
            yield above
            above = self.parent.get(id(above))

    def nested(self, node: Node) -> bool:
        """Whether the node is under a condition, in a loop, or at a label or a case."""
        return any(
            above.kind in ("if", "loop", "conditional", "catch", "other")
            or above.raw in ("labeled_statement", "case_statement")
            for above in self.ancestors(node)
        )

    def compared(self, path: str) -> list[tuple[Node, Node]]:
        """(comparison, other side) for every comparison of orders or equality that has `path` on one side."""
        found = []
        for node in self.of("binary"):
            if node.name in ("<", ">", "<=", ">=", "==", "!=") and len(node.args) == 2:
                for one, other in (node.args, node.args[::-1]):
                    if any(n.path() == path for n in one.walk()):
                        found.append((node, other))
        return found


@lru_cache(maxsize=2)
def facts(function: Node) -> Facts:
    return Facts(function)


@lru_cache(maxsize=2)
def calls(function: Node) -> dict[str, list[Node]]:
    """The function's calls by the last name of what they call."""
    found: dict[str, list[Node]] = {}
    for node in facts(function).of("call"):
        found.setdefault(called(node), []).append(node)
    return found


def calls_of(function: Node, names: Iterable[str]) -> Iterator[Node]:
    """The calls of functions of these names, in order for each name."""
    known = calls(function)
    return (call for name in names for call in known.get(name, ()))


@lru_cache(maxsize=2)
def shapes(function: Node) -> set[str]:
    """The grammar's own types of the function's nodes."""
    return {node.raw for node in facts(function).nodes}


def _tests(node: Node) -> list[Node]:
    if node.kind == "if" or node.kind == "conditional":
        return node.args[:1]
    if node.kind == "loop":
        return node.args
    if node.kind == "binary" and node.name in ("&&", "||", "==", "!="):
        return [node]
    if node.kind == "unary" and node.name == "!":
        return [node]
    if node.kind == "call" and node.base is not None and (_ASSERTS.search(node.base.name) or node.base.name.isupper()):
        return node.args
    return []


def bare(node: Node) -> Node:
    """Without casts and single wrappers."""
    while node.kind in ("cast", "other") and len(node.args) == 1:
        node = node.args[0]
    return node


def called(node: Node) -> str:
    """The last name of what a call calls; "" for anything else."""
    return node.base.name if node.kind == "call" and node.base is not None else ""


def leaves(nodes: list[Node]) -> bool:
    """Whether a run of statements ends by leaving it."""
    if not nodes:
        return False
    last = nodes[-1]
    return (
        last.kind in LEAVES
        or (last.kind == "block" and leaves(last.body))
        or called(last) in ("exit", "abort", "_exit")
    )


def dereferenced(node: Node) -> Node | None:
    """What `node` reaches through, if it is `p->x`, `p[i]` or `*p`."""
    if node.kind == "index" or (node.kind == "member" and node.value == "->"):
        return node.base
    if node.kind == "unary" and node.name == "*" and node.args:
        return node.args[0]
    return None


def in_sizeof(node: Node, known: Facts) -> bool:
    return any(called(above) in ("sizeof", "typeof", "offsetof") for above in known.ancestors(node))


def address_only(node: Node, known: Facts) -> bool:
    """`&p->x` computes an address without reading."""
    for above in known.ancestors(node):
        if above.kind == "unary" and above.name == "&":
            return True
        if above.kind not in ("member", "index"):
            return False
    return False


def in_order(node: Node) -> bool:
    return node.kind == "binary" and node.name in ("<", ">", "<=", ">=") and len(node.args) == 2


def alternatives(test: Node) -> list[Node]:
    test = bare(test)
    if test.kind == "binary" and test.name == "||":
        return [part for arg in test.args for part in alternatives(arg)]
    return [test]


def plain(node: Node, path: str) -> bool:
    """The value itself, or it in a sum or product."""
    node = bare(node)
    if node.kind == "binary" and node.name in ("+", "*", "-"):
        return any(plain(a, path) for a in node.args)
    return node.kind in ("name", "member", "index") and node.path() == path


def within(known: Facts, node: Node, loop: Node) -> bool:
    return any(above is loop for above in known.ancestors(node))
