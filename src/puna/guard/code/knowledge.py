"""What is known of each language's libraries, from `libraries/*.yaml`: where input comes from, what makes it safe,
what composes text."""

from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from puna.errors import PunaError
from puna.guard.code.pattern import Patterns

SECTIONS = {
    *("sources", "cleaners", "formatters", "writers", "input_texts"),
    *("input_marks", "input_types", "handler_marks", "handler_classes", "handler_calls"),
}


@dataclass(frozen=True)
class Write:
    """A function that writes into one of its arguments: argument `to` receives the composed `format` and what follows
    it, the arguments `of` (-1: the receiver), or something labelled `label`."""

    patterns: Patterns
    to: int
    format: int | None
    of: tuple[int, ...]
    label: str


@dataclass(frozen=True, slots=True)
class About:
    """What is known of something that has several paths: the label of the source of input that it is (or ""), the
    purposes that it makes its arguments safe for, which of them is a format (or None), what it writes into them."""

    label: str
    purposes: tuple[str, ...]
    format: int | None
    writers: tuple[Write, ...]


MAX_SEEN = 8192  # answers that are remembered


@dataclass(frozen=True)
class Knowledge:
    """One language's. `sources` label -> patterns of paths; `cleaners` purpose -> patterns of calls; `formatters`
    index of the format argument -> patterns of calls;
    `input_marks` annotations that make a parameter input, `input_types` its types that do; `handler_marks` annotations
    that make all parameters of a function input, `handler_classes` classes whose heirs' methods take input,
    `handler_calls` calls that are given such a function; `input_texts` names that a call opens to read input."""

    sources: dict[str, Patterns]
    cleaners: dict[str, Patterns]
    formatters: dict[int, Patterns]
    writers: tuple[Write, ...]
    input_marks: Patterns
    input_types: Patterns
    handler_marks: Patterns
    handler_classes: Patterns
    handler_calls: Patterns
    input_texts: frozenset[str] = frozenset()
    seen: dict[tuple[str, ...], About] = field(default_factory=dict)

    def about(self, paths: tuple[str, ...]) -> About:
        found = self.seen.get(paths)
        if found is None:
            if len(self.seen) >= MAX_SEEN:
                self.seen.clear()
            found = self.seen[paths] = About(
                next((label for label, patterns in self.sources.items() if patterns.match(paths)), ""),
                tuple(purpose for purpose, patterns in self.cleaners.items() if patterns.match(paths)),
                next((index for index, patterns in self.formatters.items() if patterns.match(paths)), None),
                tuple(writer for writer in self.writers if writer.patterns.match(paths)),
            )
        return found


def parse(text: str, where: str) -> Knowledge:
    """Raises PunaError for an unknown section or a malformed entry, naming it."""
    data: Any = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}
    unknown = set(data) - SECTIONS
    if unknown:
        raise PunaError(
            f"{where}: unknown section {sorted(unknown)[0]!r}; the sections are {', '.join(sorted(SECTIONS))}."
        )
    writers = tuple(
        Write(Patterns(_list(w["call"])), int(w["to"]), w.get("format"), tuple(w.get("of", ())), w.get("label", ""))
        for w in data.get("writers", [])
    )
    sources = {label: Patterns(patterns) for label, patterns in data.get("sources", {}).items()}
    return Knowledge(
        sources,
        {purpose: Patterns(patterns) for purpose, patterns in data.get("cleaners", {}).items()},
        {int(index): Patterns(patterns) for index, patterns in data.get("formatters", {}).items()},
        writers,
        Patterns(data.get("input_marks", [])),
        Patterns(data.get("input_types", [])),
        Patterns(data.get("handler_marks", [])),
        Patterns(data.get("handler_classes", [])),
        Patterns(data.get("handler_calls", [])),
        frozenset(data.get("input_texts", [])),
    )


def _list(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


@cache
def knowledge(language: str) -> Knowledge:
    """Of a language; TypeScript shares JavaScript's, C++ C's."""
    name = {"typescript": "javascript", "cpp": "c"}.get(language, language)
    path = files("puna.guard.code") / "libraries" / f"{name}.yaml"
    return parse(path.read_text("utf-8") if path.is_file() else "", f"libraries/{name}.yaml")
