"""`puna chat`: piped, under a terminal, and its parts."""

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import puna
from puna.cli.chat import SMALL_MODEL, MarkdownWriter, finished_blocks
from test_cli_generate import Puna, tiny_checkpoint

MAIN = [sys.executable, "-c", "from puna.cli.main import main; main()", "chat"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Puna:
    return Puna(monkeypatch, capsys)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("chat") / "tiny", context=100_000)


def test_piped_lines_are_answered_in_one_conversation(checkpoint: Path, tmp_path: Path, run: Puna) -> None:
    target = tmp_path / "talk.json"
    options = ["--max-tokens", 8, "--temperature", 0, "--system", "Be brief."]
    lines = f"Hello\n\nMore\n/save {target}\n/save {target}\n/quit\nnever read\n"
    done = run("chat", checkpoint, *options, stdin=lines)
    llama = puna.load(checkpoint)
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}]
    for text in ("Hello", "More"):
        messages.append({"role": "user", "content": text})
        reply = llama.generate(messages, max_tokens=8, temperature=0)
        messages.append({"role": "assistant", "content": reply.text})
        assert reply.text in done.stdout
    assert json.loads(target.read_text()) == messages
    assert "exists already; choose another name" in done.stdout
    assert done.stderr.count("8 out, ") == 2
    assert re.search(r"\d tokens in, 8 out, [\d.]+ tokens/s", done.stderr)
    assert "The answer was cut at --max-tokens." in done.stdout


def test_commands(checkpoint: Path, tmp_path: Path, run: Puna) -> None:
    lines = ["/help", "/nonsense", "/system", "/system You are a llama.", "hi", "/reset", "/save",
             f"/save {tmp_path / 'none' / 'x.json'}", f"/save {tmp_path / 'a.json'}"]  # fmt: skip
    out = run("chat", checkpoint, "-n", 2, stdin="\n".join(lines) + "\n").stdout
    for command in ("/help", "/system", "/save", "/reset", "/quit", "Ctrl-C"):
        assert command in out
    assert "unknown command /nonsense" in out
    assert "System message: (none)" in out
    assert "System message: You are a llama." in out
    assert "/save needs a file name" in out
    assert "can't be written: No such file or directory" in out
    saved = json.loads((tmp_path / "a.json").read_text())
    assert saved == [{"role": "system", "content": "You are a llama."}], "/reset must keep the system message alone"


def test_a_full_context_is_told_and_nothing_is_dropped(checkpoint: Path, tmp_path: Path, run: Puna) -> None:
    target = tmp_path / "full.json"
    done = run("chat", checkpoint, "--context", 60, "--temperature", 0, stdin=f"Hello\nAgain\n/save {target}\n")
    assert "The context of 60 tokens is full: begin anew with /reset." in done.stdout
    assert "more than the 60 that the model can see. Nothing was dropped" in done.stdout
    assert [turn["role"] for turn in json.loads(target.read_text())] == ["user", "assistant"]


def test_mistakes_end_in_one_sentence(checkpoint: Path, tmp_path: Path, run: Puna) -> None:
    assert "top_p must be above 0" in run("chat", checkpoint, "--top-p", 0, stdin="hi\n", code=1).stderr
    bare = tmp_path / "ids-only"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((checkpoint / name).read_bytes())
    error = " ".join(run("chat", bare, stdin="hi\n", code=1).stderr.split())
    assert "chat needs a tokenizer" in error
    assert "--ids 1,2,3" in error


def test_a_model_named_cria_is_introduced_as_small(checkpoint: Path, tmp_path: Path, run: Puna) -> None:
    (tmp_path / "cria").symlink_to(checkpoint)
    assert run("chat", tmp_path / "cria", stdin="").stdout.splitlines()[0] == SMALL_MODEL
    assert SMALL_MODEL not in run("chat", checkpoint, stdin="").stdout


class Terminal:
    """A program under a pseudo-terminal."""

    def __init__(self, command: list[str]) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a test run started in the background ignores it
            os.environ.update(TERM="xterm", COLUMNS="80", LINES="24")
            os.execv(command[0], command)
        self.seen = ""

    def until(self, text: str, seconds: float = 60) -> str:
        """Everything up to and with `text`, which must come; the rest stays for the next call."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.fd], [], [], max(0, end - time.monotonic()))
            assert ready, f"{text!r} did not come; seen: {self.seen[-2000:]!r}"
            try:
                data = os.read(self.fd, 65536)
            except OSError:  # the program has ended
                data = b""
            assert data, f"the program ended without {text!r}; seen: {self.seen[-2000:]!r}"
            self.seen += data.decode("utf-8", "replace")
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def send(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def rest(self) -> None:
        """Return when the program has slept for half a second, however slow the machine is."""
        slept, before = 0, ""
        while slept < 10:
            time.sleep(0.05)
            fields = Path(f"/proc/{self.pid}/task/{self.pid}/stat").read_text().rpartition(")")[2].split()
            now = f"{fields[11]} {fields[12]}"  # processor time of the main thread
            slept, before = (slept + 1 if fields[0] == "S" and now == before else 0), now

    def exit_code(self) -> int:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            if select.select([self.fd], [], [], 0.05)[0]:
                with contextlib.suppress(OSError):
                    os.read(self.fd, 65536)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
        raise AssertionError("the program did not end")

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)


def test_under_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_leaves(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "talk.json"
    terminal = Terminal([*MAIN, str(checkpoint), "--temperature", "0"])
    try:
        terminal.until("Ctrl-D leaves")
        terminal.until("> ")
        terminal.send("Hello\r")
        terminal.until("\x1b[2K", 60)  # the answer is being redrawn: without an end token it would go on for long
        time.sleep(1)
        terminal.send("\x03")
        terminal.until("(stopped)")
        terminal.until("tokens/s")
        terminal.until("> ")
        terminal.rest()  # a signal between the prompt and Python's wait for a key is seen only at the next key
        terminal.send("half a line\x03")
        terminal.until("> ")
        terminal.send(f"/save {target}\r")
        terminal.until("Saved 2 messages")
        terminal.until("> ")
        terminal.send("\x04")
        assert terminal.exit_code() == 0
    finally:
        terminal.close()
    user, assistant = json.loads(target.read_text())
    assert user == {"role": "user", "content": "Hello"}
    assert len(assistant["content"]) > 0


def test_finished_blocks_end_at_empty_lines_outside_code() -> None:
    assert finished_blocks("one line") == 0
    assert finished_blocks("one\n\ntwo") == 5
    assert finished_blocks("\n\none") == 0
    assert finished_blocks("```\na\n\nb") == 0
    assert finished_blocks("```\na\n\nb\n```\n\nc") == 14
    assert finished_blocks("~~~\n```\n\n~~~\n\n") == 14


def test_markdown_is_printed_once_and_cannot_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    console = Console(width=60, force_terminal=True, file=out)
    printed: list[str] = []
    write = console.print
    monkeypatch.setattr(console, "print", lambda x, **k: printed.append(getattr(x, "markup", "")) or write(x, **k))
    writer = MarkdownWriter(console)
    for character in "# Grass\n\nA *llama* eats \x1b[2J\x07\x9b31m it.\n\n- one\n- two\n":
        writer.push(character)
    writer.finish()
    assert "".join(printed) == "# Grass\n\nA *llama* eats [2J31m it.\n\n- one\n- two\n"
    assert out.getvalue().count("•") == 2
    assert not re.search(r"\x1b\[2J|\x07|\x9b", out.getvalue())
