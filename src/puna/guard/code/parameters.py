"""Decorators, parameters and the names in patterns, lowered to the uniform view."""

import re

from tree_sitter import Node as Syntax

from puna.guard.code.lowering import Lowering
from puna.guard.code.view import Node

MARK_TYPES = ("decorator", "annotation", "marker_annotation", "attribute", "attribute_item")
MARK_HOLDERS = ("modifiers", "attribute_list", "parameter_modifiers", "attribute_group")


def marks(low: Lowering, syntax: Syntax) -> list[Node]:
    """Decorators, annotations and attributes: those of the node, of its modifier lists, and those right before it."""
    found: list[Syntax] = []
    if not low.marked:
        return []
    for child in syntax.named_children:
        kind = child.type
        if kind in MARK_TYPES:
            found.append(child)
        elif kind in MARK_HOLDERS:
            found.extend(c for c in child.named_children if c.type in MARK_TYPES)
    before = syntax.prev_named_sibling
    while before is not None and before.type in ("attribute_item", "decorator"):
        found.append(before)
        before = before.prev_named_sibling
    return [_mark(low, mark) for mark in found]


def _mark(low: Lowering, syntax: Syntax) -> Node:
    """One annotation as a call (or a bare name): `@app.route("/x")`, `[HttpGet("x")]`, `#[derive(Debug)]`."""
    text = low.text(syntax).lstrip("@#[").rstrip("]")
    path = re.match(r"[\w.:\\]+", text)
    base = low.node("name", syntax, name=path[0].replace("::", ".") if path else text[:60])
    below = [low.lower(c) for c in syntax.named_children]
    values: list[Node] = []
    keys: list[str | None] = []
    for node in below:
        if node is not None and node.kind in ("call", "other"):
            values.extend(node.args)
            keys.extend(node.keys or [None] * len(node.args))
    return low.node("call", syntax, base=base, args=values, keys=keys, value=text)


def parameters(low: Lowering, syntax: Syntax | None) -> list[Node]:
    """The parameters in a list (or the one parameter without brackets)."""
    if syntax is None:
        return []
    if not syntax.named_children or syntax.type in ("parameter", "implicit_parameter"):
        return (
            [low.node("parameter", syntax, name=low.text(syntax).lstrip("$@&"))]
            if syntax.child_count == 0
            else _parameter(low, syntax)
        )
    return [node for child in syntax.named_children for node in _parameter(low, child)]


_NO_PARAMETER = frozenset(
    {"parameter_modifiers", "self_parameter", "keyword_separator", "positional_separator", "variadic_parameter"}
)


def _parameter(low: Lowering, syntax: Syntax) -> list[Node]:
    written = syntax.type
    if "comment" in written or written in _NO_PARAMETER:
        return []
    if written == "identifier" and not low.marked:
        return [low.node("parameter", syntax, name=low.text(syntax))]
    if written == "parameter_declaration" and syntax.child_by_field_name("declarator") is None:
        names = syntax.children_by_field_name("name")  # Go: a, b string
        kind = low.text(syntax.child_by_field_name("type"))
        return [low.node("parameter", n, name=low.text(n), type=kind) for n in names]
    if written in ("object_pattern", "array_pattern", "tuple_pattern"):
        return [low.node("parameter", leaf, name=low.text(leaf)) for leaf in leaves(syntax)]
    typed = syntax.child_by_field_name("type") or next(
        (
            c
            for c in syntax.named_children
            if c.type in ("user_type", "nullable_type", "type_annotation", "type_identifier")
        ),
        None,
    )
    named = next(
        (found for field in ("pattern", "name", "left", "declarator") if (found := syntax.child_by_field_name(field))),
        syntax,
    )
    if named is not None and named.type in ("object_pattern", "array_pattern"):
        return [low.node("parameter", leaf, name=low.text(leaf)) for leaf in leaves(named)]
    if named is not None and named.type == "tuple_struct_pattern" and named.named_children:
        named = named.named_children[-1]  # Rust: Query(q): Query<Q>
    leaf = leaf_of(named)
    default = (
        syntax.child_by_field_name("value")
        or syntax.child_by_field_name("right")
        or syntax.child_by_field_name("default_value")
    )
    args = [node for node in [low.lower(default)] if node is not None]
    if leaf is None:
        return []
    declared_as = syntax.child_by_field_name("declarator")
    suffix = (
        {"pointer_declarator": "*", "array_declarator": "[]"}.get(declared_as.type, "")
        if declared_as is not None
        else ""
    )
    kind = type_text(low, typed) + suffix
    return [
        low.node("parameter", leaf, name=low.text(leaf).lstrip("$@&*"), type=kind, args=args, marks=marks(low, syntax))
    ]


_LEAF = (
    "identifier",
    "simple_identifier",
    "variable_name",
    "field_identifier",
    "property_identifier",
    "shorthand_property_identifier_pattern",
    "constant",
    "instance_variable",
    "name",
)


def leaf_of(syntax: Syntax | None) -> Syntax | None:
    """The name at the bottom of a declarator or pattern."""
    for _ in range(20):
        if syntax is None or syntax.type in _LEAF:
            return syntax
        down = (
            syntax.child_by_field_name("declarator")
            or syntax.child_by_field_name("name")
            or syntax.child_by_field_name("pattern")
        )
        syntax = down or next(
            (c for c in syntax.named_children if c.type in _LEAF or "declarator" in c.type or "pattern" in c.type), None
        )
    return None


def leaves(syntax: Syntax) -> list[Syntax]:
    """The names that a destructuring pattern binds."""
    found: list[Syntax] = []
    stack = [syntax]
    while stack and len(found) < 50:
        node = stack.pop()
        if (node.type in _LEAF and node.child_count == 0) or node.type == "variable_name":
            found.append(node)
        else:
            right = node.child_by_field_name("value") if node.type == "pair_pattern" else None
            stack.extend(reversed([right] if right is not None else node.named_children))
    return found


def type_text(low: Lowering, syntax: Syntax | None) -> str:
    return low.text(syntax).lstrip(":& ").removeprefix("mut ").strip() if syntax is not None else ""
