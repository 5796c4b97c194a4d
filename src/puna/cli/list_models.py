"""`puna list`: the family in one table."""

import json
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from puna.family.arithmetic import member_parameters, weight_bytes
from puna.family.members import MEMBERS

NOT_PUBLISHED = "not published"


def list_models(as_json: bool = typer.Option(False, "--json", help="Print JSON for scripts.")) -> None:
    """List the Llama family: sizes, context, licence.

    Example: puna list --json
    """
    rows = []
    for member in MEMBERS:
        parameters = member_parameters(member)
        rows.append({
            "name": member.name,
            "title": member.title,
            "kind": member.kind,
            "parameters": parameters.total if parameters else None,
            "active_text_parameters": parameters.active_text if parameters else None,
            "bfloat16_bytes": weight_bytes(parameters.total, "bfloat16") if parameters else None,
            "context": member.context_length,
            "inputs": list(member.inputs),
            "licence": member.licence,
            "released": member.released,
        })
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        _print_table(rows)


def _print_table(rows: list[dict[str, Any]]) -> None:
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0), caption_justify="left",
                  caption="Active: what one text token meets. -: not published. More: puna show NAME")  # fmt: skip
    for title, right in (("Name", False), ("Total", True), ("Active", True), ("bfloat16", True), ("Context", True),
                         ("Input", False), ("Licence", False), ("Released", False)):  # fmt: skip
        table.add_column(title, justify="right" if right else "left", no_wrap=title not in ("Total", "Input"))
    for row in rows:
        table.add_row(
            row["name"],
            short_count(row["parameters"]),
            *(_or_dash(cell) for cell in (
                short_count(row["active_text_parameters"]),
                short_bytes(row["bfloat16_bytes"]),
                short_tokens(row["context"]),
            )),
            ", ".join(row["inputs"]),
            row["licence"] or "-",
            row["released"][:7] if row["released"] else "-",
        )
    new_console().print(table)


def _or_dash(cell: str) -> str:
    return "-" if cell == NOT_PUBLISHED else cell


def new_console() -> Console:
    """A console that is at least 100 columns wide where the output goes to a file or a pipe."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 100)
    return console


def short_count(number: int | None) -> str:
    """A parameter count in billions or millions: 8.03B, 71M. None: not published."""
    if number is None:
        return NOT_PUBLISHED
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.3g}M"


def short_bytes(number: int | None) -> str:
    """Bytes in decimal units with three or four figures: 16.1 GB. None: not published."""
    if number is None:
        return NOT_PUBLISHED
    value, unit = float(number), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def short_tokens(number: int | None) -> str:
    """A context length as it is usually said: 8K, 128K, 1M (powers of two). None: not published."""
    if number is None:
        return NOT_PUBLISHED
    if number % 1024**2 == 0:
        return f"{number // 1024**2}M"
    return f"{number // 1024}K" if number % 1024 == 0 else f"{number:,}"
