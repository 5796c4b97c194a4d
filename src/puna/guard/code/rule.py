"""Rules: data in `rules/<language>/*.yaml`, read, checked and compiled. docs/code-guard.md says how to write one."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from puna.errors import PunaError
from puna.guard.code import (  # noqa: F401 - they register checks
    checks_arithmetic,
    checks_arrays,
    checks_classes,
    checks_copies,
    checks_covered,
    checks_fill,
    checks_first,
    checks_free,
    checks_handlers,
    checks_index,
    checks_leaks,
    checks_misc,
    checks_null,
    checks_outside,
    checks_overflow,
    checks_paths,
    checks_record,
    checks_room,
    checks_services,
    checks_sizeof,
    checks_slips,
    checks_source,
    checks_stream,
    checks_text,
    checks_unset,
    checks_walk,
    checks_web,
)
from puna.guard.code.checks import CHECKS
from puna.guard.code.conditions import Test, compile_condition, compile_regex
from puna.guard.code.languages import FORMATS, LANGUAGES, RULES_OF
from puna.guard.code.pattern import Patterns
from puna.guard.code.scope import Scope

SPOKEN = (*(name for name in LANGUAGES if name not in RULES_OF), *FORMATS)
FOLDERS = {
    **{name: (name,) for name in SPOKEN},
    "yaml": ("yaml", "json"),
    "javascript": ("javascript", "typescript"),
    "c": ("c", "cpp"),
    "any": SPOKEN,
}
REQUIRED = ("id", "cwe", "severity", "confidence", "message", "why", "fix", "match", "bad", "good")
OPTIONAL = ("languages", "safe_for")
COMMON = {"file", "not_file", "in_function", "with_calls", "without_calls", "marked", "not_marked", "in_class"}
KINDS: dict[str, set[str]] = {
    "call": {"arguments", "receiver", "count", "result", "new"},
    "assign": {"value", "target"},
    "key": {"value"},
    "compare": {"one", "other"},
    "text": set(),
    "return": set(),
    "function": {"parameters"},
    "import": set(),
    "catch": {"empty"},
    "check": set(),
    "source": {"contains", "entropy", "except", "line"},
}


@dataclass
class Alternative:
    """One way for a rule to match. `patterns` are those of the paths for which it is looked up (None: asked every
    time)."""

    kind: str
    patterns: Patterns | None
    tests: list[tuple[str, Test]] = field(default_factory=list)
    regex: re.Pattern[str] | None = None
    operators: frozenset[str] = frozenset()
    count: tuple[int, int] | None = None
    unused: bool = False
    new: bool | None = None
    empty: bool = False
    check: Callable[..., Any] | None = None
    written: re.Pattern[bytes] | None = None
    contains: tuple[bytes, ...] = ()
    line: bool = False
    refused: re.Pattern[bytes] | None = None
    entropy: float = 0.0
    file: re.Pattern[str] | None = None
    not_file: re.Pattern[str] | None = None
    context: list[Callable[[Scope], bool]] = field(default_factory=list)


@dataclass
class Rule:
    """A weakness, how it looks, and what to say about it. `bad` and `good`: (language, code) examples, which are its
    tests."""

    id: str
    cwe: str
    severity: str
    confidence: str
    message: str
    why: str
    fix: str
    languages: tuple[str, ...]
    alternatives: list[Alternative]
    bad: list[tuple[str, str]]
    good: list[tuple[str, str]]


def parse_rules(text: str, where: str, default_languages: tuple[str, ...]) -> list[Rule]:
    """The rules in one file. Raises PunaError naming file, rule and key for anything malformed."""
    try:
        data = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or []
    except yaml.YAMLError as error:
        raise PunaError(f"{where}: not valid YAML: {error}") from error
    if not isinstance(data, list):
        raise PunaError(f"{where}: a rule file is a list of rules, each starting with `- id:`.")
    return [_rule(entry, where, default_languages) for entry in data]


def _rule(entry: Any, where: str, default_languages: tuple[str, ...]) -> Rule:
    if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
        raise PunaError(f"{where}: every rule is a mapping with an `id`; this isn't one: {str(entry)[:80]}")
    where = f"{where}, rule {entry['id']!r}"
    missing = [key for key in REQUIRED if not entry.get(key)]
    if missing:
        raise PunaError(f"{where}: {missing[0]!r} is missing.")
    unknown = set(entry) - {*REQUIRED, *OPTIONAL}
    if unknown:
        raise PunaError(
            f"{where}: unknown key {sorted(unknown)[0]!r}; the keys are {', '.join((*REQUIRED, *OPTIONAL))}."
        )
    for key, pattern, form in (
        ("id", r"[a-z0-9]+(-[a-z0-9]+)*", "lower-case words joined by hyphens"),
        ("cwe", r"CWE-\d+", "CWE- and a number"),
        ("severity", "warning|error", "warning or error"),
        ("confidence", "high|medium|low", "high, medium or low"),
    ):
        if not re.fullmatch(pattern, str(entry[key])):
            raise PunaError(f"{where}: {key} is {entry[key]!r}, must be {form}.")
    languages = tuple(entry.get("languages", default_languages))
    wrong = [name for name in languages if name not in SPOKEN]
    if wrong:
        raise PunaError(f"{where}: unknown language {wrong[0]!r}; the languages are {', '.join(SPOKEN)}.")
    alternatives = entry["match"] if isinstance(entry["match"], list) else [entry["match"]]
    return Rule(
        id=entry["id"],
        cwe=entry["cwe"],
        severity=entry["severity"],
        confidence=entry["confidence"],
        message=" ".join(str(entry["message"]).split()),
        why=" ".join(str(entry["why"]).split()),
        fix=" ".join(str(entry["fix"]).split()),
        languages=languages,
        alternatives=[_alternative(a, str(entry.get("safe_for", "")), where) for a in alternatives],
        bad=_examples(entry["bad"], languages, f"{where}: bad"),
        good=_examples(entry["good"], languages, f"{where}: good"),
    )


def _examples(data: Any, languages: tuple[str, ...], where: str) -> list[tuple[str, str]]:
    """Text or a list of texts (run in every language of the rule), or a mapping language -> text or list."""
    if isinstance(data, dict):
        wrong = [name for name in data if name not in languages]
        if wrong:
            raise PunaError(f"{where}: {wrong[0]!r} isn't one of the rule's languages ({', '.join(languages)}).")
        return [(name, str(code)) for name, codes in data.items() for code in _list(codes)]
    return [(name, str(code)) for code in _list(data) for name in languages]


def _alternative(data: Any, safe_for: str, where: str) -> Alternative:
    kinds = [kind for kind in KINDS if isinstance(data, dict) and kind in data]
    if len(kinds) != 1:
        raise PunaError(f"{where}: each entry of match has exactly one of {', '.join(KINDS)}.")
    kind = kinds[0]
    allowed = {kind, *KINDS[kind], *COMMON}
    unknown = set(data) - allowed
    if unknown:
        raise PunaError(
            f"{where}: unknown key {sorted(unknown)[0]!r} beside {kind!r}; "
            f"the keys there are {', '.join(sorted(allowed))}."
        )
    head = data[kind]
    made = Alternative(kind, Patterns(_list(head)) if kind in ("call", "assign", "import") else None)
    if kind in ("key", "function", "catch"):
        made.regex = compile_regex(head, where)
    elif kind == "compare":
        made.operators = frozenset(_list(head))
    elif kind in ("text", "return"):
        made.tests.append(("value", compile_condition(head, safe_for, where)))
    elif kind == "check":
        if head not in CHECKS:
            raise PunaError(f"{where}: unknown check {head!r}; the checks are {', '.join(sorted(CHECKS))}.")
        made.check = CHECKS[head]
    elif kind == "source":
        made.written = _compile_bytes(head, where)
        made.contains = tuple(str(literal).lower().encode() for literal in _list(data.get("contains", [])))
        made.line = bool(data.get("line"))
        if made.line and not made.contains:
            raise PunaError(f"{where}: `line` needs `contains`, the literals of which the line holds one.")
        made.refused = _compile_bytes(data["except"], where) if "except" in data else None
        made.entropy = float(data.get("entropy", 0))
    for spec, condition in (data.get("arguments") or {}).items():
        if not re.fullmatch(r"(any|last|-?\d+|\d+\+|\d+/\w+|[A-Za-z_>&]\w*)", str(spec)):
            raise PunaError(
                f"{where}: argument {spec!r} must be a position (0), a keyword (shell), both (0/cmd), a range (1+), "
                "any, or last."
            )
        made.tests.append((str(spec), compile_condition(condition, safe_for, where)))
    for key in ("receiver", "value", "one", "other", "target"):
        if key in data:
            made.tests.append((key, compile_condition(data[key], safe_for, where)))
    if "count" in data:
        low, high = data["count"] if isinstance(data["count"], list) else (data["count"], data["count"])
        made.count = (low, high)
    made.unused = data.get("result") == "unused"
    made.new = data.get("new")
    made.empty = bool(data.get("empty"))
    _context(made, data, where)
    return made


def _compile_bytes(text: Any, where: str) -> re.Pattern[bytes]:
    return re.compile(compile_regex(text, where).pattern.encode(), re.MULTILINE)


def _context(made: Alternative, data: dict[str, Any], where: str) -> None:
    """The conditions on where the match stands."""
    if "file" in data:
        made.file = compile_regex(data["file"], where)
    if "not_file" in data:
        made.not_file = compile_regex(data["not_file"], where)
    if "in_function" in data:
        name = compile_regex(data["in_function"], where)
        made.context.append(lambda scope: name.search(_function_name(scope)) is not None)
    if "in_class" in data:
        klass = compile_regex(data["in_class"], where)
        made.context.append(lambda scope: scope.klass is not None and klass.search(scope.klass.name) is not None)
    for key, wanted in (("with_calls", True), ("without_calls", False)):
        if key in data:
            patterns = Patterns(_list(data[key]))
            made.context.append(lambda scope, p=patterns, w=wanted: p.match(scope.calls()) == w)  # type: ignore[misc]
    for key, wanted in (("marked", True), ("not_marked", False)):
        if key in data:
            patterns = Patterns(_list(data[key]))
            made.context.append(lambda scope, p=patterns, w=wanted: p.match(_marks(scope)) == w)  # type: ignore[misc]


def _function_name(scope: Scope | None) -> str:
    """Of the function around, past those that have none."""
    while scope is not None:
        if scope.function is not None and scope.function.name:
            return scope.function.name
        scope = scope.outer
    return ""


def _marks(scope: Scope) -> list[str]:
    holders = [h for h in (scope.function, scope.klass) if h is not None]
    return [mark.base.path() for holder in holders for mark in holder.marks if mark.base is not None]


def _list(data: Any) -> list[Any]:
    return data if isinstance(data, list) else [data]


@cache
def all_rules() -> tuple[Rule, ...]:
    """Every rule there is, in order of file and place. Raises PunaError for two rules with one id."""
    found: list[Rule] = []
    for folder, languages in FOLDERS.items():
        found.extend(_folder(folder, languages))
    seen: set[str] = set()
    for rule in found:
        if rule.id in seen:
            raise PunaError(f"rules: two rules are called {rule.id!r}; ids are unique over all languages.")
        seen.add(rule.id)
    return tuple(found)


@cache
def _folder(folder: str, languages: tuple[str, ...]) -> tuple[Rule, ...]:
    path = files("puna.guard.code") / "rules" / folder
    if not path.is_dir():
        return ()
    names = sorted(entry.name for entry in path.iterdir() if entry.name.endswith(".yaml"))
    return tuple(
        rule
        for name in names
        for rule in parse_rules((path / name).read_text("utf-8"), f"rules/{folder}/{name}", languages)
    )


@cache
def rules_for(language: str) -> tuple[Rule, ...]:
    """The rules of one language; reads only the folders that can hold some."""
    found = [
        rule for folder, languages in FOLDERS.items() if language in languages for rule in _folder(folder, languages)
    ]
    return tuple(rule for rule in found if language in rule.languages)
