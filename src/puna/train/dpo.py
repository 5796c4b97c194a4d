"""Preference tuning on the loop: DPO and its kin over adapters, or over all weights with a copy of them beside."""

from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field

from puna.errors import PunaError
from puna.model import Decoder
from puna.text.tokenizer import Tokenizer
from puna.train.config import TrainConfig
from puna.train.examples import preference_example
from puna.train.lora import AdapterOptions, checked_options, what_trains
from puna.train.method import Batch, Example, Finished, Loss, Packing, Row
from puna.train.preference import EXTRA, LOSSES, WITHOUT_REFERENCE, Pairs
from puna.train.processes import Processes
from puna.train.reference import Reference, answers


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
        self._reference = Reference()

    def prepare(self, model: Decoder, seed: int) -> None:
        """Adapters, or all weights with a frozen copy as the reference."""
        if not self.options.adapter and self.options.loss not in WITHOUT_REFERENCE:
            self._reference.keep(model)
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
            reference = self._reference.logprobs(model, batch.examples)
        pairs = Pairs(policy[::2], policy[1::2], reference[::2], reference[1::2], tokens[::2], tokens[1::2])
        losses = LOSSES[self.options.loss](pairs, self.options.beta, self.extra)
        chosen, rejected = pairs.averages
        margins = (chosen - rejected if self.options.loss in WITHOUT_REFERENCE else pairs.margin).detach()
        return Loss(losses.sum(), {"margin": float(margins.sum()) * self.options.beta,
                                   "accuracy": float((margins > 0).sum())})  # fmt: skip

    def join(self, processes: Processes) -> None:
        """See `Reference.join`."""
        self._reference.join(processes)

    def save(self, finished: Finished, folder: Path) -> None:
        """An adapter, or weights."""
        self.trains.save(finished, folder)

