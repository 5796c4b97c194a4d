"""Insecure code, seen before a person runs it."""

from dataclasses import replace
from pathlib import Path

from puna.errors import PunaError
from puna.guard.code.finding import Finding
from puna.guard.code.languages import LANGUAGES, canonical, of_file
from puna.guard.code.scan import scan

__all__ = ["Finding", "scan_code", "scan_path", "scan_text"]


def scan_code(source: str, language: str | None = None) -> list[Finding]:
    """Weaknesses in a piece of source code, in order of line. `language`: a name or a common alias ("python", "c++",
    "sh"); one that isn't known gives []."""
    name = canonical(language) if language is not None else None
    return scan(source, name) if name is not None else []


def scan_text(source: str, language: str | None, path: str) -> list[Finding]:
    """As `scan_code`, with `path` in the findings. Raises PunaError for a language that isn't understood."""
    if language is not None and canonical(language) is None:
        raise PunaError(f"The language {language!r} isn't understood; the languages are {', '.join(LANGUAGES)}.")
    return [replace(finding, path=path) for finding in scan_code(source, language)]


def scan_path(path: Path, language: str | None = None) -> tuple[list[Finding], dict[str, list[str]]]:
    """Scan a file, or every file of a known language below a folder. Gives the findings and, for the files that have
    some, their lines. Raises PunaError for a file whose
    language can't be told."""
    files = (
        [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and of_file(p.name) is not None)
    )
    findings: list[Finding] = []
    texts: dict[str, list[str]] = {}
    for file in files:
        spoken = language or of_file(file.name)
        if spoken is None:
            raise PunaError(f"{file}: can't tell the language by the name; say it with --language.")
        source = file.read_text("utf-8", "replace")
        found = scan_text(source, spoken, str(file))
        if found:
            findings.extend(found)
            texts[str(file)] = source.split("\n")
    return findings, texts
