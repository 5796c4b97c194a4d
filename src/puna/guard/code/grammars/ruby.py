"""Ruby."""

from tree_sitter import Node as Syntax

from puna.guard.code import lower as L
from puna.guard.code import lower_calls as K
from puna.guard.code import lower_statements as S
from puna.guard.code.view import Node

_HOLES = ("interpolation",)
MAX_UP = 12  # levels between the mark of a text and the text


def _call(low: L.Lowering, syntax: Syntax) -> Node:
    """A call, its block (if any) as a function in the last argument."""
    node = _method(low, syntax)
    assert node is not None
    assert node.keys is not None
    if node.base is not None and node.base.kind == "name" and node.base.name in ("raise", "fail"):
        return low.node("throw", syntax, args=node.args)
    given = low.lower(syntax.child_by_field_name("block"))
    if given is not None:
        node.args = [*node.args, given]
        node.keys.append("&")
    return node


_method = K.method("receiver", "method")


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


_plain_function = S.function()


def _function(low: L.Lowering, syntax: Syntax) -> Node:
    """A method or block: its last expression is what it gives back."""
    made = _plain_function(low, syntax)
    assert made is not None
    made.body = S.valued(made.body)
    return made


def _variable(low: L.Lowering, syntax: Syntax) -> Node:
    """`@name` as a member of self, so that it is known in every method."""
    return low.node("member", syntax, base=low.node("name", syntax, name="self"), name=low.text(syntax).lstrip("@"))


def _heredoc(low: L.Lowering, syntax: Syntax) -> Node | None:
    """`<<~SQL`, whose text stands after the statement."""
    mark = low.text(syntax).lstrip("<~-").strip("\"'`")
    at: Syntax | None = syntax
    for _ in range(MAX_UP):
        below = at.next_named_sibling if at is not None else None
        while below is not None:
            if below.type == "heredoc_body" and low.text(below).rstrip().endswith(mark):
                return low.lower(below)
            below = below.next_named_sibling if below.start_point[0] == syntax.start_point[0] else None
        at = at.parent if at is not None else None
    return None


TABLE: dict[str, L.Handler] = {
    "comment": L.skip,
    "identifier": L.name,
    "constant": L.name,
    "instance_variable": _variable,
    "class_variable": _variable,
    "heredoc_beginning": _heredoc,
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
    "subshell": K.shell_literal(_HOLES),
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
    "do_block": _function,
    "block": _function,
    "lambda": _function,
    "method": _function,
    "singleton_method": _function,
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
