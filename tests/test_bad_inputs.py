"""Every mistake of `bad_inputs` is told in its exact words, and `docs/errors.md` shows them.

`PUNA_UPDATE_DOCS=1 python -m pytest tests/test_bad_inputs.py -k documented` writes `docs/errors.md` anew.
"""

import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

import puna
from bad_inputs import FILES, FLAGS, HOME, REQUESTS, TRAINING, Command, Request
from puna.cli.main import main
from puna.engine import Model
from puna.server.app import create_app
from puna.text.train import train_tokenizer
from serving import NAME, TEXTS, Scripted, serving

torch.set_num_threads(1)
DOCS = Path(__file__).parents[1] / "docs" / "errors.md"
FORECAST = re.compile(r"needs [\d.]+ GB: weights [^;]*; [\d.]+ GB free")
COMMANDS = [*FILES, *TRAINING, *FLAGS]
# Of all kinds of end: a file's error, a flag's, one before anything is loaded, wrong usage.
IN_A_PROCESS = [case for case in COMMANDS if case.wrong in (
    "a safetensors file that ends early", "a temperature below 0", "a port in use", "an unknown command")]


def prepared(case: Command, here: Path) -> tuple[list[str], object]:
    """The arguments after `puna`, and what must stay alive while it runs."""
    kept = case.make(here)
    port = here / "PORT"
    return shlex.split(case.command.replace("PORT", port.read_text()) if port.exists() else case.command)[1:], kept


def words(stderr: str, here: Path) -> str:
    """What a user reads, on one line: without usage hints, frames and the forecast of memory, which comes before what
    goes wrong after it, and with variable names made constant."""
    text = stderr.replace(str(here), HOME)
    if (here / "PORT").exists():
        text = text.replace((here / "PORT").read_text(), "PORT")
    text = re.sub(r"(?<=byte )\d{3,}|\d{3,}(?= bytes)|(?<=file at )\d+", "N", text)
    lines = [line.strip("│╭╮╰╯─ ") for line in text.splitlines() if not line.startswith((" Usage", "Usage"))]
    lines = [line for line in lines if line not in ("", "Error") and not line.startswith("Try 'puna")]
    lines = [line for line in lines if not FORECAST.fullmatch(line)]
    return " ".join(lines)


def same(said: str, expected: str) -> bool:
    """Whether a user reads just this; "..." stands for the words of a library, which change with its version."""
    if re.fullmatch(re.escape(expected).replace(r"\.\.\.", ".+"), said):
        return True
    pytest.fail(f"expected: {expected}\nbut read: {said}", pytrace=False)


def check(case: Command, here: Path, code: object, stdout: str, stderr: str) -> None:
    """Exit code and words are as the table says, and no traceback is in sight."""
    assert "Traceback" not in stdout + stderr, stderr
    start = "" if case.code == 2 else "Error: "
    assert same(words(stderr, here), start + case.sees)
    assert code == case.code


@pytest.mark.parametrize("case", COMMANDS, ids=lambda case: case.wrong)
def test_commands(case: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                  capfd: pytest.CaptureFixture[str]) -> None:
    arguments, _kept = prepared(case, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "500")
    monkeypatch.setattr(sys, "argv", ["puna", *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(SystemExit) as left:
        main()
    check(case, tmp_path, left.value.code, *capfd.readouterr())


@pytest.mark.parametrize("case", IN_A_PROCESS, ids=lambda case: case.wrong)
def test_commands_in_a_process_of_their_own(case: Command, tmp_path: Path) -> None:
    arguments, _kept = prepared(case, tmp_path)
    path = os.pathsep.join([str(Path(puna.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-m", "puna", *arguments], cwd=tmp_path, capture_output=True, text=True,
                          timeout=120, env={**os.environ, "COLUMNS": "500", "PYTHONPATH": path})
    check(case, tmp_path, done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    tokenizer = train_tokenizer(TEXTS, 330)
    with serving(create_app(Model(Scripted(tokenizer), tokenizer), NAME)) as address:  # type: ignore[arg-type]
        yield address


@pytest.mark.parametrize("case", REQUESTS, ids=lambda case: case.wrong)
def test_requests(case: Request, url: str) -> None:
    method, path = case.path.split()
    body = case.body if isinstance(case.body, bytes) else json.dumps({"model": NAME, **(case.body or {})}).encode()
    answer = httpx.request(method, url + path, content=body, headers={"content-type": "application/json"}, timeout=60)
    error = answer.json()["error"]
    assert same(error.pop("message"), case.sees)
    assert error == {"type": "invalid_request_error", "param": case.param, "code": case.code}
    assert answer.status_code == case.status


def cell(text: str) -> str:
    """Text in a markdown table, kept as it is; every second part between backticks is code."""
    parts = text.replace("|", "\\|").split("`")
    return "`".join(part if at % 2 else re.sub(r"([<*_\[\]])", r"\\\1", part) for at, part in enumerate(parts))


def shown(case: Request) -> str:
    """A request as one line, long values cut."""
    if case.body is None:
        return f"`{case.path}`"
    body = case.body.decode() if isinstance(case.body, bytes) else json.dumps(case.body, ensure_ascii=False)
    body = re.sub(r"(?:Hello){9,}", "HelloHello...", re.sub(r"(?:5, ){9,}5", "5, 5, 5, ...", body))
    return f"`{case.path}` `{body}`"


def table() -> str:
    """docs/errors.md."""
    parts = ["""# Errors, and what to do

What puna says to wrong files, training data, flags and requests. Each row is tested (`tests/test_bad_inputs.py`), and
this page is made from the test's data: `PUNA_UPDATE_DOCS=1 python -m pytest tests/test_bad_inputs.py -k documented`.

`...` stands for the words of a library, N for a number. The command line prints `Error: ` and the message, never a
traceback. Exit codes: 0 done, 1 something that you can mend, 2 wrong usage (marked; the usage line, left out here,
comes first), 130 Ctrl-C.
"""]
    head = "| What was wrong | Where it was given | What you see |\n|---|---|---|"
    for title, cases in (("Checkpoints", FILES), ("Training", TRAINING), ("Flags", FLAGS)):
        lines = [f"| {cell(c.wrong)} | `{c.command}` | {cell(c.sees)}{' (exit code 2)' if c.code == 2 else ''} |"
                 for c in cases]
        parts.append("\n".join([f"## {title}\n", head, *lines, ""]))
    parts.append("""## Requests

The server answers in OpenAI's shape: `{"error": {"message", "type": "invalid_request_error", "param", "code"}}`.
The model's name is left out below where it was right.
""")
    lines = [f"| {cell(c.wrong)} | {shown(c)} | {c.status} `{c.code}`{f', `{c.param}`' if c.param else ''}: "
             f"{cell(c.sees)} |" for c in REQUESTS]
    parts.append("\n".join([head, *lines, ""]))
    return "\n".join(parts)


def test_every_case_is_documented() -> None:
    if os.environ.get("PUNA_UPDATE_DOCS"):
        DOCS.write_text(table(), encoding="utf-8")
    assert DOCS.read_text(encoding="utf-8") == table(), "run this test with PUNA_UPDATE_DOCS=1 and read the difference"
    assert len(COMMANDS) + len(REQUESTS) >= 36
