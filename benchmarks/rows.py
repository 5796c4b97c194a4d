"""Rows of docs/benchmarks.md: each script owns one section, which it replaces."""

import datetime
import os
import platform
import re
from pathlib import Path

import torch

DOCUMENT = Path(__file__).parents[1] / "docs" / "benchmarks.md"


def machine() -> str:
    """The conditions of a measurement, in a line."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*: (.*)", info.read_text())):
        cpu = found[1]
    return f"{cpu}, {os.cpu_count()} cores, torch {torch.__version__}, {datetime.date.today()}"


def write_rows(script: Path, title: str, rows: list[str], conditions: str) -> None:
    """Replace the script's section of the document."""
    name = script.name
    section = "\n".join([
        f"<!-- {name} -->", f"## {title}", "", f"`python benchmarks/{name}`. {conditions}; medians, interleaved.", "",
        "| what | ours | peer | ratio | share |", "|---|---|---|---|---|", *rows, f"<!-- end {name} -->",
    ])  # fmt: skip
    text = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else "# Benchmarks\n"
    pattern = re.compile(f"<!-- {re.escape(name)} -->.*?<!-- end {re.escape(name)} -->", re.DOTALL)
    text = pattern.sub(lambda _: section, text) if pattern.search(text) else f"{text.rstrip()}\n\n{section}\n"
    DOCUMENT.write_text(text, encoding="utf-8")
