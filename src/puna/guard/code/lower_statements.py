"""More parts for the tables in `grammars/`: functions, classes, assignments and control flow."""

import re

from tree_sitter import Node as Syntax

from puna.guard.code.lower import Handler, Lowering, dotted
from puna.guard.code.view import Node

MARK_TYPES = ("decorator", "annotation", "marker_annotation", "attribute", "attribute_item")
MARK_HOLDERS = ("modifiers", "attribute_list", "parameter_modifiers", "attribute_group")


def marks(low: Lowering, syntax: Syntax) -> list[Node]:
    """Decorators, annotations and attributes: those of the node, of its modifier lists, and those right before it."""
    found: list[Syntax] = []
    for child in syntax.named_children:
        if child.type in MARK_TYPES:
            found.append(child)
        elif child.type in MARK_HOLDERS:
            found.extend(c for c in child.named_children if c.type in MARK_TYPES)
    before = syntax.prev_named_sibling
    while before is not None and before.type in ("attribute_item", "decorator"):
        found.append(before)
        before = before.prev_named_sibling
    return [_mark(low, mark) for mark in found]


def _mark(low: Lowering, syntax: Syntax) -> Node:
    """One annotation as a call (or a bare name): `@app.route("/x")`, `[HttpGet("x")]`, `#[derive(Debug)]`."""
    text = low.text(syntax).lstrip("@#[").rstrip("]")
    path = re.match(r"[\w.:\\]+", text)
    base = low.node("name", syntax, name=path[0].replace("::", ".") if path else text[:60])
    below = [low.lower(c) for c in syntax.named_children]
    values: list[Node] = []
    keys: list[str | None] = []
    for node in below:
        if node is not None and node.kind in ("call", "other"):
            values.extend(node.args)
            keys.extend(node.keys or [None] * len(node.args))
    return low.node("call", syntax, base=base, args=values, keys=keys, value=text)


def parameters(low: Lowering, syntax: Syntax | None) -> list[Node]:
    """The parameters in a list (or the one parameter without brackets)."""
    if syntax is None:
        return []
    if not syntax.named_children or syntax.type in ("parameter", "implicit_parameter"):
        return (
            [low.node("parameter", syntax, name=low.text(syntax).lstrip("$@&"))]
            if syntax.child_count == 0
            else _parameter(low, syntax)
        )
    return [node for child in syntax.named_children for node in _parameter(low, child)]


def _parameter(low: Lowering, syntax: Syntax) -> list[Node]:
    if "comment" in syntax.type or syntax.type in (
        "parameter_modifiers",
        "self_parameter",
        "keyword_separator",
        "positional_separator",
        "variadic_parameter",
    ):
        return []
    if syntax.type == "parameter_declaration" and syntax.child_by_field_name("declarator") is None:
        names = syntax.children_by_field_name("name")  # Go: a, b string
        kind = low.text(syntax.child_by_field_name("type"))
        return [low.node("parameter", n, name=low.text(n), type=kind) for n in names]
    if syntax.type in ("object_pattern", "array_pattern", "tuple_pattern"):
        return [low.node("parameter", leaf, name=low.text(leaf)) for leaf in leaves(syntax)]
    typed = syntax.child_by_field_name("type") or next(
        (
            c
            for c in syntax.named_children
            if c.type in ("user_type", "nullable_type", "type_annotation", "type_identifier")
        ),
        None,
    )
    named: Syntax | None = syntax
    for field in ("pattern", "name", "left", "declarator"):
        if syntax.child_by_field_name(field) is not None:
            named = syntax.child_by_field_name(field)
            break
    if named is not None and named.type in ("object_pattern", "array_pattern"):
        return [low.node("parameter", leaf, name=low.text(leaf)) for leaf in leaves(named)]
    leaf = _leaf(named)
    default = (
        syntax.child_by_field_name("value")
        or syntax.child_by_field_name("right")
        or syntax.child_by_field_name("default_value")
    )
    args = [node for node in [low.lower(default)] if node is not None]
    if leaf is None:
        return []
    declared_as = syntax.child_by_field_name("declarator")
    suffix = (
        {"pointer_declarator": "*", "array_declarator": "[]"}.get(declared_as.type, "")
        if declared_as is not None
        else ""
    )
    kind = _type_text(low, typed) + suffix
    return [
        low.node("parameter", leaf, name=low.text(leaf).lstrip("$@&*"), type=kind, args=args, marks=marks(low, syntax))
    ]


_LEAF = (
    "identifier",
    "simple_identifier",
    "variable_name",
    "field_identifier",
    "property_identifier",
    "shorthand_property_identifier_pattern",
    "constant",
    "instance_variable",
    "name",
)


def _leaf(syntax: Syntax | None) -> Syntax | None:
    """The name at the bottom of a declarator or pattern."""
    for _ in range(20):
        if syntax is None or syntax.type in _LEAF:
            return syntax
        down = (
            syntax.child_by_field_name("declarator")
            or syntax.child_by_field_name("name")
            or syntax.child_by_field_name("pattern")
        )
        syntax = down or next(
            (c for c in syntax.named_children if c.type in _LEAF or "declarator" in c.type or "pattern" in c.type), None
        )
    return None


def leaves(syntax: Syntax) -> list[Syntax]:
    """The names that a destructuring pattern binds."""
    found: list[Syntax] = []
    stack = [syntax]
    while stack and len(found) < 50:
        node = stack.pop()
        if (node.type in _LEAF and node.child_count == 0) or node.type == "variable_name":
            found.append(node)
        else:
            right = node.child_by_field_name("value") if node.type == "pair_pattern" else None
            stack.extend(reversed([right] if right is not None else node.named_children))
    return found


def _type_text(low: Lowering, syntax: Syntax | None) -> str:
    return low.text(syntax).lstrip(":& ").removeprefix("mut ").strip() if syntax is not None else ""


def function(name: str = "name", params: str = "parameters", body: str = "body") -> Handler:
    def handler(low: Lowering, syntax: Syntax) -> Node:
        named = syntax.child_by_field_name(name)
        kind = _type_text(
            low,
            syntax.child_by_field_name("type")
            or syntax.child_by_field_name("return_type")
            or syntax.child_by_field_name("returns"),
        )
        receiver = parameters(low, syntax.child_by_field_name("receiver"))
        below = low.block(syntax.child_by_field_name(body))
        given = syntax.child_by_field_name(params) or syntax.child_by_field_name("parameter")
        return low.node(
            "function",
            syntax,
            name=low.text(named),
            args=[*receiver, *parameters(low, given)],
            body=_returned(low, syntax, body, below),
            marks=marks(low, syntax),
            type=kind,
        )

    return handler


def _returned(low: Lowering, syntax: Syntax, field: str, body: list[Node]) -> list[Node]:
    """An expression as a body (`x => x + 1`) returns its value."""
    holder = syntax.child_by_field_name(field)
    if (
        holder is None
        or "block" in holder.type
        or "body" in holder.type
        or holder.type in ("compound_statement", "statements")
    ):
        return body
    return [low.node("return", holder, args=body)]


def c_function(low: Lowering, syntax: Syntax) -> Node:
    """C and C++: the name and the parameters are inside the declarator."""
    declarator = syntax.child_by_field_name("declarator")
    while (
        declarator is not None
        and declarator.type != "function_declarator"
        and declarator.type != "abstract_function_declarator"
    ):
        declarator = declarator.child_by_field_name("declarator") or next(
            (c for c in declarator.named_children if "declarator" in c.type), None
        )
    named = declarator.child_by_field_name("declarator") if declarator is not None else None
    params = parameters(low, declarator.child_by_field_name("parameters")) if declarator is not None else []
    text = re.split(r"::|\.", low.text(named))[-1]
    return low.node(
        "function",
        syntax,
        name=text,
        args=params,
        body=low.block(syntax.child_by_field_name("body")),
        type=_type_text(low, syntax.child_by_field_name("type")),
    )


def klass(name: str = "name", body: str = "body", bases: tuple[str, ...] = ()) -> Handler:
    """A class; `bases`: fields or child types that hold what it extends."""

    def handler(low: Lowering, syntax: Syntax) -> Node:
        holders = [c for c in syntax.named_children if c.type in bases]
        holders = holders or [c for f in bases if (c := syntax.child_by_field_name(f)) is not None]
        parents = [dotted(low, c) for holder in holders for c in (holder.named_children or [holder])]
        named = syntax.child_by_field_name(name)
        return low.node(
            "class",
            syntax,
            name=low.text(named),
            args=parents,
            body=low.block(syntax.child_by_field_name(body)),
            marks=marks(low, syntax),
        )

    return handler


def assign(left: str = "left", right: str = "right", type_field: str = "type") -> Handler:
    def handler(low: Lowering, syntax: Syntax) -> Node:
        sign = low.text(syntax.child_by_field_name("operator")) or "="
        target = low.expression(syntax.child_by_field_name(left), syntax)
        value = low.lower(syntax.child_by_field_name(right))
        kind = _type_text(low, syntax.child_by_field_name(type_field)) if type_field else ""
        return _paired(low, syntax, target, value, sign, kind)

    return handler


def _paired(low: Lowering, syntax: Syntax, target: Node, value: Node | None, sign: str, kind: str) -> Node:
    """`a, b = c, d` as two assignments; every other form as one."""
    if target.kind == "collection" and len(target.args) == 1:
        target = target.args[0]
    if value is not None and value.kind == "collection" and value.raw == "expression_list" and len(value.args) == 1:
        value = value.args[0]
    if (
        target.kind == "collection"
        and value is not None
        and value.kind == "collection"
        and len(target.args) == len(value.args) > 1
    ):
        each = [
            low.node("assign", syntax, base=t, args=[v], name=sign, type=kind)
            for t, v in zip(target.args, value.args, strict=True)
        ]
        return low.node("block", syntax, body=each)
    return low.node("assign", syntax, base=target, args=[value] if value is not None else [], name=sign, type=kind)


def pattern(low: Lowering, syntax: Syntax) -> Node:
    """What a destructuring binds, as a collection of names."""
    found = leaves(syntax)
    names = [low.node("name", leaf, name=low.text(leaf).lstrip("$@")) for leaf in found]
    return names[0] if len(names) == 1 else low.node("collection", syntax, args=names)


def declarator(name: str = "name", value: str = "value", last_value: bool = False) -> Handler:
    """`x = 1` inside a declaration, where the type is a field of the parent. `last_value`: the value is the last
    child, without a field."""

    def handler(low: Lowering, syntax: Syntax) -> Node:
        named = syntax.child_by_field_name(name)
        below = [c for c in syntax.named_children if c.type not in ("value_binding_pattern",)]
        at = syntax.child_by_field_name(value)
        if at is None and last_value and below and (named is None or below[-1].start_byte > named.end_byte):
            at = below[-1]
        parent = syntax.parent
        typed = syntax.child_by_field_name("type") or (
            parent.child_by_field_name("type") if parent is not None else None
        )
        typed = typed or next((c for c in syntax.named_children if c.type == "type_annotation"), None)
        if named is not None and named.type in ("object_pattern", "array_pattern", "tuple_pattern", "expression_list"):
            target = pattern(low, named)
        else:
            leaf = _leaf(named) if named is not None else None
            target = (
                low.node("name", leaf, name=low.text(leaf).lstrip("$@"))
                if leaf is not None
                else low.expression(named, syntax)
            )
        if (
            named is not None
            and named.type == "object_pattern"
            and at is not None
            and low.text(at).startswith("require(")
        ):
            return low.node("import", syntax, value=_destructured(low, named, low.text(at)[8:].strip("()'\"` ;")))
        initial = low.lower(at)
        if at is not None and at.type == "argument_list" and initial is not None:  # C++: A x(1, 2)
            base = low.node("name", syntax, name=_type_text(low, typed))
            initial = low.node("call", syntax, base=base, args=initial.args, keys=[None] * len(initial.args), new=True)
        elif at is not None and "declarator" in (named.type if named is not None else "") and initial is None:
            initial = None
        return _paired(low, syntax, target, initial, "=", _type_text(low, typed))

    return handler


def _destructured(low: Lowering, syntax: Syntax, module: str) -> list[tuple[str, str]]:
    """`const {a, b: c} = require("m")` binds like an import."""
    found = []
    for child in syntax.named_children:
        key = child.child_by_field_name("key") if child.type == "pair_pattern" else child
        local = child.child_by_field_name("value") if child.type == "pair_pattern" else child
        found.append((low.text(local), f"{module}.{low.text(key)}"))
    return found


def declared(low: Lowering, syntax: Syntax) -> Node | None:
    """C and C++: `int a[10], *p = q;` -> assignments (without a value: only declared); arrays keep their size in
    `value`."""
    typed = syntax.child_by_field_name("type")
    kind = _type_text(low, typed)
    found: list[Node] = []
    for child in syntax.children_by_field_name("declarator"):
        if child.type == "init_declarator":
            node = low.lower(child)
            inside = child.child_by_field_name("declarator")
        else:
            leaf = _leaf(child)
            if leaf is None or child.type == "function_declarator":
                continue
            node = low.node("assign", child, base=low.node("name", leaf, name=low.text(leaf)), name="=", type=kind)
            inside = child
        if node is None:
            continue
        pointer = "*" if inside is not None and inside.type == "pointer_declarator" else ""
        array = inside is not None and inside.type == "array_declarator"
        node.type = kind + pointer + ("[]" if array else "")
        if array and inside is not None:
            node.value = low.lower(inside.child_by_field_name("size"))
        found.append(node)
    return low.node("block", syntax, body=found) if found else None


def if_(
    condition: str = "condition", then: str = "consequence", alternative: str = "alternative", negate: bool = False
) -> Handler:
    def handler(low: Lowering, syntax: Syntax) -> Node:
        before = low.block(syntax.child_by_field_name("initializer"))
        test = low.expression(syntax.child_by_field_name(condition), syntax)
        if negate:
            test = low.node("unary", syntax, name="!", args=[test])
        body = low.block(syntax.child_by_field_name(then))
        orelse: list[Node] = []
        chain = orelse
        for child in syntax.children_by_field_name(alternative):
            below = low.block(child)
            chain.extend(below)
            if len(below) == 1 and below[0].kind == "if":
                chain = below[0].orelse
        node = low.node("if", syntax, args=[test], body=body, orelse=orelse)
        return low.node("block", syntax, body=[*before, node]) if before else node

    return handler


def loop(target: str = "", over: str = "condition", body: str = "body") -> Handler:
    """`for x in y`, `while c`, `for (;;)`: an initialiser runs before, an update after the body."""

    def handler(low: Lowering, syntax: Syntax) -> Node:
        initial = low.block(syntax.child_by_field_name("initializer") or syntax.child_by_field_name("init"))
        update = low.block(syntax.child_by_field_name("update") or syntax.child_by_field_name("increment"))
        named = syntax.child_by_field_name(target) if target else None
        bound = (pattern(low, named) if named.child_count else low.lower(named)) if named is not None else None
        test = low.lower(syntax.child_by_field_name(over)) if over else None
        node = low.node(
            "loop",
            syntax,
            base=bound,
            args=[test] if test else [],
            body=[*low.block(syntax.child_by_field_name(body)), *update],
        )
        return low.node("block", syntax, body=[*initial, node]) if initial else node

    return handler


def leave(kind: str) -> Handler:
    """return, throw or exit, with what is handed over."""
    return lambda low, syntax: low.node(kind, syntax, args=low.all(syntax.named_children))


_CAUGHT = re.compile(r"(?:\bas|=>)\s*(\w+)|\((?:.*[\s$&*])?\$?([a-z_]\w*)\s*\)", re.DOTALL)


def catch(body: str = "body") -> Handler:
    """A clause of try; its name is the variable that holds what was caught."""

    def handler(low: Lowering, syntax: Syntax) -> Node:
        holder = syntax.child_by_field_name(body) or next(
            (
                c
                for c in reversed(syntax.named_children)
                if "block" in c.type or c.type in ("then", "compound_statement", "statements")
            ),
            None,
        )
        head = (
            low.source[syntax.start_byte : holder.start_byte].decode("utf-8", "replace")
            if holder is not None
            else low.text(syntax)
        )
        caught = _CAUGHT.search(head)
        return low.node(
            "catch",
            syntax,
            name=(caught[1] or caught[2]) if caught else "",
            type=head.strip(),
            body=low.block(holder),
        )

    return handler
