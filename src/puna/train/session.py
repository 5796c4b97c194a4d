"""Everything that a run has in memory: model, method, data in order, optimizer, routers."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from puna.model import Decoder
from puna.text.tokenizer import Tokenizer
from puna.train.config import TrainConfig
from puna.train.data import StageData
from puna.train.method import Batch, Example, Method
from puna.train.methods import METHODS
from puna.train.optimizer import Optimizer
from puna.train.routing import Routing


class Order:
    """Which stage a step belongs to, and the examples of its rows."""

    def __init__(
        self, config: TrainConfig, folder: Path, tokenizer: Tokenizer, method: Method, cache: Path | None
    ) -> None:
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
            self.stages.append(
                StageData(stage, needed, folder, tokenizer, method, config.seed + index, config.separate, cache)
            )
            start = end

    def stage(self, step: int) -> int:
        """The number of a step's stage."""
        return max(i for i, start in enumerate(self.starts) if start <= step)

    def examples(self, step: int) -> list[Example]:
        """Of a step, in order."""
        at = self.stage(step)
        rows = self.config.rows_per_step(self.stages[at].stage)
        return self.stages[at].examples((step - self.starts[at]) * rows, rows)

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

    @staticmethod
    def of(model: Decoder, tokenizer: Tokenizer, config: TrainConfig, folder: Path, cache: Path | None) -> "Session":
        """Read the data, choose what trains, make its optimizer. Raises PunaError for bad data or options."""
        method = METHODS[config.method](config)
        order = Order(config, folder, tokenizer, method, cache)
        model.requires_grad_(False)
        method.prepare(model, config.seed)
        chooses = any(".router." in name and p.requires_grad for name, p in model.named_parameters())
        # what nobody can change needs no balance, and its loss would pull at everything below
        routing = Routing(model, config.balancing if chooses else "none", config.balance)
        muon = (config.optimizer or method.optimizer) == "muon"
        optimizer = Optimizer(
            dict(model.named_parameters()),
            muon=muon,
            rate=config.vector_rate if muon else config.rate or method.rate,
            matrix_rate=config.matrix_rate,
            weight_decay=config.weight_decay,
            clip=config.clip,
        )
        return Session(config, model, tokenizer, method, order, optimizer, routing)

    def passes(self, step: int) -> list[Batch]:
        """A step's examples as passes of about `micro_tokens` predictions, of one example at least."""
        examples = self.method.expand(self.model, self.tokenizer, self.order.examples(step), step)
        groups: list[list[Example]] = []
        room = 0
        for example in filter(lambda each: each.predictions, examples):  # one token alone predicts nothing
            if example.predictions > room or not groups:
                groups.append([])
                room = self.config.micro_tokens
            groups[-1].append(example)
            room -= example.predictions
        return [Batch.of(group, self.model.device) for group in groups]

    def state_dict(self) -> dict[str, Tensor]:
        """All that a resumed run needs."""
        return self.optimizer.state_dict() | self.routing.state_dict()

    def load_state_dict(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Take back what `state_dict` gave."""
        self.optimizer.load_state_dict(tensors, steps)
        self.routing.load_state_dict(tensors)
