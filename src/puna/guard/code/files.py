"""Files and folders: what is scanned in them, and as what."""

import codecs
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from puna.errors import PunaError
from puna.guard.code.answer import scan_pieces
from puna.guard.code.extract import pieces
from puna.guard.code.finding import Finding
from puna.guard.code.languages import FORMATS, LANGUAGES, canonical, of_file
from puna.guard.code.policy import allow

SECONDS = 10.0  # of processor time for one file
CARRIERS = {".md": "markdown", ".ipynb": "notebook", ".diff": "diff", ".patch": "diff"}
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
    return [
        replace(f, path=f"{path}{f.path if f.path.startswith('#') or not f.path else ' ' + f.path}") for f in findings
    ]


def read_text(data: bytes) -> str:
    """A file's text: UTF-16 where it says so, else UTF-8 with what isn't replaced; all line ends as \\n."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = data.decode("utf-16", "replace")
    else:
        text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def scan_path(path: Path, language: str | None = None) -> Iterator[tuple[Path, str, list[Finding]]]:
    """A file, or every file below a folder whose language its name tells (not in the folders of SKIPPED, and no links,
    which may lead out of it): each with its text and its findings. Raises PunaError for a single file whose language
    can't be told, and for what is neither a file nor a folder."""
    if path.is_file():
        files = [path]
    elif not path.is_dir():
        raise PunaError(f"{path}: neither a file nor a folder; a pipe can be read as standard input, with -.")
    else:
        below = (p for p in path.rglob("*") if not set(SKIPPED) & set(p.relative_to(path).parts))
        files = sorted(
            p for p in below if p.is_file() and not p.is_symlink() and (of_file(p.name) or p.suffix == ".ipynb")
        )
    for file in files:
        try:
            source = read_text(file.read_bytes())
        except OSError as error:
            raise PunaError(f"{file}: can't be read: {error.strerror}.") from error
        yield file, source, scan_text(source, language or of_file(file.name) or CARRIERS.get(file.suffix), str(file))
