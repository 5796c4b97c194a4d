"""Rust."""

import re

from tree_sitter import Language, Parser
from tree_sitter import Node as Syntax

from puna.guard.code import lower as L
from puna.guard.code import lower_calls as K
from puna.guard.code import lower_statements as S
from puna.guard.code.view import Node

_PREFIX = b"fn _m(){f"


def _uses(low: L.Lowering, syntax: Syntax) -> Node:
    """`use a::{b, c::d as e}`: every leaf with its full path."""
    found: list[tuple[str, str]] = []

    def visit(node: Syntax, prefix: str) -> None:
        if node.type == "use_as_clause":
            path = low.text(node.child_by_field_name("path"))
            found.append(
                (
                    low.text(node.child_by_field_name("alias")),
                    prefix.rstrip(".") if path == "self" else prefix + path.replace("::", "."),
                )
            )
        elif node.type == "scoped_use_list":
            path = low.text(node.child_by_field_name("path")).replace("::", ".")
            for child in node.named_children:
                if child.type == "use_list":
                    visit(child, prefix + path + "." if path else prefix)
        elif node.type == "use_list":
            for child in node.named_children:
                visit(child, prefix)
        elif node.type in ("identifier", "scoped_identifier", "self", "crate"):
            path = low.text(node).replace("::", ".")
            found.append((path.split(".")[-1], prefix + path))

    for child in syntax.named_children[:1]:
        visit(child, "")
    return low.node("import", syntax, value=found)


def _macro(low: L.Lowering, syntax: Syntax) -> Node:
    """`format!(...)` as a call of `format!`: its tokens are parsed again, as arguments."""
    name = low.text(syntax.child_by_field_name("macro"))
    base = low.node("name", syntax, name=name.split("::")[-1] + "!")
    tree = next((c for c in syntax.named_children if c.type == "token_tree"), None)
    node = low.node("call", syntax, base=base, keys=[])
    if tree is None or tree.end_byte - tree.start_byte > 20_000 or low.depth > 60:
        return node
    text = low.source[tree.start_byte + 1 : tree.end_byte - 1]
    source = _PREFIX + b"(" + text + b")}"
    parsed = Parser(_language()).parse(source).root_node
    call = next((n for n in _descend(parsed) if n.type == "call_expression"), None)
    if call is not None:
        inner = L.Lowering(TABLE, source, low.shift + tree.start_byte + 1 - len(_PREFIX) - 1, low.budget)
        inner.depth = low.depth + 1
        node.args, node.keys = K.arguments(inner, call.child_by_field_name("arguments"))
        _captured(low, tree, node)
    return node


_CAPTURED = re.compile(r"(?<!\{)\{([a-z_]\w*)(?::[^{}]*)?\}")


def _captured(low: L.Lowering, tree: Syntax, node: Node) -> None:
    """The names that a format's text holds (`"{name}"`), as keyword arguments."""
    text = next((a.value for a in node.args if a.kind == "string"), None)
    if not isinstance(text, str) or "{" not in text:
        return
    keys = list(node.keys or ()) or [None] * len(node.args)
    args = list(node.args)
    for name in dict.fromkeys(_CAPTURED.findall(text)):
        if name not in keys:
            args.append(low.node("name", tree, name=name))
            keys.append(name)
    node.args, node.keys = args, keys


def _descend(syntax: Syntax) -> list[Syntax]:
    found = [syntax]
    for _ in range(6):
        below = [child for node in found for child in node.named_children]
        if any(n.type == "call_expression" for n in below) or not below:
            return below
        found = below
    return found


def _language() -> Language:
    from puna.guard.code.languages import grammar

    return grammar("rust")


def _let_condition(low: L.Lowering, syntax: Syntax) -> Node:
    named = syntax.child_by_field_name("pattern")
    target = S.pattern(low, named) if named is not None else None
    return low.node(
        "assign",
        syntax,
        base=target,
        args=low.all([c for c in [syntax.child_by_field_name("value")] if c is not None]),
        name="=",
    )


def _struct(low: L.Lowering, syntax: Syntax) -> Node:
    body = low.lower(syntax.child_by_field_name("body"))
    base = L.dotted(low, syntax.child_by_field_name("name") or syntax)
    args = body.args if body else []
    return low.node(
        "call", syntax, base=base, args=args, keys=(body.keys if body and body.keys else [None] * len(args)), new=True
    )


_FUNCTION = S.function()


def _function(low: L.Lowering, syntax: Syntax) -> Node:
    """A function or closure: the last expression without a semicolon is its result."""
    made = _FUNCTION(low, syntax)
    assert made is not None
    block = syntax.child_by_field_name("body")
    if block is not None and block.type == "block" and block.named_children:
        last = block.named_children[-1]
        if not (last.type == "expression_statement" and last.children[-1].type == ";"):
            made.body = S.valued(made.body)
    return made


_DECLARED = S.declarator("pattern")


def _let(low: L.Lowering, syntax: Syntax) -> Node | None:
    """`let x = y`, `let Some(x) = y else { return }`, `let Order { id, note } = y`."""
    named = syntax.child_by_field_name("pattern")
    if named is None or named.type not in ("tuple_struct_pattern", "struct_pattern"):
        return _DECLARED(low, syntax)
    bound = low.node(
        "assign",
        syntax,
        base=_bound(low, named),
        args=low.all([c for c in [syntax.child_by_field_name("value")] if c is not None]),
        name="=",
    )
    refused = syntax.child_by_field_name("alternative")
    if refused is None:
        return bound
    other = low.node("if", refused, args=[low.node("other", refused)], body=low.block(refused))
    return low.node("block", syntax, body=[bound, other])


_BINDS = frozenset(("identifier", "shorthand_field_identifier"))


def _bound(low: L.Lowering, syntax: Syntax) -> Node:
    """The names that a pattern binds, as a collection."""
    found: list[Node] = []
    stack = [syntax]
    while stack and len(found) < 50:
        at = stack.pop()
        if at.type in _BINDS:
            name = low.text(at)
            if not name[:1].isupper():
                found.append(low.node("name", at, name=name))
        elif at.type not in ("scoped_identifier", "scoped_type_identifier", "type_identifier"):
            stack.extend(reversed(at.named_children))
    return low.node("collection", syntax, args=found)


def _match(low: L.Lowering, syntax: Syntax) -> Node:
    """Each arm with the names that its pattern binds; an arm for a literal is taken where the value equals it."""
    value = low.expression(syntax.child_by_field_name("value"), syntax)
    parts = [low.node("assign", syntax, args=[value], name="=")]
    body = syntax.child_by_field_name("body")
    for arm in body.named_children if body is not None else ():
        if arm.type != "match_arm":
            continue
        head, given = arm.child_by_field_name("pattern"), low.lower(arm.child_by_field_name("value"))
        if given is None or head is None:
            continue
        if given.kind == "block" and given.body and given.body[-1].kind not in (*S.NO_VALUE, "if", "block"):
            rest = low.node("block", arm, body=given.body[:-1])
            given = low.node("other", arm, args=[rest, given.body[-1]])
        bound = _bound(low, head)
        literals = [n for n in low.all(head.named_children) if n.kind in ("string", "number")]
        if bound.args:
            parts.append(low.node("assign", head, base=bound, args=[value], name="="))
        if literals:
            same = low.node("binary", head, name="==", args=[value, literals[0]])
            given = low.node("conditional", arm, args=[same, given])
        parts.append(given)
    return low.node("other", syntax, args=parts)


TABLE: dict[str, L.Handler] = {
    "line_comment": L.skip,
    "block_comment": L.skip,
    "identifier": L.Lowering.named,
    "field_identifier": L.Lowering.named,
    "type_identifier": L.Lowering.named,
    "self": L.name,
    "crate": L.name,
    "scoped_identifier": L.dotted,
    "scoped_type_identifier": L.dotted,
    "generic_function": L.inner("function"),
    "integer_literal": L.number,
    "float_literal": L.number,
    "string_literal": L.string(),
    "raw_string_literal": L.string(raw=True),
    "char_literal": L.string(whole=True),
    "boolean_literal": lambda low, syntax: low.node("constant", syntax, value=low.text(syntax) == "true"),
    "field_expression": L.member("value", "field"),
    "index_expression": L.index("", ""),
    "call_expression": K.call("function"),
    "macro_invocation": _macro,
    "struct_expression": _struct,
    "field_initializer_list": L.mapping(("field_initializer",), key="field"),
    "binary_expression": L.binary(),
    "unary_expression": L.unary(),
    "reference_expression": L.inner("value"),
    "try_expression": L.inner(),
    "await_expression": L.inner(),
    "parenthesized_expression": L.inner(),
    "type_cast_expression": L.cast(),
    "array_expression": L.collection,
    "tuple_expression": L.collection,
    "closure_expression": _function,
    "function_item": _function,
    "impl_item": S.klass("type"),
    "trait_item": S.klass(),
    "mod_item": S.klass(),
    "expression_statement": L.inner(),
    "let_declaration": _let,
    "const_item": S.declarator(),
    "static_item": S.declarator(),
    "assignment_expression": S.assign(type_field=""),
    "compound_assignment_expr": S.assign(type_field=""),
    "use_declaration": _uses,
    "if_expression": S.if_(),
    "let_condition": _let_condition,
    "else_clause": L.inner(),
    "for_expression": S.loop("pattern", "value"),
    "while_expression": S.loop(),
    "loop_expression": S.loop(),
    "match_expression": _match,
    "block": L.block,
    "declaration_list": L.block,
    "source_file": L.block,
    "unsafe_block": lambda low, syntax: low.node(
        "block", syntax, name="unsafe", body=low.block(syntax.named_children[-1] if syntax.named_children else None)
    ),
    "return_expression": S.leave("return"),
    "break_expression": S.leave("exit"),
    "continue_expression": S.leave("exit"),
    "attribute_item": L.skip,
    "token_tree": L.skip,
    "struct_item": L.skip,
    "enum_item": L.skip,
    "primitive_type": L.skip,
    "reference_type": L.skip,
    "generic_type": L.skip,
    "visibility_modifier": L.skip,
    "mutable_specifier": L.skip,
}
