"""What a scan gives back."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One weakness in the code. `line` and `column` are 1-based, `end_line` and `end_column` (exclusive) close the
    span; `trace` tells how input got there, as (line, text). `path` names the file, or the part of it
    (`book.ipynb#cell-2`); `allowed` is a person's reason to let it stand."""

    rule: str
    cwe: str
    severity: str  # "warning" | "error"
    confidence: str  # "high" | "medium" | "low"
    line: int
    column: int
    end_line: int
    end_column: int
    message: str
    fix: str
    why: str = ""
    language: str = ""
    path: str = ""
    trace: tuple[tuple[int, str], ...] = field(default=())
    allowed: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
