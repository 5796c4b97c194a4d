"""Kotlin. Its grammar has few fields: children are told apart by type and position."""

import re

from tree_sitter import Node as Syntax

from puna.guard.code import lower as L
from puna.guard.code import lower_calls as K
from puna.guard.code import lower_statements as S
from puna.guard.code import lower_values as V
from puna.guard.code.view import Node


def _imports(low: L.Lowering, syntax: Syntax) -> Node:
    text = low.text(syntax).removeprefix("import").strip().rstrip(";")
    path, _, alias = text.partition(" as ")
    return low.node("import", syntax, value=[(alias.strip() or path.strip().split(".")[-1], path.strip())])


def _string(low: L.Lowering, syntax: Syntax) -> Node:
    """`$name` is no node of its own in this grammar: found in the text."""
    node = _plain_string(low, syntax)
    assert node is not None
    pieces = [node] if node.kind == "string" else node.args
    escaped = _ESCAPED.findall(low.text(syntax))
    parts: list[Node] = []
    for piece in pieces:
        if piece.kind != "string":
            parts.append(piece)
            continue
        for i, text in enumerate(re.split(r"\$([A-Za-z_]\w*)", str(piece.value))):
            if i % 2 and text in escaped:
                parts.append(low.node("string", syntax, value="$" + text))
            elif i % 2:
                parts.append(low.node("name", syntax, name=text))
            elif text:
                parts.append(low.node("string", syntax, value=text))
    if all(part.kind == "string" for part in parts):
        return node
    return low.node("template", syntax, args=parts)


_plain_string = L.string(("interpolation",))
_ESCAPED = re.compile(r"\\\$([A-Za-z_]\w*)")


def _navigation(low: L.Lowering, syntax: Syntax) -> Node:
    below = [c for c in syntax.named_children if "comment" not in c.type]
    name = low.text(below[-1]) if len(below) > 1 else ""
    base = low.expression(below[0] if below else None, syntax)
    if base.kind == "unary" and base.name == "!" and base.args:
        base = base.args[0]  # the grammar reads `!a.b` as `(!a).b`
    return low.node("member", syntax, base=base, name=name.lstrip("?."))


def _binary(low: L.Lowering, syntax: Syntax) -> Node | None:
    """`f<T>(x)`, which the grammar reads as two comparisons, is a call."""
    left, right = syntax.child_by_field_name("left"), syntax.child_by_field_name("right")
    if left is not None and right is not None and right.type == "parenthesized_expression":
        called, given = left.child_by_field_name("left"), left.child_by_field_name("right")
        if (
            called is not None
            and given is not None
            and low.source[called.end_byte : given.start_byte] == b"<"
            and low.source[given.end_byte : right.start_byte] == b">"
        ):
            args = low.all(list(right.named_children))
            return low.node("call", syntax, base=low.expression(called, syntax), args=args, keys=[None] * len(args))
    return _plain_binary(low, syntax)


_plain_binary = L.binary()


def _call(low: L.Lowering, syntax: Syntax) -> Node:
    below = [c for c in syntax.named_children if "comment" not in c.type]
    base = low.expression(below[0] if below else None, syntax)
    if base.kind == "if":  # require(x) { "why" }
        return base
    args, keys = K.arguments(low, next((c for c in below if c.type == "value_arguments"), None))
    for child in below[1:]:
        if child.type == "annotated_lambda" and (given := low.lower(child)) is not None:
            args.append(given)
            keys.append(None)
    return V.demanded(low, syntax, low.node("call", syntax, base=base, args=args, keys=keys))


def _property(low: L.Lowering, syntax: Syntax) -> Node:
    """`val x: T = value`."""
    below = [
        c
        for c in syntax.named_children
        if c.type not in ("modifiers", "getter", "setter", "line_comment", "multiline_comment")
    ]
    named = next((c for c in below if c.type in ("variable_declaration", "multi_variable_declaration")), None)
    target = S.pattern(low, named) if named is not None else low.node("other", syntax)
    if named is not None and named.type == "variable_declaration":
        target = low.node("name", named, name=low.text(named.named_children[0]) if named.named_children else "")
    typed = (
        next((c for c in named.named_children if c.type in ("user_type", "nullable_type")), None)
        if named is not None
        else None
    )
    value = (
        below[-1]
        if below and below[-1] is not named and named is not None and below[-1].start_byte >= named.end_byte
        else None
    )
    return low.node(
        "assign",
        syntax,
        base=target,
        args=low.all([value] if value else []),
        name="=",
        type=low.text(typed).rstrip("?"),
    )


def _function(low: L.Lowering, syntax: Syntax) -> Node:
    by_type = {c.type: c for c in syntax.named_children}
    named = syntax.child_by_field_name("name")
    holder = by_type.get("function_body")
    body = low.block(holder)
    if holder is not None and holder.named_children and holder.named_children[0].type != "block":
        body = [low.node("return", holder, args=body)]
    params = _parameters(low, by_type.get("function_value_parameters"))
    return low.node("function", syntax, name=low.text(named), args=params, body=body, marks=S.marks(low, syntax))


def _parameters(low: L.Lowering, syntax: Syntax | None) -> list[Node]:
    found: list[Node] = []
    pending: list[Node] = []
    for child in syntax.named_children if syntax is not None else []:
        if child.type == "parameter_modifiers":
            pending = S.marks(low, child)
        elif child.type in ("parameter", "class_parameter"):
            below = [c for c in child.named_children if c.type not in ("modifiers",)]
            name = next((low.text(c) for c in below if c.type == "identifier"), "")
            kind = next((low.text(c) for c in below if "type" in c.type), "")
            found.append(low.node("parameter", child, name=name, type=kind.rstrip("?"), marks=pending))
            pending = []
        elif found:
            found[-1].args = low.all([child])
    return found


def _lambda(low: L.Lowering, syntax: Syntax) -> Node:
    params = next((c for c in syntax.named_children if c.type == "lambda_parameters"), None)
    names = [
        low.node("parameter", c, name=low.text(c.named_children[0]) if c.named_children else low.text(c))
        for c in (params.named_children if params else [])
    ]
    if not names:
        names = [low.node("parameter", syntax, name="it")]
    body = low.all([c for c in syntax.named_children if c.type != "lambda_parameters"])
    return low.node("function", syntax, args=names, body=body)


def _constructed(syntax: Syntax) -> Syntax:
    """Of `Base(1)` the type."""
    while syntax.type in ("delegation_specifier", "constructor_invocation") and syntax.named_children:
        syntax = syntax.named_children[0]
    return syntax


def _class(low: L.Lowering, syntax: Syntax) -> Node:
    by_type = {c.type: c for c in syntax.named_children}
    named = syntax.child_by_field_name("name") or by_type.get("identifier")
    bases = [
        L.dotted(low, _constructed(c))
        for c in (by_type["delegation_specifiers"].named_children if "delegation_specifiers" in by_type else [])
    ]
    body = low.block(by_type.get("class_body") or by_type.get("enum_class_body"))
    return low.node("class", syntax, name=low.text(named), args=bases, body=body, marks=S.marks(low, syntax))


def _companion(low: L.Lowering, syntax: Syntax) -> Node:
    """Its members are used as if they were the class's own."""
    held = next((c for c in syntax.named_children if c.type == "class_body"), None)
    return low.node("block", syntax, body=low.block(held))


def _if(low: L.Lowering, syntax: Syntax) -> Node:
    test = syntax.child_by_field_name("condition")
    rest = [c for c in syntax.named_children if c != test and "comment" not in c.type]
    return low.node(
        "if",
        syntax,
        args=[low.expression(test, syntax)],
        body=low.block(rest[0] if rest else None),
        orelse=low.block(rest[1] if len(rest) > 1 else None),
    )


def _for(low: L.Lowering, syntax: Syntax) -> Node:
    below = syntax.named_children
    target = low.node("name", below[0], name=low.text(below[0]).split(":")[0].strip()) if below else None
    return low.node(
        "loop", syntax, base=target, args=low.all(below[1:2]), body=low.block(below[2] if len(below) > 2 else None)
    )


def _while(low: L.Lowering, syntax: Syntax) -> Node:
    test = syntax.child_by_field_name("condition")
    body = next((c for c in syntax.named_children if c != test and "comment" not in c.type), None)
    return low.node("loop", syntax, args=low.all([test] if test is not None else []), body=low.block(body))


def _jump(kind: str) -> L.Handler:
    return S.leave(kind)


_CONSTANTS = {"true": True, "false": False, "null": None}  # the grammar reads these as identifiers

TABLE: dict[str, L.Handler] = {
    "line_comment": L.skip,
    "multiline_comment": L.skip,
    "block_comment": L.skip,
    "identifier": lambda low, syntax: (
        low.node("constant", syntax, value=_CONSTANTS[low.text(syntax)])
        if low.text(syntax) in _CONSTANTS
        else L.name(low, syntax)
    ),
    "this_expression": L.name,
    "super_expression": L.name,
    "number_literal": L.number,
    "float_literal": L.number,
    "string_literal": _string,
    "multiline_string_literal": _string,
    "character_literal": L.string(whole=True),
    "true": L.constant(True),
    "false": L.constant(False),
    "null": L.constant(None),
    "boolean_literal": lambda low, syntax: low.node("constant", syntax, value=low.text(syntax) == "true"),
    "navigation_expression": _navigation,
    "index_expression": L.index("", ""),
    "call_expression": _call,
    "binary_expression": _binary,
    "in_expression": L.binary(),
    "is_expression": L.binary(),
    "unary_expression": L.unary(),
    "as_expression": L.cast("right", "left"),
    "parenthesized_expression": L.inner(),
    "collection_literal": L.collection,
    "annotated_lambda": L.inner(last=True),
    "lambda_literal": _lambda,
    "function_declaration": _function,
    "class_declaration": _class,
    "object_declaration": _class,
    "companion_object": _companion,
    "property_declaration": _property,
    "assignment": S.assign(type_field=""),
    "import": _imports,
    "if_expression": _if,
    "when_expression": V.chosen,
    "for_statement": _for,
    "while_statement": _while,
    "do_while_statement": _while,
    "catch_block": S.catch(),
    "block": L.block,
    "function_body": L.inner(),
    "class_body": L.block,
    "source_file": L.block,
    "try_expression": L.block,
    "return_expression": _jump("return"),
    "throw_expression": _jump("throw"),
    "break_expression": _jump("exit"),
    "continue_expression": _jump("exit"),
    "modifiers": L.skip,
    "user_type": L.skip,
    "package_header": L.skip,
    "type_arguments": L.skip,
}
