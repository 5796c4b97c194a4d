"""`puna plan --train`: what each process of a training run holds."""

import json
from dataclasses import asdict
from typing import Any

import typer
from rich.markup import escape
from rich.table import Table

from puna.cli.list_models import new_console, short_bytes
from puna.errors import PunaError
from puna.family.config import ModelConfig
from puna.family.sharding import Mesh, fitting

PROCESSES = (1, 8, 64, 512)
ONE_MACHINE = 8  # devices that split matrices: what they exchange for every layer wants the shortest way
PARTS = {
    "weights": "weights of this process, with their float32 masters where they train",
    "gradients": "float32, summed over a step's passes",
    "optimizer": "the moments of AdamW, or with pretrain Muon's for the hidden matrices",
    "kept": "what a pass keeps for its backward part; experts are taken to be chosen alike",
    "recomputed": "the same with `recompute: true`",
    "gathered": "two layers' weights and one's gradients from other processes, and the outer layers'",
    "logits": "a block of them, and the output matrix's gradient as it is summed",
}
NOT_COUNTED = "Not counted: what a layer's own steps need for a moment, communication buffers, the runtime, towers."


def plan_training(
    name: str, config: ModelConfig, method: str, data: int | None, tensor: int | None, expert: int | None, tokens: int,
    rank: int, as_json: bool,
) -> None:  # fmt: skip
    """Print a row for the mesh that is given, or for meshes of 1 to 512 processes. Raises PunaError for one that the
    shape can't be split over."""
    from puna.train.mesh_plan import PLANNED, Layout, rank_bytes

    if method not in PLANNED:
        raise PunaError(f"--train {method} can't be planned so; choose from {', '.join(PLANNED)}")
    given = (data, tensor, expert)
    if any(given):
        mesh = Mesh(tensor or 1, expert or 1)
        if mesh.tensor % mesh.expert:
            raise PunaError(
                f"--expert-parallel {mesh.expert}: training deals experts among the processes that split the matrices; "
                f"give a divisor of --tensor-parallel, {mesh.tensor}"
            )
        layouts = [Layout(data or 1, mesh, method, tokens, rank=rank)]
    else:
        layouts = [Layout(*_split(config, processes), method, tokens, rank=rank) for processes in PROCESSES]
    rows = []
    for layout in layouts:
        found = rank_bytes(config, layout)
        rows.append({
            "data": layout.data, "tensor": layout.mesh.tensor, "expert": layout.mesh.expert,
            "processes": layout.processes, "bytes_per_rank": asdict(found), "total": found.total,
            "total_recomputed": found.total_recomputed,
        })  # fmt: skip
    facts = {"model": name, "method": method, "tokens_per_pass": tokens, "parts": PARTS, "meshes": rows,
             "not_counted": NOT_COUNTED}  # fmt: skip
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _print(facts)


def _split(config: ModelConfig, processes: int) -> tuple[int, Mesh]:
    """So many processes as data groups, and in each the matrices' split within a machine."""
    tensor = max(n for n in fitting(config) if n <= ONE_MACHINE and processes % n == 0)
    dealt = config.moe_layers and config.num_experts % tensor == 0
    return processes // tensor, Mesh(tensor, tensor if dealt else 1)


def _print(facts: dict[str, Any]) -> None:
    console = new_console()
    model, run = escape(facts["model"]), f"method {facts['method']}, {facts['tokens_per_pass']:,} tokens a pass"
    table = Table(title=f"{model}: bytes per process, {run}", title_justify="left", box=None, pad_edge=False)
    columns = ("Data", "Tensor", "Expert", "Processes", *map(str.capitalize, PARTS), "Total", "Recomputing")
    for column in columns:
        table.add_column(column, justify="right")
    for row in facts["meshes"]:
        where = (str(row[key]) for key in ("data", "tensor", "expert", "processes"))
        sizes = (*row["bytes_per_rank"].values(), row["total"], row["total_recomputed"])
        table.add_row(*where, *map(short_bytes, sizes))
    console.width = max(console.width, 130)
    console.print(table)
    for note in (*(f"{part.capitalize()}: {text}." for part, text in PARTS.items()), NOT_COUNTED):
        console.print(note, markup=False, soft_wrap=True)
