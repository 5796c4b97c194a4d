"""A model that speaks from a script, behind a real uvicorn on loopback: what the server's tests share."""

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import torch
import uvicorn

from puna.engine import Model, Sampling
from puna.family.config import ModelConfig
from puna.model.paged import Batch
from puna.text.tokenizer import Tokenizer

NAME = "llama-of-the-test"
SAID = "The llama eats 🦙 grass. END and more"
TEXTS = ["The llama eats grass on the high plain.", "weather in Lima, Perú, 世界! 🦙"] * 4
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
WEATHER: Any = {"type": "function", "function": {
    "name": "weather", "description": "The weather.", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}


CHAT, PLAIN = "chat/completions", "completions"


class Scripted:
    """Stands in for a decoder: whatever the prompt, it wants to say `script`, then the end token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.config = ModelConfig("llama", tokenizer.vocab_size, 8, 1, 1, 1, 8, 8, context_length=900)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.ends: dict[int, int] = {}
        self.say(SAID)

    def say(self, text: str, fail_at: int | None = None, pause_at: int | None = None) -> None:
        """fail_at: the token of an answer. pause_at: after so many passes the next one waits for `go_on`."""
        self.script = [*self.tokenizer.encode(text), self.tokenizer.eos_ids[0]]
        self.fail_at, self.pause_at, self.calls = fail_at, pause_at, 0
        self.go_on = threading.Event()

    def eval(self) -> "Scripted":
        return self

    def modules(self) -> Iterator[Any]:
        return iter(())

    def __call__(self, ids: torch.Tensor, cache: Batch, rows: torch.Tensor) -> torch.Tensor:
        """The first position whose logits are wanted ends a sequence's prompt."""
        if self.pause_at is not None and self.calls >= self.pause_at:
            assert self.go_on.wait(60)
        steps: list[int] = []
        wanted, row = set(rows.tolist()), 0
        for span in cache.spans:
            first = int(span.blocks[0])  # tells sequences apart, as long as they share none
            if span.start == 0:
                self.ends.pop(first, None)
            for position in range(span.start, span.start + span.count):
                if row in wanted:
                    steps.append(position - self.ends.setdefault(first, position))
                row += 1
        if self.fail_at in steps:
            raise ZeroDivisionError("a secret of the engine room")
        self.calls += 1
        logits = torch.zeros(1, len(rows), self.config.vocab_size)
        for at, step in enumerate(steps):
            logits[0, at, self.script[min(step, len(self.script) - 1)]] = 9.0
        return logits


def model(decoder: Scripted, tokenizer: Tokenizer | None) -> Model:
    return Model(decoder, tokenizer, defaults=Sampling(temperature=0), prefix_cache=False)  # type: ignore[arg-type]


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """A real server in a thread, at the URL that it gives."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


def post(url: str, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/{path}", json={"model": NAME, **body}, timeout=20)


def asked(url: str, **body: Any) -> http.client.HTTPConnection:
    """A completion that is asked for and not waited for; closing the connection hangs up."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", f"/v1/{PLAIN}", json.dumps({"model": NAME, **body}), headers)
    return connection


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def busy(url: str) -> int:
    return httpx.get(f"{url}/health", timeout=2).json()["requests"]
