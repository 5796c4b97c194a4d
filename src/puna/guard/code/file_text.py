"""The text of one file, as rules look at it: where its lines are, and what expressions find in it."""

import bisect
import re
from collections.abc import Iterator
from functools import cache, cached_property

from puna.guard.code.budget import Budget
from puna.guard.code.needed import in_one_line, needed
from puna.guard.code.stretches import matches, tame

MOST = 400_000  # bytes that conditions on the file look at
Lines = Iterator[tuple[int, int]]


class FileText:
    """`source` and its `lines`: the offset at which each begins. Expressions look at it as `stretches.tame` gives it,
    while `budget` lasts."""

    def __init__(self, source: bytes, budget: Budget) -> None:
        self.source = source
        self.budget = budget
        self.lines = [0, *(m.end() for m in re.finditer(b"\n", source))]
        self.tame = tame(source)
        self.small = self.tame.lower()
        self._held: dict[re.Pattern[str], bool] = {}

    @cached_property
    def _text(self) -> str:
        return self.tame[:MOST].decode("utf-8", "replace")

    @cached_property
    def _small_text(self) -> str:
        """In small letters, at the same offsets as the bytes; "" if not every character is one byte."""
        return self._text.lower() if self._text.isascii() else ""

    def position(self, offset: int) -> tuple[int, int]:
        """1-based line and column (in characters) of a byte offset."""
        line = bisect.bisect_right(self.lines, offset)
        return line, len(self.source[self.lines[line - 1] : offset].decode("utf-8", "replace")) + 1

    def holds(self, pattern: re.Pattern[str]) -> bool:
        """Whether the expression is found anywhere."""
        known = self._held.get(pattern)
        if known is None:
            known = self._held[pattern] = any(True for _ in self._seen(pattern))
        return known

    def _seen(self, pattern: re.Pattern[str]) -> Iterator[re.Match[str]]:
        wanted = needed(pattern.pattern) if self._small_text else ()
        if wanted and in_one_line(pattern):
            for start, end in self._lines_with(self._small_text, wanted):
                yield from matches(pattern, self._text, self.budget, start, end)
        elif not wanted or any(literal in self._small_text for literal in wanted):
            yield from matches(pattern, self._text, self.budget)

    def find(
        self, pattern: re.Pattern[bytes], contains: tuple[bytes, ...] = (), line: bool = False
    ) -> Iterator[re.Match[bytes]]:
        """Where the expression is found, in a text (`line`: in lines) with one of `contains`, if there are any."""
        wanted = contains or _needed_bytes(pattern)
        if line or (wanted and in_one_line(pattern)):
            for start, end in self._lines_with(self.small, wanted):
                yield from matches(pattern, self.tame, self.budget, start, end)
        elif not wanted or any(literal in self.small for literal in wanted):
            yield from matches(pattern, self.tame, self.budget)

    def _lines_with(self, small: "str | bytes", wanted: "tuple[str, ...] | tuple[bytes, ...]") -> Lines:
        """Start and end of the lines that hold one of the literals, in order."""
        places = set()
        for literal in wanted:
            at = small.find(literal)  # type: ignore[arg-type]
            while at >= 0:
                line = bisect.bisect_right(self.lines, at)
                places.add(line)
                at = small.find(literal, self.lines[line]) if line < len(self.lines) else -1  # type: ignore[arg-type]
        for line in sorted(places):
            if self.budget.check():
                return
            end = self.lines[line] - 1 if line < len(self.lines) else len(small)
            yield self.lines[line - 1], end


@cache
def _needed_bytes(pattern: re.Pattern[bytes]) -> tuple[bytes, ...]:
    return tuple(literal.encode() for literal in needed(pattern.pattern.decode()))
