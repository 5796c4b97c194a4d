"""What goes into a model and what comes out: plain data."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from puna.errors import PunaError
from puna.text.toolcalls import ToolCall

FinishReason = Literal["stop", "length", "tool_calls"]


class ContextLengthError(PunaError):
    """A prompt that doesn't fit: `prompt_tokens` tokens for a context of `context_length`.

    own: the context length of the model itself, where the cache has room for less.
    """

    def __init__(self, prompt_tokens: int, context_length: int, own: int | None = None) -> None:
        why = "" if own is None or own <= context_length else (
            f" here, because the cache has room for no more (the model itself could take {own})"
        )
        super().__init__(
            f"the prompt has {prompt_tokens} tokens, but this model's context length is {context_length} tokens{why}; "
            "shorten the prompt" + (" or ask for a longer context" if why else "")
        )
        self.prompt_tokens = prompt_tokens
        self.context_length = context_length


@dataclass(frozen=True)
class Inputs:
    """A prompt ready to run.

    token_ids: the prompt as it is, BOS included. pixel_values: float32 [T, 3, side, side], the normalised tiles of all
    pictures in order. grids: (rows, columns) of each picture. notes: what their user should know of how pictures were
    read, such as which frames of a video were used.
    """

    token_ids: Sequence[int]
    pixel_values: Tensor | None = None
    grids: Sequence[tuple[int, int]] | None = None
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class TokenLogprob:
    """One token and its natural-log probability under the model's own distribution (before temperature and bias).

    token: its text, lossy where it is part of a character. bytes: its exact bytes (None without a tokenizer).
    top: the likeliest tokens at this place, likeliest first, as many as were asked for.
    """

    id: int
    token: str
    bytes: bytes | None
    logprob: float
    top: tuple["TokenLogprob", ...] = ()


@dataclass(frozen=True)
class Usage:
    """Token counts. `completion_tokens` counts every token that was drawn, an end-of-answer token included.
    `cached_tokens`: those of the prompt that were found in the cache, so that nothing had to be computed for them."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = field(default=0, compare=False)  # equal requests get equal answers

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Reply:
    """A finished answer.

    text: what a reader should see, without control tokens, stop strings and tool calls.
    token_ids: every token drawn, with the end-of-answer token if there was one.
    logprobs: one entry per token id, or None if not asked for.
    finish_reason: "stop" (the model ended, or a stop string), "length" (max_tokens or the context), "tool_calls".
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    tool_calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None


@dataclass(frozen=True)
class Piece:
    """A step of an answer: the text that may be shown now (often empty: held back) and the tokens since the last one.

    The last piece, and only it, has `finish_reason` and the whole `reply`.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: FinishReason | None = None
    reply: Reply | None = None
