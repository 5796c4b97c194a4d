"""Go."""

import re

from tree_sitter import Node as Syntax

from puna.guard.code import lower as L
from puna.guard.code import lower_calls as K
from puna.guard.code import lower_statements as S
from puna.guard.code.view import Node


def _imports(low: L.Lowering, syntax: Syntax) -> Node:
    """`r "math/rand"`: the path keeps its last part only, as code names it (`rand`), beside the whole path."""
    path = low.text(syntax.child_by_field_name("path")).strip('"`')
    last = next((part for part in reversed(path.split("/")) if not re.fullmatch(r"v\d+", part)), path)
    alias = low.text(syntax.child_by_field_name("name")) or last
    return low.node("import", syntax, value=[(alias, path.replace("/", "."))])


def _composite(low: L.Lowering, syntax: Syntax) -> Node:
    """`T{A: 1}` as `new T(A=1)`; a slice or map literal without a named type as itself."""
    body = low.lower(syntax.child_by_field_name("body"))
    typed = syntax.child_by_field_name("type")
    if typed is None or typed.type in ("slice_type", "array_type", "map_type") or body is None:
        return body or low.node("collection", syntax)
    return low.node(
        "call", syntax, base=L.dotted(low, typed), args=body.args, keys=body.keys or [None] * len(body.args), new=True
    )


TABLE: dict[str, L.Handler] = {
    "comment": L.skip,
    "identifier": L.Lowering.named,
    "field_identifier": L.Lowering.named,
    "type_identifier": L.Lowering.named,
    "package_identifier": L.name,
    "qualified_type": L.dotted,
    "int_literal": L.number,
    "float_literal": L.number,
    "interpreted_string_literal": L.string(),
    "raw_string_literal": L.string(raw=True, whole=True),
    "rune_literal": L.string(whole=True),
    "true": L.constant(True),
    "false": L.constant(False),
    "nil": L.constant(None),
    "selector_expression": L.member("operand", "field"),
    "index_expression": L.index("operand", "index"),
    "slice_expression": L.index("operand", ""),
    "call_expression": K.call("function"),
    "composite_literal": _composite,
    "literal_value": L.mapping(("keyed_element",)),
    "literal_element": L.inner(),
    "binary_expression": L.binary(),
    "unary_expression": L.unary("operand"),
    "type_conversion_expression": L.cast("type", "operand"),
    "type_assertion_expression": L.cast("type", "operand"),
    "parenthesized_expression": L.inner(),
    "expression_list": L.collection,
    "func_literal": S.function(),
    "function_declaration": S.function(),
    "method_declaration": S.function(),
    "expression_statement": L.inner(),
    "short_var_declaration": S.assign(type_field=""),
    "assignment_statement": S.assign(type_field=""),
    "var_spec": S.assign("name", "value"),
    "const_spec": S.assign("name", "value"),
    "import_spec": _imports,
    "if_statement": S.if_(),
    "for_statement": L.block,
    "for_clause": L.block,
    "range_clause": lambda low, syntax: low.node(
        "assign",
        syntax,
        base=low.lower(syntax.child_by_field_name("left")),
        args=[low.node("index", syntax, base=low.expression(syntax.child_by_field_name("right"), syntax))],
        name="=",
    ),
    "block": L.block,
    "statement_list": L.block,
    "source_file": L.block,
    "import_declaration": L.block,
    "import_spec_list": L.block,
    "var_declaration": L.block,
    "var_spec_list": L.block,
    "const_declaration": L.block,
    "go_statement": L.inner(),
    "defer_statement": L.inner(),
    "expression_case": L.block,
    "default_case": L.block,
    "type_case": L.block,
    "return_statement": S.leave("return"),
    "break_statement": S.leave("exit"),
    "continue_statement": S.leave("exit"),
    "goto_statement": S.leave("exit"),
    "package_clause": L.skip,
    "type_declaration": L.skip,
    "label_name": L.skip,
}
