"""Python."""

from tree_sitter import Node as Syntax

from puna.guard.code import lower as L
from puna.guard.code import lower_calls as K
from puna.guard.code import lower_statements as S
from puna.guard.code.view import Node


def _imports(low: L.Lowering, syntax: Syntax) -> Node:
    """`import a.b as c`, `from a import b as c`."""
    module = syntax.child_by_field_name("module_name")
    prefix = low.text(module).lstrip(".") + "." if module is not None else ""
    found = []
    for child in syntax.children_by_field_name("name"):
        if child.type == "aliased_import":
            found.append(
                (low.text(child.child_by_field_name("alias")), prefix + low.text(child.child_by_field_name("name")))
            )
        else:
            text = low.text(child)
            found.append((text, prefix + text) if module is not None else (text.split(".")[0], text.split(".")[0]))
    if module is None:
        found.extend(
            (low.text(c), low.text(c))
            for c in syntax.children_by_field_name("name")
            if c.type == "dotted_name" and "." in low.text(c)
        )
    return low.node("import", syntax, value=found)


def _comprehension(low: L.Lowering, syntax: Syntax) -> Node:
    """The loop comes first, then the body: the body sees the loop's names."""
    clauses = [c for c in syntax.named_children if c.type in ("for_in_clause", "if_clause")]
    body = [c for c in syntax.named_children if c.type not in ("for_in_clause", "if_clause", "comment")]
    below: list[Node] = []
    for clause in clauses:
        if clause.type == "for_in_clause":
            left = clause.child_by_field_name("left")
            target = S.pattern(low, left) if left is not None and left.child_count else low.expression(left, clause)
            iterable = low.expression(clause.child_by_field_name("right"), clause)
            below.append(
                low.node("assign", clause, base=target, args=[low.node("index", clause, base=iterable)], name="=")
            )
        else:
            below.extend(low.all(clause.named_children))
    return low.node("other", syntax, args=[*below, *low.all(body)])


def _with_item(low: L.Lowering, syntax: Syntax) -> Node | None:
    value = syntax.child_by_field_name("value")
    return low.lower(value)


def _as_pattern(low: L.Lowering, syntax: Syntax) -> Node:
    alias = syntax.child_by_field_name("alias")
    target = low.expression(alias.named_children[0] if alias is not None and alias.named_children else alias, syntax)
    return low.node("assign", syntax, base=target, args=low.all(syntax.named_children[:1]), name="=")


def _not(low: L.Lowering, syntax: Syntax) -> Node:
    return low.node("unary", syntax, name="!", args=low.all(syntax.named_children))


def _keyword_arguments(low: L.Lowering, syntax: Syntax) -> Node:
    """A call; a generator as the only argument stands without an argument list."""
    holder = syntax.child_by_field_name("arguments")
    if holder is not None and holder.type == "generator_expression":
        values: list[Node] = low.all([holder])
        return low.node(
            "call",
            syntax,
            base=low.expression(syntax.child_by_field_name("function"), syntax),
            args=values,
            keys=[None],
        )
    return _call(low, syntax)  # type: ignore[return-value]


def _dict_splat(low: L.Lowering, syntax: Syntax) -> Node:
    return low.node("other", syntax, name="**", args=low.all(syntax.named_children))


_call = K.call("function")

TABLE: dict[str, L.Handler] = {
    "comment": L.skip,
    "identifier": L.name,
    "dotted_name": L.dotted,
    "integer": L.number,
    "float": L.number,
    "string": L.string(("interpolation",)),
    "concatenated_string": L.adjacent,
    "true": L.constant(True),
    "false": L.constant(False),
    "none": L.constant(None),
    "attribute": L.member("object", "attribute"),
    "subscript": L.index("value", "subscript"),
    "call": _keyword_arguments,
    "dictionary_splat": _dict_splat,
    "binary_operator": L.binary(),
    "boolean_operator": L.binary(),
    "comparison_operator": L.generic_binary,
    "not_operator": _not,
    "unary_operator": L.unary(),
    "conditional_expression": L.conditional(order=(1, 0, 2)),
    "list": L.collection,
    "tuple": L.collection,
    "set": L.collection,
    "expression_list": L.collection,
    "pattern_list": L.collection,
    "tuple_pattern": L.collection,
    "dictionary": L.mapping(("pair",)),
    "list_comprehension": _comprehension,
    "set_comprehension": _comprehension,
    "dictionary_comprehension": _comprehension,
    "generator_expression": _comprehension,
    "parenthesized_expression": L.inner(),
    "await": L.inner(),
    "lambda": S.function(),
    "named_expression": S.assign("name", "value"),
    "expression_statement": L.inner(),
    "exec_statement": K.pseudo_call("exec"),
    "assignment": S.assign(),
    "augmented_assignment": S.assign(),
    "function_definition": S.function(),
    "class_definition": S.klass(bases=("superclasses",)),
    "decorated_definition": L.inner("definition"),
    "import_statement": _imports,
    "import_from_statement": _imports,
    "if_statement": S.if_(),
    "elif_clause": S.if_(),
    "else_clause": L.inner("body"),
    "for_statement": S.loop("left", "right"),
    "while_statement": S.loop(),
    "with_item": _with_item,
    "as_pattern": _as_pattern,
    "except_clause": S.catch(""),
    "block": L.block,
    "module": L.block,
    "try_statement": L.block,
    "with_statement": L.block,
    "with_clause": L.block,
    "finally_clause": L.block,
    "return_statement": S.leave("return"),
    "raise_statement": S.leave("throw"),
    "break_statement": S.leave("exit"),
    "continue_statement": S.leave("exit"),
    "type": L.skip,
}
