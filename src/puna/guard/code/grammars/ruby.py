"""Ruby."""

from tree_sitter import Node as Syntax

from puna.guard.code import lower as L
from puna.guard.code import lower_statements as S
from puna.guard.code.view import Node

_HOLES = ("interpolation",)


def _call(low: L.Lowering, syntax: Syntax) -> Node:
    """A call, its block (if any) as a function in the last argument."""
    node = _method(low, syntax)
    assert node is not None
    assert node.keys is not None
    given = low.lower(syntax.child_by_field_name("block"))
    if given is not None:
        node.args = [*node.args, given]
        node.keys.append("&")
    return node


_method = L.method("receiver", "method")


def _symbol(low: L.Lowering, syntax: Syntax) -> Node:
    return low.node("string", syntax, value=low.text(syntax).strip(":\"'"), name=":")


def _assign(low: L.Lowering, syntax: Syntax) -> Node | None:
    """`a.b = x` names a member, though `a.b` alone is a call."""
    node = _plain_assign(low, syntax)
    target = node.base if node is not None else None
    if target is not None and target.kind == "call" and not target.args and target.base is not None:
        assert node is not None
        node.base = target.base
    return node


_plain_assign = S.assign()


def _leave(low: L.Lowering, syntax: Syntax) -> Node:
    """`return x`: the value stands in an argument list."""
    holder = syntax.named_children
    inside = holder[0].named_children if holder and holder[0].type == "argument_list" else holder
    return low.node("return", syntax, args=low.all(inside))


TABLE: dict[str, L.Handler] = {
    "comment": L.skip,
    "identifier": L.name,
    "constant": L.name,
    "instance_variable": L.name,
    "class_variable": L.name,
    "global_variable": L.name,
    "self": L.name,
    "scope_resolution": L.dotted,
    "integer": L.number,
    "float": L.number,
    "string": L.string(_HOLES),
    "heredoc_body": L.string(_HOLES),
    "simple_symbol": _symbol,
    "delimited_symbol": _symbol,
    "hash_key_symbol": _symbol,
    "regex": L.string(_HOLES, raw=True),
    "subshell": L.shell_literal(_HOLES),
    "chained_string": L.adjacent,
    "string_array": L.collection,
    "bare_string": L.string(_HOLES),
    "true": L.constant(True),
    "false": L.constant(False),
    "nil": L.constant(None),
    "element_reference": L.index("object", ""),
    "call": _call,
    "binary": L.binary(),
    "unary": L.unary("operand"),
    "conditional": L.conditional(("condition", "consequence", "alternative")),
    "array": L.collection,
    "hash": L.mapping(("pair",)),
    "parenthesized_statements": L.inner(),
    "do_block": S.function(),
    "block": S.function(),
    "lambda": S.function(),
    "method": S.function(),
    "singleton_method": S.function(),
    "class": S.klass(bases=("superclass",)),
    "module": S.klass(),
    "assignment": _assign,
    "operator_assignment": S.assign(),
    "left_assignment_list": L.collection,
    "right_assignment_list": L.collection,
    "if": S.if_(),
    "elsif": S.if_(),
    "unless": S.if_(negate=True),
    "if_modifier": S.if_(then="body"),
    "unless_modifier": S.if_(then="body", negate=True),
    "while": S.loop(),
    "until": S.loop(),
    "for": S.loop("pattern", "value"),
    "rescue": S.catch(),
    "then": L.block,
    "else": L.block,
    "do": L.block,
    "begin": L.block,
    "ensure": L.block,
    "body_statement": L.block,
    "block_body": L.block,
    "when": L.block,
    "program": L.block,
    "return": _leave,
    "break": S.leave("exit"),
    "next": S.leave("exit"),
}
