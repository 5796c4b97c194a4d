"""POST /v1/completions. Source of every shape: OpenAI API reference, "Completions"; `return_token_ids` is vLLM's."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from puna.engine import Model, Options, Piece, Reply, TokenLogprob, Usage
from puna.server.answers import Answer, Count, Heading, answers, fairness_key
from puna.server.errors import ApiError, JsonResponse
from puna.server.protocol import CompletionRequest
from puna.server.streaming import collect, event_stream
from puna.server.worker import Job, Worker
from puna.text.tokenizer import Tokenizer

MAX_TOKENS = 16  # OpenAI's default for this route
KEYS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


async def completions(request: Request, asked: CompletionRequest, model: Model, name: str, worker: Worker) -> Response:
    """One completion request, streamed or whole."""
    options = asked.options()
    options["max_tokens"] = MAX_TOKENS if asked.max_tokens is None else asked.max_tokens
    options["logprobs"] = asked.logprobs
    options["key"] = fairness_key(request, asked.user)
    prompts = _prompts(asked)
    completion = _Completion(Heading("cmpl", "text_completion", name), asked, prompts, model)
    job = worker.submit(lambda job: _work(job, model, prompts, asked, options))
    if asked.stream:
        return await event_stream(request, job, completion.chunks, completion.last)
    for answer in await collect(request, job):
        completion.add(answer)
    return JsonResponse(completion.whole())


def _prompts(asked: CompletionRequest) -> list[str | list[int]]:
    """The prompts one by one, from any of the four forms."""
    given = asked.prompt
    if isinstance(given, str):
        return [given]
    if not given:
        raise ApiError("'prompt' is an empty list: give text, token ids, or a list of either.", param="prompt",
                       code="invalid_value")
    return [given] if isinstance(given[0], int) else list(given)


def _work(job: Job[Answer], model: Model, prompts: Sequence[str | list[int]], asked: CompletionRequest,
          options: Options) -> Iterator[Answer]:
    """In the worker's thread: each prompt's own log-probabilities, where echo asks for them, and its answers."""
    n = asked.n or 1
    for at, ids in enumerate([model.prompt_ids(prompt) for prompt in prompts]):
        if job.stopped:
            return
        scored = None
        if asked.echo and asked.logprobs is not None:
            with job.running([scores := model.scores(ids, asked.logprobs, key=options.get("key"))]):
                scored = list(scores)
        found = answers(job, model, ids, n, options, at)
        if scored and asked.max_tokens == 0:  # all is known: don't run the prompt again
            empty = Piece(finish_reason="length", reply=Reply("", [], "length", Usage(len(ids), 0)))
            found = (Answer(at * n + number, empty, at) for number in range(n))
        begun = -1
        for answer in found:
            yield answer if answer.choice == begun else replace(answer, prompt_ids=ids, scored=scored)
            begun = answer.choice


class _Completion:
    """Puts pieces together, as chunks on their way or as one whole."""

    def __init__(self, heading: Heading, asked: CompletionRequest, prompts: Sequence[str | list[int]],
                 model: Model) -> None:
        self.heading, self.asked = heading, asked
        self.count = Count(asked.stream_options)
        self.choices = [_Choice(prompt, asked, model) for prompt in prompts for _ in range(asked.n or 1)]

    def add(self, answer: Answer) -> list[dict[str, Any]]:
        """Take a piece; returns what it adds to its choice: the first one also an echo before it."""
        self.count.add(answer)
        choice = self.choices[answer.choice]
        added = [choice.echo(answer)] if answer.prompt_ids else []
        return [{"index": answer.choice, **part} for part in (*added, choice.add(answer.piece))]

    def chunks(self, answer: Answer) -> Iterable[dict[str, Any]]:
        """The chunks of one piece, but none that has nothing to tell."""
        for part in self.add(answer):
            if any(part.get(key) for key in ("text", "logprobs", "finish_reason", "token_ids", "prompt_token_ids")):
                yield {**self.heading.fields, "choices": [part], **self.count.in_chunk()}

    def last(self) -> Iterable[dict[str, Any]]:
        """The chunk with usage, where it was asked for."""
        if self.count.asked:
            yield {**self.heading.fields, "choices": [], "usage": self.count.usage()}

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [{"index": index, **choice.whole()} for index, choice in enumerate(self.choices)]
        return {**self.heading.fields, "choices": choices, "usage": self.count.usage()}


class _Choice:
    """One answer: the parts that were told so far, each with text, logprobs and token ids."""

    def __init__(self, prompt: str | list[int], asked: CompletionRequest, model: Model) -> None:
        self.prompt, self.asked, self.tokenizer = prompt, asked, model.tokenizer
        self.parts: list[dict[str, Any]] = []
        self.prompt_ids: list[int] = []
        self._offsets = _Offsets(model.tokenizer)

    def echo(self, answer: Answer) -> dict[str, Any]:
        """The prompt itself, as text and with its log-probabilities; empty unless the request wants an echo."""
        self.prompt_ids = list(answer.prompt_ids)
        if not self.asked.echo:
            self._offsets.begin(0, self.prompt_ids)
            return self._part("")
        text = self.prompt
        if not isinstance(text, str):
            text = self.tokenizer.decode(text) if self.tokenizer else ""
        logprobs = None
        if answer.scored is not None:
            first = TokenLogprob(self.prompt_ids[0], *_spelling(self.prompt_ids[0], self.tokenizer), logprob=0.0)
            logprobs = self._logprobs(one or first for one in answer.scored)
            logprobs["token_logprobs"][0] = logprobs["top_logprobs"][0] = None  # nothing comes before it
        self._offsets.begin(len(text), self.prompt_ids)
        return self._part(text, logprobs)

    def add(self, piece: Piece) -> dict[str, Any]:
        """What this piece adds."""
        logprobs = self._logprobs(piece.logprobs) if piece.logprobs else None
        return self._part(piece.text, logprobs, list(piece.token_ids), piece.finish_reason)

    def _part(self, text: str, logprobs: dict | None = None, token_ids: Sequence[int] = (),
              finish_reason: str | None = None) -> dict[str, Any]:
        part: dict[str, Any] = {"text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        if self.asked.return_token_ids:
            part["token_ids"] = list(token_ids)
            if not self.parts:
                part["prompt_token_ids"] = self.prompt_ids
        self.parts.append(part)
        return part

    def whole(self) -> dict[str, Any]:
        """All parts joined."""
        joined = dict(self.parts[0], text="".join(part["text"] for part in self.parts),
                      finish_reason=self.parts[-1]["finish_reason"])
        if self.asked.logprobs is not None:
            told = [part["logprobs"] for part in self.parts if part["logprobs"]]
            joined["logprobs"] = {key: [one for lists in told for one in lists[key]] for key in KEYS}
        if self.asked.return_token_ids:
            joined["token_ids"] = [token for part in self.parts for token in part["token_ids"]]
        return joined

    def _logprobs(self, entries: Iterable[TokenLogprob]) -> dict[str, list]:
        table: dict[str, list] = {key: [] for key in KEYS}
        for one in entries:
            table["tokens"].append(_name(one))
            table["token_logprobs"].append(one.logprob)
            table["top_logprobs"].append({_name(other): other.logprob for other in (*one.top, one)})
            table["text_offset"].append(self._offsets.next(one.id))
        return table


class _Offsets:
    """Where in its choice's text each token begins, in characters."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer, self._at = tokenizer, 0
        self._decoder = tokenizer.stream() if tokenizer else None

    def begin(self, at: int, prompt: Sequence[int]) -> None:
        """The next token is the answer's first, at `at`; after a prompt its leading space counts."""
        self._at = at
        self._decoder = self._tokenizer.stream() if self._tokenizer else None
        if self._decoder:
            self._decoder.push(prompt[-1])

    def next(self, token: int) -> int:
        """The offset of this token."""
        at = self._at
        self._at += len(self._decoder.push(token)) if self._decoder else 0
        return at


def _spelling(token: int, tokenizer: Tokenizer | None) -> tuple[str, bytes | None]:
    if tokenizer is None:
        return f"token_id:{token}", None
    return tokenizer.token(token), tokenizer.token_bytes(token)


def _name(one: TokenLogprob) -> str:
    """A token's name, its own for any bytes: part of a character is spelled "bytes:\\xe2\\x80", as OpenAI does."""
    if one.bytes is None:
        return one.token
    try:
        return one.bytes.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in one.bytes)
