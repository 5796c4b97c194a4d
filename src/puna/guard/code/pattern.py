"""Patterns for dotted paths, as rules write them.

eval                 the bare name only, never `model.eval`
os.system            this path, or one that ends in it (`a.os.system`)
*.execute            a method of anything; `*` stands for any characters
hashlib.{md5,sha1}   alternatives
Runtime.getRuntime().exec    a call inside a path is written `()`, an index `[]`
"""

import re
from collections.abc import Iterable
from functools import cache, lru_cache

MAX_SEEN = 4096  # paths whose answer a set of patterns remembers


def expand(text: str) -> list[str]:
    """Braces written out: `a.{b,c}` -> `a.b`, `a.c`."""
    found = re.search(r"\{([^{}]*)\}", text)
    if not found:
        return [text]
    return [
        whole
        for part in found[1].split(",")
        for whole in expand(text[: found.start()] + part.strip() + text[found.end() :])
    ]


@lru_cache(8192)
def last_name(path: str) -> str:
    """The last segment without `()` and `[]`: the key under which patterns are looked up."""
    end = path.rstrip("()[]")
    return end[end.rfind(".") + 1 :]


class Patterns:
    """A set of patterns, looked up by the last segment of a path."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self.sources = [text for pattern in patterns for text in expand(pattern)]
        self.exact: dict[str, list[tuple[str, str]]] = {}  # each with a part that a path must have to match
        self.loose: list[tuple[str, str]] = []
        for text in self.sources:
            name = last_name(text)
            needed = max(text.split("*"), key=len)
            if "*" in name:
                self.loose.append((needed, text))
            else:
                self.exact.setdefault(name, []).append((needed, text))
        self.seen: dict[str, bool] = {}

    def names(self) -> set[str] | None:
        """The last segments that can match; None if any can."""
        return None if self.loose else set(self.exact)

    def match(self, paths: Iterable[str]) -> bool:
        """Whether one of the paths (they name the same thing) matches one of the patterns."""
        for path in paths:
            held = self.seen.get(path)
            if held is None:
                if len(self.seen) > MAX_SEEN:
                    self.seen = {}
                held = self.seen[path] = self._matches(path)
            if held:
                return True
        return False

    def _matches(self, path: str) -> bool:
        return any(
            needed in path and _compile(text).fullmatch(path)
            for needed, text in (*self.exact.get(last_name(path), ()), *self.loose)
        )


@cache
def _compile(text: str) -> re.Pattern[str]:
    body = re.escape(text).replace(r"\*", ".*")
    return re.compile(body if "." not in text or text.startswith("*") else r"(?:.*\.)?" + body, re.DOTALL)
