"""Exports that must give what was recorded when training ended: loaded again, compared, refused where they differ."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from puna.checkpoint.lineage import hashes, make_record, model_files, read_record, write_record
from puna.checkpoint.recorded import distance, read_recorded
from puna.engine.loading import load
from puna.errors import PunaError

CARD_FILES = ("Notice*", "NOTICE*", "LICENSE*", "USE_POLICY*")


def check_export(origin: Path, out: Path, format: str) -> str | None:
    """Load an export of the tuned model at `origin` and compare its logits with those recorded there; gives what was
    found, or None where nothing was recorded.

    format: a key of `puna.checkpoint.recorded.FORMATS`. Raises PunaError, and removes the export, where they differ by
    more than the format may.
    """
    recorded = read_recorded(origin) if origin.is_dir() else None
    if recorded is None:
        return None
    llama = load(out, context=max(map(len, recorded.prompts)) + 1)
    given = torch.stack([llama.logits(ids)[-1] for ids in recorded.prompts])
    found, most = distance(given, recorded.logits_PV), recorded.tolerance(format)
    if not found <= most:
        if out.is_dir():
            shutil.rmtree(out)
        else:
            out.unlink()
        raise PunaError(
            f"{out}: loaded again, the export's logits are {found:.1%} from those recorded when training ended, more "
            f"than the {most:.1%} that {format} may be; it was removed. Choose a type with more bits"
        )
    return f"Loaded again, its logits are {found:.2%} from those recorded ({format} may be {most:.1%})."


def lineage_fields(origin: Path) -> dict[str, Any]:
    """GGUF metadata that link a file to the record of what it was made from."""
    record = read_record(origin) if origin.is_dir() else None
    if record is None:
        return {}
    fields = {"general.name": record["name"], "puna.lineage.record": record["record"]}
    return fields | {"puna.lineage": json.dumps(record, separators=(",", ":"))}


def write_export_record(origin: Path, out: Path, method: Mapping[str, Any]) -> None:
    """Lineage, card and licence files of a safetensors export of a tuned model; nothing for others."""
    record = read_record(origin) if origin.is_dir() else None
    if record is None:
        return
    for file in sorted({f for pattern in CARD_FILES for f in origin.glob(pattern)}):
        shutil.copyfile(file, out / file.name)
    card = origin / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8").replace("library_name: peft", "library_name: transformers")
        text = text.replace("base_model_relation: adapter", "base_model_relation: merge")
        (out / "README.md").write_text(text, encoding="utf-8")
    base = {"name": record["name"], "files": hashes(model_files(origin))}
    write_record(out, make_record(
        kind="export", name=record["name"], base=base, data={}, method=method, compute={}, licence=record["licence"],
        files=hashes(model_files(out)), parents=[record],
    ))  # fmt: skip
