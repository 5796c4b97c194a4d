"""What the checks of C and C++ ask of a function: its nodes in order, its conditions, its declarations."""

import re
from collections.abc import Iterator
from functools import lru_cache

from puna.guard.code.view import Node

LEAVES = ("return", "throw", "exit")


_ASSERTS = re.compile(
    r"(?i)assert|check|require|expect|ensure|verify|BUG_ON|WARN_ON|IS_ERR|^(UN)?LIKELY$|THROW_IF|validate"
)


_NO_NODES: list[Node] = []


class Facts:
    """One function, looked at once: nodes in source order with their parents, blocks, and what conditions test."""

    def __init__(self, function: Node) -> None:
        self.nodes: list[Node] = []
        self.parent: dict[int, Node] = {}
        self.place: dict[int, int] = {}
        self.parent.update((id(n), function) for n in function.body)
        stack = list(reversed(function.body))
        while stack:
            node = stack.pop()
            self.place[id(node)] = len(self.nodes)
            self.nodes.append(node)
            below = [*node.args, *([node.base] if node.base is not None else []), *node.body, *node.orelse]
            if function.raw == "module":
                below = [n for n in below if n.kind not in ("function", "class")]
            for child in below:
                self.parent[id(child)] = node
            stack.extend(reversed(below))
        self.kinds: dict[str, list[Node]] = {}
        for node in self.nodes:
            self.kinds.setdefault(node.kind, []).append(node)
        self.arrays: dict[str, Node] = {}
        self.static: set[str] = set()
        self.types: dict[str, str] = {a.name: a.type for a in function.args}
        self.parameters = {a.name for a in function.args if a.name}
        for node in self.of("assign"):
            if node.base is not None and node.type and node.base.kind == "name":
                self.types.setdefault(node.base.name, node.type)
                if node.marks:
                    self.static.add(node.base.name)
                if node.type.endswith("[]") and isinstance(node.value, Node):
                    self.arrays[node.base.name] = node.value
        self.tests = [test for node in self.nodes for test in _tests(node) if id(test) in self.place]
        self.testing = {id(test) for test in self.tests}
        self.tested: dict[str, list[int]] = {}
        for test in self.tests:
            at = self.place[id(test)]
            for node in test.walk():
                path = node.path() if node.kind in ("name", "member", "index") else ""
                if path:
                    self.tested.setdefault(path, []).append(at)

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
