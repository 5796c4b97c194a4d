"""PHP."""

from tree_sitter import Node as Syntax

from puna.guard.code import lower as L
from puna.guard.code import lower_calls as K
from puna.guard.code import lower_statements as S
from puna.guard.code.view import Node

_HOLES = ("variable_name", "member_access_expression", "subscript_expression", "dynamic_variable_name", "interpolation")


def _uses(low: L.Lowering, syntax: Syntax) -> Node:
    found = []
    for clause in syntax.named_children:
        text = low.text(clause)
        path, _, alias = text.partition(" as ")
        dotted = path.strip().lstrip("\\").replace("\\", ".")
        found.append((alias.strip() or dotted.split(".")[-1], dotted))
    return low.node("import", syntax, value=found)


def _foreach(low: L.Lowering, syntax: Syntax) -> Node:
    below = syntax.named_children
    over = low.expression(below[0] if below else None, syntax)
    named = below[1] if len(below) > 1 else None
    target = S.pattern(low, named) if named is not None and named.child_count else None
    return low.node("loop", syntax, base=target, args=[over], body=low.block(syntax.child_by_field_name("body")))


def _include(low: L.Lowering, syntax: Syntax) -> Node:
    values = low.all(syntax.named_children)
    return low.node(
        "call",
        syntax,
        base=low.node("name", syntax, name=syntax.type.removesuffix("_expression")),
        args=values,
        keys=[None] * len(values),
    )


def _statement(low: L.Lowering, syntax: Syntax) -> Node | None:
    """An expression; right after `<?=` it is written to the page."""
    before = syntax.prev_sibling
    if before is not None and low.text(before).endswith("<?="):
        return _echo(low, syntax)
    return _plain(low, syntax)


_plain = L.inner()
_echo = K.pseudo_call("echo")
_heredoc_body = L.string(_HOLES)

TABLE: dict[str, L.Handler] = {
    "comment": L.skip,
    "php_tag": L.skip,
    "text": L.skip,
    "name": L.name,
    "variable_name": L.name,
    "relative_scope": L.name,
    "dynamic_variable_name": K.pseudo_call("$$"),
    "qualified_name": L.dotted,
    "integer": L.number,
    "float": L.number,
    "string": L.string(),
    "encapsed_string": L.string(_HOLES),
    "heredoc": L.inner("value"),
    "heredoc_body": _heredoc_body,
    "nowdoc": L.string(raw=True),
    "boolean": lambda low, syntax: low.node("constant", syntax, value=low.text(syntax).lower() == "true"),
    "null": L.constant(None),
    "member_access_expression": L.member("object", "name"),
    "nullsafe_member_access_expression": L.member("object", "name"),
    "scoped_property_access_expression": L.member("scope", "name"),
    "class_constant_access_expression": L.inner(last=False),
    "subscript_expression": L.index("", ""),
    "function_call_expression": K.call("function"),
    "member_call_expression": K.method("object", "name"),
    "nullsafe_member_call_expression": K.method("object", "name"),
    "scoped_call_expression": K.method("scope", "name"),
    "argument": L.inner(last=True),
    "object_creation_expression": K.new(""),
    "echo_statement": K.pseudo_call("echo"),
    "print_intrinsic": K.pseudo_call("print"),
    "exit_statement": K.pseudo_call("exit"),
    "unset_statement": K.pseudo_call("unset"),
    "include_expression": _include,
    "include_once_expression": _include,
    "require_expression": _include,
    "require_once_expression": _include,
    "shell_command_expression": K.shell_literal(_HOLES),
    "binary_expression": L.binary(),
    "unary_op_expression": L.unary(),
    "update_expression": L.unary(),
    "conditional_expression": L.conditional(("condition", "body", "alternative")),
    "array_creation_expression": L.mapping(("array_element_initializer",)),
    "array_element_initializer": L.inner(last=True),
    "cast_expression": L.cast(),
    "parenthesized_expression": L.inner(),
    "error_suppression_expression": L.inner(),
    "anonymous_function": S.function(),
    "arrow_function": S.function(),
    "function_definition": S.function(),
    "method_declaration": S.function(),
    "class_declaration": S.klass(bases=("base_clause", "class_interface_clause")),
    "expression_statement": _statement,
    "assignment_expression": S.assign(type_field=""),
    "augmented_assignment_expression": S.assign(type_field=""),
    "property_element": S.declarator("name", "default_value"),
    "const_element": S.declarator("name", "value", last_value=True),
    "namespace_use_declaration": _uses,
    "if_statement": S.if_(then="body"),
    "else_if_clause": S.if_(then="body"),
    "else_clause": L.inner("body"),
    "for_statement": S.loop(),
    "foreach_statement": _foreach,
    "while_statement": S.loop(),
    "do_statement": S.loop(),
    "catch_clause": S.catch(),
    "compound_statement": L.block,
    "colon_block": L.block,
    "declaration_list": L.block,
    "program": L.block,
    "property_declaration": L.block,
    "const_declaration": L.block,
    "try_statement": L.block,
    "finally_clause": L.block,
    "case_statement": L.block,
    "return_statement": S.leave("return"),
    "throw_expression": S.leave("throw"),
    "break_statement": S.leave("exit"),
    "continue_statement": S.leave("exit"),
    "namespace_name": L.skip,
    "visibility_modifier": L.skip,
    "static_modifier": L.skip,
    "primitive_type": L.skip,
    "named_type": L.skip,
    "global_declaration": L.skip,
}
