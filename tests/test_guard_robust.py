"""Whatever comes in, a scan ends in its time, leaves nothing behind, and gives the same on every thread."""

import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna import guard
from puna.guard.code.rule import all_rules
from puna.guard.code.scan import INCOMPLETE, SECONDS, scan

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from hostile_code import giants, hostile

SLACK = 0.7  # seconds of processor time to wind up in


def test_hostile_input_neither_crashes_nor_goes_over_the_limit() -> None:
    """300 of them; benchmarks/code_guard.py runs 10,000."""
    for text, language in hostile(300, seed=7, longest=8000):
        start = time.thread_time()
        guard.scan_code(text, language)
        assert time.thread_time() - start < SECONDS + SLACK, (language, text[:100], len(text))


@pytest.mark.parametrize(
    ("text", "language"),
    [("x => " * 3000, "java"), ("x =>\n" * 3000, "java"), ("a." * 9000, "java"), ("a::" * 9000, "rust")],
)
def test_what_once_took_too_long_or_nested_too_deeply(text: str, language: str) -> None:
    start = time.thread_time()
    guard.scan_code(text, language)
    assert time.thread_time() - start < SECONDS + SLACK


@pytest.mark.parametrize("number", [0, 3, 5, 9])
def test_five_megabytes_end_in_time_and_say_so(number: int) -> None:
    text, language = list(giants())[number]
    start = time.thread_time()
    found = scan(text, language or "text", seconds=0.5)
    assert time.thread_time() - start < 0.5 + SLACK
    assert time.thread_time() - start < 0.5 or any(f.rule == INCOMPLETE for f in found)


def test_a_scan_that_its_limit_ends_tells_where() -> None:
    code = "import os\ndef f(x):\n    os.system('ls ' + x)\n"
    found = scan(code * 60_000, "python", seconds=0.8)
    (stopped,) = [f for f in found if f.rule == INCOMPLETE]
    assert stopped.severity == "warning"
    assert len(found) > 1  # what was seen until then is told


def test_code_after_broken_code_is_scanned() -> None:
    code = "import os\nx = foo(\nclass A:\n    def f(self, a):\n        os.system('ls ' + a)\n"
    code += "y = [\nos.system('ls ' + b)\n"
    assert {f.line for f in guard.scan_code(code, "python")} == {5, 7}
    c = "int f(char *s) {\n  if (s) {\n  g((\n  system(s);\n"
    assert {f.line for f in guard.scan_code(c, "c")} == {4}


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=300), st.sampled_from(["python", "php", "cpp", "yaml", "dockerfile", None]))
def test_any_text_is_taken(text: str, language: str | None) -> None:
    for finding in guard.scan_code(text, language):
        assert 1 <= finding.line <= text.count("\n") + text.count("\r") + 1


def test_nothing_is_written_and_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_args: object, **_keywords: object) -> None:
        raise AssertionError("the scanner reached for a file or a process")

    for place, name in ((subprocess, "Popen"), (tempfile, "mkstemp"), (tempfile, "mkdtemp")):
        monkeypatch.setattr(place, name, refused)
    assert guard.scan_code("import os\ndef f(x):\n    os.system('ls ' + x)\n", "python")


def test_threads_share_the_rules_and_find_the_same() -> None:
    jobs = [(code, language) for rule in all_rules()[::9] for language, code in rule.bad] * 2
    alone = [guard.scan_code(code, language) for code, language in jobs]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda job: guard.scan_code(*job), jobs))
    assert together == alone


def test_300_lines_take_milliseconds() -> None:
    """The figures are in docs/benchmarks.md; here only that nothing is off by a large factor."""
    code = Path(subprocess.__file__).read_text("utf-8").split("\n")[:300]
    guard.scan_code("", "python")
    times = []
    for _ in range(5):
        start = time.thread_time()
        guard.scan_code("\n".join(code), "python")
        times.append(time.thread_time() - start)
    assert min(times) < 0.2
