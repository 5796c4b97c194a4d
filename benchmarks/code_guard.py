"""The code guard's speed, its noise on code that is in use, and what it does with 10,000 hostile inputs."""

import collections
import importlib.metadata
import random
import statistics
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import rows
from hostile_code import giants, hostile

from puna import guard
from puna.evaluate.samples import read_samples
from puna.guard.code.rule import all_rules
from puna.guard.code.scan import SECONDS, scan

LINES = 300
PACKAGES = ("requests", "fastapi", "jinja2")


def library() -> list[Path]:
    """The standard library's modules, without its tests and what pip put beside them."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = ("site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo")
    return sorted(p for p in root.rglob("*.py") if not set(left_out) & set(p.relative_to(root).parts))


def package(name: str) -> list[Path]:
    found = importlib.metadata.files(name) or []
    return sorted(Path(str(p.locate())) for p in found if p.suffix == ".py" and "test" not in p.parts)


def benign() -> Iterator[tuple[str, str]]:
    """300 lines of each module that has them."""
    for file in library():
        lines = file.read_text("utf-8", "replace").split("\n")
        if len(lines) >= LINES:
            yield "\n".join(lines[:LINES]), "python"


def faulty(count: int = 10) -> Iterator[tuple[str, str]]:
    """300 lines of rules' examples, one bad one among ten, of each language."""
    pick = random.Random(0)
    good, bad = collections.defaultdict(list), collections.defaultdict(list)
    for rule in all_rules():
        for kept, examples in ((good, rule.good), (bad, rule.bad)):
            for language, code in examples:
                kept[language].append(code.rstrip("\n"))
    for language, codes in bad.items():
        for _ in range(count if len(codes) >= 10 and len(good[language]) >= 5 else 0):
            text = ""
            while text.count("\n") < LINES:
                text += "".join(pick.choice(good[language]) + "\n" for _ in range(9)) + pick.choice(codes) + "\n"
            yield "\n".join(text.split("\n")[:LINES]), language


def in_use(data: Path, count: int = 10) -> Iterator[tuple[str, str]]:
    """300 lines of code that is in use and insecure (CyberSecEval's pieces, one after the other), of each language."""
    pick = random.Random(0)
    codes = collections.defaultdict(list)
    for sample in read_samples(data):
        if sample.label == "insecure":
            codes[sample.language].append(sample.code.rstrip("\n") + "\n")
    for language, pieces in sorted(codes.items()):
        for _ in range(count):
            text = ""
            while text.count("\n") < LINES:
                text += pick.choice(pieces)
            yield "\n".join(text.split("\n")[:LINES]), language


def milliseconds(sources: list[tuple[str, str]]) -> list[float]:
    """Processor time of each scan, the better of two, so that other programs' turns don't count."""
    for language in {language for _, language in sources}:
        scan("", language)
    found = []
    for text, language in sources:
        best = float("inf")
        for _ in range(2):
            start = time.thread_time()
            guard.scan_code(text, language)
            best = min(best, time.thread_time() - start)
        found.append(1000 * best)
    return sorted(found)


def noise(files: list[Path]) -> tuple[int, list[tuple[Path, guard.Finding, str]]]:
    """Lines, and the findings with file and line of code."""
    lines = 0
    found = []
    for file in files:
        source = file.read_text("utf-8", "replace")
        lines += source.count("\n")
        found += [(file, f, source.split("\n")[f.line - 1].strip()) for f in guard.scan_code(source, "python")]
    return lines, found


def attack(sources: Iterator[tuple[str, str | None]]) -> tuple[int, float, int]:
    """Scans, the longest one's seconds of processor time, and how many went over their limit. A crash is not caught."""
    count, longest, over = 0, 0.0, 0
    for text, language in sources:
        start = time.thread_time()
        guard.scan_code(text, language)
        spent = time.thread_time() - start
        count += 1
        longest = max(longest, spent)
        if spent > SECONDS:
            over += 1
            print(f"{spent:.1f} s: {language} {text[:60]!r} ({len(text)})", file=sys.stderr)
    return count, longest, over


def main() -> None:
    parser = rows.parser(__doc__)
    parser.add_argument("--data", type=Path, help="folder with CyberSecEval's insecure code")
    parser.add_argument("--hostile", type=int, default=10_000, help="hostile inputs")
    parser.add_argument("--seed", type=int, default=0, help="of the hostile inputs")
    parser.add_argument("--show", action="store_true", help="print every finding in the code that is in use")
    options = parser.parse_args()
    table = []
    samples = [("no fault", list(benign())), ("rules' own examples, good and bad", list(faulty()))]
    if options.data is not None:
        samples.insert(1, ("insecure code in use", list(in_use(options.data))))
    for what, sources in samples:
        times = milliseconds(sources)
        p95 = times[int(0.95 * (len(times) - 1))]
        size = statistics.mean(len(text) for text, _ in sources) / 1000
        found = statistics.mean(len(guard.scan_code(*source)) for source in sources)
        shape = f"{LINES} lines, {what}: {size:.0f} kB, {found:.1f} findings"
        table.append(f"| {shape} | {len(times)} | {statistics.median(times):.1f} ms | {p95:.1f} ms | - |")
    for name, files in (("standard library", library()), *((name, package(name)) for name in PACKAGES)):
        lines, found = noise(files)
        share = f"{1000 * len(found) / max(lines, 1):.2f} per 1,000 lines"
        table.append(f"| {name}: findings | {lines} lines | {len(found)} | {share} | - |")
        for file, f, line in found if options.show else []:
            print(f"{file.name}:{f.line} {f.rule} {f.confidence} | {line[:100]}")
    for what, sources in (
        (f"hostile inputs, seed {options.seed}", hostile(options.hostile, options.seed)),
        ("5 MB", giants()),
    ):
        count, longest, over = attack(sources)
        table.append(f"| {what} | {count} | longest {longest:.2f} s | no crash | {over} over {SECONDS} s |")
    print("\n".join(table))
    rows.write_rows(
        Path(__file__), "Code guard: speed, noise, hostile input", table, rows.machine() + ", one thread",
        columns=("what", "number", "median or count", "95th percentile or rate", "limit"), document=options.document,
    )  # fmt: skip


if __name__ == "__main__":
    main()
