"""Java."""

from tree_sitter import Node as Syntax

from puna.guard.code import lower as L
from puna.guard.code import lower_calls as K
from puna.guard.code import lower_statements as S
from puna.guard.code import lower_values as V
from puna.guard.code.view import Node


def _imports(low: L.Lowering, syntax: Syntax) -> Node:
    path = next((low.text(c) for c in syntax.named_children if c.type in ("scoped_identifier", "identifier")), "")
    return low.node("import", syntax, value=[(path.split(".")[-1], path)])


def _method(low: L.Lowering, syntax: Syntax) -> Node:
    node = _plain_method(low, syntax)
    assert node is not None
    return V.demanded(low, syntax, node)


_plain_method = K.method("object", "name")

TABLE: dict[str, L.Handler] = {
    "line_comment": L.skip,
    "block_comment": L.skip,
    "identifier": L.Lowering.named,
    "this": L.name,
    "super": L.name,
    "type_identifier": L.Lowering.named,
    "scoped_identifier": L.dotted,
    "decimal_integer_literal": L.number,
    "hex_integer_literal": L.number,
    "octal_integer_literal": L.number,
    "decimal_floating_point_literal": L.number,
    "string_literal": L.string(),
    "character_literal": L.string(whole=True),
    "true": L.constant(True),
    "false": L.constant(False),
    "null_literal": L.constant(None),
    "field_access": L.member("object", "field"),
    "array_access": L.index("array", "index"),
    "method_invocation": _method,
    "object_creation_expression": K.new("type"),
    "explicit_constructor_invocation": K.call("constructor"),
    "binary_expression": L.binary(),
    "unary_expression": L.unary("operand"),
    "update_expression": L.unary(),
    "ternary_expression": L.conditional(("condition", "consequence", "alternative")),
    "array_initializer": L.collection,
    "array_creation_expression": V.array,
    "cast_expression": L.cast(),
    "parenthesized_expression": L.inner(),
    "lambda_expression": S.function(),
    "method_declaration": S.function(),
    "constructor_declaration": S.function(),
    "class_declaration": S.klass(bases=("superclass", "interfaces")),
    "interface_declaration": S.klass(bases=("extends_interfaces",)),
    "enum_declaration": S.klass(),
    "record_declaration": S.klass(),
    "expression_statement": L.inner(),
    "variable_declarator": S.declarator(),
    "resource": S.declarator(),
    "assignment_expression": S.assign(type_field=""),
    "import_declaration": _imports,
    "if_statement": S.if_(),
    "for_statement": S.loop(),
    "enhanced_for_statement": S.loop("name", "value"),
    "while_statement": S.loop(),
    "do_statement": S.loop(),
    "switch_expression": V.chosen,
    "catch_clause": S.catch(),
    "block": L.block,
    "constructor_body": L.block,
    "class_body": L.block,
    "enum_body": L.block,
    "interface_body": L.block,
    "program": L.block,
    "field_declaration": L.block,
    "local_variable_declaration": L.block,
    "resource_specification": L.block,
    "try_statement": L.block,
    "try_with_resources_statement": L.block,
    "finally_clause": L.block,
    "synchronized_statement": L.block,
    "return_statement": S.leave("return"),
    "throw_statement": S.leave("throw"),
    "break_statement": S.leave("exit"),
    "continue_statement": S.leave("exit"),
    "package_declaration": L.skip,
    "modifiers": L.skip,
    "marker_annotation": L.skip,
    "annotation": L.skip,
    "type_arguments": L.skip,
    "integral_type": L.skip,
    "generic_type": L.skip,
    "array_type": L.skip,
    "void_type": L.skip,
    "throws": L.skip,
}
