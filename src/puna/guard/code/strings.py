"""How text is composed: operators, formatters, methods that append, functions that write into their arguments."""

import re
from collections.abc import Sequence
from functools import lru_cache

from puna.guard.code.guards import tested
from puna.guard.code.knowledge import Knowledge
from puna.guard.code.names import purposes
from puna.guard.code.value import MAX_PATHS, MAX_TEXT, UNKNOWN, Atom, Value, cleaned, compose, constant, join_atoms
from puna.guard.code.view import Node

# methods that give back the same text, in another type or trimmed
KEEP = frozenset(
    """toString to_string to_s strip trim encode decode lower upper toLowerCase toUpperCase clone as_str
    to_owned c_str str String into as_bytes as_ref unwrap expect copy rstrip lstrip chomp data ToString Trim
    freeze dup squish strip_heredoc getBytes toByteArray Bytes bytes trimIndent trimMargin stripIndent orEmpty lowercase
    uppercase
    ToLowerInvariant ToUpperInvariant intern""".split()  # noqa: SIM905 - a list of words
)
APPEND = frozenset(
    """append push add concat << insert extend push_str WriteString Append AppendFormat AppendLine Add addAll""".split()  # noqa: SIM905 - a list of words
)
# classes that hold a text that grows, and the methods that give the grown one back
BUILDERS = frozenset({"StringBuilder", "StringBuffer", "stringstream", "ostringstream"})
LISTS = frozenset({"asList", "of", "listOf", "arrayOf", "mutableListOf"})
ADDRESSES = frozenset({"URL", "URI", "Uri", "URI.create", "Uri.parse", "URL()", "URI()"})  # of the text given
SAME = frozenset({"GetBytes", "from"})  # Encoding.UTF8.GetBytes(text), String::from(text)
_LISTS = ("List", "Arrays", "Set", "Map", "ImmutableList", "ImmutableSet", "ImmutableMap")
ADDS = frozenset({"append", "Append", "AppendLine", "concat"})
# functions that give a text in the reader's language
TRANSLATED = frozenset(
    """_ gettext ugettext lazy_gettext gettext_lazy ugettext_lazy gettext_noop ngettext ungettext ngettext_lazy
    ungettext_lazy N_ _l""".split()  # noqa: SIM905 - a list of words
)
# operators whose result is true or false
OUTCOMES = frozenset({"==", "!=", "===", "!==", "<", ">", "<=", ">=", "in", "not in", "is", "is not", "instanceof"})
_NUMERIC = re.compile(
    r"^((const|final|unsigned|signed)\s+)*(int|Int|Integer|long|Long|short|Short|float|Float|double|Double|bool|boolean|"
    r"Boolean|Bool|[iu](8|16|32|64|128|size)|u?int(8|16|32|64)(_t)?|size_t|ssize_t|Int32|Int64|decimal|Guid|UUID|byte|char)$"
)
_PERCENT = re.compile(
    r"%(?:\((\w+)\))?[-+ #0]*+(?:\*|\d++)?(?:\.(?:\*|\d++))?(?:hh|h|ll|l|z|j|t|L|I64)?([diouxXeEfFgGcrsapvqTtbU%@])"
)
_BRACES = re.compile(r"\{(\w*(?:[.\[][^{}!:]*)?)(?:![rsa])?(?::([^{}]*))?\}")


@lru_cache(4096)
def numeric_type(text: str) -> bool:
    return bool(text) and _NUMERIC.match(text) is not None


@lru_cache(4096)
def type_name(text: str) -> str:
    """`java.util.List<String>` -> `java.util.List`, `*http.Request` -> `http.Request`, `std::string&` ->
    `std.string`."""
    plain = re.sub(r"<.*", "", text.replace("::", ".")).strip(" *&?![]")
    return plain.split()[-1].strip("*&") if plain else ""


def is_text(value: Value) -> bool:
    return value.text is not None or isinstance(value.const, str)


def binary(node: Node, values: list[Value]) -> tuple[Value, bool]:
    """The value of operands under an operator, and whether it is composed text."""
    sign = node.name
    if sign in ("||", "or", "??", "?:") and values:
        from puna.guard.code.value import either

        return either(values), False
    if sign in OUTCOMES:
        return Value(node=node), False
    if sign == "%" and len(values) == 2 and is_text(values[0]):
        given = values[1].items if values[1].items is not None else [values[1]]
        return percent(values[0], given, values[1], node), True
    if sign == "." or (sign in ("+", "++", "&") and any(is_text(v) for v in values)):
        return compose(values, node), True
    if sign == "<<" and values and is_text(values[0]):
        return compose(values, node), True
    if sign == "*" and len(values) == 2:
        text = next((v.const for v in values if isinstance(v.const, str)), None)
        count = next((v.const for v in values if type(v.const) is int), None)
        if text is not None and count is not None and 0 <= count * len(text) < MAX_TEXT:
            return constant(text * count, node), False
    if all(isinstance(v.const, int | float) and not isinstance(v.const, bool) for v in values) and len(values) == 2:
        a, b = values[0].const, values[1].const
        if sign == "+":
            return constant(a + b, node), False
        if sign == "*" and abs(a) < 1e9 and abs(b) < 1e9:
            return constant(a * b, node), False
        if sign == "|" and isinstance(a, int) and isinstance(b, int):
            return constant(a | b, node), False
    return Value(atoms=join_atoms(values), node=node, items=values if sign == "|" else None), False


def augmented(node: Node, before: Value, value: Value) -> Value:
    """`x += y` and its like."""
    sign = node.name.removesuffix("=")
    if sign in ("||", "??", "or"):
        from puna.guard.code.value import either

        return either([before, value])
    if sign in ("+", ".", "<<", "&") and (is_text(before) or is_text(value)):
        return compose([before, value], node)
    return Value(paths=before.paths, atoms=join_atoms([before, value]), node=node)


def percent(template: Value, given: list[Value], whole: Value, node: Node) -> Value:
    """printf-style formatting: number conversions are safe, the others take their argument."""
    text = template.text or ""
    parts: list[Value] = []
    at = 0
    used = 0
    for found in _PERCENT.finditer(text):
        parts.append(Value(const=text[at : found.start()], text=text[at : found.start()]))
        at = found.end()
        if found[2] == "%":
            parts.append(constant("%"))
            continue
        value = (whole.item(found[1]) if found[1] else given[used] if used < len(given) else None) or Value(
            atoms=whole.atoms, node=whole.node
        )
        used += 1
        parts.append(value if found[2] in "sraqv@T" else cleaned(value, "all"))
    parts.append(constant(text[at:]))
    result = compose(parts, node)
    if template.built:
        result.built = True
        result.atoms = join_atoms([template, result])
    return result


def braces(template: Value, call_args: list[Value], keys: list[str | None], node: Node) -> Value:
    """`"{} {name}".format(...)` and its like."""
    text = template.text or ""
    plain = [v for k, v in zip(keys, call_args, strict=False) if k is None]
    named = {k: v for k, v in zip(keys, call_args, strict=False) if k is not None}
    parts: list[Value] = []
    at = 0
    used = 0
    for found in _BRACES.finditer(text):
        parts.append(constant(text[at : found.start()]))
        at = found.end()
        name = re.split(r"[.\[]", found[1])[0]
        if name.isdigit():
            value = plain[int(name)] if int(name) < len(plain) else None
        elif name:
            value = named.get(name) or Value(atoms=(Atom("unknown", name, node.start),))
        else:
            value = plain[used] if used < len(plain) else None
            used += 1
        value = value or Value(atoms=join_atoms(call_args))
        parts.append(cleaned(value, "all") if (found[2] or "")[-1:] in tuple("dxXfeg") else value)
    parts.append(constant(text[at:]))
    return compose(parts, node)


def composed(known: Knowledge, call) -> Value | None:  # type: ignore[no-untyped-def]
    """The text that a call composes: a formatter's, `join`, or a method that keeps its receiver's text; None for
    other calls."""
    node, receiver, args = call.node, call.receiver, call.args
    name = node.base.name if node.base is not None else ""
    position = known.about(call.paths).format
    if position is not None and position < len(args):
        template = args[position]
        rest, keys = args[position + 1 :], call.keys[position + 1 :]
        if not is_text(template):
            return Value(atoms=join_atoms(args), node=node, built=False)
        text = template.text or ""
        return (
            braces(template, rest, keys, node)
            if "{" in text
            else percent(template, rest, Value(atoms=join_atoms(rest)), node)
        )
    if name in BUILDERS and (not args or is_text(args[0])) and len(args) < 2 and (node.new or receiver is None):
        return Value(
            tuple(call.paths), text=args[0].text if args else "", built=bool(args) and args[0].built,
            atoms=join_atoms(args), node=node,
        )  # fmt: skip
    if name in LISTS and (receiver is None or call.paths[0].split(".")[0] in _LISTS):
        return Value(tuple(p + "()" for p in call.paths), atoms=join_atoms(args), items=args, node=node)
    if name in SAME and len(args) == 1 and is_text(args[0]) and receiver is not None:
        return args[0]
    if len(args) == 1 and is_text(args[0]) and any(path in ADDRESSES for path in call.paths):
        paths = tuple(call.paths if node.new else (p + "()" for p in call.paths))
        return Value(paths, text=args[0].text, built=args[0].built, atoms=args[0].atoms, node=node)
    if name in TRANSLATED and args and is_text(args[0]):
        return args[0]
    if receiver is None or node.base is None or node.base.kind != "member":
        if name == "append" and args and (args[0].items is not None or not args[0].atoms):  # Go: xs = append(xs, x)
            items = [*(args[0].items or []), *args[1:]]
            return Value(args[0].paths, atoms=join_atoms(args), items=items[:50], node=node)
        if name == "make" and args and receiver is None and "make" in call.paths:  # Go: nothing in it yet
            return Value(items=[], node=node) if node.args[0].raw == "slice_type" else None
        return None
    if "strings.Repeat" in call.paths and args and args[0].known():
        return args[0]
    if "strings.Join" in call.paths and len(args) == 2 and args[0].items is not None:
        return compose([part for item in args[0].items for part in (item, args[1])][:-1], node)
    if name == "formatted" or (name == "format" and is_text(receiver) and "{" not in (receiver.text or "")):
        return percent(receiver, args, Value(atoms=join_atoms(args)), node) if is_text(receiver) else None
    if name == "format" and is_text(receiver):
        return braces(receiver, args, call.keys, node)
    if name in ("join", "Join") and len(args) == 2 and is_text(args[0]) and call.paths[0][:6].lower() == "string":
        return _joined(args[0], args[1], node)  # String.join(", ", columns)
    if name == "join" and receiver.items is not None and len(args) < 2 and all(is_text(a) for a in args):
        between = args or [constant(",", node)]
        parts = [part for item in receiver.items for part in (item, *between)]
        return compose(parts[: -len(between)], node) if parts else constant("", node)
    if name in ("join", "Join") and is_text(receiver) and args:
        return _joined(receiver, args[0], node)
    if name in ADDS and args and is_text(receiver):
        made = compose([receiver, *args], node)
        return Value(receiver.paths, text=made.text, built=made.built, atoms=made.atoms, node=node)
    if name in KEEP and (is_text(receiver) or receiver.items is not None):
        return receiver
    if name in ("replace", "replaceAll", "Replace") and receiver.text is not None and args:
        return Value(
            text=receiver.text,
            built=receiver.built or any(not a.known() for a in args),
            atoms=join_atoms([receiver, *args]),
            node=node,
        )
    return None


def _joined(between: Value, whole: Value, node: Node) -> Value:
    """The parts of a list with a text between them; of a list that texts were added to, these."""
    joined: list[Value] = []
    for part in whole.items if whole.items is not None else [whole]:
        joined += [part, between]
    return compose(joined[:-1], node) if joined else constant("", node)


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
