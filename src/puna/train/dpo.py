"""Preference tuning on the loop: DPO and its kin over adapters, or over all weights with a copy of them beside.

Legend: N predictions of a pass, P pairs.
"""

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from puna.errors import PunaError
from puna.model import Decoder
from puna.model.adapt import switched_off
from puna.text.tokenizer import Tokenizer
from puna.train.config import TrainConfig
from puna.train.examples import preference_example
from puna.train.lora import AdapterOptions, checked_options, what_trains
from puna.train.loss import IGNORED, token_losses
from puna.train.method import Batch, Example, Finished, Loss, Packing, Row
from puna.train.preference import EXTRA, LOSSES, WITHOUT_REFERENCE, Pairs
from puna.train.processes import Processes
from puna.train.sharded import deal


class DPOOptions(AdapterOptions):
    """`options` of dpo (docs/tuning.md)."""

    loss: Literal["sigmoid", "hinge", "ipo", "simpo", "orpo"] = "sigmoid"
    beta: float = Field(0.1, gt=0)
    label_smoothing: float | None = Field(None, ge=0, lt=0.5)  # of sigmoid
    gamma: float | None = Field(None, ge=0)  # of simpo
    adapter: bool = True  # False trains all weights


class DPO:
    """From pairs of a chosen and a rejected answer. The reference is the base: the same model with its adapters off."""

    name: ClassVar[str] = "dpo"
    metrics: ClassVar[tuple[str, ...]] = ("margin", "accuracy")
    packing: ClassVar[Packing] = "whole"
    optimizer: ClassVar[Literal["muon", "adamw"]] = "adamw"

    def __init__(self, config: TrainConfig) -> None:
        self.options = options = checked_options(DPOOptions, config)
        for name, loss in (("label_smoothing", "sigmoid"), ("gamma", "simpo")):
            if getattr(options, name) is not None and options.loss != loss:
                raise PunaError(f"options.{name}: loss {options.loss} has none; take it out, or use {loss}")
        self.extra = options.label_smoothing or options.gamma or EXTRA.get(options.loss, 0.0)
        self.rate = 5e-5 if options.adapter else 5e-7
        self.trains = what_trains(options, options.adapter, config.seed)
        self._base: tuple[Decoder, ...] = ()  # of all weights' training: a copy, which is no part of the model
        self._known: dict[bytes, float] = {}
        self._processes = Processes.alone()

    def prepare(self, model: Decoder, seed: int) -> None:
        """Adapters, or all weights with a frozen copy as the reference."""
        if not self.options.adapter and self.options.loss not in WITHOUT_REFERENCE:
            self._base = (copy.deepcopy(model).eval(),)
        self.trains.prepare(model, seed)

    def example(self, row: Row, tokenizer: Tokenizer) -> Example:
        """`prompt`, `chosen` and `rejected`."""
        return preference_example(row, tokenizer)

    def expand(
        self, model: Decoder, tokenizer: Tokenizer, examples: list[Example], step: int,  # noqa: ARG002
    ) -> list[Example]:  # fmt: skip
        """The rows as they are."""
        self.trains.begin_step(step)
        return examples

    def count(self, batch: Batch) -> int:
        """Pairs."""
        return len(batch.examples)

    def loss(self, model: Decoder, batch: Batch) -> Loss:
        """The chosen loss, summed over pairs."""
        self.trains.begin_pass(model, batch.number)
        policy, tokens = answers(model, batch)
        reference = torch.zeros_like(policy)
        if self.options.loss not in WITHOUT_REFERENCE:
            self._learn(model, batch.examples)
            known = [self._known[key] for example in batch.examples for key in _keys(example)]
            reference = torch.tensor(known, device=policy.device)
        pairs = Pairs(policy[::2], policy[1::2], reference[::2], reference[1::2], tokens[::2], tokens[1::2])
        losses = LOSSES[self.options.loss](pairs, self.options.beta, self.extra)
        chosen, rejected = pairs.averages
        margins = (chosen - rejected if self.options.loss in WITHOUT_REFERENCE else pairs.margin).detach()
        return Loss(losses.sum(), {"margin": float(margins.sum()) * self.options.beta,
                                   "accuracy": float((margins > 0).sum())})  # fmt: skip

    def _learn(self, model: Decoder, examples: Sequence[Example]) -> None:
        """The base's log-probabilities of these examples' answers, computed once. Each example alone in a pass, so that
        they don't depend on what else a pass holds, which a resumed run may meet at another time. Processes make as
        many passes as the one that has the most to do, since all take part in each."""
        unknown = [example for example in examples if any(key not in self._known for key in _keys(example))]
        for at in range(self._processes.most(len(unknown))):
            example = unknown[at] if at < len(unknown) else examples[0]
            batch = Batch.of([example], model.device)
            with torch.no_grad():
                if self._base:
                    found, _ = answers(self._base[0], batch)
                else:
                    with switched_off(model):
                        found, _ = answers(model, batch)
            self._known |= dict(zip(_keys(example), found.tolist(), strict=True))

    def join(self, processes: Processes) -> None:
        """Work with other processes from now on; `prepare` has been."""
        self._processes = processes
        for base in self._base:
            deal(base, processes)

    def save(self, finished: Finished, folder: Path) -> None:
        """An adapter, or weights."""
        self.trains.save(finished, folder)


def _keys(example: Example) -> list[bytes]:
    return [hashlib.sha256(d.tokens.tobytes() + d.counted.tobytes()).digest() for d in example.documents]


def answers(model: Decoder, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of each document of a pass: the log-probability of its tokens that carry loss, and how many these are."""
    losses_N = token_losses(batch.states(model), model.head_weight, batch.targets_N, model.vocabulary)
    counted_N = (batch.targets_N != IGNORED).float()
    parts = zip(losses_N.split(list(batch.lengths)), counted_N.split(list(batch.lengths)), strict=True)
    sums = [(-losses.sum(), counted.sum()) for losses, counted in parts]
    return torch.stack([one for one, _ in sums]), torch.stack([count for _, count in sums])
