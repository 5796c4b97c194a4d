"""`puna export`: a checkpoint in another format."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from puna.errors import PunaError

if TYPE_CHECKING:
    from puna.checkpoint import Source


class Bits(StrEnum):
    """How many bits a weight gets."""

    int4 = "int4"
    int8 = "int8"


class Format(StrEnum):
    """What can be written."""

    safetensors = "safetensors"
    gguf = "gguf"


def export(
    model: str = typer.Argument(..., help="Path, bundled name or hub repository."),
    out: Path = typer.Option(..., "--out", help="Folder (safetensors) or file (gguf) to write; must not exist."),
    format: Format = typer.Option(Format.safetensors, "--format", help="For transformers, or for llama.cpp."),
    type: str | None = typer.Option(
        None, "--type", help="F32, F16, BF16; for gguf also Q8_0, Q4_0. Default: as stored."
    ),
    quantize: Bits | None = typer.Option(
        None, "--quantize", help="Safetensors in few bits (compressed-tensors' pack-quantized): int4 or int8."
    ),
    revision: str | None = typer.Option(None, "--revision", help="Branch, tag or commit of a hub repository."),
) -> None:
    """Write a checkpoint, or an adapter merged with its base, as safetensors or GGUF, one tensor at a time. What
    `puna tune` made is loaded again, and refused if it doesn't give the logits recorded when training ended.

    Example: puna export cria --out cria.gguf --format gguf --type Q8_0

    Example: puna export meta-llama/Llama-3.2-1B-Instruct --out llama-int4 --quantize int4
    """
    from puna.checkpoint import open_source
    from puna.checkpoint.hub import resolve
    from puna.checkpoint.merged import open_merged
    from puna.checkpoint.peft import is_adapter
    from puna.engine.exported import check_export, write_export_record

    origin = resolve(model, revision)
    if is_adapter(origin):
        source: Source = open_merged(origin, text_only=format is Format.gguf)
    else:
        source = open_source(origin, text_only=format is Format.gguf)
    kind = type.upper() if type else None
    if format is Format.gguf:
        if quantize is not None:
            raise PunaError(f"--quantize {quantize} is for safetensors; for gguf choose --type Q4_0 or --type Q8_0")
        notes = _gguf(source, out, kind)
    else:
        notes = _safetensors(source, out, kind, quantize)
        write_export_record(origin, out, {"export": "safetensors", "type": kind, "quantize": quantize})
    for note in (*source.notes, *notes):
        typer.echo(f"Note: {note}", err=True)
    if (said := check_export(origin, out, quantize or kind or _stored_type(source))) is not None:
        typer.echo(said)
    typer.echo(f"Wrote {out}")


def _gguf(source: "Source", out: Path, type: str | None) -> tuple[str, ...]:
    from puna.checkpoint.convert import convert_to_gguf
    from puna.checkpoint.hub import licence_of
    from puna.engine.exported import lineage_fields

    licence = licence_of(source.path)
    metadata = ({"general.license": licence} if licence else {}) | lineage_fields(source.path)
    return convert_to_gguf(source, out, type, metadata)


def _safetensors(source: "Source", out: Path, type: str | None, quantize: str | None) -> tuple[str, ...]:
    import torch

    from puna.checkpoint.convert import convert_to_safetensors

    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if type is not None and type not in dtypes:
        raise PunaError(f"--type {type} is not one of safetensors; choose {', '.join(dtypes)}, or --format gguf")
    return convert_to_safetensors(source, out, dtypes[type] if type else None, quantize)


def _stored_type(source: "Source") -> str:
    """The type that a checkpoint's floats have."""
    from puna.checkpoint.gguf_write import type_of

    return type_of(source.read("norm.weight").dtype)
