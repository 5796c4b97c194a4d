"""Files and folders: what is scanned in them, and as what."""

import codecs
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from puna.errors import PunaError
from puna.guard.code.answer import scan_pieces
from puna.guard.code.extract import pieces, plain_ends
from puna.guard.code.finding import Finding
from puna.guard.code.languages import FORMATS, LANGUAGES, canonical, of_file
from puna.guard.code.policy import allow

SECONDS = 10.0  # of processor time for one file
CARRIERS = {".md": "markdown", ".ipynb": "notebook", ".diff": "diff", ".patch": "diff"}
LONGEST = 50_000_000  # bytes of a file that is read
_INTERPRETER = re.compile(r"#![^\n]*?\b(?:ba|da|z|k|a)?(python|ruby|php|node|deno|sh)[\d.]*\b")
SKIPPED = (".git", ".hg", ".svn", "node_modules", "__pycache__", ".venv", "venv", ".tox", ".mypy_cache")


def scan_text(source: str, language: str | None, path: str) -> list[Finding]:
    """The findings in one file's text, with `path` in them, and the comments that allow some honoured. Raises
    PunaError for a language that isn't understood, or can't be told."""
    known = (*LANGUAGES, *FORMATS, *sorted({*CARRIERS.values()}))
    if language is not None and canonical(language) is None and language not in CARRIERS.values():
        raise PunaError(f"The language {language!r} isn't understood; the languages are {', '.join(known)}.")
    found = pieces(source, language)
    if language is None and source.strip() and [p.language for p in found] == ["text"]:
        raise PunaError(f"{path}: can't tell which language this is; say it with --language.")
    findings = allow(scan_pieces(found, SECONDS), source)
    path = os.fsencode(path).decode("utf-8", "replace")  # a name may hold bytes that are no text
    return [
        replace(f, path=f"{path}{f.path if f.path.startswith('#') or not f.path else ' ' + f.path}") for f in findings
    ]


def read_text(data: bytes) -> str:
    """A file's text: UTF-16 where it says so, else UTF-8 with what isn't replaced; all line ends as \\n."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = data.decode("utf-16", "replace")
    else:
        text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace")
    return plain_ends(text)


def scan_path(
    path: Path, language: str | None = None, skipped: Counter[str] | None = None
) -> Iterator[tuple[Path, str, list[Finding]]]:
    """A file, or every file below a folder whose language its name or its first line (`#!`) tells (not in the folders
    of SKIPPED, and no links, which may lead out of it): each with its text and its findings. What is passed over is
    counted in `skipped`, by reason. Raises PunaError for a single file that can't be read or whose language can't be
    told, and for what is neither a file nor a folder."""
    if path.is_file():
        source = read_text(_content(path))
        yield path, source, scan_text(source, language or _told(path, source), str(path))
        return
    if not path.is_dir():
        raise PunaError(f"{path}: neither a file nor a folder; a pipe can be read as standard input, with -.")
    counted: Counter[str] = Counter() if skipped is None else skipped
    for file in _below(path, counted):
        try:
            named = of_file(file.name) or CARRIERS.get(file.suffix if file.suffix == ".ipynb" else "")
            named = named or (None if "." in file.name else _interpreted(file))
            if named is None:
                counted["in no language that is known"] += 1
                continue
            source = read_text(_content(file))
        except (OSError, PunaError):
            counted["that can't be read or are too long"] += 1
            continue
        yield file, source, scan_text(source, language or named, str(file))


def _below(path: Path, skipped: Counter[str]) -> Iterator[Path]:
    """The plain files below a folder, in order."""

    def failed(_error: OSError) -> None:
        skipped["in folders that can't be read"] += 1

    for folder, folders, names in os.walk(path, onerror=failed):
        folders[:] = sorted(name for name in folders if name not in SKIPPED)
        skipped["that are links"] += sum(os.path.islink(os.path.join(folder, name)) for name in folders)
        for name in sorted(names):
            file = Path(folder, name)
            if file.is_symlink():
                skipped["that are links"] += 1
            elif not file.is_file():
                skipped["that are no plain files"] += 1
            else:
                yield file


def _content(file: Path) -> bytes:
    """Raises PunaError for a file that can't be read, or is too long."""
    try:
        with file.open("rb") as opened:
            return bounded(opened, str(file))
    except OSError as error:
        raise PunaError(f"{file}: can't be read: {error.strerror}.") from error


def bounded(opened: BinaryIO, name: str) -> bytes:
    """What there is to read. Raises PunaError for more than LONGEST bytes."""
    data = opened.read(LONGEST + 1)
    if len(data) > LONGEST:
        raise PunaError(f"{name}: longer than {LONGEST // 1_000_000} MB; scan it in smaller parts.")
    return data


def _told(file: Path, source: str) -> str | None:
    """The language that a file's name or its first line tells."""
    return of_file(file.name) or CARRIERS.get(file.suffix) or _interpreter(source[:200])


def _interpreted(file: Path) -> str | None:
    with file.open("rb") as opened:
        return _interpreter(opened.read(200).decode("latin-1"))


def _interpreter(start: str) -> str | None:
    match = _INTERPRETER.match(start)
    return {"sh": "shell", "node": "javascript", "deno": "typescript"}.get(match[1], match[1]) if match else None
