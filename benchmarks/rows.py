"""Rows of docs/benchmarks.md: each script owns one section, which it replaces."""

import argparse
import datetime
import os
import platform
import re
import shlex
import sys
from pathlib import Path

import torch

DOCUMENT = Path(__file__).parents[1] / "docs" / "benchmarks.md"
COLUMNS = ("what", "ours", "peer", "ratio", "share")


def parser(description: str) -> argparse.ArgumentParser:
    """Arguments that every script has."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    result.add_argument("--document", type=Path, default=DOCUMENT, help="where the rows go")
    result.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of every engine")
    return result


def machine() -> str:
    """The conditions of a measurement, in a line."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*: (.*)", info.read_text())):
        cpu = found[1]
    return f"{cpu}, {os.cpu_count()} cores, torch {torch.__version__}, {datetime.date.today()}"


def command(script: Path) -> str:
    """How this run was started, without places that only this machine has."""
    arguments = sys.argv[1:]
    for option in ("--document", "--llama-server", "--resume", "--outcomes"):
        if option in arguments:
            at = arguments.index(option)
            arguments = arguments[:at] + arguments[at + 2 :]
    return shlex.join(["python", f"benchmarks/{script.name}", *arguments])


def write_rows(script: Path, title: str, rows: list[str], conditions: str, *, columns: tuple[str, ...] = COLUMNS,
               notes: str = "", document: Path = DOCUMENT) -> None:  # fmt: skip
    """Replace the script's section of the document: command and conditions, `notes` (formulas), the table."""
    name = script.name
    section = "\n".join([
        f"<!-- {name} -->", f"## {title}", "", f"`{command(script)}`. {conditions}.", "",
        *([notes, ""] if notes else []), f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *rows,
        f"<!-- end {name} -->",
    ])  # fmt: skip
    text = document.read_text(encoding="utf-8") if document.exists() else "# Benchmarks\n"
    pattern = re.compile(f"<!-- {re.escape(name)} -->.*?<!-- end {re.escape(name)} -->", re.DOTALL)
    text = pattern.sub(lambda _: section, text) if pattern.search(text) else f"{text.rstrip()}\n\n{section}\n"
    document.write_text(text, encoding="utf-8")
