"""Everything that a run has in memory: model, method, data in order, optimizer, routers."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from puna.errors import PunaError
from puna.family.config import ModelConfig
from puna.model import Decoder
from puna.text.pictures import Vision
from puna.text.tokenizer import Tokenizer
from puna.train.config import TrainConfig
from puna.train.data import StageData
from puna.train.dpo import DPO
from puna.train.kto import KTO
from puna.train.method import Batch, Example, Method, grouped
from puna.train.methods import METHODS
from puna.train.optimizer import Optimizer
from puna.train.pieces import Piece
from puna.train.processes import Processes
from puna.train.routing import Routing
from puna.train.sharded import ShardedOptimizer, deal
from puna.train.slices import Slices

ALONE = ("grpo",)  # methods that one process runs


class Order:
    """Which stage a step belongs to, and the examples of its rows."""

    def __init__(
        self, config: TrainConfig, folder: Path, tokenizer: Tokenizer, method: Method, cache: Path | None,
        vision: Vision | None = None,
    ) -> None:  # fmt: skip
        total = sum(stage.share for stage in config.stages)
        self.config = config
        self.starts: list[int] = []
        self.stages: list[StageData] = []
        start, passed = 0, 0.0
        for index, stage in enumerate(config.stages):
            passed += stage.share
            end = round(config.steps * passed / total)
            needed = (end - start) * config.rows_per_step(stage)
            self.starts.append(start)
            seed, separate = config.seed + index, config.separate
            self.stages.append(StageData(stage, needed, folder, tokenizer, method, seed, separate, cache, vision))
            start = end

    def stage(self, step: int) -> int:
        """The number of a step's stage."""
        return max(i for i, start in enumerate(self.starts) if start <= step)

    def examples(self, step: int) -> list[Example]:
        """Of a step, in order."""
        at = self.stage(step)
        rows = self.config.rows_per_step(self.stages[at].stage)
        return self.stages[at].examples((step - self.starts[at]) * rows, rows)

    @property
    def fingerprint(self) -> str:
        """A hash of all that the sources say, as token ids."""
        return hashlib.sha256(
            "".join(rows.source.fingerprint for data in self.stages for rows in data.sources).encode()
        ).hexdigest()

    def notes(self) -> Iterator[str]:
        """What became of each source."""
        for data in self.stages:
            yield from data.notes()


@dataclass(frozen=True)
class Session:
    """A run in memory."""

    config: TrainConfig
    model: Decoder
    tokenizer: Tokenizer
    method: Method
    order: Order
    optimizer: Optimizer
    routing: Routing
    processes: Processes = field(default_factory=Processes.alone)
    base: str = ""  # a hash of the base's files

    @staticmethod
    def of(
        model: Decoder,
        tokenizer: Tokenizer,
        config: TrainConfig,
        folder: Path,
        cache: Path | None,
        processes: Processes | None = None,
    ) -> "Session":
        """Read the data, choose what trains, make its optimizer. Raises PunaError for bad data or options."""
        processes = processes or Processes.alone()
        with processes.together():
            method = METHODS[config.method](config)
            if processes.size > 1 and config.method in ALONE:
                raise PunaError(f"method: {config.method} generates in one process; start it without torchrun")
            vision = model.config.vision if processes.size == 1 else None
            order = Order(config, folder, tokenizer, method, cache, vision) if processes.first else None
        with processes.together():  # the others read what the first has tokenised
            order = order or Order(config, folder, tokenizer, method, cache)
            model.requires_grad_(False)
            method.prepare(model, config.seed)
            if model.vision is not None:
                model.vision.requires_grad_(False)  # it sees as it did
            if processes.share is not None:
                Slices(processes.share).draw(model, config.seed)
        chooses = any(".router." in name and p.requires_grad for name, p in model.named_parameters())
        # what nobody can change needs no balance, and its loss would pull at everything below
        routing = Routing(model, config.balancing if chooses else "none", config.balance)
        muon = (config.optimizer or method.optimizer) == "muon"
        options: dict[str, Any] = {
            "muon": muon, "rate": config.vector_rate if muon else config.rate or method.rate,
            "matrix_rate": config.matrix_rate, "weight_decay": config.weight_decay, "clip": config.clip,
        }  # fmt: skip
        optimizer = _optimizer(model, method, processes, options)
        return Session(config, model, tokenizer, method, order, optimizer, routing, processes)

    @property
    def shape(self) -> ModelConfig:
        """The whole model's."""
        share = self.processes.share
        return self.model.config if share is None else share.sharding.config

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that it goes on with."""
        return {**self.config.order(), "data": self.order.fingerprint, "base": self.base}

    @property
    def trained(self) -> int:
        """How many parameters train, of the whole model."""
        return sum(prod(piece.shape) for piece in self.optimizer.pieces().values())

    def passes(self, step: int) -> list[Batch]:
        """A step's examples as passes of about `micro_tokens` predictions, of one example at least."""
        examples = self.method.expand(self.model, self.tokenizer, self.order.examples(step), step)
        groups = grouped(examples, self.config.micro_tokens)
        return [Batch.of(group, self.model.device, number) for number, group in enumerate(groups)]

    def state_dict(self) -> dict[str, Tensor]:
        """All that a resumed run needs."""
        return self.optimizer.state_dict() | self.routing.state_dict()

    def pieces(self) -> dict[str, Piece]:
        """Which part of each whole tensor `state_dict` holds."""
        kinds = {name: ("master", *(kind for kind in kinds if kind != "low"))
                 for name, kinds in self.optimizer.state.items()}  # fmt: skip
        own = {f"{name}/{kind}": piece for name, piece in self.optimizer.pieces().items() for kind in kinds[name]}
        return own | {name: Piece.whole(tensor.shape) for name, tensor in self.routing.state_dict().items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Take back what `state_dict` gave."""
        self.optimizer.load_state_dict(tensors, steps)
        self.routing.load_state_dict(tensors)


def _optimizer(model: Decoder, method: Method, processes: Processes, options: dict[str, Any]) -> Optimizer:
    """Of one process, or of its part of a model that is now dealt to all of them."""
    if processes.size == 1:
        return Optimizer(dict(model.named_parameters()), **options)
    pieces = deal(model, processes)
    if isinstance(method, DPO | KTO):
        method.join(processes)
    parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
    return ShardedOptimizer(parameters, pieces, processes, **options)
