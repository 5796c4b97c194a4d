"""Shell (bash). A command is a call of its name; each word is an argument, a redirection is an argument named `>`."""

import re

from tree_sitter import Node as Syntax

from puna.guard.code import lower as L
from puna.guard.code import lower_statements as S
from puna.guard.code.view import Node

_QUOTES = re.compile(r"\bsed\b[^|]*(?i:escape|quote|'\\\\+'')[^|]*\)?`?$|\bprintf\s+(-v\s+\w+\s+)?[\"']?%q")
_KEEPS = re.compile(r"\btr\s+-(cd|dc|c\s+-d|d\s+-c)\b|\bsed\b[^|]*s(.)\[\^[^]]*\][*+]?\2\2g")  # certain characters only
_NEGATIVE = re.compile(r"\[[!^]")  # a class of all but some characters
_HOLES = ("simple_expansion", "expansion", "command_substitution", "arithmetic_expansion", "process_substitution")


def _variable(low: L.Lowering, syntax: Syntax) -> Node:
    inside = next(
        (c for c in syntax.named_children if c.type in ("variable_name", "special_variable_name", "subscript")), None
    )
    return low.node("name", syntax, name=low.text(inside or syntax).strip('${}"').replace("*", "@"))


def _string(low: L.Lowering, syntax: Syntax) -> Node:
    """`"a $x b"` and `a$x`: quoted text and concatenations with their expansions."""
    parts: list[Node] = []
    end = syntax.start_byte
    for child in syntax.named_children:
        if child.type in _HOLES:
            parts.append(low.expression(child, child))
        elif child.type == "string":
            inner = _string(low, child)
            parts.extend(inner.args if inner.kind == "template" else [inner])
        else:
            parts.append(low.node("string", child, value=low.text(child).strip("'\"")))
        end = child.end_byte
    if not parts:
        return low.node("string", syntax, value=low.text(syntax).strip("'\""))
    if end and all(part.kind == "string" for part in parts):
        return low.node("string", syntax, value="".join(str(part.value) for part in parts))
    return low.node("template", syntax, args=parts, name='"' if syntax.type == "string" else "")


def _command(low: L.Lowering, syntax: Syntax) -> Node:
    named = syntax.child_by_field_name("name")
    inside = named.named_children[0] if named is not None and named.named_children else named
    text = low.text(inside)
    plain = inside is None or inside.type in ("word", "command_name")
    base = low.node("name", inside or syntax, name=text.rsplit("/", 1)[-1] if plain else "$")
    before = [c for c in syntax.named_children if c.type == "variable_assignment"]
    if text == "read":
        return _read(low, syntax)
    given = list(syntax.children_by_field_name("argument"))
    args = low.all([*([] if plain or inside is None else [inside]), *given])
    node = low.node("call", syntax, base=base, args=args, keys=[None] * len(args))
    return low.node("block", syntax, body=[*low.all(before), node]) if before else node


def _read(low: L.Lowering, syntax: Syntax) -> Node:
    """`read a b`: each name is given what was read."""
    names = [c for c in syntax.children_by_field_name("argument") if c.type == "word" and low.text(c).isidentifier()]
    given = [
        low.node(
            "assign", c, base=low.node("name", c, name=low.text(c)), args=[low.node("name", c, name="REPLY")], name="="
        )
        for c in names
    ]
    return low.node("block", syntax, body=given)


def _case(low: L.Lowering, syntax: Syntax) -> Node:
    """`case x in a) ...;; *) ...;; esac` as a chain of conditions on x."""
    value = syntax.child_by_field_name("value")
    found: list[Node] = []
    for item in reversed([c for c in syntax.named_children if c.type == "case_item"]):
        patterns = item.children_by_field_name("value")
        known = {c.id for c in patterns}
        body = low.all([c for c in item.named_children if c.id not in known])
        words = [low.text(pattern) for pattern in patterns]
        if "*" in words:
            found = body
            continue
        sign = "!=" if any(_NEGATIVE.search(word) for word in words) else "=="
        test = low.node(
            "binary",
            item,
            name=sign,
            args=[
                *low.all([value] if value is not None else []),
                low.node("string", item, value=words[0] if words else ""),
            ],
        )
        found = [low.node("if", item, args=[test], body=body, orelse=found)]
    return low.node("block", syntax, body=found)


def _redirected(low: L.Lowering, syntax: Syntax) -> Node:
    body = low.expression(syntax.child_by_field_name("body"), syntax)
    targets = [redirect.child_by_field_name("destination") for redirect in syntax.children_by_field_name("redirect")]
    values = low.all([target for target in targets if target is not None])
    if values and body.kind == "call" and body.keys is not None:
        body.args = [*body.args, *values]
        body.keys += [">"] * len(values)
    return body


def _pipeline(low: L.Lowering, syntax: Syntax) -> Node:
    """`a | b` as a call of `|` whose arguments are the commands."""
    values = low.all(syntax.named_children)
    return low.node("call", syntax, base=low.node("name", syntax, name="|"), args=values, keys=[None] * len(values))


def _declare(low: L.Lowering, syntax: Syntax) -> Node:
    return low.node(
        "block", syntax, body=low.all([c for c in syntax.named_children if c.type == "variable_assignment"])
    )


def _if(low: L.Lowering, syntax: Syntax) -> Node:
    conditions = syntax.children_by_field_name("condition")
    tests = low.all([c for c in conditions if c.is_named])
    known = {c.id for c in conditions}
    below = [c for c in syntax.named_children if c.id not in known]
    alternatives = [c for c in below if c.type in ("else_clause", "elif_clause")]
    test = tests[0] if tests else low.node("other", syntax)
    return low.node(
        "if",
        syntax,
        args=[test],
        body=low.all([c for c in below if c.type not in ("else_clause", "elif_clause")]),
        orelse=low.all(alternatives),
    )


def _substitution(low: L.Lowering, syntax: Syntax) -> Node:
    """`$(a | b)` as a call; of a name that says so where it quotes for the shell."""
    text = low.text(syntax)
    name = "sanitize" if _KEEPS.search(text) else "shell_quote" if _QUOTES.search(text) else "$()"
    return low.node(
        "call",
        syntax,
        base=low.node("name", syntax, name=name),
        args=low.all(syntax.named_children),
        keys=[None] * syntax.named_child_count,
    )


TABLE: dict[str, L.Handler] = {
    "comment": L.skip,
    "word": L.string(whole=True, raw=True),
    "raw_string": L.string(whole=True, raw=True),
    "ansi_c_string": L.string(whole=True),
    "number": L.string(whole=True, raw=True),
    "variable_name": L.name,
    "string": _string,
    "concatenation": _string,
    "simple_expansion": _variable,
    "expansion": _variable,
    "command_substitution": _substitution,
    "process_substitution": _substitution,
    "command": _command,
    "pipeline": _pipeline,
    "redirected_statement": _redirected,
    "test_command": L.inner(last=True),
    "binary_expression": L.binary(),
    "array": L.collection,
    "declaration_command": _declare,
    "variable_assignment": S.assign("name", "value", ""),
    "function_definition": S.function(),
    "if_statement": _if,
    "elif_clause": _if,
    "else_clause": L.block,
    "for_statement": S.loop("variable", "value"),
    "while_statement": S.loop(),
    "program": L.block,
    "compound_statement": L.block,
    "do_group": L.block,
    "list": L.block,
    "subshell": L.block,
    "case_statement": _case,
    "heredoc_start": L.skip,
    "heredoc_end": L.skip,
}
