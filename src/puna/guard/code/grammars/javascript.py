"""JavaScript (with JSX) and TypeScript."""

from tree_sitter import Node as Syntax

from puna.guard.code import lower as L
from puna.guard.code import lower_calls as K
from puna.guard.code import lower_statements as S
from puna.guard.code.view import Node


def _imports(low: L.Lowering, syntax: Syntax) -> Node | None:
    """`import a, {b as c} from "m"`, `import * as d from "m"`."""
    module = low.text(syntax.child_by_field_name("source")).strip("'\"`").removeprefix("node:")
    found: list[tuple[str, str]] = []
    stack = [c for c in syntax.named_children if c.type == "import_clause"]
    while stack:
        node = stack.pop()
        if node.type == "import_specifier":
            original = low.text(node.child_by_field_name("name"))
            found.append((low.text(node.child_by_field_name("alias")) or original, f"{module}.{original}"))
        elif node.type == "identifier":
            found.append((low.text(node), module))
        else:
            stack.extend(node.named_children)
    return low.node("import", syntax, value=found)


def _jsx_attribute(low: L.Lowering, syntax: Syntax) -> Node:
    """`href={x}` as a map with one key, so that rules for keys see it."""
    below = syntax.named_children
    value = low.lower(below[-1]) if len(below) > 1 else None
    return low.node("map", syntax, args=[value] if value else [], keys=[low.text(below[0])] if value else [])


def _object(low: L.Lowering, syntax: Syntax) -> Node:
    node = _mapping(low, syntax)
    assert node is not None
    if node.kind == "collection":
        node.kind, node.keys = "map", [None] * len(node.args)
    return node


_mapping = L.mapping(("pair",))

TABLE: dict[str, L.Handler] = {
    "comment": L.skip,
    "identifier": L.Lowering.named,  # with its dollar signs: they are letters here (`$` is jQuery)
    "property_identifier": L.name,
    "shorthand_property_identifier": L.name,
    "this": L.name,
    "super": L.name,
    "number": L.number,
    "string": L.string(),
    "template_string": L.string(("template_substitution",)),
    "regex": L.inner("pattern"),
    "regex_pattern": L.string(raw=True, whole=True),
    "true": L.constant(True),
    "false": L.constant(False),
    "null": L.constant(None),
    "undefined": L.constant(None),
    "member_expression": L.member("object", "property"),
    "subscript_expression": L.index("object", "index"),
    "call_expression": K.call("function"),
    "new_expression": K.new("constructor"),
    "binary_expression": L.binary(),
    "unary_expression": L.unary(),
    "update_expression": L.unary(),
    "ternary_expression": L.conditional(("condition", "consequence", "alternative")),
    "array": L.collection,
    "object": _object,
    "jsx_attribute": _jsx_attribute,
    "jsx_expression": L.inner(),
    "parenthesized_expression": L.inner(),
    "await_expression": L.inner(),
    "spread_element": L.inner(),
    "as_expression": L.first,
    "non_null_expression": L.inner(),
    "satisfies_expression": L.first,
    "arrow_function": S.function(),
    "function_expression": S.function(),
    "function_declaration": S.function(),
    "generator_function_declaration": S.function(),
    "method_definition": S.function(),
    "class_declaration": S.klass(bases=("class_heritage",)),
    "class": S.klass(bases=("class_heritage",)),
    "abstract_class_declaration": S.klass(bases=("class_heritage",)),
    "field_definition": S.declarator("property"),
    "public_field_definition": S.declarator("name"),
    "expression_statement": L.inner(),
    "variable_declarator": S.declarator(),
    "assignment_expression": S.assign(type_field=""),
    "augmented_assignment_expression": S.assign(type_field=""),
    "object_pattern": S.pattern,
    "array_pattern": S.pattern,
    "import_statement": _imports,
    "if_statement": S.if_(),
    "else_clause": L.inner(),
    "for_statement": S.loop(),
    "for_in_statement": S.loop("left", "right"),
    "while_statement": S.loop(),
    "do_statement": S.loop(),
    "catch_clause": S.catch(),
    "statement_block": L.block,
    "class_body": L.block,
    "program": L.block,
    "lexical_declaration": L.block,
    "variable_declaration": L.block,
    "export_statement": L.block,
    "return_statement": S.leave("return"),
    "throw_statement": S.leave("throw"),
    "break_statement": S.leave("exit"),
    "continue_statement": S.leave("exit"),
    "type_annotation": L.skip,
    "type_arguments": L.skip,
    "interface_declaration": L.skip,
    "type_alias_declaration": L.skip,
}
