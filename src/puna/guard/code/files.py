"""Files and folders: what is scanned in them, and as what."""

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


def scan_path(path: Path, language: str | None = None) -> Iterator[tuple[Path, str, list[Finding]]]:
    """A file, or every file below a folder whose language its name tells (not in the folders of SKIPPED): each with
    its text and its findings. Raises PunaError for a single file whose language can't be told."""
    if path.is_file():
        files = [path]
    else:
        below = (p for p in path.rglob("*") if not set(SKIPPED) & set(p.relative_to(path).parts))
        files = sorted(p for p in below if p.is_file() and (of_file(p.name) or p.suffix == ".ipynb"))
    for file in files:
        try:
            source = file.read_text("utf-8", "replace")
        except OSError as error:
            raise PunaError(f"{file}: can't be read: {error.strerror}.") from error
        yield file, source, scan_text(source, language or of_file(file.name) or CARRIERS.get(file.suffix), str(file))
