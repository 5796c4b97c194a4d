"""Data flow: what is followed, and what ends it."""

import pytest

from puna import guard
from puna.errors import PunaError
from puna.guard.code.rule import parse_rules


def rules(source: str, language: str = "python") -> list[tuple[str, int]]:
    return [(finding.rule, finding.line) for finding in guard.scan_code(source, language)]


def test_input_is_followed_into_a_helper() -> None:
    source = (
        "import os\nfrom flask import request\ndef run(c):\n    os.system(c)\ndef view():\n    run(request.args['c'])\n"
    )
    (finding,) = guard.scan_code(source, "python")
    assert (finding.rule, finding.line, finding.confidence) == ("python-shell-composed", 4, "high")
    assert finding.trace[0][0] == 6  # the trace points at where the input came in


def test_a_helper_that_returns_a_constant_is_harmless() -> None:
    assert rules("import os\ndef name(x):\n    return 'fixed'\ndef f(x):\n    os.system('ls ' + name(x))\n") == []


@pytest.mark.parametrize(
    "guarded",
    [
        "if x not in ('a', 'b'):\n        return\n",
        "if not re.fullmatch('[a-z]+', x):\n        raise ValueError\n",
        "x = int(x)\n",
        "x = shlex.quote(x)\n",
    ],
)
def test_a_test_or_a_cleaner_ends_the_flow(guarded: str) -> None:
    source = f"import os\ndef f(x):\n    {guarded}    os.system('ls ' + x)\n"
    assert rules(source) == []


def test_a_test_for_emptiness_does_not_end_the_flow() -> None:
    assert rules("import os\ndef f(x):\n    if not x:\n        return\n    os.system('ls ' + x)\n") == [
        ("python-shell-composed", 5)
    ]


@pytest.mark.parametrize(
    "test", ["if x == 'quit':\n        return\n", "if x != 'quit':\n        print(x)\n    else:\n        return\n"]
)
def test_that_it_is_not_one_word_says_nothing_of_a_value(test: str) -> None:
    source = f"import os\ndef f(x):\n    {test}    os.system('ls ' + x)\n"
    assert [rule for rule, _ in rules(source)] == ["python-shell-composed"]


@pytest.mark.parametrize(
    ("language", "source"),
    [
        ("python", "def f(request):\n    if 'x' in request.args:\n        os.system('ls ' + request.args['x'])\n"),
        ("ruby", "def f\n  system(<<~A)\n    ls #{params[:x]}\n  A\nend\n"),
        ("ruby", "class A\n  def initialize(x)\n    @x = params[:x]\n  end\n  def f\n    system(@x)\n  end\nend\n"),
        ("ruby", 'def x\n  "ls #{params[:x]}"\nend\ndef f\n  system(x())\nend\n'),
        ("javascript", "const run = (x) => `ls ${x}`;\napp.get('/', (req, res) => { exec(run(req.query.x)); });\n"),
        ("javascript", "app.get('/', (req, res) => { const d = req.body; if (d.type === 'a') exec('ls ' + d.x); });\n"),
    ],
    ids=[
        "presence of a key",
        "heredoc",
        "instance variable",
        "last expression",
        "function in a constant",
        "kind of a message",
    ],
)
def test_what_does_not_end_the_flow(language: str, source: str) -> None:
    assert any(finding.cwe == "CWE-78" for finding in guard.scan_code(source, language))


KEPT = {
    "python": """class A:
    def __init__(self, x):
        self.x = x
    def f(self):
        open(self.x)
A(request.args['x']).f()
""",
    "javascript": """class A { constructor(x) { this.x = x; } f() { fs.readFileSync(this.x); } }
new A(req.query.x).f();
""",
    "php": """<?php class A { function __construct($x) { $this->x = $x; } function f() { readfile($this->x); } }
$a = new A($_GET['x']);
""",
    "ruby": """class A
  def initialize(x)
    @x = x
  end
  def f
    File.read(@x)
  end
end
A.new(params[:x]).f
""",
}


@pytest.mark.parametrize(("language", "source"), KEPT.items(), ids=list(KEPT))
def test_what_a_constructor_is_given_is_known_in_methods(language: str, source: str) -> None:
    assert [finding.cwe for finding in guard.scan_code(source, language)] == ["CWE-22"]


@pytest.mark.parametrize(
    "source",
    [
        "app.get('/', (req, res) => { const n = req.body.ids.map(Number).join(','); exec('ls ' + n); });\n",
        "app.get('/', (req, res) => { const n = req.body.ids.map((_, i) => '-' + i).join(','); exec('ls ' + n); });\n",
        "app.get('/', (req) => { const u = new URL(req.query.x); if (!HOSTS.has(u.hostname)) return; exec('a' + u); })",
        "app.get('/', (req, res) => { if (!NAMES.includes(req.query.x)) return; exec('ls ' + req.query.x); });\n",
    ],
    ids=["map of a cleaner", "map that drops the element", "host in a set", "member that was tested"],
)
def test_what_ends_the_flow(source: str) -> None:
    assert guard.scan_code(source, "javascript") == []


def test_after_both_branches_meet_the_name_is_unchecked_again() -> None:
    branches = "    if x == 'a':\n        print(1)\n    else:\n        print(2)\n"
    source = f"import os\ndef f(x):\n{branches}    os.system('ls ' + x)\n"
    assert rules(source) == [("python-shell-composed", 7)]


def test_broken_code_is_still_scanned() -> None:
    source = "        return x\n    def f(self, x):\n        os.system('ls %s' % x)\n   else:\n  y = (\n"
    assert rules(source) == [("python-shell-composed", 3)]


def test_deep_nesting_ends_well() -> None:
    assert rules("x = " + "(" * 5000 + ")" * 5000) == [("scan-incomplete", 1)]  # what is inside wasn't judged
    assert rules("x = " + "a+" * 20000 + "a") == []


HEAD = "- {id: a, cwe: CWE-1, severity: error, confidence: high, message: m, why: w, fix: f, bad: b, good: g"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- id: a", "rule 'a': 'cwe' is missing"),
        (HEAD.replace("CWE-1", "89") + ", match: {call: f}}", "cwe is 89, must be CWE- and a number"),
        (HEAD + ", match: {call: f, arguements: {}}}", "unknown key 'arguements' beside 'call'"),
        (HEAD + ", match: {call: f, arguments: {0: {bilt: 1}}}}", "unknown key 'bilt' in a condition"),
        (HEAD + ", match: {text: {matches: '('}}}", "regular expression '(' is broken"),
        (HEAD + ", match: {check: nonsense}}", "unknown check 'nonsense'"),
        (HEAD + ", match: {call: f}, languages: [cobol]}", "unknown language 'cobol'"),
        ("a: 1", "a list of rules"),
        ("- [", "not valid YAML"),
    ],
)
def test_a_malformed_rule_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(PunaError, match=r"rules/x\.yaml") as caught:
        parse_rules(text, "rules/x.yaml", ("python",))
    assert message in str(caught.value)
