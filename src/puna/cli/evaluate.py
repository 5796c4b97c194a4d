"""`puna evaluate`: benchmarks and comparisons."""

import json
import sys
from enum import StrEnum
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich")


class Half(StrEnum):
    both = "both"
    development = "development"
    held_out = "held-out"


@app.callback(epilog="Example: puna evaluate code-guard guard-data/")
def _root() -> None:
    """Measure models and guards, with confidence intervals."""


@app.command("code-guard", no_args_is_help=True, epilog="Example: puna evaluate code-guard guard-data/")
def code_guard(
    data: Path = typer.Argument(
        ..., metavar="DATA", help="A JSONL file (plain or .xz) of labelled code, or a folder of them."
    ),
    peer: list[str] = typer.Option(
        [], "--peer", help="Compare with codeshield or bandit (pip install 'puna[peers]'); may be repeated."
    ),
    peers: str = typer.Option(
        sys.executable, "--peers", metavar="PYTHON", help="The interpreter that has the peers installed."
    ),
    half: Half = typer.Option(Half.both, "--half", help="Of the data, by the hash of each row."),
    as_json: bool = typer.Option(False, "--json", help="Print the table as JSON."),
) -> None:
    """Compare the code guard with its peers on insecure and mended code: how much of each is flagged."""
    from puna.errors import PunaError
    from puna.evaluate.code_guard import PEERS, latency, run_peer, run_puna, table
    from puna.evaluate.samples import read_samples

    unknown = [name for name in peer if name not in PEERS]
    if unknown:
        raise PunaError(f"--peer {unknown[0]}: the peers are {' and '.join(PEERS)}.")
    samples = [s for s in read_samples(data) if half == Half.both or s.half == half.value]
    runs = {"puna": run_puna(samples), **{name: run_peer(name, samples, peers) for name in peer}}
    rows = [row for engine, outcomes in runs.items() for row in table(engine, outcomes)]
    times = {engine: latency(outcomes) for engine, outcomes in runs.items()}
    if as_json:
        typer.echo(json.dumps({"rows": [row.as_dict() for row in rows], "milliseconds": times}, indent=2))
        return
    shown = Table("what", "half", *runs)
    for what, which in dict.fromkeys((row.what, row.half) for row in rows):
        cells = []
        for engine in runs:
            found = next((r.as_dict() for r in rows if (r.engine, r.half, r.what) == (engine, which, what)), None)
            cells.append(f"{found['share']:.1%} [dim]({found['low']:.1%} to {found['high']:.1%})[/]" if found else "-")
        shown.add_row(what, which, *cells)
    shown.add_row("ms a sample: median, 95 %", "", *(f"{p50:.1f}, {p95:.1f}" for p50, p95 in times.values()))
    Console(width=None if sys.stdout.isatty() else 140).print(shown)
