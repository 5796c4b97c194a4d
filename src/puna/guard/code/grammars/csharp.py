"""C#."""

from tree_sitter import Node as Syntax

from puna.guard.code import lower as L
from puna.guard.code import lower_calls as K
from puna.guard.code import lower_statements as S
from puna.guard.code import lower_values as V
from puna.guard.code.view import Node


def _using(low: L.Lowering, syntax: Syntax) -> Node:
    alias = low.text(syntax.child_by_field_name("name"))
    path = low.text(syntax.named_children[-1]) if syntax.named_children else ""
    return low.node("import", syntax, value=[(alias, path)] if alias else [("", path)])


def _initial(low: L.Lowering, syntax: Syntax) -> Node:
    """`{ A = 1 }` after `new T()`: a map of the properties set."""
    args: list[Node] = []
    keys: list[str | None] = []
    for child in syntax.named_children:
        left = child.child_by_field_name("left") if child.type == "assignment_expression" else None
        node = low.lower(child.child_by_field_name("right") if left is not None else child)
        if node is not None:
            args.append(node)
            keys.append(low.text(left) if left is not None else None)
    return low.node("map" if any(keys) else "collection", syntax, args=args, keys=keys)


def _conditional_access(low: L.Lowering, syntax: Syntax) -> Node:
    """`a?.b`: a member of a."""
    base = low.expression(syntax.child_by_field_name("condition"), syntax)
    last = syntax.named_children[-1]
    inside = last.child_by_field_name("name")
    if last.type == "member_binding_expression":
        return low.node("member", syntax, base=base, name=low.text(inside).partition("<")[0])
    return low.node("other", syntax, args=[base, *low.all([last])])


def _member(low: L.Lowering, syntax: Syntax) -> Node:
    """`db.Query<Row>`: the member's name is `Query`."""
    node = _plain_member(low, syntax)
    assert node is not None
    node.name = node.name.partition("<")[0]
    return node


_plain_member = L.member("expression", "name")


def _property(low: L.Lowering, syntax: Syntax) -> Node:
    """`public string Text { get; set; } = "";`: what is set later isn't the empty text."""
    node = _plain_property(low, syntax)
    assert node is not None
    if node.args and node.args[0].kind == "string" and not node.args[0].value:
        node.args = []
    return node


_plain_property = S.declarator()


def _implicit_new(low: L.Lowering, syntax: Syntax) -> Node:
    """`Options o = new() { A = 1 }`: the class is the one declared."""
    above = syntax.parent
    while above is not None and above.type in ("variable_declarator", "equals_value_clause"):
        above = above.parent
    typed = above.child_by_field_name("type") if above is not None else None
    node = _plain_new(low, syntax)
    assert node is not None
    node.base = L.dotted(low, typed) if typed is not None else low.node("other", syntax)
    node.body = low.all([c for c in syntax.named_children if c.type == "initializer_expression"])
    return node


_plain_new = K.new("type")

TABLE: dict[str, L.Handler] = {
    "comment": L.skip,
    "identifier": L.name,
    "this": L.name,
    "base": L.name,
    "generic_name": L.dotted,
    "qualified_name": L.dotted,
    "predefined_type": L.name,
    "integer_literal": L.number,
    "real_literal": L.number,
    "string_literal": L.string(),
    "verbatim_string_literal": L.string(raw=True, whole=True),
    "raw_string_literal": L.string(raw=True),
    "character_literal": L.string(whole=True),
    "interpolated_string_expression": L.string(("interpolation",)),
    "boolean_literal": lambda low, syntax: low.node("constant", syntax, value=low.text(syntax) == "true"),
    "null_literal": L.constant(None),
    "member_access_expression": _member,
    "conditional_access_expression": _conditional_access,
    "element_access_expression": L.index("expression", "subscript"),
    "bracketed_argument_list": L.inner(),
    "argument": L.inner(last=True),
    "invocation_expression": K.call("function"),
    "object_creation_expression": _plain_new,
    "implicit_object_creation_expression": _implicit_new,
    "array_creation_expression": V.array,
    "implicit_array_creation_expression": V.array,
    "initializer_expression": _initial,
    "binary_expression": L.binary(),
    "is_expression": L.generic_binary,
    "prefix_unary_expression": L.unary(),
    "postfix_unary_expression": L.unary(),
    "conditional_expression": L.conditional(("condition", "consequence", "alternative")),
    "cast_expression": L.cast(),
    "as_expression": L.cast("right", "left"),
    "declaration_expression": L.inner("name"),  # out var x
    "parenthesized_expression": L.inner(),
    "await_expression": L.inner(),
    "lambda_expression": S.function(),
    "anonymous_method_expression": S.function(),
    "method_declaration": S.function(),
    "local_function_statement": S.function(),
    "constructor_declaration": S.function(),
    "class_declaration": S.klass(bases=("base_list",)),
    "struct_declaration": S.klass(bases=("base_list",)),
    "record_declaration": S.klass(bases=("base_list",)),
    "interface_declaration": S.klass(bases=("base_list",)),
    "property_declaration": _property,
    "expression_statement": L.inner(),
    "variable_declarator": S.declarator(last_value=True),
    "assignment_expression": S.assign(type_field=""),
    "using_directive": _using,
    "if_statement": S.if_(),
    "for_statement": S.loop(),
    "foreach_statement": S.loop("left", "right"),
    "while_statement": S.loop(),
    "do_statement": S.loop(),
    "switch_expression": V.chosen,
    "catch_clause": S.catch(),
    "block": L.block,
    "declaration_list": L.block,
    "compilation_unit": L.block,
    "global_statement": L.inner(),
    "namespace_declaration": L.inner("body"),
    "variable_declaration": L.block,
    "local_declaration_statement": L.block,
    "field_declaration": L.block,
    "using_statement": L.block,
    "lock_statement": L.block,
    "try_statement": L.block,
    "finally_clause": L.block,
    "switch_section": L.block,
    "return_statement": S.leave("return"),
    "throw_statement": S.leave("throw"),
    "throw_expression": S.leave("throw"),
    "break_statement": S.leave("exit"),
    "continue_statement": S.leave("exit"),
    "goto_statement": S.leave("exit"),
    "modifier": L.skip,
    "attribute_list": L.skip,
    "implicit_type": L.skip,
    "type_argument_list": L.skip,
    "accessor_list": L.block,
    "accessor_declaration": S.function(),
    "arrow_expression_clause": S.leave("return"),
}
