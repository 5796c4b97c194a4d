"""The training loop, the same for every method: reads top to bottom."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from puna.errors import PunaError
from puna.model import Decoder
from puna.model.ranks import Ranks
from puna.text.tokenizer import Tokenizer
from puna.train.checkpoint import RunFolder
from puna.train.method import Batch
from puna.train.pieces import SavedTensors
from puna.train.roof import matrix_roof, operations
from puna.train.session import Session
from puna.train.watching import Metrics


@dataclass(frozen=True)
class Progress:
    """What a step reports: loss in nats per counted token (or pair), speed in tokens/s, share of the matrix roof."""

    step: int
    steps: int
    loss: float
    norm: float  # of the gradient before clipping
    rate: float  # multiplier of the peak rates
    tokens: int  # predictions so far
    tokens_per_second: float
    roof: float  # floating-point operations a second as a share of what this device's matrix product reaches alone
    imbalance: Mapping[int, float]  # of each layer with experts: the busiest one's load, 1 is even
    idle: Mapping[int, int]  # of each layer with experts: how many served no token
    metrics: Mapping[str, float] = field(default_factory=dict)  # the method's, per counted token (or pair)
    scores: Mapping[str, float] = field(default_factory=dict)  # of evaluations, where this step had them

    @property
    def worst_imbalance(self) -> float:
        """Over all layers; 0 without experts."""
        return max(self.imbalance.values(), default=0.0)


@dataclass(frozen=True)
class Evaluation:
    """Something to score in the loop: handed in from above. `score` leaves the model as it is."""

    names: tuple[str, ...]
    score: Callable[[Decoder, Tokenizer], Mapping[str, float]]


def run(
    session: Session,
    folder: RunFolder,
    evaluations: Sequence[Evaluation],
    report: Callable[[Progress], None],
    note: Callable[[str], None],
) -> int:
    """Train the session's model in place for all its steps, continuing the folder's saved state if it has one; gives
    the predictions of the whole run.

    Raises PunaError where a saved state doesn't fit, and where the loss stops being finite.
    """
    config, model = session.config, session.model
    first, tokens = _resume(session, folder, note)
    order = session.identity()
    roof = matrix_roof(model.device, getattr(torch, config.dtype)) * session.processes.size
    every = [name for evaluation in evaluations for name in evaluation.names]
    model.train()
    table = (
        Metrics(folder.path, first, session.method.metrics, every, bool(session.routing.mixtures))
        if session.processes.first
        else nullcontext()
    )
    with table as metrics:
        for step in range(first, config.steps):
            begun = time.perf_counter()
            passes = session.passes(step)
            rate = config.schedule(step)
            loss, sums = gradients(session, passes, rate)
            if not math.isfinite(loss):
                raise PunaError(f"step {step}: the loss is {loss}; lower the rates and begin again")
            norm = session.optimizer.step(rate)
            session.routing.end()
            seconds = time.perf_counter() - begun
            predictions = sum(sum(each.lengths) for each in passes)
            tokens += predictions
            done = step + 1
            scores: dict[str, float] = {}
            if done % config.evaluate_every == 0 or done == config.steps:
                model.eval()
                for evaluation in evaluations:
                    scores |= evaluation.score(model, session.tokenizer)
                model.train()
            share = operations(session, passes) / seconds / roof
            progress = Progress(
                done, config.steps, loss, norm, rate, tokens, predictions / seconds, share,
                session.routing.imbalance(), session.routing.idle(), sums, scores,
            )  # fmt: skip
            report(progress)
            if metrics:
                metrics.write(progress)
            if done % config.save_every == 0 or done == config.steps:
                if metrics:
                    metrics.flush()
                facts = {"step": done, "tokens": tokens, "order": order}
                folder.save(session.state_dict(), facts, session.pieces())
    return tokens


def gradients(session: Session, passes: Sequence[Batch], rate: float) -> tuple[float, dict[str, float]]:
    """Gather one step's gradients: of the mean loss over ALL that its passes count, however they split it. Gives that
    mean, and the method's metrics likewise."""
    method, routing = session.method, session.routing
    total = max(1, sum(method.count(batch) for batch in passes))
    predictions = max(1, sum(sum(batch.lengths) for batch in passes))
    own = dealt(passes, session.processes.data)
    session.optimizer.passes = len(own)
    routing.begin(rate)
    sums = dict.fromkeys(("loss", *method.metrics), 0.0)
    for batch, counts in own:
        routing.open(sum(batch.lengths))
        with recomputing(session.model, session.config.recompute):
            loss = method.loss(session.model, batch)
            objective, balance = loss.sum / total, routing.close(counts)
            if balance is not None:
                objective = objective + balance * (sum(batch.lengths) / predictions)
            if counts:
                sums["loss"] += loss.sum.item()
                for name, value in loss.metrics.items():
                    sums[name] += value
            (objective if counts else objective * 0).backward()
    routing.add_up(session.processes.sums)
    everyones = session.processes.sums(torch.tensor(list(sums.values()), dtype=torch.float64)).tolist()
    means = {name: value / total for name, value in zip(sums, everyones, strict=True)}
    return means.pop("loss"), means


def dealt(passes: Sequence[Batch], data: Ranks) -> list[tuple[Batch, bool]]:
    """The passes of one of the data groups, and whether each counts: one that has fewer than another goes through the
    last again, uncounted, since weights are gathered from all and gradients summed over all in every pass."""
    rounds = -(-len(passes) // data.size)
    places = [at * data.size + data.rank for at in range(rounds)]
    return [(passes[min(place, len(passes) - 1)], place < len(passes)) for place in places]


class recomputing:
    """Where `on`, blocks keep only their inputs and compute again in the backward pass."""

    def __init__(self, model: Decoder, on: bool) -> None:
        self.blocks: list[nn.Module] = list(model.layers) if on else []

    def __enter__(self) -> None:
        from torch.utils.checkpoint import checkpoint

        def again(block: nn.Module) -> Callable[..., torch.Tensor]:
            forward = block.forward
            return lambda *inputs: checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)

        for block in self.blocks:
            block.forward = again(block)

    def __exit__(self, *_: object) -> None:
        for block in self.blocks:
            del block.forward  # the class's own again


def _resume(session: Session, folder: RunFolder, note: Callable[[str], None]) -> tuple[int, int]:
    """The step to begin at and the tokens seen until there."""
    with session.processes.together():
        saved = folder.load()
        if saved:
            _take_back(session, folder, *saved)
    first, tokens = (saved[1]["step"], saved[1]["tokens"]) if saved else (0, 0)
    if folder.resume or saved:
        note(f"resumed at step {first}" + ("" if saved else ": nothing is saved in the folder yet"))
    else:
        note("started at step 0")
    return first, tokens


def _take_back(session: Session, folder: RunFolder, tensors: SavedTensors, facts: Mapping[str, Any]) -> None:
    """Make the saved state the session's. Raises PunaError where it isn't of such a session."""
    order = session.identity()
    if changed := [name for name, value in order.items() if facts["order"].get(name, value) != value]:
        raise PunaError(
            f"{folder.path}: the saved state was made with other {', '.join(changed)}; resume with the same, or "
            "begin in another folder"
        )
    pieces = session.pieces()
    if tensors.shapes != {name: piece.shape for name, piece in pieces.items()}:
        raise PunaError(f"{folder.path}: the saved state is of a model of another shape; resume with the same base")
    session.load_state_dict(tensors.parts(pieces), facts["step"])
