"""From a tree-sitter tree to the uniform view: the parts that the tables in `grammars/` are made of.

A table maps a grammar's node type to a function `(lowering, tree-sitter node) -> Node`; the makers below build those
functions from field names. A type that a table
leaves out becomes an `other` node with its children, so that broken or unknown code is still looked into.
"""

import re

from tree_sitter import Node as Syntax

from puna.guard.code.literals import number_value, strip_quotes, unescape
from puna.guard.code.lowering import MAX_DEPTH, Handler, Lowering, other
from puna.guard.code.view import Node

# ---- leaves


def skip(_low: Lowering, _syntax: Syntax) -> None:
    return None


def block(low: Lowering, syntax: Syntax) -> Node:
    return low.node("block", syntax, body=low.all(syntax.named_children))


def inner(field: str | None = None, last: bool = False) -> Handler:
    """A wrapper without meaning of its own (parentheses, expression statements): the one child that counts."""

    def handler(low: Lowering, syntax: Syntax) -> Node | None:
        child = syntax.child_by_field_name(field) if field else None
        if child is None and syntax.named_child_count == 1:
            child = syntax.named_child(0)
            if child is not None and "comment" in child.type:
                return other(low, syntax) if not last else None
        elif child is None:
            below = [c for c in syntax.named_children if "comment" not in c.type]
            if len(below) != 1 and not last:
                return other(low, syntax)
            child = below[-1] if below else None
        return low.lower(child)

    return handler


def name(low: Lowering, syntax: Syntax) -> Node:
    """A name without its sigil."""
    made = low.named(syntax)
    made.name = made.name.lstrip("$@&")
    return made


def dotted(low: Lowering, syntax: Syntax) -> Node:
    """A qualified name in one token: `a.b`, `a::b`, `a\\b`."""
    made = low.named(syntax)
    text = made.name
    if text.isidentifier():
        return made
    parts = [part for part in re.split(r"::|\\|\.|->", re.sub(r"<[^<>]*>", "", text)) if part.strip()]
    node = low.node("name", syntax, name=(parts[0] if parts else "").strip().lstrip("$@"))
    for part in parts[1:MAX_DEPTH]:
        node = low.node("member", syntax, base=node, name=part.strip().lstrip("$@"))
    return node


def constant(value: bool | None) -> Handler:
    return lambda low, syntax: low.node("constant", syntax, value=value)


def number(low: Lowering, syntax: Syntax) -> Node:
    return low.node("number", syntax, value=number_value(low.text(syntax)))


_DELIMITERS = frozenset({"string_start", "string_end", "interpolation_start", "heredoc_start", "heredoc_end"})
_PREFIX = re.compile(r"^[@$rRbBuUL#]+(?=[\"'`])")  # of a literal: r"...", b'...', @"...", r#"..."#


def string(holes: tuple[str, ...] = (), raw: bool = False, whole: bool = False) -> Handler:
    """A literal. Named children whose type is in `holes` are expressions; `raw`: no escapes; `whole`: one token,
    quotes inside the text."""

    def handler(low: Lowering, syntax: Syntax) -> Node:
        if whole or syntax.child_count == 0:
            text = _PREFIX.sub("", low.text(syntax)).rstrip("#")
            return low.node("string", syntax, value=strip_quotes(text) if raw else unescape(strip_quotes(text)))
        if syntax.named_child_count == 1:  # mostly: quotes around plain text
            only = syntax.named_child(0)
            if only is not None and only.type not in holes and only.type not in _DELIMITERS:
                return low.node("string", syntax, value=low.text(only) if raw else unescape(low.text(only)))
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
            elif child.is_named and child.type not in _DELIMITERS:
                text += low.text(child) if raw else unescape(low.text(child))
        if not parts:
            return low.node("string", syntax, value=text)
        if text:
            parts.append(low.node("string", syntax, value=text))
        return low.node("template", syntax, args=parts)

    return handler


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


def first(low: Lowering, syntax: Syntax) -> Node | None:
    """The first of the named children; the others (a type) mean nothing."""
    return low.lower(next(iter(syntax.named_children), None))


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
