"""Values that some languages write with a construct of their own: arrays of a size, switches that give a value."""

from tree_sitter import Node as Syntax

from puna.guard.code.lowering import Lowering, other
from puna.guard.code.view import Node

_SIZES = ("dimensions_expr", "array_rank_specifier")
_ARMS = ("switch_expression_arm", "switch_rule", "when_entry")
_HOLDERS = ("switch_block", "when_subject")
_USED = (
    *("variable_declarator", "property_declaration", "assignment", "assignment_expression", "return_statement"),
    *("return_expression", "argument", "value_argument", "argument_list", "interpolation", "function_body"),
    *("parenthesized_expression", "binary_expression", "arrow_expression_clause", "lambda_expression"),
)


def array(low: Lowering, syntax: Syntax) -> Node | None:
    """`new byte[16]`: what stands in braces, or a call of `byte[]` with the sizes as arguments."""
    below = syntax.named_children
    initial = next((c for c in below if "initializer" in c.type), None)
    if initial is not None or not below:
        return low.lower(initial)
    holders = [c for c in (*below, *below[0].named_children) if c.type in _SIZES]
    sizes = low.all([size for holder in holders for size in holder.named_children])
    element = low.text(below[0]).partition("[")[0].strip()
    base = low.node("name", below[0], name=element + "[]")
    return low.node("call", syntax, base=base, args=sizes, keys=[None] * len(sizes), new=True)


_DEMANDS = ("require", "check", "checkArgument", "checkState", "isTrue", "state")
_DEMANDERS = ("Assert", "Preconditions", "Validate")


def demanded(low: Lowering, syntax: Syntax, call: Node) -> Node:
    """`require(x in KNOWN)`, `Assert.isTrue(ok(x), "no")`: what follows is reached where the condition holds."""
    base = call.base
    plain = base is not None and base.kind == "name"
    owned = base is not None and base.base is not None and base.base.name in _DEMANDERS
    if base is None or base.name not in _DEMANDS or not (plain or owned) or not call.args:
        return call
    if call.args[0].kind not in ("binary", "unary", "call"):
        return call
    refused = low.node("unary", syntax, name="!", args=call.args[:1])
    return low.node("if", syntax, args=[refused], body=[low.node("throw", syntax, args=call.args[1:])])


def chosen(low: Lowering, syntax: Syntax) -> Node:
    """`x switch { "a" => 1, _ => 2 }`: one of the arms' values, whatever x holds; as a statement, its children."""
    if syntax.parent is None or syntax.parent.type not in _USED:
        return other(low, syntax)
    below = [
        c
        for child in syntax.named_children
        for c in ((child, *child.named_children) if child.type in _HOLDERS else (child,))
    ]
    arms = [c for c in below if c.type in _ARMS and c.named_child_count]
    asked = next((c for c in below if c.type not in (*_ARMS, *_HOLDERS)), None)
    values = [low.expression(arm.named_children[-1], arm) for arm in arms]
    return low.node("conditional", syntax, args=[low.expression(asked, syntax), *values])
