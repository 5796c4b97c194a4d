"""Input that was made to take long: each of these once took many times the limit of a scan."""

import time

import pytest

from puna import guard
from puna.guard.code.scan import SECONDS

SLACK = 0.7  # seconds of processor time to wind up in


def within(text: str, language: str | None) -> list[guard.Finding]:
    """The findings, and that they took no longer than a scan may."""
    guard.scan_code("", language)
    start = time.thread_time()
    found = guard.scan_code(text, language)
    assert time.thread_time() - start < SECONDS + SLACK
    return found


@pytest.mark.parametrize("unit", ["#", "/*", "= &", "& <%"])
def test_a_parser_that_does_not_look_at_the_clock(unit: str) -> None:
    """Swift's: quadratic within a token, or worse in its recovery from errors."""
    assert [f.rule for f in within(unit * (60_000 // len(unit)), "swift")] == ["scan-incomplete"]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("\n" * 3_000_000, None),
        ("\n" * 100_000, "python"),
        ("function" + " " * 12_000, None),
        ("private" + " " * 12_000, "text"),
    ],
)
def test_blanks(text: str, language: str | None) -> None:
    assert within(text, language) == []
