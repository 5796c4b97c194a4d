"""What follows from findings: a verdict, and which of them a person has allowed."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from puna.guard.code.finding import Finding

CONFIDENCE = ("low", "medium", "high")
LINES = 10  # of a finding in which a comment may allow it
_ALLOW = re.compile(r"(?:#|//|/\*|\*|--|;|<!--|%)[ \t]*puna:[ \t]*allow[ \t]+([a-z0-9][a-z0-9-]*)[ \t:,-]*([^\n]*)")
_COMMENT = re.compile(r"^\s*(#|//|/\*|\*|--|;|<!--|%)")


@dataclass(frozen=True)
class Policy:
    """`block`: the severity from which code is refused ("error", "warning", or "never"); `confidence`: findings that
    are less sure than this don't count; `ignore`: rules that don't."""

    block: str = "error"
    confidence: str = "medium"
    ignore: frozenset[str] = frozenset()

    def verdict(self, findings: Iterable[Finding]) -> str:
        """ "block", "warn" or "allow"."""
        counted = [f for f in findings if self.counts(f)]
        blocking = {"error": ("error",), "warning": ("error", "warning"), "never": ()}[self.block]
        if any(f.severity in blocking for f in counted):
            return "block"
        return "warn" if counted else "allow"

    def counts(self, finding: Finding) -> bool:
        """Whether the finding is sure enough, and neither its rule nor a person says that it doesn't matter."""
        sure = CONFIDENCE.index(finding.confidence) >= CONFIDENCE.index(self.confidence)
        return sure and finding.rule not in self.ignore and not finding.allowed


def allow(findings: list[Finding], source: str) -> list[Finding]:
    """The findings, with `allowed` set to the reason where the source says `puna: allow RULE reason` in a comment on
    one of its lines (the first LINES of them) or alone on the line before. Without a reason nothing is allowed. For
    code that people have reviewed; a model's own comments decide nothing (`scan_code` and `scan_answer` don't ask)."""
    if "puna:" not in source:
        return findings
    allowed: dict[tuple[str, int], str] = {}
    for number, line in enumerate(source.split("\n"), 1):
        if (match := _ALLOW.search(line)) is not None:
            reason = match[2].strip()
            for end in ("*/", "-->", "%>"):
                reason = reason.removesuffix(end).rstrip()
            if len(reason) >= 3:
                allowed[match[1], number + bool(_COMMENT.match(line))] = reason
    return [
        replace(f, allowed=next((allowed[f.rule, n] for n in _lines(f) if (f.rule, n) in allowed), ""))
        for f in findings
    ]


def _lines(finding: Finding) -> range:
    return range(finding.line, max(finding.line, min(finding.end_line, finding.line + LINES)) + 1)
