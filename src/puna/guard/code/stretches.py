"""Regular expressions over text that may have been made to keep them busy: Python's can't be interrupted, so they are
given text whose runs are broken up, in stretches between which the clock is looked at."""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import AnyStr

from puna.guard.code.budget import Budget

BLANKS = 100  # characters between which there is more than white space
LETTERS = 400  # the same of letters, digits and _
STRETCH = 6000  # characters that are looked at in one go
SHARED = 1000  # of these, which the next stretch has, too: the longest match that is always found
LINE = 1000  # the same of a line
_LONG = re.compile(rb"[^\n]{%d,}" % LINE)
_LINES = bytes(ord("\n") if i == ord("\n") else ord("a") for i in range(256))
_SHAPE = bytes(
    ord(" ") if bytes([i]).isspace() else ord("a") if bytes([i]).isalnum() or i == ord("_") else 0 for i in range(256)
)
_RUN = re.compile(rb" {%d,}|a{%d,}" % (BLANKS, LETTERS))
_RUN_OF_TEXT = re.compile(rf"\s{{{BLANKS}}}|\w{{{LETTERS}}}")


def tame(source: bytes) -> bytes:
    """`source`, as long as before, with a control character wherever white space runs on for BLANKS bytes or a word
    for LETTERS, and lines of more than LINE bytes broken, at a blank where there is one: what is quadratic in a run or
    a line stays harmless."""
    shape = source.translate(_SHAPE)
    long = b"a" * LINE in source.translate(_LINES)
    if not long and b" " * BLANKS not in shape and b"a" * LETTERS not in shape:
        return source
    made = bytearray(source)
    for line in _LONG.finditer(source) if long else ():
        at = line.start() + LINE // 2
        while at < line.end():
            blank = source.find(b" ", at, at + LINE // 4)
            at = at if blank < 0 else blank
            made[at] = ord("\n")
            at += LINE // 2
    for run in _RUN.finditer(shape):
        step = BLANKS if run[0][0] == ord(" ") else LETTERS
        for at in range(run.start() + step - 1, run.end(), step):
            made[at] = 1
    return bytes(made)


@lru_cache(256)
def tame_text(text: str) -> str:
    """The same for a short text."""
    return _RUN_OF_TEXT.sub(lambda run: run[0][:-1] + "\1", text)


def matches(
    pattern: re.Pattern[AnyStr], text: AnyStr, budget: Budget, start: int = 0, end: int | None = None
) -> Iterator[re.Match[AnyStr]]:
    """As `pattern.finditer(text, start, end)`, looking at STRETCH characters at once, until the budget ends."""
    end = len(text) if end is None else min(end, len(text))
    while True:
        last = start + STRETCH >= end
        shared = end if last else start + STRETCH - SHARED
        for match in pattern.finditer(text, start, min(start + STRETCH, end)):
            if match.start() >= shared and not last:
                break
            yield match
            shared = max(shared, match.end())
        if last or budget.check():
            return
        start = shared
