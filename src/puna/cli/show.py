"""`puna show`: everything about one member of the family, or the shape of any checkpoint."""

import json
from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from puna.cli.list_models import NOT_PUBLISHED, new_console, short_bytes, short_count, short_tokens
from puna.errors import PunaError
from puna.family.describe import describe, describe_config
from puna.family.members import find, get

BUNDLED = "cria"


def show(
    name: str = typer.Argument(help="A member (llama-3.1-8b, scout, a hub id), a checkpoint's path, or cria."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON for scripts."),
) -> None:
    """Show one model: shape, parameters, memory, claims.

    A path is read as a checkpoint; any other name is looked up in the family.

    Example: puna show llama-4-scout
    """
    facts = _checkpoint(name) if _is_checkpoint(name) else _member(name)
    if as_json:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        _print(facts)


def _is_checkpoint(name: str) -> bool:
    return name == BUNDLED or Path(name).expanduser().exists() or name.startswith((".", "/", "~"))


def _member(name: str) -> dict[str, Any]:
    if find(name) is None and name.count("/") == 1:
        raise PunaError(
            f"{name!r} is neither a path here nor a member of the Llama family. If it is a checkpoint on a hub: "
            f"`puna pull {name}`, then show the folder that it prints."
        )
    return describe(get(name))


def _checkpoint(name: str) -> dict[str, Any]:
    from puna.checkpoint.hub import resolve
    from puna.checkpoint.source import open_source

    source = open_source(resolve(name))
    facts = {"name": name, "title": name, "kind": "checkpoint", "format": source.format, "path": str(source.path)}
    notes = [{"about": "checkpoint", "text": note, "status": "read from the files"} for note in source.notes]
    return facts | describe_config(source.config) | {"notes": notes}


def _print(facts: dict[str, Any]) -> None:
    console = new_console()
    console.print(f"[bold]{escape(facts['title'])}[/bold]  ({facts['kind']})")
    _print_facts(console, facts)
    _print_shape(console, facts)
    _print_memory(console, facts)
    _print_notes(console, facts.get("notes", []))
    _print_claims(console, facts.get("claims", []))


def _two_columns(console: Console, title: str, rows: list[tuple[str, str]]) -> None:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(overflow="fold")
    for key, value in rows:
        table.add_row(key, escape(value))
    console.print(table)


def _print_facts(console: Console, facts: dict[str, Any]) -> None:
    if facts["kind"] == "checkpoint":
        _two_columns(console, "", [("Path", facts["path"]), ("Format", facts["format"])])
        return
    licence, context = facts["licence"], facts["context"]
    rows = [
        ("Released", facts["released"] or "not released"),
        ("Licence", f"{licence['id']} ({licence['title']}, {licence['dated']})" if licence else NOT_PUBLISHED),
        ("Input", " + ".join(facts["inputs"])),
        ("Languages", ", ".join(facts["languages"]) if facts["languages"] else NOT_PUBLISHED),
        ("Knowledge until", facts["knowledge_cutoff"] or NOT_PUBLISHED),
        ("Training tokens", facts["training_tokens"] or NOT_PUBLISHED),
        ("Context", _context(context)),
    ]
    rows += [("Hub" if i == 0 else "", f"{hub_id}  ({variant})")
             for i, (variant, hub_id) in enumerate(facts["hub_ids"].items())]  # fmt: skip
    _two_columns(console, "", rows)


def _context(context: dict[str, int | None]) -> str:
    known = [f"{short_tokens(length)} ({length:,} tokens, {variant})" for variant, length in context.items() if length]
    return ", ".join(known) or NOT_PUBLISHED


def _layers(indices: list[int] | tuple[int, ...], total: int) -> str:
    """Layer numbers in a short form: all 48, or 12 of 48: 3, 7, ..., 47."""
    if len(indices) == total:
        return f"all {total}"
    shown = [*map(str, indices[:2]), "...", str(indices[-1])] if len(indices) > 4 else map(str, indices)
    return f"{len(indices)} of {total}: {', '.join(shown)}" if indices else "none"


def _print_shape(console: Console, facts: dict[str, Any]) -> None:
    shape, vision, encoder = facts.get("shape"), facts.get("vision"), facts.get("encoder")
    if shape is not None:
        _two_columns(console, "Shape", _decoder_rows(shape))
    elif encoder is not None:
        _two_columns(console, "Shape (DeBERTa encoder)", [(key, f"{value}") for key, value in encoder.items()])
    else:
        _two_columns(console, "Shape", [("Layers and widths", NOT_PUBLISHED)])
    if vision is not None:
        _two_columns(console, "Vision", _vision_rows(vision))


def _decoder_rows(shape: dict[str, Any]) -> list[tuple[str, str]]:
    layers, scaling = shape["num_layers"], shape["rope_scaling"]
    rows = [
        ("Layers", f"{layers}"),
        ("Width", f"{shape['hidden_size']:,}"),
        ("Heads", f"{shape['num_heads']} query, {shape['num_kv_heads']} key/value, {shape['head_dim']} wide"),
        ("Vocabulary", f"{shape['vocab_size']:,}" + (", tied embeddings" if shape["tie_word_embeddings"] else "")),
        ("Rotary positions", f"theta {shape['rope_theta']:,.0f}, " + (
            f"scaled by {scaling['factor']:g} (low {scaling['low_freq_factor']:g}, high "
            f"{scaling['high_freq_factor']:g}, original context {scaling['original_context']:,})"
            if scaling else "not scaled")),
    ]  # fmt: skip
    if len(shape["moe_layers"]) < layers:
        rows.append(("Feed-forward", f"{shape['intermediate_size']:,}"))
    if shape["moe_layers"]:
        rows.append(("Experts", f"{shape['num_experts']}, {shape['num_experts_per_token']} chosen and 1 shared, "
                                f"{shape['expert_intermediate_size']:,} wide"))  # fmt: skip
        rows.append(("Expert layers", _layers(shape["moe_layers"], layers)))
    if shape["nope_layers"]:
        rows.append(("No-position layers", _layers(shape["nope_layers"], layers)))
    if shape["attention_chunk_size"]:
        rows.append(("Attention chunk", f"{shape['attention_chunk_size']:,} tokens on the other layers"))
    if shape["architecture"] == "llama4":
        temperature = shape["attention_temperature"]
        tuned = f"scale {temperature['scale']:g}, floor {temperature['floor']:,}" if temperature else "off"
        rows += [("Query/key norm", "yes" if shape["qk_norm"] else "no"), ("Attention temperature", tuned)]
    return rows


def _vision_rows(vision: dict[str, Any]) -> list[tuple[str, str]]:
    """Of a tower of Llama 4, whose outputs become tokens, or of Llama 3.2, whose outputs extra layers read."""
    layers, side, patch, tiles = (vision[key] for key in ("num_layers", "tile_side", "patch_side", "max_tiles"))
    patches, shuffle = (side // patch) ** 2, vision.get("pixel_shuffle")
    more = " and one of the whole" if shuffle and tiles > 1 else ""
    rows = [
        ("Tiles", f"{side} x {side} pixels, up to {tiles}{more}"),
        ("Patches", f"{patch} x {patch} pixels, {patches:,} a tile"),
        ("Layers", f"{layers}" if shuffle else f"{layers} and {vision['num_global_layers']} global"),
        ("Width", f"{vision['hidden_size']:,}"),
        ("Heads", f"{vision['num_heads']}, {vision['hidden_size'] // vision['num_heads']} wide"),
        ("Feed-forward", f"{vision['intermediate_size']:,}"),
    ]
    if shuffle:
        rows += [
            ("Rotary positions", f"theta {vision['rope_theta']:,.0f}, by row and column"),
            ("Adapter", f"{shuffle} x {shuffle} patches become one token of {vision['adapter_size']:,}: "
                        f"{patches // shuffle**2:,} tokens a tile"),
        ]  # fmt: skip
    else:
        seen, before = vision["intermediate_layers"], vision["cross_attention_before"]
        rows += [
            ("Output", f"{vision['hidden_size'] * (1 + len(seen)):,} wide: the last layer's and those of layers "
                       f"{', '.join(map(str, seen))}"),
            ("Adapter", f"{len(before)} cross-attention layers, before layers {', '.join(map(str, before))} of "
                        "the text"),
            ("Computed as by", {"meta": "Meta's code", "transformers": "transformers"}[vision["reference"]]),
        ]  # fmt: skip
    return [*rows, ("Picture's token", f"{vision['image_token_id']:,}")]


def _print_memory(console: Console, facts: dict[str, Any]) -> None:
    parameters = facts.get("parameters")
    if parameters is None:
        _two_columns(console, "Parameters and memory", [("Computed from the shape", NOT_PUBLISHED)])
        return
    names = {"text": "Text", "vision": "Vision", "active_text": "Active, text", "active": "Active, with vision",
             "total": "Total", "backbone": "Backbone", "token_embeddings": "Token embeddings"}  # fmt: skip
    shown = {key: value for key, value in parameters.items()
             if parameters.get("vision", 1) or key not in ("vision", "active")}  # fmt: skip
    _two_columns(console, "Parameters (computed from the shape)",
                 [(names[key], f"{value:>19,}  {short_count(value)}") for key, value in shown.items()])  # fmt: skip
    weights = [(dtype, f"{size:>19,}  {short_bytes(size)}") for dtype, size in facts["weight_bytes"].items()]
    _two_columns(console, "Weights, all parameters in one format", weights)
    cache = facts.get("kv_cache")
    if cache is not None:
        labels = (("naive_bytes_per_token", "Per token, counted naively"),
                  ("growing_bytes_per_token", "Per token, layers that grow"),
                  ("fixed_bytes", "Fixed, chunked layers when full"),
                  ("bytes_at_full_context", "At the full context"))  # fmt: skip
        _two_columns(console, f"Key/value cache, bytes of one sequence in {cache['dtype']}",
                     [(label, f"{cache[key]:>19,}  {short_bytes(cache[key])}") for key, label in labels])  # fmt: skip


def _print_notes(console: Console, notes: list[dict[str, str]]) -> None:
    if notes:
        _two_columns(console, "Notes", [(note["about"], f"{note['text']} [{note['status']}]") for note in notes])


def _print_claims(console: Console, claims: list[dict[str, Any]]) -> None:
    if not claims:
        return
    table = Table(title="Published by Meta (not measured here)", title_justify="left", box=box.SIMPLE, pad_edge=False)
    for column in ("Claim", "Setting", "Of", "Value", "Status", "Source"):
        table.add_column(column, justify="right" if column == "Value" else "left")
    for claim in claims:
        unit = "%" if claim["unit"] == "%" else f" {claim['unit']}".rstrip()
        table.add_row(claim["subject"], claim["setting"], claim["variant"], f"{claim['value']:g}{unit}",
                      claim["status"], claim["source"])  # fmt: skip
    console.print(table)
