"""`puna train`: pretraining from a shape, or continued training of a checkpoint."""

from pathlib import Path
from typing import Annotated, Any

import typer


def train(
    base: Annotated[Path, typer.Argument(help="A checkpoint, or a folder with config.json and a tokenizer.")],
    data: Annotated[Path, typer.Option(help="JSON lines of `text` or `messages`, or the folder of --config's files.")],
    out: Annotated[Path, typer.Option(help="Output folder: locked during the run, ends with safetensors and a card.")],
    config: Annotated[Path | None, typer.Option(help="YAML file of the run (docs/training.md).")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Number of steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and order.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's last saved step.")] = False,
) -> None:
    """Train a model on text or chats.

    Example: puna train my-shape --data articles.jsonl --out runs/first --steps 200
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from puna.errors import PunaError
    from puna.train.config import checked_config, read_config
    from puna.train.loop import Progress as Step
    from puna.train.pretrain import pretrain

    console = Console()
    stage: dict[str, Any] = {"sources": [{"file": data.name}]}
    if config is not None:
        settings = read_config(config, {} if data.is_dir() else {"stages": [stage]}, steps=steps, seed=seed)
        files = {source.file for each in settings.stages for source in each.sources}
        if not data.is_dir() and files != {data.name}:
            raise PunaError(f"--data is one file, but {config} names {', '.join(sorted(files))}: give their folder")
    elif data.is_dir():
        raise PunaError(f"{data} is a folder: --config must say which of its files to train on")
    else:
        steps = steps or 100
        given = {"stages": [stage], "steps": steps, "seed": seed or 0, "save_every": min(200, max(1, steps // 10))}
        settings = checked_config(given, "options")
    counter = TextColumn("{task.completed}/{task.total}")

    def note(sentence: str) -> None:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    columns = (TextColumn("{task.description}"), BarColumn(), counter, TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=settings.steps)

        def show(step: Step) -> None:
            speed, loss = f"{step.tokens_per_second:,.0f} tokens/s", f"loss {step.loss:.4f}"
            bar.update(task, completed=step.step, description=f"{loss}, {speed}")
            score = "" if step.heldout is None else f", held-out {step.heldout:.4f} bits per byte"
            if score or (step.step % settings.save_every == 0 and not console.is_terminal):  # a log file has no bar
                note(f"step {step.step}: {loss}, {speed}{score}")

        folder = data if data.is_dir() else data.parent
        pretrain(base, settings, folder, out, resume=resume, report=show, note=note)
    note(f"written to {out}")
