"""The code guard where code comes in oddly: wrong names of languages, diffs, links, encodings; and data that takes the
ways that programs of the web give it."""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from puna.cli.guard import app
from puna.errors import PunaError
from puna.guard.code import CodeStream, files, scan_answer, scan_path, scan_text
from puna.guard.code.detect import detect
from puna.guard.code.finding import Finding
from puna.guard.code.sarif import sarif
from puna.guard.code.scan import scan

BAD = "import os\ndef f(x):\n    os.system('ls ' + x)\n"


@pytest.mark.parametrize("named", ["javascript", "text", "plaintext", "code"])
def test_a_block_that_is_plainly_python_is_read_as_python(named: str) -> None:
    (found,) = scan_answer(f"```{named}\n{BAD}```\n")
    assert (found.language, found.line) == ("python", 4)


def test_columns_in_a_diff_count_its_sign() -> None:
    diff = "--- a/x.py\n+++ b/x.py\n@@ -1,2 +1,3 @@\n import os\n def f(x):\n+    os.system('ls ' + x)\n"
    (found,) = scan_answer(diff)
    line = diff.split("\n")[found.line - 1]
    assert line[found.column - 1 : found.end_column - 1] == "os.system('ls ' + x)"


def test_an_added_line_that_looks_like_the_head_of_a_file_is_none() -> None:
    diff = "--- a/x.py\n+++ b/x.py\n@@ -1,2 +1,4 @@\n import os\n+++ 1\n def f(x):\n+    os.system('ls ' + x)\n"
    assert [f.line for f in scan_answer(diff)] == [7]


def test_links_in_a_folder_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside.py").write_text(BAD)
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "link.py").symlink_to(tmp_path / "outside.py")
    assert list(scan_path(folder)) == []
    assert [len(found) for _, _, found in scan_path(tmp_path)] == [1]


def test_scripts_without_an_ending_are_told_by_their_first_line(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("#!/usr/bin/env python3.11\n" + BAD)
    (tmp_path / "install").write_text("#!/bin/bash\neval $1\n")
    (tmp_path / "README").write_text("hello\n")
    (tmp_path / "tool").write_bytes(b"\x7fELF\0\0")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "hook").write_text("#!/bin/sh\neval $1\n")
    assert [(file.name, found[0].language) for file, _, found in scan_path(tmp_path)] == [
        ("install", "shell"),
        ("run", "python"),
    ]
    (found,) = [found for _, _, found in scan_path(tmp_path / "run")]
    assert found[0].language == "python"


def test_what_is_passed_over_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.py")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere")
    (tmp_path / "notes.odt").write_text("hello")
    (tmp_path / "large.py").write_text("x = 1\n" * 100)
    (tmp_path / "small.py").write_text(BAD)
    monkeypatch.setattr(files, "LONGEST", 100)
    skipped: Counter[str] = Counter()
    assert [file.name for file, _, _ in scan_path(tmp_path, skipped=skipped)] == ["small.py"]
    assert skipped == {
        "that are links": 2,
        "that are no plain files": 1,
        "in no language that is known": 1,
        "that can't be read or are too long": 1,
    }
    with pytest.raises(PunaError, match="scan it in smaller parts"):
        list(scan_path(tmp_path / "large.py"))
    said = CliRunner().invoke(app, ["code", str(tmp_path)]).output
    assert "Not scanned: 1 in no language that is known, 2 that are links, 1 that are no plain files" in said


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.py")
    with pytest.raises(PunaError, match="neither a file nor a folder"):
        list(scan_path(tmp_path / "pipe.py"))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "latin-1"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "a.py"
    file.write_bytes(("# é\n" + BAD).replace("\n", "\r\n").encode(encoding))
    ((_, _, (found,)),) = scan_path(file)
    assert (found.line, found.column) == (4, 5)


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
def test_line_ends(end: str) -> None:
    answer = f"So:\n```python\n{BAD}```\n".replace("\n", end)
    (whole,) = scan_answer(answer)
    stream = CodeStream()
    parts = [found for letter in answer for found in stream.feed(letter)] + stream.close()
    assert [(f.line, f.column) for f in (whole, *parts)] == [(5, 5), (5, 5)]


def test_sarif_addresses_and_columns() -> None:
    (found,) = scan_text(BAD, "python", "my file.py")
    run = sarif([found], "1")["runs"][0]
    place = run["results"][0]["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"] == "my%20file.py"
    assert run["columnKind"] == "unicodeCodePoints"


def test_addresses_of_odd_names() -> None:
    (found,) = scan_text(BAD, "python", "a:b#c%\udcff.py")
    (result,) = sarif([found], "1")["runs"][0]["results"]
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "a%3Ab%23c%25%EF%BF%BD.py"
    (result,) = sarif([replace(found, path="my book.ipynb#cell-2")], "1")["runs"][0]["results"]
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "my%20book.ipynb#cell-2"


def test_code_cannot_steer_the_terminal(tmp_path: Path) -> None:
    file = tmp_path / "a\x1b[2J.py"
    file.write_text(BAD.replace("'ls '", "'ls \x1b[31m\u202e'"))
    said = CliRunner().invoke(app, ["code", str(file)]).output
    assert "\x1b" not in said
    assert "\u202e" not in said
    assert "'ls \\x1b[31m\\u202e'" in said


@pytest.mark.parametrize(
    ("statement", "allowed"),
    [
        ("os.system(\n    'ls ' + x\n)  # puna: allow python-shell-composed only for admins", "only for admins"),
        ("os.system('puna: allow python-shell-composed only for admins' + x)", ""),
    ],
)
def test_where_a_comment_allows(statement: str, allowed: str) -> None:
    (found,) = scan_text(f"import os, sys\nx = sys.argv[1]\n{statement}", "python", "a.py")
    assert found.allowed == allowed


def rules(code: str, language: str) -> list[str]:
    found: list[Finding] = scan(code, language)
    return [f.rule for f in found]


@pytest.mark.parametrize(
    ("language", "code", "rule"),
    [
        ("python", "def f():\n    n = request.args.get('n') or 'x'\n    return f'<p>{n}</p>'\n",
         "python-html-composed"),
        ("javascript", "app.get('/', (req, res) => { const q = req.query.q || ''; res.send(`<p>${q}</p>`); });",
         "javascript-html-composed"),
        ("javascript", "const cp = require('child_process');\nconst run = promisify(cp.exec);\n"
         "function f(x) { run('ls ' + x); }", "javascript-shell-composed"),
        ("javascript", "function f(all) { let h = ''; all.forEach((a) => { h += `<i>${a}</i>`; }); b.innerHTML = h; }",
         "javascript-html-composed"),
        ("python", "import shutil\nclass W:\n    def remove(self, name):\n        shutil.rmtree('/srv/' + name)\n"
         "w = W()\ndef handler():\n    w.remove(request.json['name'])\n", "python-path-from-input"),
        ("python", "class H(BaseHTTPRequestHandler):\n    def do_GET(self):\n        open('www' + self.path)\n",
         "python-path-from-input"),
    ],
)  # fmt: skip
def test_data_is_followed(language: str, code: str, rule: str) -> None:
    assert rule in rules(code, language)


@pytest.mark.parametrize(
    ("language", "code"),
    [
        ("php", "<?php ctype_alnum($_POST['n']) or die(); $x->xpath(\"//u[@n='\" . $_POST['n'] . \"']\");"),
        ("ruby", "def f\n  head :bad and return unless HOSTS.include?(params[:h])\n"
         "  Net::HTTP.get(params[:h], '/')\nend"),
        ("python", "def f():\n    u = request.args['u']\n    p = urlsplit(u)\n    if p.hostname not in HOSTS:\n"
         "        abort(400)\n    requests.get(u, timeout=5)\n"),
        ("python", "def f():\n    n = request.args.get('n')\n    if re.fullmatch('[a-z]+', n) is None:\n"
         "        abort(400)\n    open('/srv/' + n)\n"),
        ("python", "def f(user):\n    logger.info('login of ' + request.form['u'].replace('\\n', ' '))\n"),
    ],
)  # fmt: skip
def test_what_was_tested_is_quiet(language: str, code: str) -> None:
    assert rules(code, language) == []


@pytest.mark.parametrize(("language", "code"), [("ruby", "FOO { |c| c }\n"), ("javascript", "ASSERT(() => 1);")])
def test_a_function_as_a_condition_at_the_margin_is_no_trouble(language: str, code: str) -> None:
    assert rules(code, language) == []


@pytest.mark.parametrize(
    ("language", "code"),
    [
        ("csharp", "class A {\n  string F(string path) {\n    var reader = new StreamReader(path);\n"
         "    var line = reader.ReadLine();\n    if (line == null) return \"\";\n"
         "    reader.Close();\n    return line;\n  }\n}\n"),
        ("csharp", "public class A : Controller {\n  private static int hits;\n"
         "  public IActionResult Get() { hits++; return Ok(hits); }\n}\n"),
        ("swift", "func ping(host: String) throws {\n    let process = Process()\n"
         "    process.launchPath = \"/sbin/ping\"\n"
         "    process.arguments = [\"-c\", \"1\", host]\n    try process.run()\n}\n"),
        ("swift", "app.get(\"f\") { req in\n    let name = req.parameters.get(\"name\")!\n"
         "    return req.fileio.streamFile(at: name)\n}\n"),
        ("shell", "umask 000\ncurl -k https://example.org/x -o x\nrm -f x\n"),
    ],
)  # fmt: skip
def test_short_answers_are_told_apart(language: str, code: str) -> None:
    assert detect(code) == language
