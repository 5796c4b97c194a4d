"""Input that was made to take long: each of these once took many times the limit of a scan."""

import json
import time

import pytest

from puna import guard
from puna.guard.code.answer import scan_found
from puna.guard.code.scan import SECONDS

SLACK = 0.7  # seconds of processor time to wind up in


def within(text: str, language: str | None, seconds: float = SECONDS) -> list[guard.Finding]:
    """The findings, and that they took no longer than a scan may."""
    scan_found("", language)
    start = time.thread_time()
    found = scan_found(text, language, seconds)
    assert time.thread_time() - start < seconds + SLACK
    return found


@pytest.mark.parametrize("unit", ["#", "/*", "= &", "& <%", "a b c\n"])
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


@pytest.mark.parametrize(
    ("unit", "language"),
    [
        ("tar $ -C/", "shell"),
        ("'wget -o-a . ", "shell"),
        ("ssh -a -a ", "shell"),
        ("[[[[[", "csharp"),
        ("[nodeLoadExternalEntitiesAlway", "swift"),
        ("void checkServerTrusted(a),{//a //a //a //a //a //a //a //a //a //a //a //a //a", "java"),
        ("@a.route('/a/users/{methods=PUT", "python"),
        ("printf(\"%" + "0" * 20_000 + "\", x);\n", "c"),
        ("f(\"%" + "9" * 5000 + "d\" % x)\n", "python"),
        ("sprintf(s, \"%" + "9" * 5000 + "d\", x);\n", "c"),
        ("cursor.execute('select " + "database %s " * 200 + "x %s' % (a, b))\n", "python"),
        (" " * 100_000 + "```x`\n", None),
        ("=>" * 70_000, "shell"),
        ("if a; then\n" + "b\n" * 70_000 + "fi\n", "shell"),
    ],
)  # fmt: skip
def test_expressions(unit: str, language: str | None) -> None:
    within(unit * (60_000 // len(unit) + 1), language, seconds=0.6)


@pytest.mark.parametrize(
    "statement",
    [
        "x->payload{0}_len = x->payload{0};",
        "char *a{0} = malloc(n{0});",
        "strcpy(b, p{0}); strcat(b, q{0});",
        "if (!p{0}) return 1; p{0}->x = q{0}->y;",
        "A *a{0} = new A; delete a{0}; a{0}->x();",
    ],
)
def test_a_function_of_thousands_of_lines(statement: str) -> None:
    """Checks of C that look at each node beside each other one."""
    body = "\n".join(statement.format(i) for i in range(100_000 // len(statement)))
    within("int f(struct s *x, char *p, int n) {\nchar b[10];\n" + body + "\n}\n", "cpp", seconds=0.6)


LINES = "".join(f"def f{i}(a, b):\n    if a == {i}:\n        return b.foo({i})\n" for i in range(120))


@pytest.mark.parametrize(
    "text",
    [
        "```markdown\n" * 20_000,
        "````markdown\n```python\nx\n```\n" * 5000,
        f"```\n{LINES}```\n" * 200,
        json.dumps([{"x": LINES}] * 200),
        "```python\nx\n```\n" * 600,
        "".join(f"--- a\n+++ b/x{i}.py\n@@ -1 +1 @@\n+x\n" for i in range(600)),
        json.dumps([{"command": "ls"}] * 600),
    ],
)
def test_what_is_too_much_to_be_looked_at_is_said(text: str) -> None:
    """Blocks in blocks, and hundreds of them whose language must be told."""
    assert [f.rule for f in within(text, None, seconds=0.6)][-1] == "scan-incomplete"


def test_a_stream_that_is_fed_at_once_has_one_limit() -> None:
    stream = guard.CodeStream(seconds=0.5)
    start = time.thread_time()
    found = stream.feed(f"```\n{LINES}```\n" * 200)
    assert time.thread_time() - start < 0.5 + SLACK
    assert found[-1].rule == "scan-incomplete"
