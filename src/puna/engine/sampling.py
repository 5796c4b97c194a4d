"""From one row of logits to the next token. Pure functions over float32 on the CPU; no model, no text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from puna.errors import PunaError

NUCLEUS_SHARES = (1e-2, 1e-4, 1e-6, 0.0)  # of the likeliest token's probability: what lies above is sorted, if enough
PIECE = 512  # tokens whose probabilities are added up before one of them is looked for


class Options(TypedDict, total=False):
    """What a caller may say about one generation. Absent or None: the model's default. See `Sampling` for meanings."""

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    stop: str | Sequence[str] | None
    logprobs: int | bool | None
    ignore_eos: bool | None
    schema: Mapping[str, Any] | None
    tools: Sequence[Mapping[str, Any]] | None
    key: str | None
    priority: int | None
    timeout: float | None


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens and when to end. Every field is checked on construction; PunaError names field and range.

    temperature: 0 is greedy. Default 0.6, top_p 0.9: Meta's defaults for every generation (llama-models).
    top_p: keep the fewest tokens that together hold this probability. top_k: keep the k likeliest (None or 0: all).
    min_p: keep tokens at least this fraction as likely as the likeliest.
    repetition_penalty: divides positive and multiplies negative logits of every token in prompt or answer (CTRL, 2019).
    presence_penalty, frequency_penalty: subtracted once, or per occurrence, for tokens of the answer (OpenAI's API).
    logit_bias: token id -> added logit. seed: same seed, same answer; None draws a fresh one.
    max_tokens: None means whatever the context still holds. stop: strings that end the answer and are not shown.
    logprobs: report log-probabilities with this many alternatives (0: the chosen token only); None reports none. As an
        option also True (0) and False (None).
    ignore_eos: go on past the model's end-of-answer tokens.
    """

    temperature: float = 0.6
    top_p: float = 0.9
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0.0, None)
        _number("top_p", self.top_p, 0.0, 1.0, above_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, None, above_low=True)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        for name in ("top_k", "max_tokens", "logprobs"):
            value = getattr(self, name)
            if value is not None:
                _whole(name, value, 0)
        if self.seed is not None:
            _whole("seed", self.seed, None)
        if not isinstance(self.ignore_eos, bool):
            raise PunaError(f"ignore_eos must be True or False, not {self.ignore_eos!r:.80}")
        if not all(isinstance(s, str) and s for s in self.stop):
            raise PunaError(f"stop must be non-empty strings, not {list(self.stop)!r}")
        if not isinstance(self.logit_bias, Mapping):
            raise PunaError(f"logit_bias must map token ids to numbers, not {type(self.logit_bias).__name__}")
        for token, bias in self.logit_bias.items():
            _whole("logit_bias: a token id", token, 0)
            _number(f"logit_bias of token {token}", bias, -100.0, 100.0)

    def with_options(self, options: Mapping[str, Any]) -> "Sampling":
        """These defaults with what a caller gave (None counts as not given). Unknown names raise TypeError."""
        known = {f.name for f in fields(self)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise TypeError(f"unknown generation option {unknown[0]!r}; known: {', '.join(sorted(known))}")
        given = {name: value for name, value in options.items() if value is not None}
        if isinstance(given.get("logprobs"), bool):
            given["logprobs"] = 0 if given["logprobs"] else None
        if "stop" in given:
            stop = given["stop"]
            if not isinstance(stop, str | Sequence):
                raise PunaError(f"stop must be a string or a list of strings, not {type(stop).__name__}")
            given["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
        return replace(self, **given)

    def generator(self) -> torch.Generator:
        """A random source of this request alone, on the CPU so that one seed gives one answer on every device."""
        random = torch.Generator(device="cpu")
        if self.seed is None:
            random.seed()
        else:
            random.manual_seed(self.seed % 2**63)
        return random


def finite(value: Any) -> bool:
    """Whether it is a number that a float holds."""
    try:
        return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # whole numbers of more than 308 digits
        return False


def _number(name: str, value: Any, low: float, high: float | None, above_low: bool = False) -> None:
    wanted = f"{'above' if above_low else 'at least'} {low:g}" + ("" if high is None else f" and at most {high:g}")
    if not finite(value):
        raise PunaError(f"{name} must be a number {wanted}, not {value!r:.80}")
    if value < low or (above_low and value == low) or (high is not None and value > high):
        raise PunaError(f"{name} must be {wanted}, not {value:g}")


def _whole(name: str, value: Any, low: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise PunaError(f"{name} must be a whole number, not {value!r}")
    if low is not None and value < low:
        raise PunaError(f"{name} must be at least {low}, not {value}")


def adjust(logits_V: Tensor, sampling: Sampling, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Logits [V] after penalties and bias, as float32. `prompt` and `answer` are the token ids so far."""
    changed = (sampling.repetition_penalty != 1.0 or sampling.presence_penalty or sampling.frequency_penalty
               or sampling.logit_bias)  # fmt: skip
    logits_V = logits_V.to(torch.float32, copy=bool(changed))
    size = logits_V.shape[0]
    if sampling.repetition_penalty != 1.0 and (prompt or answer):
        seen = torch.tensor(sorted(token for token in {*prompt, *answer} if token < size))  # <|image|> may lie beyond
        chosen = logits_V[seen]
        penalty = sampling.repetition_penalty
        logits_V[seen] = torch.where(chosen > 0, chosen / penalty, chosen * penalty)
    if answer and (sampling.presence_penalty or sampling.frequency_penalty):
        counts_V = torch.bincount(torch.tensor(answer), minlength=size).to(torch.float32)
        logits_V -= sampling.presence_penalty * (counts_V > 0) + sampling.frequency_penalty * counts_V
    for token, bias in sampling.logit_bias.items():
        if token >= size:
            raise PunaError(f"logit_bias names token {token}, but this model has {size} tokens (0 to {size - 1})")
        logits_V[token] += bias
    return logits_V


def probabilities(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """The distribution [V] that a token is drawn from: temperature, then min_p, top_k and top_p, renormalised."""
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits_V.argmax(), logits_V.shape[0]).to(torch.float32)
    # the maximum is subtracted first: a tiny temperature must not overflow; nor may it become float32's 0
    temperature = max(sampling.temperature, torch.finfo(torch.float32).tiny)
    probs_V = torch.softmax((logits_V.float() - logits_V.max()) / temperature, dim=-1)
    if sampling.min_p > 0:
        probs_V = probs_V.where(probs_V >= sampling.min_p * probs_V.max(), 0.0)
    if sampling.top_k and sampling.top_k < probs_V.shape[0]:
        top = probs_V.topk(sampling.top_k)
        probs_V = torch.zeros_like(probs_V).scatter_(0, top.indices, top.values)
    probs_V = probs_V / probs_V.sum()
    if sampling.top_p < 1:
        probs_V = _nucleus(probs_V, sampling.top_p)
    return probs_V


def _nucleus(probs_V: Tensor, top_p: float) -> Tensor:
    """The fewest likeliest tokens that together reach `top_p` (the one that crosses it stays), renormalised."""
    top = float(probs_V.max())
    for share in NUCLEUS_SHARES:  # a threshold and a sort of what is above it take a fifth of topk's time
        indices = torch.from_numpy(np.flatnonzero(probs_V.numpy() >= share * top))
        values, order = probs_V[indices].sort(descending=True)
        if values.sum() >= top_p:
            break
    inside = values.cumsum(0) - values < top_p
    inside[0] = True  # also where top_p is nothing to float32
    kept = values.where(inside, 0.0)
    return torch.zeros_like(probs_V).scatter_(0, indices[order], kept / kept.sum())


def draw(probs_V: Tensor, random: torch.Generator) -> int:
    """One token from a distribution [V], using one random number; a token of probability 0 is never drawn."""
    pieces_PW = torch.nn.functional.pad(probs_V, (0, -len(probs_V) % PIECE)).view(-1, PIECE)
    sums = pieces_PW.sum(1, dtype=torch.float64).cumsum(0)
    point = torch.rand(1, generator=random, dtype=torch.float64) * sums[-1]
    piece = _reaching(sums, point)
    within = pieces_PW[piece].double().cumsum(0) + (sums[piece - 1] if piece else 0.0)
    return piece * PIECE + _reaching(within, point)


def _reaching(sums: Tensor, point: Tensor) -> int:
    """The first of rising sums above a point; where rounding leaves none, the last that rose."""
    index = int(torch.searchsorted(sums, point, right=True))
    return index if index < len(sums) else int(torch.searchsorted(sums, sums[-1]))


def choose(logits_V: Tensor, sampling: Sampling, prompt: Sequence[int], answer: Sequence[int],
           random: torch.Generator, allowed_V: Tensor | None = None) -> int:
    """The next token for logits [V] after `prompt` and `answer`; `allowed_V` (bool) bars the others entirely."""
    raw_V, logits_V = logits_V, adjust(logits_V, sampling, prompt, answer)
    if not logits_V.sum().isfinite():  # one pass, and no number that a model means reaches float32's end
        if raw_V.sum().isfinite():
            raise PunaError(f"repetition_penalty {sampling.repetition_penalty:g} takes logits out of float32's range; "
                            "give one nearer to 1")
        raise PunaError(
            "the model gave logits that are not finite numbers: the weights are damaged, or the dtype is too narrow; "
            "try dtype='float32'"
        )
    if allowed_V is not None:
        logits_V = logits_V.masked_fill(~allowed_V, -math.inf)
    if sampling.temperature == 0:
        return int(logits_V.numpy().argmax())  # a tenth of the time of PyTorch's
    return draw(probabilities(logits_V, sampling), random)
