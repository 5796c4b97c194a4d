"""The code guard against its peers, on the same samples in the same run."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.errors import PunaError
from puna.evaluate.intervals import wilson
from puna.evaluate.samples import Sample
from puna.guard.code.scan import scan

PEERS = ("codeshield", "bandit")
LANGUAGES = {"python": ("python",), "C/C++": ("c", "cpp")}  # SVEN's


@dataclass(frozen=True)
class Outcome:
    """What an engine said of a sample: the CWEs found, None where it doesn't know the language or failed; `sure`: one
    of the findings is of at least medium confidence (None where the engine gives no confidence)."""

    sample: Sample
    found: tuple[str, ...] | None
    seconds: float
    sure: bool | None = None


def run_puna(samples: Sequence[Sample]) -> list[Outcome]:
    """The guard, in this process."""
    for language in {sample.language for sample in samples}:
        scan("", language)  # rules and grammars are read once, before the clock runs
    outcomes = []
    for sample in samples:
        start = time.perf_counter()
        findings = scan(sample.code, sample.language)
        seconds = time.perf_counter() - start
        sure = any(finding.confidence != "low" for finding in findings)
        outcomes.append(Outcome(sample, tuple(finding.cwe for finding in findings), seconds, sure))
    return outcomes


def run_peer(
    peer: str, samples: Sequence[Sample], python: str = sys.executable, progress: Callable[[int], None] | None = None
) -> list[Outcome]:
    """One of PEERS, in `python`'s process. Raises PunaError where it isn't installed there or ends early."""
    worker = Path(__file__).with_name("peer_worker.py")
    lines = "".join(json.dumps({"id": s.id, "code": s.code, "language": s.language}) + "\n" for s in samples)
    path = {"PATH": f"{Path(python).parent}:/usr/local/bin:/usr/bin:/bin"}
    try:
        process = subprocess.Popen(
            [python, str(worker), peer], env=path, text=True, encoding="utf-8",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
    except OSError as error:
        raise PunaError(f"{python}: can't be started: {error.strerror}. --peers names a Python interpreter.") from error
    said, complaints = process.communicate(lines)
    results = [json.loads(line) for line in said.splitlines()]
    if len(results) != len(samples):
        last = complaints.strip().splitlines()[-1:] or ["no message"]
        raise PunaError(
            f"{peer} stopped after {len(results)} of {len(samples)} samples: {last[0]}. Install it with "
            "pip install 'puna[peers]', or name an interpreter that has it with --peers."
        )
    if progress is not None:
        progress(len(results))
    return [
        Outcome(sample, None if r["found"] is None else tuple(r["found"]), r["seconds"])
        for sample, r in zip(samples, results, strict=True)
    ]


@dataclass(frozen=True)
class Row:
    """One line of the table: a share with its 95 % interval."""

    engine: str
    half: str
    what: str
    hits: int
    total: int

    def as_dict(self) -> dict[str, Any]:
        low, high = wilson(self.hits, self.total)
        return {
            "engine": self.engine, "half": self.half, "what": self.what, "hits": self.hits, "total": self.total,
            "share": self.hits / self.total, "low": low, "high": high,
        }  # fmt: skip


def table(engine: str, outcomes: Iterable[Outcome]) -> list[Row]:
    """Shares by half: insecure rows flagged and with the labelled CWE (all languages, and each), pairs flagged before
    and after the fix. A sample that the engine can't judge counts as not flagged; languages that it doesn't know at
    all are left out of the lines of their own."""
    kept = list(outcomes)
    rows: list[Row] = []
    for half in sorted({o.sample.half for o in kept}):
        here = [o for o in kept if o.sample.half == half]
        insecure = [o for o in here if o.sample.label == "insecure"]
        for language in ["all", *sorted({o.sample.language for o in insecure})]:
            of = [o for o in insecure if language in ("all", o.sample.language)]
            if not of or all(o.found is None for o in of):
                continue
            rows.append(Row(engine, half, f"insecure, {language}: flagged", sum(bool(o.found) for o in of), len(of)))
            same = sum(o.sample.cwe in (o.found or ()) for o in of)
            rows.append(Row(engine, half, f"insecure, {language}: same CWE", same, len(of)))
            if language == "all" and all(o.sure is not None for o in of):
                what = "insecure, all: flagged, medium or high confidence"
                rows.append(Row(engine, half, what, sum(bool(o.sure) for o in of), len(of)))
        for name, languages in LANGUAGES.items():
            for label in ("vulnerable", "fixed"):
                of = [o for o in here if o.sample.label == label and o.sample.language in languages]
                if of and not all(o.found is None for o in of):
                    rows.append(Row(engine, half, f"{name}: {label} flagged", sum(bool(o.found) for o in of), len(of)))
                if of and all(o.sure is not None for o in of):
                    what = f"{name}: {label} flagged, medium or high confidence"
                    rows.append(Row(engine, half, what, sum(bool(o.sure) for o in of), len(of)))
    return rows


def latency(outcomes: Iterable[Outcome]) -> tuple[float, float]:
    """Median and 95th percentile of milliseconds a sample."""
    times = sorted(o.seconds for o in outcomes if o.found is not None)
    if not times:
        return 0.0, 0.0
    return 1000 * times[len(times) // 2], 1000 * times[int(0.95 * (len(times) - 1))]
