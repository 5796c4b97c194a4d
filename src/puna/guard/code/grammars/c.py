"""C and C++."""

from tree_sitter import Node as Syntax

from puna.guard.code import lower as L
from puna.guard.code import lower_calls as K
from puna.guard.code import lower_statements as S
from puna.guard.code.parameters import type_text
from puna.guard.code.view import Node


def _sizeof(low: L.Lowering, syntax: Syntax) -> Node:
    inside = syntax.child_by_field_name("value") or syntax.child_by_field_name("type")
    values = low.all([inside] if inside is not None else [])
    return low.node(
        "call",
        syntax,
        base=low.node("name", syntax, name="sizeof"),
        args=values,
        keys=[None] * len(values),
        value=low.text(inside),
    )


def _include(low: L.Lowering, syntax: Syntax) -> Node:
    path = low.text(syntax.child_by_field_name("path")).strip('<>"')
    return low.node("import", syntax, value=[("", path)])


def _define(low: L.Lowering, syntax: Syntax) -> Node | None:
    """`#define N 10` or `#define K "x"` as an assignment of the literal."""
    text = low.text(syntax.child_by_field_name("value")).strip()
    named = syntax.child_by_field_name("name")
    if named is None or not text or "\n" in text:
        return None
    if text[0] == text[-1] == '"' and text.count('"') == 2:
        value = low.node("string", syntax, value=L.unescape(text[1:-1]))
    elif text[0].isdigit():
        value = low.node("number", syntax, value=L.number_value(text))
    else:
        return None
    return low.node("assign", syntax, base=low.node("name", named, name=low.text(named)), args=[value], name="=")


def _new(low: L.Lowering, syntax: Syntax) -> Node:
    node = _plain_new(low, syntax)
    assert node is not None
    length = syntax.child_by_field_name("declarator")
    if length is not None:
        node.name = "[]"
        node.args = low.all(length.named_children)
        node.keys = [None] * len(node.args)
    return node


_plain_new = K.new("type")
_plain_delete = K.pseudo_call("delete")


def _delete(low: L.Lowering, syntax: Syntax) -> Node | None:
    """`delete p`; of `delete[] p` the name is "[]"."""
    node = _plain_delete(low, syntax)
    if node is not None and any(c.type == "[" for c in syntax.children):
        node.name = "[]"
    return node


_plain_member = L.member("argument", "field")


def _member(low: L.Lowering, syntax: Syntax) -> Node | None:
    """`a.b` and `a->b`; the latter's value is "->"."""
    node = _plain_member(low, syntax)
    operator = syntax.child_by_field_name("operator")
    if node is not None and operator is not None and operator.type == "->":
        node.value = "->"
    return node


def _constructed(low: L.Lowering, syntax: Syntax) -> Node | None:
    """`std::ifstream in(path);` in a function, which the grammar reads as the declaration of a function `in`."""
    declared = syntax.child_by_field_name("declarator")
    typed = syntax.child_by_field_name("type")
    if declared is None or typed is None or declared.type != "function_declarator" or typed.type == "primitive_type":
        return None
    named, given = declared.child_by_field_name("declarator"), declared.child_by_field_name("parameters")
    parameters = given.named_children if given is not None else []
    values = [p.child_by_field_name("type") for p in parameters if p.named_child_count == 1]
    if named is None or named.type != "identifier" or not values or len(values) != len(parameters):
        return None
    if any(v is None or v.type not in ("type_identifier", "qualified_identifier") for v in values):
        return None
    kind = type_text(low, typed)
    base = low.node("name", syntax, name=kind.replace("::", "."))
    args = low.all([v for v in values if v is not None])
    made = low.node("call", syntax, base=base, args=args, keys=[None] * len(args), new=True)
    target = low.node("name", named, name=low.text(named))
    return low.node("block", syntax, body=[low.node("assign", declared, base=target, args=[made], name="=", type=kind)])


def _declaration(low: L.Lowering, syntax: Syntax) -> Node | None:
    """As in every language; what is declared `static` or `extern`, and outlives the function, is marked so."""
    inside = syntax.parent is not None and syntax.parent.type == "compound_statement"
    node = S.declared(low, syntax) or (_constructed(low, syntax) if inside else None)
    if node is not None and any(
        c.type == "storage_class_specifier" and low.text(c) in ("static", "extern") for c in syntax.children
    ):
        for declared in [node, *node.body]:
            if declared.kind == "assign":
                declared.marks = [low.node("name", syntax, name="static")]
    return node


def _label(low: L.Lowering, syntax: Syntax) -> Node | None:
    """`out: ...` as a block with the label's name."""
    node = L.block(low, syntax)
    if node is not None:
        node.name = low.text(syntax.child_by_field_name("label"))
    return node


_leave = S.leave("exit")


def _goto(low: L.Lowering, syntax: Syntax) -> Node | None:
    """`goto out;` as an exit with the label's name."""
    node = _leave(low, syntax)
    if node is not None:
        node.name = low.text(syntax.child_by_field_name("label"))
    return node


TABLE: dict[str, L.Handler] = {
    "comment": L.skip,
    "identifier": L.Lowering.named,
    "field_identifier": L.Lowering.named,
    "type_identifier": L.Lowering.named,
    "namespace_identifier": L.name,
    "this": L.name,
    "qualified_identifier": L.dotted,
    "template_function": L.inner("name"),
    "number_literal": L.number,
    "string_literal": L.string(),
    "raw_string_literal": L.string(raw=True),
    "char_literal": L.string(whole=True),
    "concatenated_string": L.adjacent,
    "true": L.constant(True),
    "false": L.constant(False),
    "null": L.constant(None),
    "field_expression": _member,
    "subscript_expression": L.index("argument"),
    "subscript_argument_list": L.inner(),
    "call_expression": K.call("function"),
    "new_expression": _new,
    "delete_expression": _delete,
    "sizeof_expression": _sizeof,
    "binary_expression": L.binary(),
    "unary_expression": L.unary(),
    "pointer_expression": L.unary(),
    "update_expression": L.unary(),
    "conditional_expression": L.conditional(("condition", "consequence", "alternative")),
    "initializer_list": L.mapping(("initializer_pair",), key="designator"),
    "cast_expression": L.cast(),
    "parenthesized_expression": L.inner(),
    "condition_clause": L.inner("value"),
    "comma_expression": L.block,
    "lambda_expression": S.c_function,
    "function_definition": S.c_function,
    "class_specifier": S.klass(bases=("base_class_clause",)),
    "struct_specifier": S.klass(bases=("base_class_clause",)),
    "expression_statement": L.inner(),
    "declaration": _declaration,
    "init_declarator": S.declarator("declarator"),
    "field_declaration": S.declared,
    "assignment_expression": S.assign(type_field=""),
    "preproc_include": _include,
    "preproc_def": _define,
    "if_statement": S.if_(),
    "else_clause": L.inner(),
    "for_statement": S.loop(),
    "for_range_loop": S.loop("declarator", "right"),
    "while_statement": S.loop(),
    "do_statement": S.loop(),
    "catch_clause": S.catch(),
    "compound_statement": L.block,
    "declaration_list": L.block,
    "field_declaration_list": L.block,
    "translation_unit": L.block,
    "namespace_definition": L.inner("body"),
    "linkage_specification": L.inner("body"),
    "try_statement": L.block,
    "case_statement": L.block,
    "labeled_statement": _label,
    "preproc_if": L.block,
    "preproc_ifdef": L.block,
    "return_statement": S.leave("return"),
    "throw_statement": S.leave("throw"),
    "break_statement": S.leave("exit"),
    "continue_statement": S.leave("exit"),
    "goto_statement": _goto,
    "statement_identifier": L.skip,
    "primitive_type": L.name,
    "sized_type_specifier": L.skip,
    "type_qualifier": L.skip,
    "storage_class_specifier": L.skip,
    "preproc_arg": L.skip,
    "preproc_call": L.skip,
    "enum_specifier": L.skip,
    "template_argument_list": L.skip,
    "access_specifier": L.skip,
}
