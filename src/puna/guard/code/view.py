"""The uniform view of a program: one small tree for every language, so that a rule is written once.

Kinds of `Node`, and the attributes that each one fills (all others stay at their defaults):

    name         name                                    `x`, `$x`, `@x` (sigils dropped)
    member       base, name                              `a.b`, `a->b`, `a::b`
    index        base, args                              `a[i]`
    call         base (what is called), args, keys, new  `f(x, k=1)`, `new F(x)`; `keys[i]` names a keyword argument
    string       value                                   a literal without holes
    number       value                                   int, float, or None if unreadable
    constant     value                                   True, False, None
    template     args                                    literal with holes: strings and expressions in order
    binary       name (operator), args                   two operands; a chain of one operator is flat: many operands
    unary        name (operator), args
    conditional  args                                    condition, then, else as values
    collection   args                                    list, tuple, set, array
    map          args, keys                              `keys[i]` is the text of a constant key, else None
    cast         type, args
    function     name, args (parameters), body, marks, type   `marks`: decorators, annotations, attributes (nodes)
    parameter    name, type, args (default), marks
    class        name, args (bases), body, marks
    assign       base (target), args (value), name (operator), type   declarations too; no args: declared only
    import       value                                   list of (local name, full dotted path)
    if           args (condition), body, orelse
    loop         base (target or None), args (iterable or condition), body
    catch        name (bound name), type (what is caught), body
    block        body
    return, throw, exit (break, continue, goto)          args
    other        args                                    anything else: children in order
"""

from typing import Any, cast

_NONE = cast("list[Any]", ())  # shared by all nodes that have none: most have, and lists cost time


class Node:
    """One piece of a program, see the module's table. `start` and `end` are byte offsets into the source; `raw` is
    the grammar's own type."""

    __slots__ = (
        "args",
        "base",
        "body",
        "end",
        "keys",
        "kind",
        "marks",
        "name",
        "new",
        "orelse",
        "raw",
        "spelt",
        "start",
        "type",
        "value",
    )

    def __init__(
        self,
        kind: str,
        start: int,
        end: int,
        raw: str,
        name: str = "",
        base: "Node | None" = None,
        args: "list[Node] | None" = None,
        keys: "list[str | None] | None" = None,
        body: "list[Node] | None" = None,
        orelse: "list[Node] | None" = None,
        marks: "list[Node] | None" = None,
        type: str = "",
        value: Any = None,
        new: bool = False,
    ) -> None:
        self.kind = kind
        self.start = start
        self.end = end
        self.raw = raw
        self.name = name
        self.base = base
        self.args: list[Node] = args or _NONE
        self.keys = keys
        self.body: list[Node] = body or _NONE
        self.orelse: list[Node] = orelse or _NONE
        self.marks: list[Node] = marks or _NONE
        self.type = type
        self.value = value
        self.new = new
        self.spelt: str | None = None  # what `path` gave

    def __repr__(self) -> str:
        return (
            f"Node({self.kind} {self.name or self.value or ''} {self.base or ''} {self.args or ''} {self.body or ''})"
        )

    def path(self) -> str:
        """`a.b().c[]` for a chain of names, members, calls and indexes; "" where it starts with anything else."""
        found = self.spelt
        if found is None:
            found = self.spelt = self._spell()
        return found

    def _spell(self) -> str:
        parts: list[str] = []
        node: Node | None = self
        while node is not None:
            if node.kind == "name":
                parts.append(node.name)
                return "".join(reversed(parts))
            if node.kind == "member":
                parts.append("." + node.name)
            elif node.kind == "call":
                parts.append("" if node.new else "()")
            elif node.kind == "index":
                parts.append("[]")
            else:
                return ""
            node = node.base
        return ""

    def children(self) -> "list[Node]":
        """Every node directly below, in source order where it matters."""
        below = [self.base] if self.base is not None else []
        return [*below, *self.marks, *self.args, *self.body, *self.orelse]

    def walk(self) -> "list[Node]":
        """This node and everything below it."""
        found: list[Node] = []
        stack = [self]
        while stack:
            node = stack.pop()
            found.append(node)
            if node.orelse:
                stack.extend(reversed(node.orelse))
            if node.body:
                stack.extend(reversed(node.body))
            if node.args:
                stack.extend(reversed(node.args))
            if node.marks:
                stack.extend(reversed(node.marks))
            if node.base is not None:
                stack.append(node.base)
        return found
