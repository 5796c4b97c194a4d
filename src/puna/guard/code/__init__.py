"""Insecure code, seen before a person runs it. docs/code-guard.md tells how it works and how to add a rule."""

from puna.guard.code.answer import CodeStream, scan_answer, scan_found
from puna.guard.code.files import scan_path, scan_text
from puna.guard.code.finding import Finding
from puna.guard.code.policy import Policy
from puna.guard.code.sarif import sarif

__all__ = ["CodeStream", "Finding", "Policy", "sarif", "scan_answer", "scan_code", "scan_path", "scan_text"]


def scan_code(source: str, language: str | None = None) -> list[Finding]:
    """Weaknesses in a piece of source code, in order of line. `language`: a name or a common alias ("python", "c++",
    "sh", "diff", "notebook"); without one, or with one that isn't known, it is detected, and code is found inside
    Markdown, diffs, notebooks and tool-call arguments. Text without code gives []. Never raises for what `source`
    holds; a scan over its limit of 2 s ends with a finding that says so."""
    return scan_found(source, language)
