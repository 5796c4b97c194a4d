"""The methods by name, and the two that train all weights on next tokens."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar, Literal

from puna.checkpoint.source import save
from puna.errors import PunaError
from puna.model import Decoder
from puna.text.tokenizer import Tokenizer
from puna.train.config import TrainConfig
from puna.train.dpo import DPO
from puna.train.examples import learnable
from puna.train.grpo import GRPO
from puna.train.kto import KTO
from puna.train.lora import DoRATuning, LoRATuning, QLoRATuning
from puna.train.loss import linear_cross_entropy
from puna.train.method import Batch, Example, Finished, Loss, Method, Packing, Row


class Pretrain:
    """All weights, on every token of texts and on what the assistant says in chats; documents in one stream."""

    name: ClassVar[str] = "pretrain"
    metrics: ClassVar[tuple[str, ...]] = ()
    packing: ClassVar[Packing] = "stream"
    optimizer: ClassVar[Literal["muon", "adamw"]] = "muon"
    rate: ClassVar[float] = 1e-3

    def __init__(self, config: TrainConfig) -> None:
        if config.options:
            raise PunaError(f"options: {self.name} has none, but the configuration gives {', '.join(config.options)}")

    def prepare(self, model: Decoder, seed: int) -> None:  # noqa: ARG002 - others draw their first values
        """Everything trains."""
        model.requires_grad_(True)

    def example(self, row: Row, tokenizer: Tokenizer) -> Example:
        """A text or a chat."""
        return learnable(row, tokenizer)

    def expand(
        self, model: Decoder, tokenizer: Tokenizer, examples: list[Example], step: int,  # noqa: ARG002
    ) -> list[Example]:  # fmt: skip
        """The rows as they are."""
        return examples

    def count(self, batch: Batch) -> int:
        """Tokens that carry loss."""
        return batch.counted

    def loss(self, model: Decoder, batch: Batch) -> Loss:
        """Cross-entropy in nats, summed over the tokens that carry loss."""
        return Loss(linear_cross_entropy(batch.states(model), model.head_weight, batch.targets_N, model.vocabulary))

    def save(self, finished: Finished, folder: Path) -> None:
        """A checkpoint that loads like any other."""
        model = finished.model
        save(model, model.config, finished.tokenizer, folder, generation=finished.generation)


class Full(Pretrain):
    """Supervised fine-tuning of all weights: every example whole in a row."""

    name: ClassVar[str] = "full"
    packing: ClassVar[Packing] = "whole"
    optimizer: ClassVar[Literal["muon", "adamw"]] = "adamw"
    rate: ClassVar[float] = 2e-5


METHODS: Mapping[str, Callable[[TrainConfig], Method]] = {
    "pretrain": Pretrain,
    "full": Full,
    "lora": LoRATuning,
    "dora": DoRATuning,
    "qlora": QLoRATuning,
    "dpo": DPO,
    "kto": KTO,
    "grpo": GRPO,
}
