"""More parts for the tables in `grammars/`: calls of all kinds, and their arguments."""

from tree_sitter import Node as Syntax

from puna.guard.code.lower import dotted, string
from puna.guard.code.lowering import MAX_NAME, Handler, Lowering
from puna.guard.code.view import Node

# argument wrappers: type -> (field of the keyword's name, field of the value); "" takes the last named child
ARGUMENT_TYPES = {
    "argument": ("name", ""),
    "value_argument": ("name", "value"),
    "keyword_argument": ("name", "value"),
    "attribute_argument": ("name", ""),
    "pair": ("key", "value"),
    "element_value_pair": ("key", "value"),
}


def arguments(low: Lowering, syntax: Syntax | None) -> tuple[list[Node], list[str | None]]:
    """The arguments of a call and, beside each, its keyword or None."""
    args: list[Node] = []
    keys: list[str | None] = []
    for child in syntax.named_children if syntax is not None else []:
        key: str | None = None
        value: Syntax | None = child
        fields = ARGUMENT_TYPES.get(child.type)
        if fields is not None and child.named_child_count == 1:  # a value alone
            value = child.named_child(0)
        elif fields is not None:
            named = child.child_by_field_name(fields[0])
            below = child.named_children
            value = child.child_by_field_name(fields[1]) if fields[1] else None
            value = value or (below[-1] if below else None)
            if (
                child.type == "value_argument"
                and named is None
                and len(below) == 2
                and below[0].type in ("identifier", "simple_identifier")
            ):
                named = below[0]  # Kotlin names an argument without a field
            key = low.text(named).strip("'\":") if named is not None else None
        node = low.lower(value)
        if node is not None:
            args.append(node)
            keys.append(key)
    return args, keys


def call(function: str, args: str = "arguments") -> Handler:
    def handler(low: Lowering, syntax: Syntax) -> Node:
        base = low.expression(syntax.child_by_field_name(function), syntax)
        values, keys = arguments(low, syntax.child_by_field_name(args))
        return low.node("call", syntax, base=base, args=values, keys=keys)

    return handler


def method(base: str, field: str, args: str = "arguments") -> Handler:
    """A call whose receiver and name are fields of the call itself; without a receiver, a plain call."""

    def handler(low: Lowering, syntax: Syntax) -> Node:
        named = syntax.child_by_field_name(field)
        receiver = syntax.child_by_field_name(base)
        if receiver is not None:
            text = low.text(named)[:MAX_NAME].lstrip("$@")
            callee = Node(
                "member",
                receiver.start_byte + low.shift,
                (named or syntax).end_byte + low.shift,
                syntax.type,
                base=low.expression(receiver, syntax),
                name=text,
            )
        else:
            callee = low.expression(named, syntax)
        values, keys = arguments(low, syntax.child_by_field_name(args))
        return low.node("call", syntax, base=callee, args=values, keys=keys)

    return handler


def new(type_field: str, args: str = "arguments") -> Handler:
    def handler(low: Lowering, syntax: Syntax) -> Node:
        typed = syntax.child_by_field_name(type_field) or next(iter(syntax.named_children), None)
        holder = syntax.child_by_field_name(args) or next(
            (c for c in syntax.named_children if c.type in ("arguments", "argument_list")), None
        )
        values, keys = arguments(low, holder)
        initial = syntax.child_by_field_name("initializer") or next(
            (c for c in syntax.named_children if c.type == "class_body"), None
        )
        below = low.lower(initial)
        base = dotted(low, typed) if typed is not None else low.node("other", syntax)
        return low.node("call", syntax, base=base, args=values, keys=keys, new=True, body=[below] if below else None)

    return handler


def pseudo_call(callee: str) -> Handler:
    """A construct of the language that acts like a function (`echo x`, backticks, `delete p`): its named children are
    the arguments."""

    def handler(low: Lowering, syntax: Syntax) -> Node:
        values = low.all(syntax.named_children)
        values = [
            v
            for value in values
            for v in (value.args if value.raw in ("sequence_expression", "expression_list") else [value])
        ]
        return low.node(
            "call", syntax, base=low.node("name", syntax, name=callee), args=values, keys=[None] * len(values)
        )

    return handler


def shell_literal(holes: tuple[str, ...]) -> Handler:
    """A command in backticks: a call of "`" with the text as its argument."""
    literal = string(holes)

    def handler(low: Lowering, syntax: Syntax) -> Node:
        value = literal(low, syntax)
        return low.node(
            "call", syntax, base=low.node("name", syntax, name="`"), args=[value] if value else [], keys=[None]
        )

    return handler
