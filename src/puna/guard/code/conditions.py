"""Conditions on a value, compiled from a rule's data into functions. See docs/code-guard.md for the keys' meaning."""

import re
from collections.abc import Callable
from typing import Any

from puna.errors import PunaError
from puna.guard.code.pattern import Patterns, last_name
from puna.guard.code.stretches import BLANKS, tame_text
from puna.guard.code.value import HOLE, MAX_TEXT, Atom, Value

Test = Callable[[Value | None], "Atom | bool"]  # an atom: holds, and this is where the value came from
ANY_LABEL = frozenset({"input", "address", "local", "parameter", "unknown"})
KEYS = frozenset(
    """absent above all any below built constant equals from has item kind length_below matches mentions name not path
    starts_built""".split()  # noqa: SIM905 - a list of words
)


def compile_condition(data: Any, safe_for: str, where: str) -> Test:
    """A test of one value. Raises PunaError for an unknown key or a broken regular expression, with `where` in
    front."""
    if not isinstance(data, dict):
        data = {"equals": data}
    unknown = set(data) - KEYS
    if unknown:
        raise PunaError(
            f"{where}: unknown key {sorted(unknown)[0]!r} in a condition; the keys are {', '.join(sorted(KEYS))}."
        )
    tests = [_one(key, data[key], safe_for, where) for key in sorted(data, key=lambda k: k in ("from", "built"))]
    if len(tests) == 1:
        return tests[0]

    def every(value: Value | None) -> Atom | bool:
        result: Atom | bool = True
        for test in tests:
            held = test(value)
            if not held:
                return False
            if held is not True:
                result = held
        return result

    return every


def _one(key: str, data: Any, safe_for: str, where: str) -> Test:
    if key == "absent":
        return lambda value: (value is None) == bool(data)
    if key == "not":
        test = compile_condition(data, safe_for, where)
        return lambda value: not test(value)
    if key in ("any", "all"):
        parts = [compile_condition(d, safe_for, where) for d in _list(data)]
        if key == "all":
            return lambda value: all(part(value) for part in parts)
        return lambda value: next((held for part in parts if (held := part(value))), False)
    if key in ("from", "built", "starts_built"):
        labels = ANY_LABEL if data in ("any", True) else frozenset(_list(data))
        return _sourced(labels, key, safe_for)
    return _present(_plain(key, data, safe_for, where))


def _sourced(labels: frozenset[str], key: str, safe_for: str) -> Test:
    def test(value: Value | None) -> Atom | bool:
        if (
            value is None
            or (key != "from" and not value.built)
            or (key == "starts_built" and not (value.text or "").startswith(HOLE))
        ):
            return False
        for atom in value.atoms:
            if atom.label in labels and safe_for not in atom.clean and "checked" not in atom.clean:
                return atom
        return False

    return test


def _present(test: Callable[[Value], Any]) -> Test:
    return lambda value: value is not None and bool(test(value))


def _plain(key: str, data: Any, safe_for: str, where: str) -> Callable[[Value], Any]:
    if key == "constant":
        return lambda value: value.known() == bool(data)
    if key == "equals":
        accepted = _list(data)
        return lambda value: value.known() and any(value.const == a and type(value.const) is type(a) for a in accepted)
    if key == "matches":
        pattern = compile_regex(data, where)
        return lambda value: value.text is not None and pattern.search(_looked_at(value.text)) is not None
    if key == "path":
        patterns = Patterns(_list(data))
        return lambda value: patterns.match(value.paths)
    if key == "name":
        pattern = compile_regex(data, where)
        return lambda value: any(pattern.search(last_name(p)) for p in value.paths)
    if key == "mentions":
        pattern = compile_regex(data, where)
        return lambda value: any(pattern.search(atom.text) for atom in value.atoms)
    if key == "kind":
        kinds = frozenset(_list(data))
        return lambda value: value.node is not None and value.node.kind in kinds
    if key in ("below", "above"):
        return lambda value: _is_number(value.const) and (value.const < data if key == "below" else value.const > data)
    if key == "length_below":
        return lambda value: isinstance(value.const, str) and len(value.const) < data
    if key == "item":
        test = compile_condition(data, safe_for, where)
        return lambda value: any(test(item) for item in value.items or [])
    assert key == "has"
    tests = {name: compile_condition(d, safe_for, where) for name, d in data.items()}
    return lambda value: all(test(value.item(name)) for name, test in tests.items())


def _looked_at(text: str) -> str:
    return text if len(text) <= 3 * BLANKS else tame_text(text[:MAX_TEXT])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _list(data: Any) -> list[Any]:
    return data if isinstance(data, list) else [data]


def compile_regex(text: Any, where: str) -> re.Pattern[str]:
    try:
        return re.compile(str(text))
    except re.error as error:
        raise PunaError(f"{where}: the regular expression {text!r} is broken: {error}.") from error
