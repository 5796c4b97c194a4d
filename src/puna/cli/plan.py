"""`puna plan`: what each process holds of a model that several share, to answer with it or to train it."""

import json
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape
from rich.table import Table

from puna.cli.list_models import new_console, short_bytes
from puna.errors import PunaError
from puna.family.config import ModelConfig
from puna.family.members import find, get
from puna.family.shard_bytes import formats, kv_bytes_per_rank, tensor_bytes, weight_bytes_per_rank
from puna.family.sharding import Mesh, Sharding, fitting

RANKS = (1, 2, 4, 8, 16)
NOT_COUNTED = "Not counted: activations, communication buffers, the runtime itself, vision weights."


def plan(
    model: str = typer.Argument(help="A member (llama-3.1-405b, maverick, a hub id), a checkpoint, or a config.json."),
    tensor: int | None = typer.Option(None, "--tensor-parallel", min=1, help="Processes that split each matrix."),
    expert: int | None = typer.Option(None, "--expert-parallel", min=1, help="Groups that the experts are dealt to."),
    context: int | None = typer.Option(None, "--context", min=1, help="Tokens of a sequence's keys and values. [8192]"),
    bits: list[str] = typer.Option([], "--bits", help="Only bf16, fp8, int8 or int4. May be given several times."),
    train: str | None = typer.Option(None, "--train", help="Plan a training run: full, pretrain, lora or qlora."),
    data: int | None = typer.Option(None, "--data-parallel", min=1, help="With --train: groups with other passes."),
    tokens: int | None = typer.Option(None, "--tokens", min=1, help="With --train: of a group's pass. [6144]"),
    rank: int | None = typer.Option(None, "--rank", min=1, help="With --train lora or qlora: of the updates. [16]"),
    as_json: bool = typer.Option(False, "--json", help="Print JSON for scripts."),
) -> None:
    """Show how a model splits over processes, and the bytes that each holds.

    Without numbers of processes, a table of 1 to 16 (with --train of 1 to 512); with them, also which matrix is split
    how.

    Example: puna plan llama-3.1-405b --tensor-parallel 8 --context 131072
    """
    config = _config(model)
    _refuse_others(train, {"--context": context, "--bits": bits}, {"--data-parallel": data, "--tokens": tokens,
                   "--rank": rank})  # fmt: skip
    if train is not None:
        from puna.cli.plan_training import plan_training

        plan_training(model, config, train, data, tensor, expert, tokens or 6144, rank or 16, as_json)
        return
    context = context or min(8192, config.context_length)
    if context > config.context_length:
        raise PunaError(f"--context {context:,} is more than the model's {config.context_length:,} tokens; lower it")
    wanted = bits or list(formats(config))
    if unknown := [name for name in wanted if name not in formats(config)]:
        raise PunaError(f"--bits {unknown[0]} is not known; choose from {', '.join(formats(config))}")
    facts: dict[str, Any] = {"model": model, "context": context, "not_counted": NOT_COUNTED}
    facts["formats"] = {name: formats(config)[name].text for name in wanted}
    if tensor is None and expert is None:
        facts["meshes"] = [_row(config, mesh, context, wanted) for mesh in _overview(config)]
    else:
        sharding = Sharding(config, Mesh(tensor or 1, expert or 1))
        facts["meshes"] = [_row(config, sharding.mesh, context, wanted)]
        facts["splits"] = _splits(sharding, wanted)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _print(facts)


def _refuse_others(train: str | None, serving: dict[str, Any], training: dict[str, Any]) -> None:
    """Raises PunaError for an option that says nothing about what is planned."""
    for name, value in (training if train is None else serving).items():
        if value:
            raise PunaError(f"{name} is for plans {'with' if train is None else 'without'} --train; leave it out")


def _config(model: str) -> ModelConfig:
    path = Path(model).expanduser()
    if model != "cria" and not path.exists():
        config = get(model).config if find(model) else None
        if config is None:
            raise PunaError(f"{model!r} is no path here and no member whose shape is published; `puna list` shows all")
        return config
    file = path if path.name == "config.json" else path / "config.json"
    if file.is_file():
        from puna.checkpoint.hf_config import read_config

        return read_config(file)
    from puna.checkpoint.hub import resolve
    from puna.checkpoint.source import open_source

    return open_source(resolve(model)).config


def _overview(config: ModelConfig) -> list[Mesh]:
    """Tensor-parallel meshes, then for mixtures of experts those that deal out whole experts."""
    meshes = [Mesh(ranks) for ranks in RANKS]
    if config.moe_layers:
        tensor = {ranks: max(n for n in fitting(config) if ranks % n == 0) for ranks in RANKS[1:]}
        meshes += [Mesh(tensor[ranks], ranks) for ranks in RANKS[1:]]
    return meshes


def _row(config: ModelConfig, mesh: Mesh, context: int, wanted: list[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"tensor_parallel": mesh.tensor, "expert_parallel": mesh.expert, "ranks": mesh.ranks}
    try:
        sharding = Sharding(config, mesh)
    except PunaError as error:
        return row | {"refused": str(error)}
    weights = {name: weight_bytes_per_rank(sharding, formats(config)[name]) for name in wanted}
    return row | {"weight_bytes_per_rank": weights, "kv_bytes_per_rank": kv_bytes_per_rank(sharding, context)}


def _splits(sharding: Sharding, wanted: list[str]) -> list[dict[str, Any]]:
    """Each kind of tensor once: how it is split, and rank 0's bytes of all of that kind together."""
    kinds: dict[str, dict[str, Any]] = {}
    for name, shape in sharding.shapes.items():
        kind = ".".join(piece for piece in name.split(".") if not piece.isdigit())
        key = f"{kind} {shape}"
        split = kinds.setdefault(key, {
            "tensor": kind, "count": 0, "shape": list(shape), "rank_shape": list(sharding.shape(name, 0)),
            "how": _how(sharding, name), "bytes_per_rank": dict.fromkeys(wanted, 0),
        })  # fmt: skip
        split["count"] += 1
        for each in wanted:
            split["bytes_per_rank"][each] += tensor_bytes(sharding, name, 0, formats(sharding.config)[each])
    return list(kinds.values())


def _how(sharding: Sharding, name: str) -> str:
    rule = sharding.rule(name)
    copies = f", each on {sharding.kv_copies} ranks" if rule.kind == "kv_heads" and sharding.kv_copies > 1 else ""
    return rule.text + copies


def _print(facts: dict[str, Any]) -> None:
    console = new_console()
    table = Table(title=f"{escape(facts['model'])}: bytes per process", title_justify="left", box=None, pad_edge=False)
    for title in ("Tensor", "Expert", "Processes", *facts["formats"], f"Cache, {facts['context']:,} tokens"):
        table.add_column(title, justify="right")
    refused = []
    for row in facts["meshes"]:
        where = (str(row["tensor_parallel"]), str(row["expert_parallel"]), str(row["ranks"]))
        if "refused" in row:
            refused.append(f"{where[0]} x {where[1]}: {row['refused']}")
            table.add_row(*where, *["-" for _ in facts["formats"]], "-")
        else:
            weights = row["weight_bytes_per_rank"].values()
            table.add_row(*where, *map(short_bytes, weights), short_bytes(row["kv_bytes_per_rank"]))
    console.print(table)
    if "splits" in facts:
        _print_splits(facts["splits"], next(iter(facts["formats"])))
    notes = [f"{name}: {text}." for name, text in facts["formats"].items()]
    for note in (*refused, *notes, "Cache: one sequence's keys and values in bfloat16.", facts["not_counted"]):
        console.print(note, markup=False, soft_wrap=True)


def _print_splits(splits: list[dict[str, Any]], format: str) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("Tensor", "Of", "Whole", "Per process", format, "How"):
        right = title in ("Of", format)
        table.add_column(title, justify="right" if right else "left", no_wrap=title != "How")
    for split in splits:
        name = split["tensor"].removeprefix("layers.").removesuffix(".weight").replace("feed_forward.", "")
        shapes = ["x".join(map(str, split[key])) for key in ("shape", "rank_shape")]
        size = short_bytes(split["bytes_per_rank"][format])
        table.add_row(name, str(split["count"]), *shapes, size, split["how"])
    console = new_console()
    console.width = max(console.width, 130)
    console.print(table)
