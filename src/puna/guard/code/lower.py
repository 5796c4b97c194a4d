"""From a tree-sitter tree to the uniform view: the parts that the tables in `grammars/` are made of.

A table maps a grammar's node type to a function `(lowering, tree-sitter node) -> Node`; the makers below build those
functions from field names. A type that a table
leaves out becomes an `other` node with its children, so that broken or unknown code is still looked into.
"""

import re
from collections.abc import Callable
from typing import Any

from tree_sitter import Node as Syntax

from puna.guard.code.budget import Budget
from puna.guard.code.view import Node

MAX_DEPTH = 110  # levels of nesting that are looked into; below it a node is a leaf (keeps recursion bounded)
Handler = Callable[["Lowering", Syntax], "Node | None"]
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", "a": "\a", "b": "\b", "f": "\f", "v": "\v", "e": "\x1b"}
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|u\{[0-9a-fA-F]{1,6}\}|.)", re.DOTALL)


class Lowering:
    """Walks one tree. `shift` is added to byte offsets (for a piece of text that was parsed by itself). Where the
    budget ends, nodes become leaves."""

    def __init__(self, table: dict[str, Handler], source: bytes, shift: int = 0, budget: Budget | None = None) -> None:
        self.table = table
        self.source = source
        self.shift = shift
        self.budget = budget or Budget(1.0)
        self.steps = 0
        self.depth = 0

    def text(self, syntax: Syntax | None) -> str:
        return "" if syntax is None else self.source[syntax.start_byte : syntax.end_byte].decode("utf-8", "replace")

    def node(self, kind: str, syntax: Syntax, **attributes: Any) -> Node:
        return Node(kind, syntax.start_byte + self.shift, syntax.end_byte + self.shift, syntax.type, **attributes)

    def lower(self, syntax: Syntax | None) -> Node | None:
        """One node, or None for what has no meaning (comments, absent fields)."""
        if syntax is None:
            return None
        handler = self.table.get(syntax.type, other)
        self.steps += 1
        if not self.steps % 500:
            self.budget.check()
        if self.depth >= MAX_DEPTH or self.budget.spent:
            return self.node("other", syntax)
        self.depth += 1
        try:
            return handler(self, syntax)
        finally:
            self.depth -= 1

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


def unescape(text: str) -> str:
    """The usual backslash escapes, resolved; an unknown one keeps its letter."""

    def one(match: re.Match[str]) -> str:
        code = match[1]
        if len(code) > 1:
            point = int(code[1:].strip("{}"), 16)
            return chr(point) if point < 0x110000 else ""
        return _ESCAPES.get(code, code)

    return _ESCAPE.sub(one, text) if "\\" in text else text


def number_value(text: str) -> int | float | None:
    """A literal's value: suffixes and digit separators dropped; None if it can't be read."""
    cleaned = text.replace("_", "").replace("'", "").lower()
    if cleaned.startswith(("-", "+")):
        value = number_value(cleaned[1:])
        return -value if value is not None and cleaned[0] == "-" else value
    for base, prefix in ((16, "0x"), (2, "0b"), (8, "0o")):
        if cleaned.startswith(prefix):
            digits = re.match(r"[0-9a-f]+" if base == 16 else r"[0-7]+", cleaned[2:])
            try:
                return int(digits[0], base) if digits else None
            except ValueError:
                return None
    found = re.match(r"(\d+)(\.\d*)?(e[+-]?\d+)?", cleaned)
    if not found or len(cleaned) > 60:
        return None
    if found[2] is None and found[3] is None:
        digits_only = found[1]
        octal = len(digits_only) > 1 and digits_only[0] == "0" and set(digits_only) <= set("01234567")
        return int(digits_only, 8) if octal else int(digits_only)
    return float(found[0])


# ---- leaves


def other(low: Lowering, syntax: Syntax) -> Node:
    return low.node("other", syntax, args=low.all(syntax.named_children))


def skip(_low: Lowering, _syntax: Syntax) -> None:
    return None


def block(low: Lowering, syntax: Syntax) -> Node:
    return low.node("block", syntax, body=low.all(syntax.named_children))


def inner(field: str | None = None, last: bool = False) -> Handler:
    """A wrapper without meaning of its own (parentheses, expression statements): the one child that counts."""

    def handler(low: Lowering, syntax: Syntax) -> Node | None:
        child = syntax.child_by_field_name(field) if field else None
        if child is None:
            below = [c for c in syntax.named_children if "comment" not in c.type]
            if len(below) != 1 and not last:
                return other(low, syntax)
            child = below[-1] if below else None
        return low.lower(child)

    return handler


def name(low: Lowering, syntax: Syntax) -> Node:
    return low.node("name", syntax, name=low.text(syntax).lstrip("$@&"))


def dotted(low: Lowering, syntax: Syntax) -> Node:
    """A qualified name in one token: `a.b`, `a::b`, `a\\b`."""
    parts = [part for part in re.split(r"::|\\|\.|->", re.sub(r"<[^<>]*>", "", low.text(syntax))) if part.strip()]
    node = low.node("name", syntax, name=(parts[0] if parts else "").strip().lstrip("$@"))
    for part in parts[1:]:
        node = low.node("member", syntax, base=node, name=part.strip().lstrip("$@"))
    return node


def constant(value: bool | None) -> Handler:
    return lambda low, syntax: low.node("constant", syntax, value=value)


def number(low: Lowering, syntax: Syntax) -> Node:
    return low.node("number", syntax, value=number_value(low.text(syntax)))


def string(holes: tuple[str, ...] = (), raw: bool = False, whole: bool = False) -> Handler:
    """A literal. Named children whose type is in `holes` are expressions; `raw`: no escapes; `whole`: one token,
    quotes inside the text."""

    def handler(low: Lowering, syntax: Syntax) -> Node:
        if whole or syntax.child_count == 0:
            text = low.text(syntax).strip("@rRbBuU#")
            return low.node("string", syntax, value=_strip_quotes(text) if raw else unescape(_strip_quotes(text)))
        parts: list[Node] = []
        text = ""
        for child in syntax.children:
            if child.type in holes:
                if text:
                    parts.append(low.node("string", syntax, value=text))
                    text = ""
                found = [c for c in child.named_children if "comment" not in c.type and c.type != "interpolation_brace"]
                target = child.child_by_field_name("expression") or (found[0] if found else None)
                direct = child.type.startswith(("variable_name", "member_access", "subscript", "simple_expansion"))
                parts.append(low.expression(child if direct else target, child))
            elif child.is_named and child.type not in (
                "string_start",
                "string_end",
                "interpolation_start",
                "heredoc_start",
                "heredoc_end",
            ):
                text += low.text(child) if raw else unescape(low.text(child))
        if not parts:
            return low.node("string", syntax, value=text)
        if text:
            parts.append(low.node("string", syntax, value=text))
        return low.node("template", syntax, args=parts)

    return handler


def _strip_quotes(text: str) -> str:
    for quote in ('"""', "'''", '"', "'", "`"):
        if len(text) >= 2 * len(quote) and text.startswith(quote) and text.endswith(quote):
            return text[len(quote) : -len(quote)]
    return text


def adjacent(low: Lowering, syntax: Syntax) -> Node:
    """Literals written side by side, which the language joins."""
    parts = low.all(syntax.named_children)
    if all(part.kind == "string" for part in parts):
        return low.node("string", syntax, value="".join(str(part.value) for part in parts))
    flat = [piece for part in parts for piece in (part.args if part.kind == "template" else [part])]
    return low.node("template", syntax, args=flat)


# ---- expressions


def member(base: str, field: str) -> Handler:
    def handler(low: Lowering, syntax: Syntax) -> Node:
        target = low.expression(syntax.child_by_field_name(base) or next(iter(syntax.named_children), None), syntax)
        return low.node("member", syntax, base=target, name=low.text(syntax.child_by_field_name(field)).lstrip("$@"))

    return handler


def index(base: str, at: str = "") -> Handler:
    def handler(low: Lowering, syntax: Syntax) -> Node:
        below = syntax.named_children
        target = syntax.child_by_field_name(base) or (below[0] if below else None)
        chosen = [syntax.child_by_field_name(at)] if at else below[1:]
        return low.node(
            "index", syntax, base=low.expression(target, syntax), args=low.all([c for c in chosen if c is not None])
        )

    return handler


# argument wrappers: type -> (field of the keyword's name, field of the value); "" takes the last named child
ARGUMENT_TYPES = {
    "argument": ("name", ""),
    "value_argument": ("name", "value"),
    "keyword_argument": ("name", "value"),
    "attribute_argument": ("name", ""),
    "pair": ("key", "value"),
    "element_value_pair": ("key", "value"),
}


def arguments(low: Lowering, syntax: Syntax | None) -> tuple[list[Node], list[str | None]]:
    """The arguments of a call and, beside each, its keyword or None."""
    args: list[Node] = []
    keys: list[str | None] = []
    for child in syntax.named_children if syntax is not None else []:
        key: str | None = None
        value: Syntax | None = child
        fields = ARGUMENT_TYPES.get(child.type)
        if fields is not None:
            named = child.child_by_field_name(fields[0])
            below = child.named_children
            value = child.child_by_field_name(fields[1]) if fields[1] else None
            value = value or (below[-1] if below else None)
            if (
                child.type == "value_argument"
                and named is None
                and len(below) == 2
                and below[0].type in ("identifier", "simple_identifier")
            ):
                named = below[0]  # Kotlin names an argument without a field
            key = low.text(named).strip("'\":") if named is not None else None
        node = low.lower(value)
        if node is not None:
            args.append(node)
            keys.append(key)
    return args, keys


def call(function: str, args: str = "arguments") -> Handler:
    def handler(low: Lowering, syntax: Syntax) -> Node:
        base = low.expression(syntax.child_by_field_name(function), syntax)
        values, keys = arguments(low, syntax.child_by_field_name(args))
        return low.node("call", syntax, base=base, args=values, keys=keys)

    return handler


def method(base: str, field: str, args: str = "arguments") -> Handler:
    """A call whose receiver and name are fields of the call itself; without a receiver, a plain call."""

    def handler(low: Lowering, syntax: Syntax) -> Node:
        named = syntax.child_by_field_name(field)
        receiver = syntax.child_by_field_name(base)
        if receiver is not None:
            text = low.text(named).lstrip("$@")
            callee = Node(
                "member",
                receiver.start_byte + low.shift,
                (named or syntax).end_byte + low.shift,
                syntax.type,
                base=low.expression(receiver, syntax),
                name=text,
            )
        else:
            callee = low.expression(named, syntax)
        values, keys = arguments(low, syntax.child_by_field_name(args))
        return low.node("call", syntax, base=callee, args=values, keys=keys)

    return handler


def new(type_field: str, args: str = "arguments") -> Handler:
    def handler(low: Lowering, syntax: Syntax) -> Node:
        typed = syntax.child_by_field_name(type_field) or next(iter(syntax.named_children), None)
        holder = syntax.child_by_field_name(args) or next(
            (c for c in syntax.named_children if c.type in ("arguments", "argument_list")), None
        )
        values, keys = arguments(low, holder)
        initial = syntax.child_by_field_name("initializer") or next(
            (c for c in syntax.named_children if c.type == "class_body"), None
        )
        below = low.lower(initial)
        base = dotted(low, typed) if typed is not None else low.node("other", syntax)
        return low.node("call", syntax, base=base, args=values, keys=keys, new=True, body=[below] if below else None)

    return handler


def pseudo_call(callee: str) -> Handler:
    """A construct of the language that acts like a function (`echo x`, backticks, `delete p`): its named children are
    the arguments."""

    def handler(low: Lowering, syntax: Syntax) -> Node:
        values = low.all(syntax.named_children)
        values = [
            v
            for value in values
            for v in (value.args if value.raw in ("sequence_expression", "expression_list") else [value])
        ]
        return low.node(
            "call", syntax, base=low.node("name", syntax, name=callee), args=values, keys=[None] * len(values)
        )

    return handler


def shell_literal(holes: tuple[str, ...]) -> Handler:
    """A command in backticks: a call of "`" with the text as its argument."""
    literal = string(holes)

    def handler(low: Lowering, syntax: Syntax) -> Node:
        value = literal(low, syntax)
        return low.node(
            "call", syntax, base=low.node("name", syntax, name="`"), args=[value] if value else [], keys=[None]
        )

    return handler


def binary(left: str = "left", right: str = "right", operator: str = "operator") -> Handler:
    """Two operands. A left-leaning chain of one operator (a + b + c ...) is made flat, however long it is."""

    def handler(low: Lowering, syntax: Syntax) -> Node:
        sign = low.text(syntax.child_by_field_name(operator))
        if not sign:
            sign = next((low.text(c) for c in syntax.children if not c.is_named), "")
        rights: list[Syntax] = []
        at: Syntax | None = syntax
        while (
            at is not None
            and at.type == syntax.type
            and (at is syntax or low.text(at.child_by_field_name(operator)) == sign)
        ):
            found = at.child_by_field_name(right)
            if found is None:
                break
            rights.append(found)
            at = at.child_by_field_name(left)
        values = low.all([*([at] if at is not None else []), *reversed(rights)])
        return low.node("binary", syntax, name=sign, args=values)

    return handler


def generic_binary(low: Lowering, syntax: Syntax) -> Node:
    """An operator between named children without fields."""
    sign = " ".join(low.text(c) for c in syntax.children if not c.is_named and c.type not in "()")
    return low.node("binary", syntax, name=sign, args=low.all(syntax.named_children))


def unary(argument: str = "argument") -> Handler:
    def handler(low: Lowering, syntax: Syntax) -> Node:
        sign = low.text(syntax.child_by_field_name("operator")) or next(
            (low.text(c) for c in syntax.children if not c.is_named), ""
        )
        target = syntax.child_by_field_name(argument) or next(reversed(syntax.named_children), None)
        return low.node("unary", syntax, name=sign, args=low.all([target] if target is not None else []))

    return handler


def conditional(fields: tuple[str, str, str] | None = None, order: tuple[int, int, int] = (0, 1, 2)) -> Handler:
    def handler(low: Lowering, syntax: Syntax) -> Node:
        if fields is not None:
            values = [syntax.child_by_field_name(f) for f in fields]
        else:
            below = syntax.named_children
            values = [below[i] for i in order] if len(below) == 3 else list(below)
        return low.node("conditional", syntax, args=[low.expression(v, syntax) for v in values])

    return handler


def collection(low: Lowering, syntax: Syntax) -> Node:
    return low.node("collection", syntax, args=low.all(syntax.named_children))


def mapping(pair_types: tuple[str, ...], key: str = "key", value: str = "value") -> Handler:
    """A literal of key and value pairs; pairs without the fields are split by position."""

    def handler(low: Lowering, syntax: Syntax) -> Node:
        args: list[Node] = []
        keys: list[str | None] = []
        found_pair = False
        for child in syntax.named_children:
            named: str | None = None
            target: Syntax | None = child
            if child.type in pair_types:
                below = [c for c in child.named_children if "comment" not in c.type]
                at = child.child_by_field_name(key) or (below[0] if len(below) > 1 else None)
                target = child.child_by_field_name(value) or (below[-1] if below else None)
                if at is not None:
                    found_pair = True
                    named = low.text(at).strip("'\"`:[] ")
            node = low.lower(target)
            if node is not None:
                args.append(node)
                keys.append(named)
        return low.node("map" if found_pair else "collection", syntax, args=args, keys=keys if found_pair else None)

    return handler


def cast(type_field: str = "type", value: str = "value") -> Handler:
    def handler(low: Lowering, syntax: Syntax) -> Node:
        target = syntax.child_by_field_name(value) or next(reversed(syntax.named_children), None)
        return low.node(
            "cast",
            syntax,
            type=low.text(syntax.child_by_field_name(type_field)),
            args=low.all([target] if target is not None else []),
        )

    return handler
