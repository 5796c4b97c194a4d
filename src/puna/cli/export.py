"""`puna export`: a checkpoint in another format."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from puna.errors import PunaError

if TYPE_CHECKING:
    from puna.checkpoint import Source


class Format(StrEnum):
    """What can be written."""

    safetensors = "safetensors"
    gguf = "gguf"


def export(
    model: str = typer.Argument(..., help="Path, bundled name or hub repository."),
    out: Path = typer.Option(..., "--out", help="Folder (safetensors) or file (gguf) to write; must not exist."),
    format: Format = typer.Option(Format.safetensors, "--format", help="For transformers, or for llama.cpp."),
    type: str | None = typer.Option(
        None, "--type", help="F32, F16 or BF16; for gguf also Q8_0 or Q4_0. Default: as stored, quantised ones as F32."
    ),
    revision: str | None = typer.Option(None, "--revision", help="Branch, tag or commit of a hub repository."),
) -> None:
    """Write a checkpoint as safetensors or GGUF, one tensor at a time.

    Example: puna export cria --out cria.gguf --format gguf --type Q8_0
    """
    from puna.checkpoint import open_source
    from puna.checkpoint.hub import resolve

    source = open_source(resolve(model, revision))
    write = _safetensors if format is Format.safetensors else _gguf
    notes = write(source, out, type.upper() if type else None)
    for note in (*source.notes, *notes):
        typer.echo(f"Note: {note}", err=True)
    typer.echo(f"Wrote {out}")


def _gguf(source: "Source", out: Path, type: str | None) -> tuple[str, ...]:
    from puna.checkpoint.gguf_names import slots
    from puna.checkpoint.gguf_write import type_of, write_tensors
    from puna.checkpoint.hub import licence_of
    from puna.checkpoint.validate import check_shapes

    check_shapes(source, {slot.name: slot.shape for slot in slots(source.config)})
    kind = type or type_of(source.read("embed_tokens.weight").dtype)
    licence = licence_of(source.path)
    metadata = {"general.license": licence} if licence else {}
    return write_tensors(source.read, source.config, source.tokenizer(), out, kind, source.generation, metadata).notes


def _safetensors(source: "Source", out: Path, type: str | None) -> tuple[str, ...]:
    import torch

    from puna.checkpoint.safetensors_write import write_safetensors
    from puna.checkpoint.source import load_source

    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if type is not None and type not in dtypes:
        raise PunaError(f"--type {type} is not one of safetensors; choose {', '.join(dtypes)}, or --format gguf")
    loaded = load_source(source, dtype=dtypes[type] if type else None)
    write_safetensors(loaded.model, loaded.config, loaded.tokenizer, out, generation=loaded.generation)
    return ()
