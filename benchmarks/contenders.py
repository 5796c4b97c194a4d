"""The engines that single.py and moe.py compare, each in a process of its own, driven with token ids alone.

`Contender.answer` gives the arrival time of every token of one greedy answer, in seconds from the request, so that all
engines are timed by one clock in one way: the first token is the prefill, the rest are decoding.
"""

import importlib.util
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import shapes
import torch

LLAMA_CPP_TYPES = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}


class Engine(Protocol):
    """One loaded model. `weight_bytes`: what one decoded token reads of the weights."""

    weight_bytes: int

    def answer(self, ids: list[int], count: int) -> list[float]: ...


class Puna:
    """Ours, by its public face."""

    def __init__(self, path: Path, bits: str) -> None:
        import puna

        self.llama = puna.load(path, dtype="bfloat16", quantize=None if bits == "bf16" else bits, prefix_cache=False)
        self.weight_bytes = decoder_bytes(self.llama.decoder)

    def answer(self, ids: list[int], count: int) -> list[float]:
        """Arrival seconds of `count` greedy tokens."""
        begun, arrivals = time.perf_counter(), []
        for piece in self.llama.stream(ids, max_tokens=count, temperature=0.0, ignore_eos=True):
            arrivals += [time.perf_counter() - begun] * len(piece.token_ids)
        return arrivals


class LlamaCpp:
    """llama.cpp by its Python bindings: batches of 512, its own thread pool, key/value cache in float16."""

    def __init__(self, path: Path) -> None:
        import llama_cpp

        self.logits = llama_cpp.llama_get_logits_ith
        threads = torch.get_num_threads()
        self.llama = llama_cpp.Llama(str(path), n_ctx=4096, n_batch=512, n_threads=threads, n_threads_batch=threads,
                                     verbose=False)  # fmt: skip
        self.weight_bytes = shapes.gguf_bytes(path)  # the embedding is tied, so that all is read for a token

    def answer(self, ids: list[int], count: int) -> list[float]:
        """Arrival seconds of `count` greedy tokens."""
        import numpy as np

        self.llama.reset()
        begun, arrivals, fed = time.perf_counter(), [], ids
        for _ in range(count):
            self.llama.eval(fed)
            row = np.ctypeslib.as_array(self.logits(self.llama.ctx, -1), (self.llama.n_vocab(),))
            fed = [int(row.argmax())]
            arrivals.append(time.perf_counter() - begun)
        return arrivals


class Transformers:
    """transformers in bfloat16 with its default attention: greedy steps over a dynamic cache, without `generate`."""

    def __init__(self, path: Path) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        self.weight_bytes = decoder_bytes(self.model)

    @torch.no_grad()
    def answer(self, ids: list[int], count: int) -> list[float]:
        """Arrival seconds of `count` greedy tokens."""
        begun, arrivals, cache, fed = time.perf_counter(), [], None, torch.tensor([ids])
        for _ in range(count):
            out = self.model(fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, fed = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
            fed.tolist()
            arrivals.append(time.perf_counter() - begun)
        return arrivals


def decoder_bytes(model: torch.nn.Module) -> int:
    """Bytes of all weights but an input embedding of its own: of that, a token reads one row. Ours or transformers'."""
    if hasattr(model, "embed_tokens"):
        inputs, output = model.embed_tokens, model.lm_head or model.embed_tokens
    else:
        inputs, output = model.get_input_embeddings(), model.get_output_embeddings()
    tied = held_bytes(torch.nn.ModuleList([inputs, output])) == held_bytes(inputs)
    return held_bytes(model) - (0 if tied else held_bytes(inputs))


def held_bytes(module: torch.nn.Module) -> int:
    """Bytes of the parameters and of the packed panels below a module, shared ones counted once."""
    packed = {id(m.packed): m.packed.bytes() for m in module.modules() if hasattr(m, "packed")}
    return sum(packed.values()) + sum(p.nbytes for p in module.parameters())  # parameters() gives each once


@dataclass(frozen=True)
class Entry:
    """A contender by name, and how to make it."""

    name: str
    make: Callable[..., Engine]
    arguments: tuple[Any, ...]


def entries(shape: str, bits: str) -> list[Entry]:
    """Ours and llama.cpp at these bits, and transformers at bf16, the only one that it runs at its best here."""
    path = shapes.checkpoint(shape)
    found = [Entry(f"puna {bits}", Puna, (path, bits))]
    kind = LLAMA_CPP_TYPES[bits]
    if importlib.util.find_spec("llama_cpp"):
        found.append(Entry(f"llama.cpp {kind}", LlamaCpp, (shapes.gguf(shape, kind),)))
    if bits == "bf16":
        found.append(Entry("transformers bf16", Transformers, (path,)))
    return found


class Contender:
    """An engine in a process of its own, so that thread pools and memory don't meet."""

    def __init__(self, entry: Entry, threads: int) -> None:
        self.name = entry.name
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, entry.make, entry.arguments, threads), daemon=True)
        self._process.start()
        theirs.close()
        self.weight_bytes, self.load_seconds = self._pipe.recv()

    def answer(self, ids: list[int], count: int) -> list[float]:
        """Arrival seconds of `count` tokens after the prompt `ids`."""
        self._pipe.send((ids, count))
        return self._pipe.recv()

    def close(self) -> None:
        """End the process."""
        self._pipe.send(None)
        self._process.join()


def _serve(pipe: Connection, make: Callable[..., Engine], arguments: tuple[Any, ...], threads: int) -> None:
    torch.set_num_threads(threads)
    begun = time.perf_counter()
    engine = make(*arguments)
    pipe.send((engine.weight_bytes, time.perf_counter() - begun))
    while (task := pipe.recv()) is not None:
        pipe.send(engine.answer(*task))
