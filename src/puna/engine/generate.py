"""From a task's tokens to the pieces that a reader sees, as a stream that can be closed at any time."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from puna.engine.blocks import Table
from puna.engine.core import Task
from puna.engine.engine import Engine
from puna.engine.grammar import Grammar
from puna.engine.pictures import Shown, TaskPictures
from puna.engine.reply import FinishReason, Piece, Reply, TokenLogprob, Usage
from puna.engine.sampling import Sampling
from puna.engine.stops import StopStrings
from puna.text.tokenizer import Tokenizer
from puna.text.toolcalls import MARKERS, ToolCall, ToolCallParser

T = TypeVar("T")
Item = TypeVar("Item")


@dataclass
class Request:
    """One checked generation: everything that is needed, nothing to look up."""

    prompt: list[int]
    sampling: Sampling
    limit: int  # most tokens to draw: max_tokens, or what the context still holds
    stop_ids: frozenset[int]
    continues_text: bool = False  # the answer goes on in the prompt's text, so its leading space is part of it
    tools: Sequence[Mapping[str, Any]] = ()  # OpenAI's definitions; calls of them are taken out of the text
    grammar: Grammar | None = None
    key: str | None = None
    priority: int = 0
    timeout: float | None = None
    pictures: Sequence[Shown] = ()

    def task(self) -> Task:
        """This request as the engine wants it."""
        return Task(list(self.prompt), len(self.prompt) - 1, key=self.key, priority=self.priority, prompt=self.prompt,
                    sampling=self.sampling, limit=self.limit, stop_ids=self.stop_ids, grammar=self.grammar,
                    seconds=self.timeout, finished=self.limit < 1, **_with(self.prompt, self.pictures))


def _with(prompt: Sequence[int], pictures: Sequence[Shown]) -> dict[str, Any]:
    """The fields of a task that a prompt's pictures make."""
    if not pictures:
        return {}
    shown = TaskPictures(prompt, pictures)
    return {"pictures": shown, "table": Table(marks=shown.marks), "ready": shown.ready(0)}


class Live(Iterator[T]):
    """What the engine computes from now on, piece by piece. `close()` may be called from any thread, also while another
    waits for a piece; one that nobody holds any more closes itself."""

    def __init__(self, engine: Engine, task: Task, pieces: Iterator[T]) -> None:
        self._engine, self._task, self._pieces = engine, task, pieces
        self._closed = False
        if task.finished:
            task.outbox.put(None)
        else:
            engine.submit(task)

    def __next__(self) -> T:
        if self._closed:
            raise StopIteration
        return next(self._pieces)

    def close(self) -> None:
        """End the work now: at most the step in progress still completes. Frees the cache."""
        if not self._closed:
            self._closed = True
            if not self._task.finished:
                self._engine.cancel(self._task)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class Stream(Live[Piece]):
    """The pieces of one answer."""

    def __init__(self, engine: Engine, request: Request, tokenizer: Tokenizer | None) -> None:
        self.reply: Reply | None = None  # set with the last piece
        task = request.task()
        super().__init__(engine, task, _pieces(engine, task, request, tokenizer))

    def __next__(self) -> Piece:
        piece = super().__next__()
        self.reply = piece.reply
        if self.reply is not None:
            self.close()  # a stop string may have ended it, of which the engine doesn't know
        return piece


class Rows(Live[Tensor]):
    """The float32 logits [S, V] of `ids`, piece by piece in order."""

    def __init__(self, engine: Engine, ids: Sequence[int], pictures: Sequence[Shown] = ()) -> None:
        task = Task(list(ids), 0, prompt=ids, finished=not ids, **_with(ids, pictures))
        super().__init__(engine, task, _received(engine, task, Tensor))


class Scores(Live[TokenLogprob | None]):
    """How likely each of `ids` was after those before it, with the `top` likeliest; None for the first. [S, V] is never
    held whole."""

    def __init__(self, engine: Engine, ids: Sequence[int], top: int, tokenizer: Tokenizer | None,
                 key: str | None = None, pictures: Sequence[Shown] = ()) -> None:
        task = Task(list(ids[:-1]), 0, prompt=ids, key=key, finished=len(ids) < 2, **_with(ids, pictures))
        super().__init__(engine, task, _scored(_received(engine, task, Tensor), ids, top, tokenizer))


def _received(engine: Engine, task: Task, kind: type[Item]) -> Iterator[Item]:
    while isinstance(item := engine.receive(task), kind):
        yield item
    if isinstance(item, BaseException):
        raise item


def _scored(rows: Iterator[Tensor], ids: Sequence[int], top: int,
            tokenizer: Tokenizer | None) -> Iterator[TokenLogprob | None]:
    yield None
    following = iter(ids[1:])
    for rows_RV in rows:
        for logits_V in rows_RV:
            yield describe(logits_V, next(following), top, tokenizer)


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
    readable_only = token >= len(logprobs_V)  # such as <|image|>, which no model writes
    return entry(token, -math.inf if readable_only else float(logprobs_V[token]), alternatives)


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


def _pieces(engine: Engine, task: Task, request: Request, tokenizer: Tokenizer | None) -> Iterator[Piece]:
    """The pieces of one answer; the last one carries the whole `Reply`. After cancellation there is no last piece."""
    sampling = request.sampling
    writer = _Writer(tokenizer, request)
    text: list[str] = []
    ids: list[int] = []
    calls: list[ToolCall] = []
    logprobs: list[TokenLogprob] | None = None if sampling.logprobs is None else []
    finish: FinishReason = "length"
    for token, logits_V in _received(engine, task, tuple):
        ids.append(token)
        ended = token in request.stop_ids and not sampling.ignore_eos
        shown, called = ("", ()) if ended else writer.push(token)
        scores = None
        if logprobs is not None and logits_V is not None and sampling.logprobs is not None:
            scores = (describe(logits_V, token, sampling.logprobs, tokenizer),)
            logprobs.extend(scores)
        text.append(shown)
        calls.extend(called)
        yield Piece(shown, (token,), scores, called)
        if ended or writer.stopped:
            finish = "stop"
            break
    else:
        if task.cancelled:
            return
        if request.grammar and request.grammar.finished:
            finish = "stop"
    shown, called = writer.finish()
    text.append(shown)
    calls.extend(called)
    if calls and finish == "stop":
        finish = "tool_calls"
    usage = Usage(len(request.prompt), len(ids), task.cached or 0)
    reply = Reply("".join(text), ids, finish, usage, calls, logprobs)
    yield Piece(shown, (), None, called, finish, reply)
