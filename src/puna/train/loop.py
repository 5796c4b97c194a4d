"""The training loop, the same for every method: reads top to bottom."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from puna.errors import PunaError
from puna.model import Decoder
from puna.text.tokenizer import Tokenizer
from puna.train.checkpoint import RunFolder
from puna.train.method import Batch
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
    roof = matrix_roof(model)
    every = [name for evaluation in evaluations for name in evaluation.names]
    model.train()
    with Metrics(folder.path, first, session.method.metrics, every, bool(session.routing.mixtures)) as metrics:
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
            metrics.write(progress)
            if done % config.save_every == 0 or done == config.steps:
                metrics.flush()
                folder.save(session.state_dict(), {"step": done, "tokens": tokens, "order": config.order()})
    return tokens


def gradients(session: Session, passes: Sequence[Batch], rate: float) -> tuple[float, dict[str, float]]:
    """Gather one step's gradients: of the mean loss over ALL that its passes count, however they split it. Gives that
    mean, and the method's metrics likewise."""
    method, routing = session.method, session.routing
    total = max(1, sum(method.count(batch) for batch in passes))
    predictions = max(1, sum(sum(batch.lengths) for batch in passes))
    session.optimizer.passes = len(passes)
    routing.begin(rate)
    loss_sum, sums = 0.0, dict.fromkeys(method.metrics, 0.0)
    for batch in passes:
        routing.open(sum(batch.lengths))
        with recomputing(session.model, session.config.recompute):
            loss = method.loss(session.model, batch)
            objective, balance = loss.sum / total, routing.close()
            if balance is not None:
                objective = objective + balance * (sum(batch.lengths) / predictions)
            loss_sum += loss.sum.item()
            for name, value in loss.metrics.items():
                sums[name] += value
            objective.backward()
    return loss_sum / total, {name: value / total for name, value in sums.items()}


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
    saved = folder.load()
    if saved:
        tensors, facts = saved
        here = session.state_dict()
        if {name: t.shape for name, t in tensors.items()} != {name: t.shape for name, t in here.items()}:
            raise PunaError(f"{folder.path}: the saved state is of a model of another shape; resume with the same base")
        order = session.config.order()
        if changed := [name for name, value in order.items() if facts["order"].get(name, value) != value]:
            raise PunaError(
                f"{folder.path}: the saved state was made with other {', '.join(changed)}; resume with the same, or "
                "begin in another folder"
            )
        session.load_state_dict(tensors, facts["step"])
        first, tokens = facts["step"], facts["tokens"]
    else:
        first = tokens = 0
    if folder.resume or saved:
        note(f"resumed at step {first}" + ("" if saved else ": nothing is saved in the folder yet"))
    else:
        note("started at step 0")
    return first, tokens
