"""The loop: prompt in pieces through the cache, then token by token, as a stream that can be closed at any time."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from puna.engine.grammar import Grammar
from puna.engine.reply import FinishReason, Piece, Reply, TokenLogprob, Usage
from puna.engine.sampling import Sampling, choose
from puna.engine.stops import StopStrings
from puna.model import Cache, Decoder
from puna.text.tokenizer import Tokenizer
from puna.text.toolcalls import MARKERS, ToolCall, ToolCallParser

PREFILL_TOKENS = 512  # bounds activations, and how long a closed stream can still be at work


@dataclass
class Request:
    """One checked generation: everything the loop needs, nothing it has to look up."""

    prompt: list[int]
    sampling: Sampling
    limit: int  # most tokens to draw: max_tokens, or what the context still holds
    stop_ids: frozenset[int]
    continues_text: bool = False  # the answer goes on in the prompt's text, so its leading space is part of it
    tools: Sequence[Mapping[str, Any]] = ()  # OpenAI's definitions; calls of them are taken out of the text
    grammar: Grammar | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)


class Stream(Iterator[Piece]):
    """The pieces of one answer. `close()` may be called from any thread, also while another waits for a piece."""

    def __init__(self, pieces: Iterator[Piece], cancelled: threading.Event) -> None:
        self._pieces = pieces
        self._cancelled = cancelled
        self.reply: Reply | None = None  # set with the last piece

    def __next__(self) -> Piece:
        if self._cancelled.is_set():
            raise StopIteration
        piece = next(self._pieces)
        self.reply = piece.reply
        return piece

    def close(self) -> None:
        """End the work now: at most the forward pass in progress still completes. Frees the cache."""
        self._cancelled.set()
        try:
            self._pieces.close()  # type: ignore[attr-defined]  # it is a generator
        except ValueError:  # it is running in another thread, and ends by itself at its next look at `cancelled`
            return

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Runner:
    """A decoder with the lock that lets concurrent streams take turns, one forward pass at a time."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._turn = threading.Lock()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Exclusive use of the decoder without gradients. Never held while a caller has control."""
        with self._turn, torch.no_grad():  # not inference_mode: a caller may write into the logits it gets
            yield

    def forward(self, ids: Sequence[int], cache: Cache | None = None, last_only: bool = False) -> Tensor:
        """Logits [S, V] (or [1, V]), in the weights' dtype and on their device."""
        with self.turn():
            return self.decoder(torch.tensor([ids], device=self.decoder.device), cache=cache, last_only=last_only)[0]

    def tokens(self, request: Request) -> Iterator[tuple[int, Tensor]]:
        """(token, raw float32 logits [V] on the CPU that it was drawn from), until the limit or cancellation."""
        cache = self.decoder.new_cache()
        random = request.sampling.generator()
        answer: list[int] = []
        logits_V = None
        for start in range(0, len(request.prompt), PREFILL_TOKENS):
            if request.cancelled.is_set():
                return
            logits_V = self.forward(request.prompt[start : start + PREFILL_TOKENS], cache, last_only=True)[-1]
        while logits_V is not None and len(answer) < request.limit and not request.cancelled.is_set():
            logits_V = logits_V.to("cpu", torch.float32)
            allowed_V = request.grammar.allowed() if request.grammar else None
            token = choose(logits_V, request.sampling, request.prompt, answer, random, allowed_V)
            if request.grammar:
                request.grammar.accept(token)
            answer.append(token)
            yield token, logits_V
            if request.grammar and request.grammar.finished:
                return
            if len(answer) < request.limit and not request.cancelled.is_set():
                logits_V = self.forward([token], cache, last_only=True)[-1]


def describe(logits_V: Tensor, token: int, top: int, tokenizer: Tokenizer | None) -> TokenLogprob:
    """The log-probability of `token` under raw logits [V], with the `top` likeliest tokens."""
    logprobs_V = torch.log_softmax(logits_V.to("cpu", torch.float32), dim=-1)

    def entry(id: int, logprob: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        if tokenizer is None:
            return TokenLogprob(id, f"token_id:{id}", None, logprob, top)
        data = tokenizer.token_bytes(id)
        return TokenLogprob(id, data.decode("utf-8", errors="replace"), data, logprob, top)

    likeliest = logprobs_V.topk(min(top, logprobs_V.shape[0]))
    alternatives = tuple(map(entry, likeliest.indices.tolist(), likeliest.values.tolist()))
    return entry(token, float(logprobs_V[token]), alternatives)


class _Writer:
    """Turns tokens into what a reader sees: whole characters, no stop strings, tool calls taken out."""

    def __init__(self, tokenizer: Tokenizer | None, request: Request) -> None:
        self._characters = tokenizer.stream() if tokenizer else None
        if self._characters and request.continues_text:
            self._characters.push(request.prompt[-1])  # sentencepiece drops a space only at the very beginning
        self._stops = StopStrings(request.sampling.stop)
        self._calls = ToolCallParser(request.tools) if request.tools else None
        self._markers: dict[int, str] = {}  # control tokens beside a call: the parser wants them, no reader does
        if tokenizer and self._calls:
            self._markers = {tokenizer.control[name]: name for name in MARKERS if name in tokenizer.control}

    @property
    def stopped(self) -> bool:
        return self._stops.matched is not None

    def push(self, token: int) -> tuple[str, tuple[ToolCall, ...]]:
        if self._characters is None:
            return "", ()
        text = self._markers.get(token) or self._characters.push(token)
        return self._parsed(self._stops.push(text))

    def finish(self) -> tuple[str, tuple[ToolCall, ...]]:
        if self._characters is None:
            return "", ()
        text = "" if self.stopped else self._stops.push(self._characters.finish())
        return self._parsed(text + self._stops.finish(), last=True)

    def _parsed(self, text: str, last: bool = False) -> tuple[str, tuple[ToolCall, ...]]:
        if self._calls is None:
            return text, ()
        events = self._calls.push(text) + (self._calls.finish() if last else [])
        shown = "".join(event for event in events if isinstance(event, str))
        for marker in self._markers.values():
            shown = shown.replace(marker, "")
        return shown, tuple(event for event in events if isinstance(event, ToolCall))


def run(runner: Runner, request: Request, tokenizer: Tokenizer | None) -> Iterator[Piece]:
    """The pieces of one answer; the last one carries the whole `Reply`. After cancellation there is no last piece."""
    sampling = request.sampling
    writer = _Writer(tokenizer, request)
    text: list[str] = []
    ids: list[int] = []
    calls: list[ToolCall] = []
    logprobs: list[TokenLogprob] | None = None if sampling.logprobs is None else []
    finish: FinishReason = "length"
    for token, logits_V in runner.tokens(request):
        ids.append(token)
        ended = token in request.stop_ids and not sampling.ignore_eos
        shown, called = ("", ()) if ended else writer.push(token)
        scores = None
        if logprobs is not None and sampling.logprobs is not None:
            scores = (describe(logits_V, token, sampling.logprobs, tokenizer),)
            logprobs.extend(scores)
        text.append(shown)
        calls.extend(called)
        yield Piece(shown, (token,), scores, called)
        if ended or writer.stopped:
            finish = "stop"
            break
    if request.cancelled.is_set():
        return
    if request.grammar and request.grammar.finished:
        finish = "stop"
    shown, called = writer.finish()
    text.append(shown)
    calls.extend(called)
    if calls and finish == "stop":
        finish = "tool_calls"
    usage = Usage(len(request.prompt), len(ids))
    reply = Reply("".join(text), ids, finish, usage, calls, logprobs)
    yield Piece(shown, (), None, called, finish, reply)


def score(runner: Runner, ids: Sequence[int], top: int, tokenizer: Tokenizer | None) -> list[TokenLogprob | None]:
    """How likely each token was after those before it; None for the first. In pieces, so [S, V] is never held whole."""
    cache = runner.decoder.new_cache()
    found: list[TokenLogprob | None] = [None]
    for start in range(0, len(ids) - 1, PREFILL_TOKENS):
        piece = ids[start : min(start + PREFILL_TOKENS, len(ids) - 1)]
        for row, logits_V in enumerate(runner.forward(piece, cache)):
            found.append(describe(logits_V, ids[start + row + 1], top, tokenizer))
    return found


