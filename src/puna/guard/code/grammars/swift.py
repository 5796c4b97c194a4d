"""Swift."""

from tree_sitter import Node as Syntax

from puna.guard.code import lower as L
from puna.guard.code import lower_calls as K
from puna.guard.code import lower_statements as S
from puna.guard.code.view import Node


def _imports(low: L.Lowering, syntax: Syntax) -> Node:
    path = low.text(syntax).removeprefix("import").strip()
    return low.node("import", syntax, value=[(path.split(".")[-1], path)])


def _navigation(low: L.Lowering, syntax: Syntax) -> Node:
    suffix = syntax.child_by_field_name("suffix")
    inside = suffix.child_by_field_name("suffix") if suffix is not None else None
    name = low.text(inside or suffix).lstrip(".")
    return low.node("member", syntax, base=low.expression(syntax.child_by_field_name("target"), syntax), name=name)


def _prefix(low: L.Lowering, syntax: Syntax) -> Node:
    """`!x`, `-1`; `.red` is a name."""
    sign = low.text(syntax.child_by_field_name("operation"))
    target = low.lower(syntax.child_by_field_name("target"))
    return low.node("unary", syntax, name=sign, args=[target] if target is not None else [])


def _call(low: L.Lowering, syntax: Syntax) -> Node:
    """`f(a, label: b) { ... }`: a trailing closure is the last argument; a label is a keyword."""
    below = [c for c in syntax.named_children if "comment" not in c.type]
    base = low.expression(below[0] if below else None, syntax)
    suffix = below[-1] if below and below[-1].type == "call_suffix" else None
    args: list[Node] = []
    keys: list[str | None] = []
    for child in suffix.named_children if suffix is not None else []:
        if child.type == "value_arguments":
            args, keys = K.arguments(low, child)
        elif (given := low.lower(child)) is not None:
            args.append(given)
            keys.append(None)
    if base.kind in ("unary", "binary") and base.name and base.args:  # read `a + b()` as `(a + b)()`, `!a.b()` too
        called = low.node("call", syntax, base=base.args[-1], args=args, keys=keys)
        return low.node(base.kind, syntax, name=base.name, args=[*base.args[:-1], called])
    return low.node("call", syntax, base=base, args=args, keys=keys)


_VALUES = frozenset(("call", "name", "member", "index", "string", "template", "binary", "conditional", "cast", "map"))


def _returned(body: list[Node]) -> list[Node]:
    """A body that is a single expression gives it back."""
    if len(body) == 1 and body[0].kind == "block":
        body[0].body = _returned(body[0].body)
    elif len(body) == 1 and body[0].kind in _VALUES:
        return [Node("return", body[0].start, body[0].end, body[0].raw, args=body)]
    return body


def _function(low: L.Lowering, syntax: Syntax) -> Node:
    params: list[Node] = []
    for child in syntax.named_children:
        if child.type == "parameter":
            names = child.children_by_field_name("name")
            kind = low.text(names[1]) if len(names) > 1 else ""
            params.append(low.node("parameter", child, name=low.text(names[0]) if names else "", type=kind))
    body = low.block(syntax.child_by_field_name("body"))
    return low.node(
        "function",
        syntax,
        name=low.text(syntax.child_by_field_name("name")),
        args=params,
        body=_returned(body),
        marks=S.marks(low, syntax),
    )


def _lambda(low: L.Lowering, syntax: Syntax) -> Node:
    typed = syntax.child_by_field_name("type")
    params = [
        low.node("parameter", leaf, name=low.text(leaf)) for leaf in (S.leaves(typed) if typed is not None else [])
    ]
    body = [node for child in syntax.named_children if child.type == "statements" for node in low.block(child)]
    return low.node("function", syntax, args=params, body=_returned(body))


def _property(low: L.Lowering, syntax: Syntax) -> Node:
    """`let x: T = value` and `var (a, b) = value`."""
    named = syntax.child_by_field_name("name")
    target = S.pattern(low, named) if named is not None else low.node("other", syntax)
    typed = next((c for c in syntax.named_children if c.type == "type_annotation"), None)
    value = syntax.child_by_field_name("value")
    kind = low.text(typed).lstrip(": ").rstrip("?!")
    return low.node("assign", syntax, base=target, args=low.all([value] if value else []), name="=", type=kind)


def _conditional_block(low: L.Lowering, syntax: Syntax) -> Node:
    """`if`, `guard`, `while`: conditions are fields, bodies are `statements`; `let z = y` binds."""
    tests: list[Node] = []
    bound: Syntax | None = None
    for i, child in enumerate(syntax.children):
        field = syntax.field_name_for_child(i)
        if field == "bound_identifier":
            bound = child
        elif field == "condition" and child.is_named and child.type != "value_binding_pattern":
            value = low.lower(child)
            if value is not None:
                tests.append(
                    low.node(
                        "assign", child, base=low.node("name", bound, name=low.text(bound)), args=[value], name="="
                    )
                    if bound is not None
                    else value
                )
            bound = None
    test = tests[0] if len(tests) == 1 else low.node("binary", syntax, name="&&", args=tests)
    bodies = [c for c in syntax.named_children if c.type in ("statements", "if_statement")]
    body = low.block(bodies[0] if bodies else None)
    if syntax.type == "while_statement":
        return low.node("loop", syntax, args=[test], body=body)
    if syntax.type == "guard_statement":
        return low.node("if", syntax, args=[low.node("unary", syntax, name="!", args=[test])], body=body)
    return low.node("if", syntax, args=[test], body=body, orelse=low.block(bodies[1] if len(bodies) > 1 else None))


def _for(low: L.Lowering, syntax: Syntax) -> Node:
    named = syntax.child_by_field_name("item")
    body = next((c for c in syntax.named_children if c.type == "statements"), None)
    over = low.lower(syntax.child_by_field_name("collection"))
    return low.node(
        "loop",
        syntax,
        base=S.pattern(low, named) if named is not None else None,
        args=[over] if over else [],
        body=low.block(body),
    )


def _transfer(low: L.Lowering, syntax: Syntax) -> Node:
    """return, throw, break and continue are one node type."""
    word = low.text(syntax).split(" ", 1)[0]
    kind = {"return": "return", "throw": "throw"}.get(word, "exit")
    return low.node(kind, syntax, args=low.all([c for c in syntax.named_children if c.type != "throw_keyword"]))


_TEXT = L.string(("interpolated_expression", "interpolation"))
_BINARY = L.binary("lhs", "rhs", "op")

TABLE: dict[str, L.Handler] = {
    "comment": L.skip,
    "multiline_comment": L.skip,
    "simple_identifier": L.name,
    "self_expression": L.name,
    "super_expression": L.name,
    "integer_literal": L.number,
    "hex_literal": L.number,
    "real_literal": L.number,
    "line_string_literal": _TEXT,
    "multi_line_string_literal": _TEXT,
    "raw_string_literal": L.string(raw=True),
    "boolean_literal": lambda low, syntax: low.node("constant", syntax, value=low.text(syntax) == "true"),
    "nil": L.constant(None),
    "navigation_expression": _navigation,
    "call_expression": _call,
    "additive_expression": _BINARY,
    "multiplicative_expression": _BINARY,
    "comparison_expression": _BINARY,
    "equality_expression": _BINARY,
    "conjunction_expression": _BINARY,
    "disjunction_expression": _BINARY,
    "nil_coalescing_expression": L.binary("value", "if_nil"),
    "bitwise_operation": _BINARY,
    "infix_expression": _BINARY,
    "prefix_expression": _prefix,
    "postfix_expression": L.inner("target"),
    "ternary_expression": L.conditional(("condition", "if_true", "if_false")),
    "try_expression": L.inner("expr"),
    "await_expression": L.inner("expr"),
    "as_expression": L.cast("name", "expr"),
    "tuple_expression": L.collection,
    "array_literal": L.collection,
    "dictionary_literal": L.mapping((), "key", "value"),
    "directly_assignable_expression": L.inner(),
    "lambda_literal": _lambda,
    "function_declaration": _function,
    "init_declaration": _function,
    "class_declaration": S.klass(bases=("inheritance_specifier",)),
    "protocol_declaration": S.klass(),
    "property_declaration": _property,
    "assignment": S.assign("target", "result", ""),
    "import_declaration": _imports,
    "if_statement": _conditional_block,
    "guard_statement": _conditional_block,
    "while_statement": _conditional_block,
    "for_statement": _for,
    "catch_block": S.catch(),
    "statements": L.block,
    "function_body": L.block,
    "class_body": L.block,
    "source_file": L.block,
    "do_statement": L.block,
    "switch_entry": L.block,
    "control_transfer_statement": _transfer,
    "modifiers": L.skip,
    "user_type": L.skip,
    "try_operator": L.skip,
    "as_operator": L.skip,
    "value_argument_label": L.skip,
    "type_annotation": L.skip,
    "catch_keyword": L.skip,
}
