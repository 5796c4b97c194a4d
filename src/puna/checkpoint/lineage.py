"""Where a model comes from: a record beside its files that names base, data, method, compute and licence, and is
linked by hashes to the files that it speaks of and to the records of what it was made from.

`record` is the SHA-256 of the rest as canonical JSON; `parents` hold the whole records of base and teachers, so a chain
can be checked without them.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from puna.errors import PunaError

FILE = "lineage.json"
FORMAT = 1
_WEIGHTS = (".safetensors", ".gguf", ".pth", ".bin", ".json", ".model", ".jinja")


def hash_of(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def hashes(files: Iterable[Path]) -> dict[str, str]:
    """Of each file by its name."""
    return {file.name: hash_of(file) for file in sorted(files)}


def sampled(files: Iterable[Path]) -> str:
    """One hash of files' names, sizes and 64 stretches of 4 KiB of each: quick however large, and another if they were
    trained or converted again."""
    found = hashlib.sha256()
    for file in sorted(files):
        size = file.stat().st_size
        found.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as handle:
            for at in range(64):
                handle.seek(size * at // 64)
                found.update(handle.read(4096))
    return found.hexdigest()


def model_files(path: Path) -> list[Path]:
    """What a checkpoint or an adapter is made of: itself, or the weights, configuration and tokenizer in the folder."""
    if path.is_file():
        return [path]
    own = (file for file in path.iterdir() if file.is_file() and file.suffix in _WEIGHTS)
    return sorted(file for file in own if file.name != FILE and not file.name.startswith("."))


def make_record(*, kind: str, name: str, base: Mapping[str, Any], data: Mapping[str, str], method: Mapping[str, Any],
                compute: Mapping[str, Any], licence: Mapping[str, Any] | None, files: Mapping[str, str],
                parents: Sequence[Mapping[str, Any]] = (), **more: Any) -> dict[str, Any]:  # fmt: skip
    """A record. kind: "weights", "adapter" or "export"; files: hashes of the artefact's own."""
    facts = {"format": FORMAT, "kind": kind, "name": name, "base": dict(base), "data": dict(data),
             "method": dict(method), "compute": dict(compute), "licence": None if licence is None else dict(licence),
             "files": dict(files), **more, "parents": [dict(parent) for parent in parents]}  # fmt: skip
    return {**facts, "record": digest(facts)}


def digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of a record without its own hash."""
    facts = {key: value for key, value in record.items() if key != "record"}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write lineage.json into a folder."""
    (folder / FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_record(path: Path) -> dict[str, Any] | None:
    """The record beside a checkpoint or adapter, or None where there is none. Raises PunaError for one that is not
    what its hash says."""
    file = (path if path.is_dir() else path.parent) / FILE
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_bytes())
        if not isinstance(record, dict):
            raise ValueError("no object")
    except (ValueError, RecursionError, OSError) as error:
        raise PunaError(f"{file}: the lineage record is damaged ({error}); restore it, or delete it") from None
    if "record" not in record:
        return None  # of an older puna, not linked
    for each in _chain(record):
        if digest(each) != each.get("record"):
            raise PunaError(
                f"{file}: the record of {each.get('name')!r} is not what its hash says: it was changed after it was "
                "written; restore the file"
            )
    return record


def verify(folder: Path) -> list[str]:
    """What in a folder is not as its record says, one sentence each. Raises PunaError for a changed or missing
    record."""
    record = read_record(folder)
    if record is None:
        raise PunaError(f"{folder}: no lineage record to check; `puna tune` writes one")
    found = []
    for name, expected in record["files"].items():
        file = folder / name
        if not file.is_file():
            found.append(f"{name} is missing")
        elif hash_of(file) != expected:
            found.append(f"{name} was changed after the record was written")
    return found


def _chain(record: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """A record and all that it comes from."""
    waiting: list[Any] = [record]
    while waiting:
        one = waiting.pop()
        if not isinstance(one, Mapping):
            raise PunaError("a lineage record's parents must be records; restore the file")
        yield one
        waiting += one.get("parents") or []
