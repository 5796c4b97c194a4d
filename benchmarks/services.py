"""The services that serving.py compares. Each takes requests as token ids and tells when every token arrived."""

import http.client
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch

MODEL = "benchmark"
START_SECONDS = 180  # a server that isn't up by then won't be
Stream = Callable[[list[int], int], Iterator[int]]  # prompt and answer length -> number of tokens that came, each time


@dataclass(frozen=True)
class Asked:
    """One request, sent `delay` seconds after the first."""

    ids: list[int]
    count: int
    delay: float = 0.0


@dataclass(frozen=True)
class Answered:
    """When it was sent and when each token arrived, on one clock (`time.perf_counter`)."""

    sent: float
    arrivals: list[float]

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.arrivals[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens."""
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]


class Service(Protocol):
    """Something that answers several requests at once."""

    name: str

    def run(self, asked: list[Asked]) -> list[Answered]: ...

    def close(self) -> None: ...


def together(stream: Stream, asked: list[Asked]) -> list[Answered]:
    """Send every request from a thread of its own. Raises the first error of any."""
    answered: list[Answered | BaseException | None] = [None] * len(asked)
    begun = time.perf_counter()

    def one(at: int, request: Asked) -> None:
        try:
            time.sleep(max(0.0, begun + request.delay - time.perf_counter()))
            sent, arrivals = time.perf_counter(), []
            for count in stream(request.ids, request.count):
                arrivals += [time.perf_counter()] * count
            if len(arrivals) != request.count:
                raise RuntimeError(f"request {at} got {len(arrivals)} tokens, not {request.count}")
            answered[at] = Answered(sent, arrivals)
        except BaseException as error:
            answered[at] = error

    threads = [threading.Thread(target=one, args=(at, request)) for at, request in enumerate(asked)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in answered:
        if isinstance(result, BaseException):
            raise result
    return answered  # type: ignore[return-value]


class InProcess:
    """A model in a process of its own, asked by that process's threads through `run(asked)` of what `make` gives."""

    def __init__(self, name: str, make: Callable[..., Callable[[list[Asked]], list[Answered]]], threads: int,
                 *arguments: Any) -> None:  # fmt: skip
        self.name = name
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_work, args=(theirs, make, threads, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe.recv()

    def run(self, asked: list[Asked]) -> list[Answered]:
        """Answer them all."""
        self._pipe.send(asked)
        answered = self._pipe.recv()
        if isinstance(answered, BaseException):
            raise answered
        return answered

    def close(self) -> None:
        """End the process."""
        self._pipe.send(None)
        self._process.join()


def _work(pipe: Connection, make: Callable[..., Any], threads: int, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    run = make(*arguments)
    pipe.send(True)
    while (asked := pipe.recv()) is not None:
        try:
            pipe.send(run(asked))
        except Exception as error:
            pipe.send(error)


def puna_threads(path: Path, bits: str) -> Callable[[list[Asked]], list[Answered]]:
    """Ours by `Model.stream` from one thread a request."""
    import puna

    llama = puna.load(path, dtype="bfloat16", quantize=None if bits == "bf16" else bits)

    def stream(ids: list[int], count: int) -> Iterator[int]:
        for piece in llama.stream(ids, max_tokens=count, temperature=0.0, ignore_eos=True):
            yield len(piece.token_ids)

    return lambda asked: together(stream, asked)


def transformers_batching(path: Path, most: int) -> Callable[[list[Asked]], list[Answered]]:
    """transformers' continuous batching in bfloat16, steps of at most 512 tokens; it takes no delayed requests."""
    import transformers
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    page = 32
    batching = ContinuousBatchingConfig(page_size=page, num_blocks=most // page + 64, max_batch_tokens=512)

    def run(asked: list[Asked]) -> list[Answered]:
        count = asked[0].count
        options = transformers.GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0)
        sent = time.perf_counter()
        outputs = model.generate_batch([one.ids for one in asked], generation_config=options, warmup=False,
                                       continuous_batching_config=batching, record_timestamps=True)  # fmt: skip
        answers = [Answered(sent, outputs[key].timestamps) for key in sorted(outputs, key=lambda k: int(k[4:]))]
        if any(len(answer.arrivals) != count for answer in answers):
            raise RuntimeError("transformers' continuous batching did not answer every request in full")
        return answers

    return run


class Server:
    """An HTTP server in a process of its own, asked with streaming.

    `tokens(event, seen)` counts the new tokens of an event, after `seen` earlier ones.
    """

    def __init__(self, name: str, command: list[str], port: int, route: str, body: dict[str, Any], limit: str,
                 tokens: Callable[[dict[str, Any], int], int]) -> None:  # fmt: skip
        self.name, self._port, self._route = name, port, route
        self._body, self._limit, self._tokens = body, limit, tokens
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + START_SECONDS
        while not self._healthy():
            if self._process.poll() is not None or time.monotonic() > until:
                self.close()
                raise RuntimeError(f"{name} did not start: {' '.join(command)}")
            time.sleep(0.2)

    def _healthy(self) -> bool:
        with suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
            connection.request("GET", "/v1/models")
            return connection.getresponse().status == 200
        return False

    def run(self, asked: list[Asked]) -> list[Answered]:
        """Answer them all."""
        return together(self._stream, asked)

    def _stream(self, ids: list[int], count: int) -> Iterator[int]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port)
        body = self._body | {"prompt": ids, self._limit: count, "temperature": 0, "stream": True, "ignore_eos": True}
        connection.request("POST", self._route, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"{self.name} answered {response.status}: {response.read(300)!r}")
        seen = 0
        for line in response:
            if line.startswith(b"data: {"):
                yield (new := self._tokens(json.loads(line[6:]), seen))
                seen += new
        connection.close()

    def close(self) -> None:
        """End the server."""
        self._process.terminate()
        self._process.wait()


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def llama_server(binary: str, path: Path, threads: int, slots: int, slot_tokens: int) -> Server:
    """llama.cpp's own server: a slot a request, batches of 512, no cache of old prompts in RAM."""
    port = free_port()
    command = [binary, "-m", str(path), "--port", str(port), "--parallel", str(slots), "-c", str(slots * slot_tokens),
               "-t", str(threads), "-tb", str(threads), "-b", "2048", "-ub", "512", "--cache-ram", "0",
               "--no-ui"]  # fmt: skip
    return Server(f"llama-server {path.stem.split('-')[-1]}", command, port, "/completion", {"return_tokens": True},
                  "n_predict", lambda event, seen: event["tokens_predicted"] - seen)  # fmt: skip


def puna_server(path: Path, bits: str) -> Server:
    """Ours by `puna serve`."""
    port = free_port()
    command = [sys.executable, "-m", "puna", "serve", str(path), "--port", str(port), "--name", MODEL, "--dtype",
               "bfloat16", *([] if bits == "bf16" else ["--quantize", bits])]  # fmt: skip
    return Server(f"puna serve {bits}", command, port, "/v1/completions", {"model": MODEL, "return_token_ids": True},
                  "max_tokens", lambda event, _: len(event["choices"][0].get("token_ids", ())))  # fmt: skip


def find_llama_server(given: str | None) -> str | None:
    """The binary, where there is one."""
    return given if given and os.access(given, os.X_OK) else shutil.which("llama-server")
