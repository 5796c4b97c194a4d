"""`puna serve` from outside: a process of its own, a checkpoint on disk, a real port."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import torch

from puna.cli import serve as command
from puna.engine import Model, load
from puna.errors import PunaError
from puna.family.config import ModelConfig
from puna.model import Decoder
from puna.text.train import train_tokenizer
from serving import TEXTS

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama 3 with a tokenizer, as safetensors."""
    torch.manual_seed(3)
    tokenizer = train_tokenizer(TEXTS, 330)
    config = ModelConfig("llama", tokenizer.vocab_size, 32, 2, 4, 2, 8, 48, context_length=96,
                         bos_token_id=tokenizer.bos_id, eos_token_ids=tokenizer.eos_ids)
    decoder = Decoder(config)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 if parameter.ndim > 1 else torch.ones_like(parameter))
    folder = tmp_path_factory.mktemp("served") / "tiny-llama"
    Model(decoder, tokenizer).save(folder)
    return folder


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "puna", "serve", str(checkpoint), "--port", "0", "--name", "tiny", "--context", "64"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    lines = [process.stdout.readline(), process.stdout.readline()]
    assert re.match(r"needs [\d.]+ GB: ", lines[0]), lines
    found = re.search(r"tiny at (http://127\.0\.0\.1:[1-9]\d*)/v1", lines[1])
    assert found, lines
    yield found[1], process
    process.kill()
    process.wait()


def test_it_answers_as_the_engine_does(server: tuple[str, subprocess.Popen[str]], checkpoint: Path) -> None:
    url, _ = server
    model = load(str(checkpoint))
    prompt = [{"role": "user", "content": "The llama eats"}]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=60) as client:
        assert [card.id for card in client.models.list().data] == ["tiny"]
        told = client.chat.completions.create(
            model="tiny", messages=prompt, max_tokens=12, seed=5, temperature=1.5)  # type: ignore[arg-type]
        expected = model.generate(prompt, max_tokens=12, seed=5, temperature=1.5)
        assert expected.text
        assert told.choices[0].message.content == expected.text
        scored = client.completions.create(
            model="tiny", prompt=[1, 2, 3, 4], echo=True, logprobs=1, max_tokens=0).choices[0].logprobs
        assert scored is not None
        expected_scores = [one.logprob for one in model.score([1, 2, 3, 4]) if one]
        assert (scored.token_logprobs or [])[1:] == pytest.approx(expected_scores, abs=1e-5)
        with pytest.raises(openai.BadRequestError, match="maximum context length is 64 tokens") as caught:
            client.completions.create(model="tiny", prompt=[5] * 65)
        assert caught.value.code == "context_length_exceeded"
    health = httpx.get(f"{url}/health").json()
    assert health["status"] == "ok", json.dumps(health)


def test_ctrl_c_ends_it_quietly(server: tuple[str, subprocess.Popen[str]]) -> None:
    _, process = server
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=20)
    assert process.returncode in (0, 130)
    assert "Traceback" not in rest


def test_a_port_in_use_and_a_foreign_address_are_told_before_the_model_loads() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PunaError, match=f"port {port} on 127.0.0.1 is in use.*--port"):
            command.serve("no-such-model", port=port)
    with pytest.raises(PunaError, match=r"192\.0\.2\.1.*--host"):
        command.serve("no-such-model", host="192.0.2.1", port=0)


@pytest.mark.parametrize(("host", "warns"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_only_an_open_host_warns(checkpoint: Path, host: str, warns: bool, capsys: pytest.CaptureFixture[str],
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: None)
    command.serve(str(checkpoint), host=host, port=0)
    told = capsys.readouterr()
    assert ("no authentication" in told.err) == warns
    assert f"http://{host}:" in told.out
