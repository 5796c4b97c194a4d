"""`puna guard`: judge code before a person runs it."""

import json
import sys
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="rich", help="Judge what goes in and comes out."
)


@app.callback()
def _root() -> None:
    """Judge what goes in and comes out: insecure code."""


@app.command("code", no_args_is_help=True, epilog="Example: puna guard code src/")
def code(
    source: str = typer.Argument(
        ...,
        metavar="FILE|FOLDER|-",
        help="A file, a folder (every file in a known language below it), or - for standard input.",
    ),
    language: str | None = typer.Option(
        None, "--language", "-l", help="The language; by default told from the file's ending."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print the findings as a JSON list."),
) -> None:
    """Find insecure code: what is wrong, where, why, and how to mend it. Nothing is run or downloaded."""
    from puna.errors import PunaError
    from puna.guard.code import scan_path, scan_text

    if source == "-":
        findings = scan_text(sys.stdin.read(), language, path="-")
        texts: dict[str, list[str]] = {}
    else:
        path = Path(source)
        if not path.exists():
            raise PunaError(f"{source}: no such file or folder.")
        findings, texts = scan_path(path, language)
    if as_json:
        typer.echo(json.dumps([finding.as_dict() for finding in findings], indent=2))
        return
    console = Console(highlight=False)
    for finding in findings:
        colour = "red" if finding.severity == "error" else "yellow"
        where = f"{finding.path}:{finding.line}:{finding.column}"
        console.print(
            f"[bold]{escape(where)}[/] [{colour}]{finding.severity}[/] {escape(finding.message)} "
            f"[dim]({finding.cwe}, {finding.rule}, {finding.confidence} confidence)[/]"
        )
        if finding.path in texts:
            console.print(f"    [dim]{finding.line:>5} |[/] {escape(texts[finding.path][finding.line - 1].strip())}")
        console.print(f"    fix: {escape(finding.fix)}")
    errors = sum(f.severity == "error" for f in findings)
    console.print(f"{errors} errors, {len(findings) - errors} warnings" if findings else "Nothing found.")
