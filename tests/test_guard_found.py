"""Code where it is: in answers, streams, diffs, notebooks, tool calls; and which language it is."""

import json

import pytest

from puna import guard
from puna.guard.code.detect import detect
from puna.guard.code.extract import pieces

FAULT = "import os\ndef f(x):\n    os.system('ls ' + x)\n"
RULE = "python-shell-composed"


def found(text: str, language: str | None = None) -> list[tuple[str, str, int]]:
    return [(f.rule, f.path, f.line) for f in guard.scan_code(text, language)]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f"Here:\n\n```python\n{FAULT}```\nDone.\n", 6),
        (f"~~~py\n{FAULT}~~~\n", 4),
        (f"1. Do this:\n   ```python\n{FAULT}", 5),  # half-finished
        (f"````markdown\ntext\n```python\n{FAULT}```\n````\n", 6),  # nested
        (f"```markdown\n```python\n{FAULT}```\n```\n", 5),
        (f"```js\nlet a = 1\n```python\n{FAULT}```\n", 6),  # the first block is never closed
        (f"```\n{FAULT}```\n", 4),  # without a name
        (f"```{{.python}}\n{FAULT}```\n", 4),
        ("```pycon\n>>> import os\n>>> os.system('ls ' + x)\n0\n```\n", 3),
        (FAULT, 3),
    ],
)
def test_code_in_an_answer(text: str, line: int) -> None:
    assert found(text) == [(RULE, "", line)]
    stream = guard.CodeStream()
    streamed = [f for i in range(0, len(text), 5) for f in stream.feed(text[i : i + 5])] + stream.close()
    assert [(f.rule, f.path, f.line) for f in streamed] == [(RULE, "", line)]


def test_prose_gives_nothing() -> None:
    assert found("You import os, then call os.system with care; class is over at 5: see you.") == []
    assert found("") == []


def test_a_stream_judges_a_block_as_it_closes_and_tells_each_finding_once() -> None:
    stream = guard.CodeStream()
    assert stream.feed(f"```python\n{FAULT}") == []
    (finding,) = stream.feed("```\nand ")
    assert finding.line == 4
    assert stream.feed("so on\n") == []
    assert stream.close() == []


def test_a_long_block_is_judged_by_function_while_it_is_written() -> None:
    stream = guard.CodeStream()
    filler = "".join(f"def g{i}(a):\n    return a + {i}\n\n" for i in range(30))
    early = stream.feed(f"```python\nimport os as o\n{filler}def f(x):\n    o.system('ls ' + x)\n{filler}")
    assert [(f.rule, f.line) for f in early] == [(RULE, 2 + 90 + 2)]
    late = stream.feed("def h(x):\n    o.system('rm ' + x)\n```\n")
    assert [(f.rule, f.line) for f in late] == [(RULE, 94 + 90 + 2)]


def test_a_diff_is_judged_by_what_it_adds() -> None:
    diff = (
        "diff --git a/run.py b/run.py\n--- a/run.py\n+++ b/run.py\n@@ -1,4 +1,5 @@\n import os\n def f(x):\n"
        "-    os.system('a ' + x)\n+    os.system('b ' + x)\n     os.system('c ' + x)\n"
    )
    assert found(diff) == [(RULE, "", 8)]
    assert found(diff, "diff") == [(RULE, "", 8)]


def test_the_cells_of_a_notebook_are_one_program() -> None:
    book = {
        "cells": [
            {"cell_type": "code", "source": ["import os as o\n"]},
            {"cell_type": "markdown", "source": ["o.system('x' + y)"]},
            {"cell_type": "code", "source": ["%time\n", "!ls\n", "o.system('ls ' + x)\n"]},
        ]
    }
    assert found(json.dumps(book)) == [(RULE, "#cell-3", 3)]


@pytest.mark.parametrize(
    ("call", "path"),
    [
        ({"code": FAULT}, "code"),
        ({"tool_calls": [{"function": {"name": "run", "arguments": json.dumps({"code": FAULT})}}]},
         "tool_calls[0].function.arguments.code"),
        ({"path": "src/a.py", "file_text": FAULT}, "file_text"),
        ({"language": "python", "snippet": FAULT}, "snippet"),
    ],
)  # fmt: skip
def test_code_in_the_arguments_of_a_tool_call(call: dict, path: str) -> None:
    assert (RULE, path, 3) in found(json.dumps(call))


def test_a_command_in_the_arguments_of_a_tool_call_is_shell() -> None:
    (piece, _) = pieces(json.dumps({"command": "ls"}))
    assert (piece.language, piece.source) == ("shell", "ls")


def test_a_language_that_is_not_known_is_detected() -> None:
    assert found(FAULT, "no-such-language") == [(RULE, "", 3)]


@pytest.mark.parametrize(
    ("language", "code"),
    [
        ("python", "def f(x):\n    return None\n"),
        ("javascript", "const a = require('fs');\nmodule.exports = () => a;\n"),
        ("typescript", "interface A { b: string }\nconst f = (x: number): void => {};\n"),
        ("java", "public class A {\n  public static void main(String[] a) { System.out.println(1); }\n}\n"),
        ("c", "#include <stdio.h>\nint main(void) {\n  printf(\"x\");\n}\n"),
        ("cpp", "#include <vector>\nint main() {\n  std::vector<int> v;\n}\n"),
        ("csharp", "using System;\nnamespace A {\n  class B { static void Main() { Console.WriteLine(1); } }\n}\n"),
        ("php", "<?php\necho $_GET['a'];\n"),
        ("go", "package main\nimport \"fmt\"\nfunc main() {\n  fmt.Println(1)\n}\n"),
        ("ruby", "require 'x'\ndef f(a)\n  puts a\nend\n"),
        ("rust", "fn main() {\n  let mut x = 1;\n  println!(\"{}\", x);\n}\n"),
        ("kotlin", "fun main() {\n  val x = 1\n  println(x)\n}\n"),
        ("swift", "import Foundation\nlet x: Int = 1\nguard let y = z else { exit(1) }\n"),
        ("shell", "#!/bin/sh\nset -e\nfor f in *; do\n  echo \"$f\"\ndone\n"),
        ("dockerfile", "FROM debian:12\nRUN apt-get update\nCMD [\"a\"]\n"),
        ("yaml", "apiVersion: v1\nkind: Pod\nmetadata:\n  name: a\n"),
        ("json", '{"a": [1, 2]}'),
        ("sql", "SELECT a FROM b WHERE c = 1;\nDELETE FROM b;\n"),
        (None, "Dear reader,\n\nplease find the letter below. If you like it, let me know.\n"),
    ],
)  # fmt: skip
def test_the_language_is_detected(language: str | None, code: str) -> None:
    assert detect(code) == language
