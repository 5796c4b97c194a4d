"""What a training method is: the small part of a run in which pretraining, tuning, adapters and preferences differ.

The loop (`loop.py`) does the rest, the same for all: order, passes, exact normalisation, optimizer, saving, watching.
Legend: N predictions of one pass, D model width, V vocabulary.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from puna.checkpoint.source import GenerationDefaults
from puna.model import Decoder
from puna.model.differentiable import FILL
from puna.text.tokenizer import Tokenizer
from puna.train.loss import IGNORED
from puna.train.pictures import PictureFile, seen
from puna.train.separate import Separate

Row = Mapping[str, Any]  # one object of a data file
Packing = Literal["stream", "starts", "whole"]


@dataclass(frozen=True)
class Document:
    """Token ids [n] that are read from position 0, and which of them, as targets, carry loss [n] (the first never)."""

    tokens: NDArray[np.uint32]
    counted: NDArray[np.bool_]
    pictures: tuple[PictureFile, ...] = ()

    @property
    def predictions(self) -> int:
        """How many tokens the model is asked to predict, counted or not."""
        return max(0, len(self.tokens) - 1)


@dataclass(frozen=True)
class Example:
    """What stays together in one pass: one document, or several (chosen, then rejected). `extra` holds JSON values
    that come from the row (an answer to check against) or from `Method.expand` (advantages)."""

    documents: tuple[Document, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def predictions(self) -> int:
        """Of all its documents."""
        return sum(document.predictions for document in self.documents)


@dataclass(frozen=True)
class Batch:
    """One pass: the documents of its examples end to end, without padding. Document i has `lengths[i]` predictions."""

    tokens_N: Tensor  # inputs: each document without its last token
    targets_N: Tensor  # the token after each input, or IGNORED
    lengths: tuple[int, ...]
    examples: tuple[Example, ...]
    number: int = 0  # among the passes of its step

    @staticmethod
    def of(examples: Sequence[Example], device: torch.device, number: int = 0) -> "Batch":
        """The pass over these examples."""
        documents = [document for example in examples for document in example.documents]
        tokens = np.concatenate([document.tokens[:-1] for document in documents]).astype(np.int64)
        targets = np.concatenate(
            [np.where(document.counted[1:], document.tokens[1:].astype(np.int64), IGNORED) for document in documents]
        )
        return Batch(
            torch.from_numpy(tokens).to(device),
            torch.from_numpy(targets).to(device),
            tuple(document.predictions for document in documents),
            tuple(examples),
            number,
        )

    @property
    def counted(self) -> int:
        """Targets that carry loss."""
        return int((self.targets_N != IGNORED).sum())

    def states(self, model: Decoder) -> Tensor:
        """Final normalised states [N, D]: every document from position 0, none sees another."""
        count = len(self.tokens_N)
        spare = -count % FILL  # as one more document, which nobody asks about
        lengths = (*self.lengths, spare) if spare and len(set(self.lengths)) > 1 else self.lengths
        tokens_N = torch.nn.functional.pad(self.tokens_N, (0, sum(lengths) - count))
        documents = [document for example in self.examples for document in example.documents]
        return model.hidden(tokens_N[None], Separate(model.config, lengths), seen(model, documents))[0, :count]


def grouped(examples: Iterable[Example], room: int) -> list[list[Example]]:
    """Examples in order as passes of about `room` predictions, of one example at least; those that predict nothing (one
    token alone) are in none."""
    groups: list[list[Example]] = []
    left = 0
    for example in filter(lambda each: each.predictions, examples):
        if example.predictions > left or not groups:
            groups.append([])
            left = room
        groups[-1].append(example)
        left -= example.predictions
    return groups


@dataclass(frozen=True)
class Loss:
    """Of one pass: the differentiable sum (the loop divides it by the count of the whole step), and sums to report.

    A metric is reported as its sum over the step divided by the step's count.
    """

    sum: Tensor
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Finished:
    """What a method needs to write its result."""

    model: Decoder
    tokenizer: Tokenizer
    generation: GenerationDefaults | None
    base: str  # where others find the base: its path, or its name where it has none here
    extended: bool = False  # the context is not the base's


class Method(Protocol):
    """One way to train, made from the configuration (`methods.METHODS`), whose `options` are its own to check."""

    @property
    def name(self) -> str:
        """What `--method` says."""
        ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """The columns that its losses report."""
        ...

    @property
    def packing(self) -> Packing:
        """How documents fill rows where a source doesn't say."""
        ...

    @property
    def optimizer(self) -> Literal["muon", "adamw"]:
        """Where the configuration doesn't say."""
        ...

    @property
    def rate(self) -> float:
        """AdamW's peak rate where the configuration doesn't say."""
        ...

    def prepare(self, model: Decoder, seed: int) -> None:
        """Choose what trains: set `requires_grad` (all weights come without), add adapters."""
        ...

    def example(self, row: Row, tokenizer: Tokenizer) -> Example:
        """One row as token ids. Raises PunaError that begins with the field's name; the reader adds file and line."""
        ...

    def expand(self, model: Decoder, tokenizer: Tokenizer, examples: list[Example], step: int) -> list[Example]:
        """What the step trains on, of its rows' examples: themselves, or answers generated to them. A pure function of
        weights, examples and step, so that a resumed run sees the same."""
        ...

    def count(self, batch: Batch) -> int:
        """What the step's loss is divided by, summed over its passes: targets that carry loss, or pairs."""
        ...

    def loss(self, model: Decoder, batch: Batch) -> Loss:
        """The pass's loss, with the graph to differentiate."""
        ...

    def save(self, finished: Finished, folder: Path) -> None:
        """Write what the run is for (weights, or an adapter) into an empty folder."""
        ...
