"""What both kinds of completion share: the work in the model's thread, usage, and the fields of every response."""

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from puna import __version__
from puna.engine import ContextLengthError, Model, Options, Piece, TokenLogprob
from puna.server.protocol import StreamOptions
from puna.server.worker import Job

FINGERPRINT = f"fp_puna_{__version__}"


@dataclass(frozen=True)
class Answer:
    """A piece of one choice, counted over all prompts.

    The first piece of a plain completion has its prompt with it: ids and, where asked for, their log-probabilities.
    """

    choice: int
    piece: Piece
    prompt: int
    prompt_ids: Sequence[int] = ()
    scored: Sequence[TokenLogprob | None] | None = None


def answers(job: Job, model: Model, prompt: Any, n: int, options: Options, at: int = 0) -> Iterator[Answer]:
    """All pieces of `n` answers to the prompt with number `at`, computed together and told one after another.

    A seed grows by one with each.
    """
    seed = options.get("seed")
    each = [options if seed is None else Options(**{**options, "seed": seed + number}) for number in range(n)]
    streams = [] if job.stopped else [model.stream(prompt, **mine) for mine in each]
    with job.running(streams):
        for number, pieces in enumerate(streams):
            for piece in pieces:
                if piece.reply and not piece.reply.token_ids and options.get("max_tokens") != 0:
                    raise ContextLengthError(piece.reply.usage.prompt_tokens, model.context_length)  # no room to answer
                yield Answer(at * n + number, piece, at)


def fairness_key(request: Request, user: Any) -> str:
    """Whose request this is, among which the engine is shared fairly: the API key with OpenAI's `user`."""
    return json.dumps([request.headers.get("authorization"), user])


class Heading:
    """The fields that every object of one response begins with."""

    def __init__(self, prefix: str, kind: str, model: str) -> None:
        self.fields: Mapping[str, Any] = {
            "id": f"{prefix}-{secrets.token_hex(16)}", "object": kind, "created": int(time.time()), "model": model,
            "system_fingerprint": FINGERPRINT,
        }


class Count:
    """Counts tokens: each prompt once, and all that was drawn."""

    def __init__(self, options: StreamOptions | None) -> None:
        self.asked = bool(options and options.include_usage)
        self._prompts: dict[int, int] = {}
        self._cached: dict[int, int] = {}
        self._completion = 0

    def add(self, answer: Answer) -> None:
        """Count one piece."""
        self._completion += len(answer.piece.token_ids)
        if answer.piece.reply is not None:
            usage = answer.piece.reply.usage
            self._prompts[answer.prompt] = usage.prompt_tokens
            # of several answers to one prompt, the first to run had the least in the cache
            self._cached[answer.prompt] = min(usage.cached_tokens, self._cached.get(answer.prompt, usage.cached_tokens))

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        prompt = sum(self._prompts.values())
        return {"prompt_tokens": prompt, "completion_tokens": self._completion,
                "total_tokens": prompt + self._completion,
                "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())}}

    def in_chunk(self) -> dict[str, Any]:
        """What a chunk says about usage: null where a last chunk will tell, else nothing."""
        return {"usage": None} if self.asked else {}
