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


@app.command(no_args_is_help=True, epilog="Example: puna evaluate retrieval cria --lengths 512,1024 --samples 4")
def retrieval(
    model: str = typer.Argument(..., help="Bundled name, hub id, folder or file."),
    lengths: str = typer.Option("1024,2048,4096", "--lengths", help="Tokens of the texts, with commas."),
    samples: int = typer.Option(8, "--samples", min=1, help="Texts of each length."),
    depths: int = typer.Option(5, "--depths", min=2, max=24, help="Facts in a text, from its beginning to its end."),
    text: Path | None = typer.Option(None, "--text", help="What to hide them in: rows of text, .txt or .md."),
    chat: bool = typer.Option(False, "--chat/--raw", help="Ask in a chat message, or let the text go on."),
    adapter: str | None = typer.Option(None, "--adapter", help="A PEFT adapter's folder, beside the weights."),
    device: str = typer.Option("cpu", "--device", help="Where to run, as torch names it."),
    quantize: str | None = typer.Option(None, "--quantize", help="Weights in int8 or int4; default: as stored."),
    seed: int = typer.Option(0, "--seed", help="Same seed and tokenizer, same questions."),
    picture: Path | None = typer.Option(None, "--picture", help="A PNG to write: length by depth."),
    as_json: bool = typer.Option(False, "--json", help="Print every cell as JSON."),
) -> None:
    """Hide numbers in a long text and ask for each: what share is found, by length and depth, with 95 % intervals.

    exact: the greedy answer is the number. chosen: of a text's numbers the right one gains most by being asked for.
    """
    from puna.engine import load
    from puna.errors import PunaError
    from puna.evaluate.retrieval import cells, draw, retrieve

    wanted = _numbers(lengths, "--lengths")
    llama = load(model, device=device, quantize=quantize, adapter=adapter)
    if llama.tokenizer is None:
        raise PunaError(f"{model} has no tokenizer; put tokenizer.json or tokenizer.model beside its weights")
    found = cells(retrieve(llama.decoder, llama.tokenizer, wanted, text=text, samples=samples, depths=depths,
                           chat=chat, seed=seed))  # fmt: skip
    if picture is not None:
        draw(found, picture)
    context = llama.config.context_length
    if as_json:
        facts = {"model": model, "adapter": adapter, "context": context, "seed": seed, "samples": samples}
        typer.echo(json.dumps({**facts, "cells": [cell.as_dict() for cell in found]}, indent=2))
        return
    shown = Table("tokens", "depth", "exact", "chosen", "margin, nats", title=f"by chance {1 / depths:.0%} is chosen")
    for cell in found:
        past = f" (past {context:,})" if cell.length > context else ""
        low, high = cell.margin_interval
        shown.add_row(
            f"{cell.length:,}{past}", "all" if cell.depth is None else f"{cell.depth:.0%}",
            *(f"{share:.0%} [dim]({lower:.0%} to {upper:.0%})[/]" for share, (lower, upper) in
              ((cell.exact, cell.exact_interval), (cell.chosen, cell.chosen_interval))),
            f"{cell.margin:.2f} [dim]({low:.2f} to {high:.2f})[/]", end_section=cell.depth is None,
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 140).print(shown)


@app.command(no_args_is_help=True, epilog="Example: puna evaluate positions cria novels.jsonl --edges 512,1024,2048")
def positions(
    model: str = typer.Argument(..., help="Bundled name, hub id, folder or file."),
    text: Path = typer.Argument(..., help="Rows of long texts, .txt or .md."),
    edges: str = typer.Option("512,1024,2048", "--edges", help="Where bands of positions end, with commas."),
    windows: int = typer.Option(32, "--windows", min=1, help="Most stretches of text to score."),
    adapter: str | None = typer.Option(None, "--adapter", help="A PEFT adapter's folder, beside the weights."),
    device: str = typer.Option("cpu", "--device", help="Where to run, as torch names it."),
    as_json: bool = typer.Option(False, "--json", help="Print the bands as JSON."),
) -> None:
    """Bits per byte of long texts by where in the context their tokens stand, with 95 % intervals."""
    from puna.engine import load
    from puna.errors import PunaError
    from puna.evaluate.haystack import read_texts
    from puna.evaluate.positions import bits_by_position

    wanted = _numbers(edges, "--edges")
    texts = read_texts(text)
    llama = load(model, device=device, adapter=adapter)
    if llama.tokenizer is None:
        raise PunaError(f"{model} has no tokenizer; put tokenizer.json or tokenizer.model beside its weights")
    bands = bits_by_position(llama.decoder, llama.tokenizer, texts, wanted, windows)
    if as_json:
        found = {"model": model, "adapter": adapter, "bands": [one.as_dict() for one in bands]}
        typer.echo(json.dumps(found, indent=2))
        return
    shown = Table("positions", "bits per byte", "windows")
    for one in bands:
        span = f" [dim]({one.interval[0]:.3f} to {one.interval[1]:.3f})[/]" if one.interval else ""
        shown.add_row(f"{one.first:,} to {one.last - 1:,}", f"{one.bits:.3f}{span}", str(one.windows))
    Console(width=None if sys.stdout.isatty() else 140).print(shown)


def _numbers(given: str, option: str) -> list[int]:
    from puna.errors import PunaError

    try:
        return [int(part) for part in given.split(",")]
    except ValueError:
        raise PunaError(f'{option} must be whole numbers with commas, as in "512,1024", not {given!r:.80}') from None
