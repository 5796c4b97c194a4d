"""`puna tune`: fine-tuning, adapters, preferences and rewards, on one's own data."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

# without a configuration: chats are long and their files short
PRESET: dict[str, Any] = {"method": "lora", "length": 2048, "batch_tokens": 4096, "warmup": 0.05}


class Method(StrEnum):
    """How to tune."""

    full = "full"
    lora = "lora"
    qlora = "qlora"
    dora = "dora"
    dpo = "dpo"
    kto = "kto"
    grpo = "grpo"


def tune(
    base: Annotated[Path, typer.Argument(help="Path, bundled name or hub repository.")],
    data: Annotated[Path, typer.Option(help="JSON lines or Parquet, or the folder of --config's files.")],
    out: Annotated[Path | None, typer.Option(help="Output folder; ends with an adapter, or weights.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of the run (docs/tuning.md).")] = None,
    method: Annotated[Method | None, typer.Option(help="lora, or what --config says.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Number of steps.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of first values, order and dropout.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's last saved step.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; one step is measured.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The plan as JSON.")] = False,
) -> None:
    """Make a model yours: train it on chats, texts, preferences or tasks with a checkable answer.

    Example: puna tune cria --data chats.jsonl --out runs/mine --steps 100
    """
    from puna.cli.ranks import one_error
    from puna.cli.training import plan_or_run, settings

    with one_error():
        preset = PRESET if config is None else {"method": "lora"}
        read, folder = settings(config, data, method.value if method else None, preset, steps=steps, seed=seed)
        plan_or_run(base, read, folder, out, resume=resume, dry_run=dry_run, as_json=as_json)
