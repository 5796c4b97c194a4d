"""How text is composed: operators, formatters, methods that append."""

import re
from functools import lru_cache

from puna.guard.code.knowledge import Knowledge
from puna.guard.code.value import MAX_TEXT, Atom, Value, cleaned, compose, constant, join_atoms
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
