"""`puna generate` as a user runs it, on tiny checkpoints."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import puna
from puna.cli.main import main
from puna.engine import Model
from puna.family.config import ModelConfig
from puna.model import Decoder
from puna.text.train import train_tokenizer

torch.set_num_threads(1)


def tiny_checkpoint(folder: Path, context: int = 256) -> Path:
    """A random Llama with a tokenizer, whose end tokens are unlikely."""
    tokenizer = train_tokenizer(["The llama eats grass on the high plain. Hello!"] * 4, 330)
    torch.manual_seed(1)
    config = ModelConfig("llama", tokenizer.vocab_size, 32, 2, 4, 2, 8, 48, context, bos_token_id=tokenizer.bos_id,
                         eos_token_ids=tokenizer.eos_ids)  # fmt: skip
    decoder = Decoder(config)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4 if parameter.ndim > 1 else torch.ones_like(parameter))
        assert decoder.lm_head is not None
        decoder.lm_head.weight[list(tokenizer.control_ids)] = 0.0
    Model(decoder, tokenizer).save(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("generate") / "tiny")


@pytest.fixture(scope="module")
def without_tokenizer(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate") / "ids-only"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((checkpoint / name).read_bytes())
    return folder


class Done(NamedTuple):
    stdout: str
    stderr: str


class Puna:
    """Runs commands in this process, as the entry point does: a process each would import torch each time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: object, stdin: str = "", code: int = 0) -> Done:
        self.monkeypatch.setattr(sys, "argv", ["puna", *map(str, arguments)])
        self.monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as left:
            main()
        done = Done(*self.capsys.readouterr())
        assert left.value.code == code, done
        return done


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Puna:
    return Puna(monkeypatch, capsys)


def test_json_equals_the_python_call(checkpoint: Path, run: Puna) -> None:
    found = json.loads(
        run("generate", checkpoint, "--prompt", "The llama", "--max-tokens", 12, "--temperature", 1, "--top-k", 20,
            "--top-p", 0.95, "--min-p", 0.01, "--seed", 3, "--json").stdout
    )  # fmt: skip
    reply = puna.load(checkpoint).generate(
        "The llama", max_tokens=12, temperature=1, top_k=20, top_p=0.95, min_p=0.01, seed=3
    )
    assert found["text"] == reply.text
    assert found["token_ids"] == reply.token_ids
    assert found["finish_reason"] == reply.finish_reason
    assert found["usage"] == {
        "prompt_tokens": reply.usage.prompt_tokens, "completion_tokens": len(reply.token_ids),
        "total_tokens": reply.usage.total_tokens,
    }  # fmt: skip


def test_a_piped_prompt_streams_text_and_stops_at_a_stop_string(checkpoint: Path, run: Puna) -> None:
    whole = puna.load(checkpoint).generate("Hello", max_tokens=15, temperature=0).text
    assert run("generate", checkpoint, "--max-tokens", 15, "--temperature", 0, stdin="Hello\n").stdout == whole + "\n"
    stop = whole[3:5]
    cut = run("generate", checkpoint, "-n", 15, "-t", 0, "--stop", stop, "--chat", "-p", "Hello").stdout
    assert stop not in cut


def test_ids_work_without_a_tokenizer_and_text_says_what_it_needs(without_tokenizer: Path, run: Puna) -> None:
    done = run("generate", without_tokenizer, "--ids", "1,2, 3", "--max-tokens", 5, "--temperature", 0)
    reply = puna.load(without_tokenizer).generate([1, 2, 3], max_tokens=5, temperature=0)
    assert done.stdout == ",".join(map(str, reply.token_ids)) + "\n"
    assert "needs a tokenizer" in run("generate", without_tokenizer, "--prompt", "x", code=1).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ids", "1,x"], '--ids must be whole numbers with commas, as in "1,2,3"'),
        (["--ids", "1", "--prompt", "x"], "--ids stands alone"),
        (["--ids", "99999"], "token id 99999 at place 0 is outside this model's vocabulary"),
        (["--prompt", "x", "--temperature", "-1"], "temperature must be at least 0, not -1"),
        (["--prompt", "x", "--dtype", "int3"], "dtype 'int3' is not known"),
        (["--prompt", "x", "--device", "abacus"], "device 'abacus' can't be used here"),
        (["--prompt", "x y z " * 20, "--context", "9"], "context length is 9 tokens"),
    ],
)
def test_mistakes_end_in_one_sentence(checkpoint: Path, run: Puna, arguments: list[str], message: str) -> None:
    done = run("generate", checkpoint, *arguments, code=1)
    assert message in " ".join(done.stderr.split())
    assert done.stdout == ""


def test_as_a_process_of_its_own(checkpoint: Path) -> None:
    command = [sys.executable, "-c", "from puna.cli.main import main; main()", "generate", str(checkpoint), "-n", "4"]
    done = subprocess.run(command, input=b"Hello\xff\n", capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(b"\n")
    said = done.stderr.decode().splitlines()
    assert [line.split(" ")[0] for line in said] == ["needs", "memory:"], said  # forecast before, peak after
