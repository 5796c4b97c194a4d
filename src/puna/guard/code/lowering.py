"""The walk over a tree-sitter tree that gives the uniform view."""

import re
from collections.abc import Callable
from typing import Any

from tree_sitter import Node as Syntax

from puna.guard.code.budget import Budget
from puna.guard.code.view import Node

MAX_DEPTH = 110  # levels of nesting that are looked into; below it a node is a leaf (keeps recursion bounded)
MAX_NAME = 200  # characters of a name or a type that are looked at
_MARK = re.compile(rb"@\w|(?:^|[#({,;}\]])\s{0,200}\[", re.MULTILINE)
Handler = Callable[["Lowering", Syntax], "Node | None"]


class Lowering:
    """Walks one tree. `shift` is added to byte offsets (for a piece of text that was parsed by itself). Where the
    budget ends, nodes become leaves. `functions`: those met, inner ones first."""

    def __init__(self, table: dict[str, Handler], source: bytes, shift: int = 0, budget: Budget | None = None) -> None:
        self.table = table
        self.read(source)
        self.shift = shift
        self.budget = budget or Budget(1.0)
        self.functions: list[Node] = []
        self.marked = _MARK.search(source) is not None  # whether there may be annotations
        self.steps = 0
        self.depth = 0

    def read(self, source: bytes) -> None:
        """Take this as the text that the tree was made of."""
        self.source = source
        self.plain = source.decode("ascii") if source.isascii() else None

    def text(self, syntax: Syntax | None) -> str:
        if syntax is None:
            return ""
        if self.plain is not None:
            return self.plain[syntax.start_byte : syntax.end_byte]
        return self.source[syntax.start_byte : syntax.end_byte].decode("utf-8", "replace")

    def node(
        self,
        kind: str,
        syntax: Syntax,
        name: str = "",
        base: Node | None = None,
        args: list[Node] | None = None,
        keys: list[str | None] | None = None,
        body: list[Node] | None = None,
        orelse: list[Node] | None = None,
        marks: list[Node] | None = None,
        type: str = "",
        value: Any = None,
        new: bool = False,
    ) -> Node:
        start, end = syntax.start_byte + self.shift, syntax.end_byte + self.shift
        if len(name) > MAX_NAME or len(type) > MAX_NAME:
            name, type = name[:MAX_NAME], type[:MAX_NAME]
        made = Node(kind, start, end, syntax.type, name, base, args, keys, body, orelse, marks, type, value, new)
        if kind == "function":
            self.functions.append(made)
        return made

    def lower(self, syntax: Syntax | None) -> Node | None:
        """One node, or None for what has no meaning (comments, absent fields)."""
        if syntax is None:
            return None
        handler = self.table.get(syntax.type, other)
        self.steps += 1
        if not self.steps % 500:
            self.budget.check()
        if self.depth >= MAX_DEPTH or self.budget.spent:
            if self.depth >= MAX_DEPTH and self.budget.deep is None and syntax.named_child_count:
                self.budget.deep = syntax.start_byte + self.shift
            return self.node("other", syntax)
        self.depth += 1
        made = handler(self, syntax)
        self.depth -= 1
        return made

    def expression(self, syntax: Syntax | None, beside: Syntax) -> Node:
        """As `lower`, but an empty `other` node in place of None."""
        return self.lower(syntax) or self.node("other", syntax or beside)

    def all(self, syntaxes: list[Syntax]) -> list[Node]:
        return [node for syntax in syntaxes if (node := self.lower(syntax)) is not None]

    def block(self, syntax: Syntax | None) -> list[Node]:
        """The statements of a body: a block's own, or the single statement."""
        node = self.lower(syntax)
        if node is None:
            return []
        return node.body if node.kind == "block" else [node]


def other(low: Lowering, syntax: Syntax) -> Node:
    """What a table leaves out: its children in order."""
    return low.node("other", syntax, args=low.all(syntax.named_children))
