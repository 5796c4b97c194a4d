"""What a call is to the data flow beside its value: a cleaner, a look-up, a writer into another name, an end."""

import re
from collections.abc import Sequence

from puna.guard.code.guards import tested
from puna.guard.code.knowledge import Knowledge
from puna.guard.code.names import purposes
from puna.guard.code.strings import APPEND, is_text, percent
from puna.guard.code.value import MAX_PATHS, UNKNOWN, Atom, Value, compose, constant, join_atoms
from puna.guard.code.view import Node

_PURE = frozenset(
    """array_fill implode join str_repeat rtrim ltrim trim str_pad range repeat fill array_keys array_merge array_map
    strtolower strtoupper ucfirst sorted list tuple Array""".split()  # noqa: SIM905 - a list of words
)


def pure(call) -> bool:  # type: ignore[no-untyped-def]
    """Whether a call's result depends on its arguments alone."""
    base = call.node.base
    return base is not None and base.name in _PURE


_GETTERS = frozenset({"get", "fetch", "getOrDefault", "TryGetValue", "at"})


def looks_up(call) -> bool:  # type: ignore[no-untyped-def]
    """Whether a call takes what a table written in the program holds under a key: `COLUMNS.get(name)`."""
    base = call.node.base
    if base is None or base.kind != "member" or base.name not in _GETTERS or base.base is None or not call.args:
        return False
    table = call.receiver
    if table is not None and table.keys is not None and table.items is not None:
        return all(v.known() for v in table.items)
    return base.base.kind in ("name", "member") and base.base.name.isupper() and len(base.base.name) > 3


_ONLY = re.compile(r"\[\^[\w\\\- ]*\][+*]?")  # whatever isn't a letter, a digit, - or _
_BREAKS = re.compile(r"\n|\\[nsR]|\\x0a|\[\^")  # line breaks, or all but what is named
_ENDS = frozenset({"abort", "exit", "_exit", "die", "panic", "halt", "wp_die", "wp_send_json_error"})


def ends(node: Node) -> bool:
    """Whether a call never comes back: `abort(404)`, `sys.exit(1)`."""
    if node.base is None or node.base.name not in _ENDS:
        return False
    holder = node.base.base
    return holder is None or holder.path() in ("sys", "os", "flask", "process", "bottle", "std")


def _breaks(value: Value) -> bool:
    """Whether line breaks are among the texts that are replaced."""
    texts = [v.const for v in value.items] if value.items is not None else [value.const]
    return any(isinstance(text, str) and _BREAKS.search(text) for text in texts)


def cleans(known: Knowledge, call) -> Sequence[str]:  # type: ignore[no-untyped-def]
    """The purposes that a call makes its arguments safe for: a cleaner itself, `map(cleaner, values)`, the removal of
    all but letters and digits, the text of a number."""
    paths, args = call.paths, call.args
    name = call.node.base.name if call.node.base is not None else ""
    if name == "map" and args:
        paths = args[0].paths
    elif name in ("takeIf", "filter") and len(args) == 1 and args[0].function is not None and _asks(args[0].function):
        return ["checked"]
    elif name == "array_map" and args:
        paths = (args[0].const,) if isinstance(args[0].const, str) else args[0].paths
    elif name in ("sub", "gsub", "replaceAll", "preg_replace") and args and isinstance(args[0].const, str):
        return ["all"] if _ONLY.fullmatch(args[0].const) else ["log"] if _BREAKS.search(args[0].const) else []
    elif name in ("str_replace", "replace") and args and _breaks(args[0]):
        return ["log"]
    elif name in ("str", "unicode") and len(args) == 1 and call.receiver is None and not args[0].atoms:
        return ["all"]
    return known.about(paths).purposes or (purposes(name) if args and not call.node.new else ())


def _asks(function: Node) -> bool:
    """Whether a condition that is written as a function asks for more than emptiness of what it is given."""
    given = {p.name for p in function.args}
    return any(given & tested(test) for statement in function.body for test in (statement, *statement.args))


_FILLED = frozenset({"TryGetValue", "TryParse", "TryParseExact"})  # C#: `out` arguments, of a table or a number


def write(known: Knowledge, call, env: dict[str, Value]) -> None:  # type: ignore[no-untyped-def]
    """What a call changes: the receiver of an append, the argument that a function writes into."""
    node, args = call.node, call.args
    base = node.base
    if (
        base is not None
        and base.kind == "member"
        and base.name in APPEND
        and base.base is not None
        and call.receiver is not None
    ):
        holder = base.base
        while holder.kind == "call" and holder.base is not None and holder.base.name in APPEND and holder.base.base:
            holder = holder.base.base  # b.append(x).append(y)
        path = holder.path()
        before = call.receiver
        if path in env or (holder.kind == "name" and args):
            if is_text(before) or any(is_text(a) for a in args):
                value = compose([*([before] if is_text(before) else []), *args], before.node)
            else:
                value = Value(atoms=join_atoms([before, *args]), node=before.node)
            items = [*before.items, *args] if before.items is not None and len(before.items) < 50 else before.items
            env[path] = Value(
                before.paths[:MAX_PATHS],
                UNKNOWN,
                value.text,
                value.built or before.built,
                join_atoms([before, value]),
                items,
                before.keys,
                None,
                before.node,
            )
    if base is not None and base.name in _FILLED and node.args and node.args[-1].kind == "name" and len(args) > 1:
        taken = call.receiver.atoms if call.receiver is not None and base.name == "TryGetValue" else ()
        env[node.args[-1].name] = Value((node.args[-1].name,), atoms=taken, node=node)
    for writer in known.about(call.paths).writers:
        if writer.to < len(args):
            target = node.args[writer.to]
            adds = False  # `strcpy(text + n, more)` leaves what stands before
            while target.kind in ("unary", "cast", "index", "binary") and (target.args or target.base):
                adds = adds or (target.kind == "binary" and target.name == "+")
                target = target.base if target.kind == "index" and target.base is not None else target.args[0]
            path = target.path()
            if not path:
                continue
            before = env.get(path) or Value(paths=(path,))
            if writer.label:
                value = Value(atoms=(Atom(writer.label, call.paths[0], node.start),), node=node)
            elif writer.format is not None and writer.format < len(args):
                value = percent(
                    args[writer.format],
                    args[writer.format + 1 :],
                    Value(atoms=join_atoms(args[writer.format + 1 :])),
                    node,
                )
                if args[writer.format].text is None:  # a format that isn't known: what it brings along
                    value = compose([args[writer.format], *args[writer.format + 1 :]], node)
            else:
                given = [args[i] if i >= 0 else call.receiver or Value() for i in writer.of if i < len(args)]
                value = compose(given, node)
            if adds and path in env:
                value = compose([before, value], node)
            env[path] = Value(before.paths, value.const, value.text, value.built, value.atoms, node=node)


def stream(node: Node, values: list[Value], env: dict[str, Value]) -> None:
    """What C++'s operators on streams change: the text that `text << value` grows, what `std::cin >> name` reads."""
    first = values[0]
    if node.name == ">>":
        if any(path in ("std.cin", "cin") for path in first.paths):
            for target in node.args[1:]:
                before = env.get(target.path())
                if target.kind == "name" and before is not None:
                    env[target.name] = Value(before.paths, atoms=(Atom("local", "std::cin", node.start),), node=node)
        return
    holder = node.args[0]
    if holder.kind == "name" and first.items is not None and len(first.items) < 50:  # Ruby: list << value
        env[holder.name] = Value(first.paths, atoms=join_atoms(values), items=[*first.items, *values[1:]], node=node)
        return
    if holder.kind == "name" and is_text(first) and not isinstance(first.const, int | float):  # Ruby: text << value
        made = compose(values, node)
        env[holder.name] = Value(first.paths, made.const, made.text, made.built, made.atoms, node=node)
        return
    if node.args[0].kind == "name" and any(path.endswith(("stringstream", "ostringstream")) for path in first.paths):
        made = compose([first if is_text(first) else constant("", node), *values[1:]], node)
        env[node.args[0].name] = Value(first.paths, text=made.text, built=made.built, atoms=made.atoms, node=node)
