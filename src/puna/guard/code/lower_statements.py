"""More parts for the tables in `grammars/`: functions, classes, assignments and control flow."""

import re

from tree_sitter import Node as Syntax

from puna.guard.code.lower import dotted
from puna.guard.code.lowering import Handler, Lowering
from puna.guard.code.parameters import leaf_of, leaves, marks, parameters, type_text
from puna.guard.code.view import Node


def function(name: str = "name", params: str = "parameters", body: str = "body") -> Handler:
    def handler(low: Lowering, syntax: Syntax) -> Node:
        named = syntax.child_by_field_name(name)
        kind = type_text(
            low,
            syntax.child_by_field_name("type")
            or syntax.child_by_field_name("return_type")
            or syntax.child_by_field_name("returns"),
        )
        receiver = parameters(low, syntax.child_by_field_name("receiver"))
        for own in receiver:
            own.value = "receiver"
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
        type=type_text(low, syntax.child_by_field_name("type")),
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
        kind = type_text(low, syntax.child_by_field_name(type_field)) if type_field else ""
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
            leaf = leaf_of(named) if named is not None else None
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
            base = low.node("name", syntax, name=type_text(low, typed).replace("::", "."))
            initial = low.node("call", syntax, base=base, args=initial.args, keys=[None] * len(initial.args), new=True)
        elif at is not None and "declarator" in (named.type if named is not None else "") and initial is None:
            initial = None
        return _paired(low, syntax, target, initial, "=", type_text(low, typed))

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
    kind = type_text(low, typed)
    found: list[Node] = []
    for child in syntax.children_by_field_name("declarator"):
        if child.type == "init_declarator":
            node = low.lower(child)
            inside = child.child_by_field_name("declarator")
        else:
            leaf = leaf_of(child)
            if leaf is None or child.type == "function_declarator":
                continue
            node = low.node("assign", child, base=low.node("name", leaf, name=low.text(leaf)), name="=", type=kind)
            inside = child
        if node is None:
            continue
        pointer = "*" if inside is not None and inside.type == "pointer_declarator" else ""
        if pointer and inside is not None:  # an array of pointers: T *a[3]
            held = inside.child_by_field_name("declarator")
            inside = held if held is not None and held.type == "array_declarator" else inside
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
        node = last = low.node("if", syntax, args=[test], body=body)
        for child in syntax.children_by_field_name(alternative):
            below = low.block(child)
            last.orelse = [*last.orelse, *below]
            if len(below) == 1 and below[0].kind == "if":
                last = below[0]
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


NO_VALUE = frozenset(("assign", "loop", "return", "throw", "exit", "function", "class", "import", "catch"))


def valued(body: list[Node]) -> list[Node]:
    """A body whose last expression is what it gives back, as a return."""
    if not body or body[-1].kind in NO_VALUE:
        return body
    last = body[-1]
    if last.kind == "if":
        last.body, last.orelse = valued(last.body), valued(last.orelse)
        return body
    if last.kind == "block":
        last.body = valued(last.body)
        return body
    return [*body[:-1], Node("return", last.start, last.end, last.raw, args=[last])]
