"""Labelled code: CyberSecEval's insecure completions, SVEN's pairs before and after a security fix."""

import hashlib
import json
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.errors import PunaError

HALVES = ("development", "held-out")


@dataclass(frozen=True)
class Sample:
    """A piece of code. `label`: "insecure" (CyberSecEval), "vulnerable" or "fixed" (SVEN). `half`: rules were written
    with the development half in sight; the held-out half was looked at once, at the end."""

    id: str
    label: str
    language: str
    cwe: str
    code: str
    half: str


def half(key: str) -> str:
    """Which half a row belongs to, by the hash of its key."""
    return HALVES[hashlib.sha256(key.encode()).digest()[0] % 2]


def read_samples(path: Path) -> list[Sample]:
    """The samples in a JSONL file (plain or .xz), or in all such files of a folder; rows of another kind are left
    alone in a folder. Raises PunaError for a file that can't be read or holds no sample."""
    if not path.exists():
        raise PunaError(f"{path}: no such file or folder.")
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.name.endswith((".jsonl", ".jsonl.xz")))
    found = [sample for file in files for row in _rows(file) for sample in _samples(row)]
    if not found:
        raise PunaError(
            f"{path}: no labelled code here. A row has id, language, cwe, and code (CyberSecEval), or vulnerable, "
            "fixed and origin.commit (SVEN)."
        )
    return found


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    opener = lzma.open if file.suffix == ".xz" else open
    with opener(file, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise PunaError(f"{file}, line {number}: not JSON: {error}.") from error
            if isinstance(row, dict):
                yield row


def _samples(row: dict[str, Any]) -> list[Sample]:
    if not {"id", "language", "cwe"} <= set(row):
        return []
    if "code" in row:
        return [Sample(row["id"], "insecure", row["language"], row["cwe"], row["code"], half(row["id"]))]
    if {"vulnerable", "fixed", "origin"} <= set(row):
        which = half(row["origin"]["commit"])  # both functions of a commit lie in one half
        return [Sample(row["id"], k, row["language"], row["cwe"], row[k], which) for k in ("vulnerable", "fixed")]
    return []
