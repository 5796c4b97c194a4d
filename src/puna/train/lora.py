"""Training low-rank updates of a frozen base: LoRA, DoRA, and QLoRA, whose base is in few bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from puna.checkpoint.peft_write import write_adapter
from puna.checkpoint.source import Loaded, Source, load_source, save
from puna.errors import PunaError
from puna.model import Decoder
from puna.model.adapt import TARGETS, Lora, attach, set_dropout, updates
from puna.text.tokenizer import Tokenizer
from puna.train.config import TrainConfig
from puna.train.examples import learnable
from puna.train.loss import linear_cross_entropy
from puna.train.method import Batch, Example, Finished, Loss, Packing, Row

Bits = Literal[4, 8]


class AdapterOptions(BaseModel):
    """`options` of methods that train adapters (docs/tuning.md)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    rank: int = Field(16, gt=0)
    alpha: float = Field(32.0, gt=0)
    rslora: bool = False
    dora: bool = False
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] = ()
    bits: Bits | None = None  # the frozen layers' weights are kept in so many

    @property
    def lora(self) -> Lora:
        """As the model wants them."""
        return Lora(self.rank, self.alpha, self.rslora, self.dora, self.dropout, self.targets)


Options = TypeVar("Options", bound=BaseModel)


def checked_options(kind: type[Options], config: TrainConfig, **defaults: Any) -> Options:
    """A method's options. Raises PunaError that names every wrong field."""
    try:
        return kind.model_validate({**defaults, **config.options})
    except ValidationError as error:
        problems = []
        for found in error.errors():
            name = ".".join(map(str, found["loc"]))
            known = f"no such option; {config.method} has {', '.join(kind.model_fields)}"
            problems.append(f"options.{name}: {known if found['type'] == 'extra_forbidden' else found['msg']}")
        raise PunaError("; ".join(problems)) from None


class Adapters:
    """What methods that train adapters share: attaching, dropout that a resumed run repeats, saving."""

    def __init__(self, options: AdapterOptions, seed: int) -> None:
        unknown = [target for target in options.targets if target not in TARGETS]
        if unknown:
            raise PunaError(f"options.targets: {unknown[0]!r} is not one; choose from {', '.join(TARGETS)}")
        self.lora, self._seed, self._first = options.lora, seed, 0

    def prepare(self, model: Decoder, seed: int) -> None:
        """The base freezes, the updates train."""
        if self.lora.rank > model.config.hidden_size:  # no update has a higher one
            raise PunaError(
                f"options.rank: {self.lora.rank:,} is more than the model's width, {model.config.hidden_size:,}"
            )
        names = attach(model, self.lora, seed)
        if not names:
            raise PunaError(f"options.targets: this model has none of {', '.join(self.lora.targets)}")
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name or name.endswith("magnitude"))

    def begin_step(self, step: int) -> None:
        """A step's passes drop what its number says."""
        self._first = step * 100_000

    def begin_pass(self, model: Decoder, number: int) -> None:
        """A pass of the step, by its number."""
        set_dropout(model, self._seed * 1_000_000_007 + self._first + number)

    def save(self, finished: Finished, folder: Path) -> None:
        """An adapter as PEFT loads it."""
        model = finished.model
        write_adapter(folder, updates(model), self.lora, model.config, finished.base, finished.extended)


class AllWeights:
    """In place of `Adapters`, where everything trains."""

    def prepare(self, model: Decoder, seed: int) -> None:  # noqa: ARG002
        """All weights train."""
        model.requires_grad_(True)

    def begin_step(self, step: int) -> None:
        """Nothing is dropped."""

    def begin_pass(self, model: Decoder, number: int) -> None:
        """Nothing is dropped."""

    def save(self, finished: Finished, folder: Path) -> None:
        """A checkpoint that loads like any other."""
        model = finished.model
        save(model, model.config, finished.tokenizer, folder, generation=finished.generation)


def what_trains(options: AdapterOptions, adapter: bool, seed: int) -> Adapters | AllWeights:
    """Adapters or everything. Raises PunaError for options that contradict each other."""
    if adapter:
        return Adapters(options, seed)
    if given := [name for name in AdapterOptions.model_fields if name in options.model_fields_set]:
        raise PunaError(
            f"options.{given[0]}: is an adapter's, and all weights are to train; take it out, or `adapter: false`"
        )
    return AllWeights()


class LoRATuning:
    """Supervised fine-tuning of low-rank updates: every example whole in a row."""

    name: ClassVar[str] = "lora"
    metrics: ClassVar[tuple[str, ...]] = ()
    packing: ClassVar[Packing] = "whole"
    optimizer: ClassVar[Literal["muon", "adamw"]] = "adamw"
    rate: ClassVar[float] = 2e-4
    fixed: ClassVar[dict[str, Any]] = {}  # options that the method's name says

    def __init__(self, config: TrainConfig) -> None:
        self.options = checked_options(AdapterOptions, config, **self.fixed)
        wrong = [name for name, value in self.fixed.items() if not getattr(self.options, name) and value]
        if wrong:
            raise PunaError(f"options.{wrong[0]}: method {self.name} has it; take it out, or use method lora")
        self.adapters = Adapters(self.options, config.seed)

    def prepare(self, model: Decoder, seed: int) -> None:
        """The updates train."""
        self.adapters.prepare(model, seed)

    def example(self, row: Row, tokenizer: Tokenizer) -> Example:
        """A text or a chat."""
        return learnable(row, tokenizer)

    def expand(
        self, model: Decoder, tokenizer: Tokenizer, examples: list[Example], step: int,  # noqa: ARG002
    ) -> list[Example]:  # fmt: skip
        """The rows as they are."""
        self.adapters.begin_step(step)
        return examples

    def count(self, batch: Batch) -> int:
        """Tokens that carry loss."""
        return batch.counted

    def loss(self, model: Decoder, batch: Batch) -> Loss:
        """Cross-entropy in nats, summed over the tokens that carry loss."""
        self.adapters.begin_pass(model, batch.number)
        return Loss(linear_cross_entropy(batch.states(model), model.head_weight, batch.targets_N, model.vocabulary))

    def save(self, finished: Finished, folder: Path) -> None:
        """An adapter as PEFT loads it."""
        self.adapters.save(finished, folder)


class DoRATuning(LoRATuning):
    """The same, each row of a weight with a learnt length."""

    name: ClassVar[str] = "dora"
    fixed: ClassVar[dict[str, Any]] = {"dora": True}


class QLoRATuning(LoRATuning):
    """The same over a base in four bits."""

    name: ClassVar[str] = "qlora"
    fixed: ClassVar[dict[str, Any]] = {"bits": 4}


def opener(config: TrainConfig) -> Callable[..., Loaded]:
    """How to load the base of a run, as `load_source` takes it: in few bits where the method keeps it so."""
    from puna.checkpoint.frozen import load_frozen

    bits = config.options.get("bits", 4 if config.method == QLoRATuning.name else None)
    if bits not in (4, 8):
        return load_source

    def frozen(
        source: Source, device: str | torch.device, dtype: torch.dtype, model: Decoder | None = None
    ) -> Loaded:
        return load_frozen(source, device, dtype, bits, model)

    return frozen
