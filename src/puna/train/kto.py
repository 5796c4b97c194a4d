"""KTO (arXiv 2402.01306): single answers that are good or bad, in place of pairs. TRL's formulas
(`trl/trainer/kto_trainer.py`), with the whole step as the batch that the distance to the base is estimated on.

Legend: B rows of a pass.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from puna.model import Decoder
from puna.text.tokenizer import Tokenizer
from puna.train.config import TrainConfig
from puna.train.examples import completion_example
from puna.train.lora import AdapterOptions, checked_options, what_trains
from puna.train.method import Batch, Example, Finished, Loss, Packing, Row, grouped
from puna.train.processes import Processes
from puna.train.reference import Reference, answers


class KTOOptions(AdapterOptions):
    """`options` of kto (docs/tuning.md)."""

    beta: float = Field(0.1, gt=0)
    desirable: float = Field(1.0, ge=0)  # the weight of good answers' losses, the paper's lambda_D
    undesirable: float = Field(1.0, ge=0)  # of bad ones', lambda_U
    adapter: bool = True  # False trains all weights


def kto_losses(
    gains_B: Tensor, good_B: Tensor, distance: float, beta: float, desirable: float, undesirable: float
) -> Tensor:
    """Each row's loss [B]: its weight times 1 - sigmoid(beta (gain - distance)), the other way round for bad answers.
    gain: how much more likely the policy finds the answer than the base does, in nats."""
    signs = torch.where(good_B, 1.0, -1.0)
    weights = torch.where(good_B, desirable, undesirable)
    return weights * (1 - torch.sigmoid(beta * signs * (gains_B - distance)))


def mismatched(examples: Sequence[Example]) -> list[Example]:
    """Each example's prompt with the completion of the one before it, the first's with the last's."""
    found = []
    for example, before in zip(examples, [examples[-1], *examples[:-1]], strict=True):
        (own,), (other,) = example.documents, before.documents
        prompt, rest = int(own.counted.argmax()), int(other.counted.argmax())
        tokens = np.concatenate((own.tokens[:prompt], other.tokens[rest:]))
        counted = np.concatenate((own.counted[:prompt], other.counted[rest:]))
        found.append(Example((replace(own, tokens=tokens, counted=counted),)))
    return found


class KTO:
    """From answers that are labelled good or bad. The distance between policy and base is estimated once a step, before
    it, from mismatched prompts and completions of all its rows; so it doesn't depend on how passes split them. A row
    that is alone in its step has nothing to be paired with: it takes the distance 0."""

    name: ClassVar[str] = "kto"
    metrics: ClassVar[tuple[str, ...]] = ("margin", "accuracy", "kl")
    packing: ClassVar[Packing] = "whole"
    optimizer: ClassVar[Literal["muon", "adamw"]] = "adamw"

    def __init__(self, config: TrainConfig) -> None:
        self.options = options = checked_options(KTOOptions, config)
        self.rate = 5e-5 if options.adapter else 5e-7
        self.trains = what_trains(options, options.adapter, config.seed)
        self._room = config.micro_tokens
        self._reference = Reference()

    def prepare(self, model: Decoder, seed: int) -> None:
        """Adapters, or all weights with a frozen copy as the reference."""
        if not self.options.adapter:
            self._reference.keep(model)
        self.trains.prepare(model, seed)

    def join(self, processes: Processes) -> None:
        """See `Reference.join`."""
        self._reference.join(processes)

    def example(self, row: Row, tokenizer: Tokenizer) -> Example:
        """`prompt`, `completion` and `label`."""
        return completion_example(row, tokenizer)

    def expand(
        self, model: Decoder, tokenizer: Tokenizer, examples: list[Example], step: int,  # noqa: ARG002
    ) -> list[Example]:  # fmt: skip
        """The rows, each with the step's distance and its base's log-probability."""
        self.trains.begin_step(step)
        distance = self._distance(model, mismatched(examples)) if len(examples) > 1 else 0.0
        base = self._reference.logprobs(model, examples).tolist()
        return [replace(example, extra={**example.extra, "distance": distance, "base": one})
                for example, one in zip(examples, base, strict=True)]  # fmt: skip

    def _distance(self, model: Decoder, others: list[Example]) -> float:
        """How much likelier than the base the policy finds mismatched completions, in nats; 0 at least."""
        policy = []
        for number, group in enumerate(grouped(others, self._room)):
            self.trains.begin_pass(model, number)
            with torch.no_grad():
                policy.append(answers(model, Batch.of(group, model.device, number))[0])
        return max(0.0, float((torch.cat(policy) - self._reference.logprobs(model, others)).mean()))

    def count(self, batch: Batch) -> int:
        """Rows."""
        return len(batch.examples)

    def loss(self, model: Decoder, batch: Batch) -> Loss:
        """Summed over rows."""
        self.trains.begin_pass(model, batch.number)
        policy_B, _ = answers(model, batch)
        base, good, distances = ([one.extra[name] for one in batch.examples] for name in ("base", "label", "distance"))
        good_B = torch.tensor(good, device=policy_B.device)
        gains_B = policy_B - torch.tensor(base, device=policy_B.device)
        options, distance = self.options, distances[0]
        losses_B = kto_losses(gains_B, good_B, distance, options.beta, options.desirable, options.undesirable)
        margins_B = (torch.where(good_B, 1.0, -1.0) * (gains_B - distance)).detach()
        return Loss(losses_B.sum(), {"margin": float(margins_B.sum()) * options.beta,
                                     "accuracy": float((margins_B > 0).sum()),
                                     "kl": math.fsum(distances)})  # fmt: skip

    def save(self, finished: Finished, folder: Path) -> None:
        """An adapter, or weights."""
        self.trains.save(finished, folder)
