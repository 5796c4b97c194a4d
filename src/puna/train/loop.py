"""The training loop: reads top to bottom."""

import csv
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from puna.errors import PunaError
from puna.model import Decoder
from puna.text.tokenizer import Tokenizer
from puna.train.checkpoint import RunFolder
from puna.train.config import Stage, TrainConfig
from puna.train.data import Counted, StageData, Tokens
from puna.train.evaluate import bits_per_byte, read_texts
from puna.train.loss import IGNORED, RouterWatch, balance_loss, linear_cross_entropy
from puna.train.optimizer import Optimizer


@dataclass(frozen=True)
class Progress:
    """What a step reports: loss in nats per counted token, speed in tokens/s, held-out bits per byte where scored."""

    step: int
    steps: int
    loss: float
    rate: float
    tokens: int
    tokens_per_second: float
    expert_imbalance: float  # busiest expert's share of tokens times the number of experts; 1 is even
    heldout: float | None


class Schedule:
    """Which stage a step belongs to, and its rows."""

    def __init__(self, config: TrainConfig, folder: Path, tokenizer: Tokenizer) -> None:
        total = sum(stage.share for stage in config.stages)
        self.starts: list[int] = []
        self.stages: list[tuple[Stage, StageData]] = []
        start, passed = 0, 0.0
        for index, stage in enumerate(config.stages):
            passed += stage.share
            end = round(config.steps * passed / total)
            needed = (end - start) * self.rows(config, stage)
            self.starts.append(start)
            self.stages.append((stage, StageData(stage, needed, folder, tokenizer, config.seed + index)))
            start = end

    @staticmethod
    def rows(config: TrainConfig, stage: Stage) -> int:
        """Rows of one step."""
        return max(1, config.batch_tokens // stage.length)

    def batch(self, config: TrainConfig, step: int) -> tuple[Stage, Tokens, Counted]:
        """The stage, ids and loss marks of a step."""
        index = max(i for i, start in enumerate(self.starts) if start <= step)
        stage, data = self.stages[index]
        rows = self.rows(config, stage)
        return stage, *data.batch((step - self.starts[index]) * rows, rows)

    def left_out(self) -> Iterator[str]:
        """What the rows could not hold, one sentence a source."""
        for stage, data in self.stages:
            for source, rows in zip(stage.sources, data.sources, strict=True):
                beyond = f"{rows.left_out:,} tokens beyond a row left out"
                yield f"{source.file}: {len(rows):,} rows of {stage.length}; {beyond}"


def run(
    model: Decoder,
    tokenizer: Tokenizer,
    config: TrainConfig,
    data_folder: Path,
    folder: RunFolder,
    report: Callable[[Progress], None],
    note: Callable[[str], None],
) -> None:
    """Train `model` in place for `config.steps` steps, continuing the folder's saved state if it has one.

    Raises PunaError for bad data before the first step, and where the loss stops being finite.
    """
    schedule = Schedule(config, data_folder, tokenizer)
    heldout = read_texts(data_folder / config.heldout) if config.heldout else []
    for sentence in schedule.left_out():
        note(sentence)
    optimizer = Optimizer(
        model, matrix_rate=config.matrix_rate, vector_rate=config.vector_rate, weight_decay=config.weight_decay
    )
    watch = RouterWatch(model)
    first, tokens = 0, 0
    if saved := folder.load():
        if _shapes(saved[0]) != _shapes(optimizer.state_dict()):
            raise PunaError(f"{folder.path}: the saved state is of a model of another shape; resume with the same base")
        if saved[1].get("order", config.order()) != config.order():
            raise PunaError(
                f"{folder.path}: the saved state was made with other seed, batch_tokens, stages or steps, which decide "
                "the order of the data; resume with the same, or begin in another folder"
            )
        optimizer.load_state_dict(saved[0], steps=saved[1]["step"])
        first, tokens = saved[1]["step"], saved[1]["tokens"]
    if folder.resume or saved:
        note(f"resumed at step {first}" + ("" if saved else ": nothing is saved in the folder yet"))
    else:
        note("started at step 0")
    folder.cut_metrics(first)
    model.train()
    with (folder.path / "metrics.csv").open("a", newline="") as file:
        metrics = csv.writer(file)
        if not first:
            metrics.writerow(["step", "loss", "rate", "tokens", "tokens_per_second", "expert_imbalance", "heldout_bpb"])
        for step in range(first, config.steps):
            begun = time.perf_counter()
            stage, ids, counted = schedule.batch(config, step)
            loss, imbalance = _accumulate(model, watch, config, stage, ids, counted)
            if not loss == loss or loss == float("inf"):
                raise PunaError(f"step {step}: the loss is {loss}; lower matrix_rate and vector_rate and begin again")
            rate = config.rate(step, config.steps)
            optimizer.step(rate)
            tokens += ids.shape[0] * stage.length
            speed = ids.shape[0] * stage.length / (time.perf_counter() - begun)
            done = step + 1
            score = None
            if heldout and (done % config.evaluate_every == 0 or done == config.steps):
                model.eval()
                score = bits_per_byte(model, tokenizer, heldout)[0]
                watch.take()
                model.train()
            progress = Progress(done, config.steps, loss, rate, tokens, speed, imbalance, score)
            report(progress)
            row = [done, f"{loss:.5f}", f"{rate:.5f}", tokens, f"{speed:.0f}", f"{imbalance:.3f}", score or ""]
            metrics.writerow(row)
            if done % config.save_every == 0 or done == config.steps:
                file.flush()
                folder.save(optimizer.state_dict(), {"step": done, "tokens": tokens, "order": config.order()})


def _shapes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _accumulate(
    model: Decoder, watch: RouterWatch, config: TrainConfig, stage: Stage, ids: Tokens, counted: Counted
) -> tuple[float, float]:
    """Gradients of one step: the mean loss over ALL its counted tokens, however it is split into micro-batches."""
    tokens = torch.from_numpy(ids.astype("int64"))
    targets = tokens[:, 1:].where(torch.from_numpy(counted[:, 1:]), IGNORED)
    total = max(1, int((targets != IGNORED).sum()))
    rows = max(1, config.micro_tokens // stage.length)
    loss_sum, worst = 0.0, 0.0
    for start in range(0, len(tokens), rows):
        part = tokens[start : start + rows].to(model.device)
        states = model.hidden(part[:, :-1])
        wanted = targets[start : start + rows].flatten().to(model.device)
        loss = linear_cross_entropy(states.flatten(0, 1), model.head_weight, wanted)
        loss_sum += loss.item()
        routed = watch.take()
        objective = loss / total
        if routed:
            share = len(part) / len(tokens)
            top_k = model.config.num_experts_per_token
            balance = torch.stack([balance_loss(logits, top_k) for logits in routed]).mean()
            objective = objective + config.balance * share * balance
            worst = max(worst, *(_imbalance(logits) for logits in routed))
        objective.backward()
    return loss_sum / total, worst


def _imbalance(logits: torch.Tensor) -> float:
    counts = logits.argmax(-1).bincount(minlength=logits.shape[-1])
    return float(counts.max() * logits.shape[-1] / counts.sum())
