"""`puna train`: pretraining from a shape, or continued training of a checkpoint."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    base: Annotated[Path, typer.Argument(help="A checkpoint, or a folder with config.json and a tokenizer.")],
    data: Annotated[Path, typer.Option(help="JSON lines or Parquet, a folder of text, or that of --config's files.")],
    out: Annotated[Path | None, typer.Option(help="Output folder: locked during the run, ends with weights.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of the run (docs/training.md).")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Number of steps.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of weights and order.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's last saved step.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; one step is measured.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The plan as JSON.")] = False,
) -> None:
    """Train a model on text or chats.

    Example: puna train my-shape --data articles.jsonl --out runs/first --steps 200
    """
    from puna.cli.ranks import one_error
    from puna.cli.training import plan_or_run, settings

    with one_error():
        read, folder = settings(config, data, None, steps=steps, seed=seed)
        plan_or_run(base, read, folder, out, resume=resume, dry_run=dry_run, as_json=as_json)
