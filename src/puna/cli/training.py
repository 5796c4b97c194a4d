"""What `puna train` and its kin share: options to a configuration, a run's progress, the plan's table."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from puna.cli.list_models import short_bytes
from puna.cli.ranks import one_of_many, prints
from puna.errors import PunaError

if TYPE_CHECKING:
    from puna.train.config import TrainConfig
    from puna.train.loop import Progress as Step
    from puna.train.plan import Plan


def settings(config: Path | None, data: Path, method: str | None, preset: Mapping[str, Any] = MappingProxyType({}),
             **given: Any) -> "tuple[TrainConfig, Path]":  # fmt: skip
    """The configuration of a file and of options (those that are None say nothing), and the folder of its data.
    `preset`: what a command sets where there is no file, a stage's `length` among it.

    `data` is one file, a folder of text files (without a configuration), or the folder of the configuration's files.
    """
    # Before PyTorch is imported: its threads shall sleep soon, not spin, while they wait for each other. Beside another
    # program a step took 7 to 23 s with two threads, as against 1.4; alone it is no slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    from puna.train.config import checked_config, read_config

    if data.name in ("", ".."):  # "." and "/.." have no name
        data = data.resolve()
    rest = dict(preset)
    stage = {"length": rest.pop("length")} if "length" in rest else {}
    alone: dict[str, Any] = {"stages": [{"sources": [{"file": data.name}], **stage}]}
    named = {"method": method} if method else {}
    changes = {name: value for name, value in given.items() if value is not None}
    if config is None:
        steps = changes.setdefault("steps", 100)
        changes.setdefault("save_every", min(200, max(1, steps // 10)))
        return checked_config({**alone, **rest, **named, **changes}, "options"), data.parent
    inside = data.is_dir()
    defaults = {} if inside else alone
    read = read_config(config, {**defaults, **rest, **named}, **changes)
    if method and read.method != method:
        raise PunaError(f"{config} says method: {read.method}, the command {method}; give one of them")
    files = {source.file for stage in read.stages for source in stage.sources}
    if not inside and files != {data.name}:
        raise PunaError(f"--data is one file, but {config} names {', '.join(sorted(files))}: give their folder")
    return read, data if inside else data.parent


def plan_or_run(base: Path, config: "TrainConfig", folder: Path, out: Path | None, *, resume: bool, dry_run: bool,
                as_json: bool) -> None:  # fmt: skip
    """What a training command does with its configuration: the plan of a dry run, or the run."""
    if dry_run:
        show_plan(base, config, folder, as_json)
    elif out is None:
        raise typer.BadParameter("a run needs a folder to write to (--dry-run none)", param_hint="--out")
    else:
        run_training(base, config, folder, out, resume)


def run_training(base: Path, config: "TrainConfig", folder: Path, out: Path, resume: bool) -> None:
    """Train, with a bar on a terminal and a line a save in a log."""
    from puna.train.run import train

    console = Console(quiet=not prints())

    def note(sentence: str) -> None:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(bar_width=20),
        TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("preparing", total=config.steps)

        def show(step: "Step") -> None:
            words = _words(step)
            bar.update(task, completed=step.step, description=words)
            scores = "".join(f", {name} {value:.4f}" for name, value in step.scores.items())
            if scores or (step.step % config.save_every == 0 and not console.is_terminal):  # a log file has no bar
                note(f"step {step.step}: {words}{scores}")

        train(base, config, folder, out, resume=resume, report=show, note=note)
    note(f"written to {out}")


def _words(step: "Step") -> str:
    parts = [f"loss {step.loss:.4f}", *(f"{name} {value:.4f}" for name, value in step.metrics.items())]
    parts.append(f"{step.tokens_per_second:,.0f} tokens/s, {step.roof:.0%} of the matrix roof")
    if step.imbalance:
        parts.append(f"busiest expert {step.worst_imbalance:.1f}x, {max(step.idle.values())} idle")
    return ", ".join(parts)


def show_plan(base: Path, config: "TrainConfig", folder: Path, as_json: bool) -> None:
    """Print what the run would train, need and take; one step is measured, nothing is written."""
    from puna.train.run import plan

    console = Console(quiet=not prints())
    quiet = (lambda _: None) if as_json else lambda said: console.print(said, markup=False, soft_wrap=True)
    found = plan(base, config, folder, quiet)
    if as_json:
        console.print_json(json.dumps(found.as_dict()))
        return
    _print_parameters(console, found)
    memory = found.memory
    parts = {name: short_bytes(getattr(memory, name)) for name in memory.__dataclass_fields__}
    of = " of each process" if one_of_many() else ""
    lines = (
        f"method: {found.method}; optimizer: " + ", ".join(f"{who} {n:,}" for who, n in found.optimizers.items()),
        f"memory{of}: {short_bytes(memory.total)} at most, {short_bytes(found.available)} are free: "
        + ", ".join(f"{name} {size}" for name, size in parts.items()),
        f"tokens: {found.tokens:,} in {found.steps:,} steps; the first has {found.counted:,} that carry loss, in "
        f"{found.passes} passes",
        f"time: about {_duration(found.seconds)}; {found.basis}",
    )
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _print_parameters(console: Console, found: "Plan") -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("Parameters", "trained", "frozen"):
        table.add_column(title, justify="left" if title == "Parameters" else "right")
    for kind in dict.fromkeys((*found.trainable, *found.frozen)):
        table.add_row(kind, f"{found.trainable.get(kind, 0):,}", f"{found.frozen.get(kind, 0):,}")
    table.add_row("all", f"{sum(found.trainable.values()):,}", f"{sum(found.frozen.values()):,}")
    console.print(table)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
