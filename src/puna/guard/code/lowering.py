"""The walk over a tree-sitter tree that gives the uniform view."""

import re
from collections.abc import Callable
from typing import Any

from tree_sitter import Node as Syntax

from puna.guard.code.budget import Budget
from puna.guard.code.view import Node

MAX_DEPTH = 110  # levels of nesting that are looked into; below it a node is a leaf (keeps recursion bounded)
MAX_NAME = 200  # characters of a name or a type that are looked at
LOOK = 500  # nodes after which the budget is asked again
_MARKS = {  # how a grammar's annotations begin; in all others by an @
    "csharp": re.compile(rb"(?:^|[#({,;}\]])\s{0,200}\[", re.MULTILINE),
    "php": re.compile(rb"#\["),
    "php_only": re.compile(rb"#\["),
    "rust": re.compile(rb"#!?\["),
}
_MARK = re.compile(rb"@\w")
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
        self.marked = True  # whether there may be annotations
        self.steps = 0
        self.depth = 0
        self.most = MAX_DEPTH  # nothing below this depth is looked into: all of it once the budget is spent

    def look_for_marks(self, name: str) -> None:
        """Whether the source has annotations as the grammar writes them."""
        self.marked = _MARKS.get(name, _MARK).search(self.source) is not None

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
        self.steps += 1
        if self.steps >= LOOK:
            self.steps = 0
            if self.budget.check():
                self.most = 0
        return made

    def named(self, syntax: Syntax) -> Node:
        """A name as it is written: the commonest node, made without detours."""
        start, end = syntax.start_byte, syntax.end_byte
        plain = self.plain
        text = plain[start:end] if plain is not None else self.source[start:end].decode("utf-8", "replace")
        if end - start > MAX_NAME:
            text = text[:MAX_NAME]
        return Node("name", start + self.shift, end + self.shift, syntax.type, text)

    def lower(self, syntax: Syntax | None) -> Node | None:
        """One node, or None for what has no meaning (comments, absent fields)."""
        if syntax is None:
            return None
        if self.depth >= self.most:
            return self.cut(syntax)
        self.depth += 1
        made = self.table.get(syntax.type, other)(self, syntax)
        self.depth -= 1
        return made

    def cut(self, syntax: Syntax) -> Node:
        """A leaf in place of what is nested too deeply, or comes too late."""
        if self.depth >= MAX_DEPTH and self.budget.deep is None and syntax.named_child_count:
            self.budget.deep = syntax.start_byte + self.shift
        return self.node("other", syntax)

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
