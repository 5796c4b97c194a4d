"""`puna guard`: judge code before a person runs it."""

import json
import sys
from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from puna.guard.code import Finding

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="rich", help="Judge what goes in and comes out."
)
FAILED = 3  # exit code where --fail-on is reached


class FailOn(StrEnum):
    error = "error"
    warning = "warning"
    never = "never"


class Confidence(StrEnum):
    low = "low"
    medium = "medium"
    high = "high"


@app.callback(epilog="Example: puna guard code src/")
def _root() -> None:
    """Judge what goes in and comes out: insecure code."""


@app.command("code", no_args_is_help=True, epilog="Example: puna guard code src/ --fail-on error")
def code(
    source: str = typer.Argument(
        ...,
        metavar="FILE|FOLDER|-",
        help="A file, a folder (every file below whose name or #! line tells a known language), or -: standard input.",
    ),
    language: str | None = typer.Option(
        None, "--language", "-l", help="The language; by default told from the file's name, or from the text."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print the findings as a JSON list."),
    as_sarif: bool = typer.Option(False, "--sarif", help="Print a SARIF 2.1.0 report."),
    fail_on: FailOn = typer.Option(
        FailOn.never, "--fail-on", help="From which severity on the exit code is 3 (the verdict block)."
    ),
    confidence: Confidence = typer.Option(
        Confidence.medium, "--confidence", help="Findings that are less sure than this are left out."
    ),
    ignore: list[str] = typer.Option([], "--ignore", metavar="RULE", help="A rule to leave out; may be repeated."),
) -> None:
    """Find insecure code: what is wrong, where, why, and how to mend it. Nothing is run or downloaded.

    A line is allowed by a comment on it or before it: [bold]puna: allow RULE reason[/].
    """
    from puna import __version__
    from puna.errors import PunaError
    from puna.guard.code import Policy, sarif, scan_path, scan_text
    from puna.guard.code.files import bounded, read_text
    from puna.guard.code.policy import CONFIDENCE

    if as_json and as_sarif:
        raise PunaError("--json and --sarif: one report at a time.")
    if ignore:
        from puna.guard.code.rule import all_rules

        missing = sorted(set(ignore) - {rule.id for rule in all_rules()})
        if missing:
            raise PunaError(f"--ignore {missing[0]}: there is no such rule; docs/code-guard.md tells where they are.")
    findings: list[Finding] = []
    console = Console(highlight=False, soft_wrap=True)
    loud = not (as_json or as_sarif)
    files = unsure = 0
    skipped: Counter[str] = Counter()
    if source == "-":
        text = read_text(bounded(sys.stdin.buffer, "standard input"))
        scans = iter([(Path("-"), text, scan_text(text, language, path="-"))])
    elif Path(source).exists():
        scans = scan_path(Path(source), language, skipped)
    else:
        raise PunaError(f"{source}: no such file or folder.")
    for _, text, found in scans:
        files += 1
        found = [f for f in found if f.rule not in ignore]
        unsure += sum(CONFIDENCE.index(f.confidence) < CONFIDENCE.index(confidence.value) for f in found)
        found = [f for f in found if CONFIDENCE.index(f.confidence) >= CONFIDENCE.index(confidence.value)]
        findings += found
        for finding in found if loud else []:
            _print(console, finding, text)
    open_findings = [f for f in findings if not f.allowed]
    block = "error" if fail_on == FailOn.never else fail_on.value
    verdict = Policy(block=block, confidence=confidence.value).verdict(open_findings)
    if as_json:
        typer.echo(json.dumps([finding.as_dict() for finding in open_findings], indent=2))
    elif as_sarif:
        typer.echo(json.dumps(sarif(findings, __version__), indent=2))
    else:
        errors = sum(f.severity == "error" for f in open_findings)
        said = f"{errors} errors, {len(open_findings) - errors} warnings" if open_findings else "Nothing found"
        allowed = len(findings) - len(open_findings)
        console.print(f"{said} in {files} files{f', {allowed} allowed' if allowed else ''}. Verdict: {verdict}.")
        if skipped.total():
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()) if count)
            console.print(f"[dim]Not scanned: {reasons}.[/]")
        if unsure:
            console.print(f"[dim]{unsure} less sure findings are left out; --confidence low shows them.[/]")
    if verdict == "block" and fail_on != FailOn.never:
        raise typer.Exit(FAILED)


def _print(console: Console, finding: "Finding", text: str) -> None:
    colour = "dim" if finding.allowed else "red" if finding.severity == "error" else "yellow"
    where = f"{_visible(finding.path)}:{finding.line}:{finding.column}"
    console.print(
        f"[bold]{escape(where)}[/] [{colour}]{'allowed' if finding.allowed else finding.severity}[/] "
        f"{escape(finding.message)} [dim]({finding.cwe}, {finding.rule}, {finding.confidence} confidence)[/]"
    )
    lines = text.split("\n")
    if "#cell-" not in finding.path and " " not in finding.path and finding.line <= len(lines):
        console.print(f"    [dim]{finding.line:>5} |[/] {escape(_visible(lines[finding.line - 1].strip()[:200]))}")
    for line, origin in finding.trace:
        if line != finding.line:
            console.print(f"    [dim]{line:>5} : comes from {escape(_visible(origin))}[/]")
    console.print(
        f"    {'allowed: ' + escape(_visible(finding.allowed)) if finding.allowed else 'fix: ' + escape(finding.fix)}"
    )


def _visible(text: str) -> str:
    """Without what would steer the terminal: control characters, marks that turn the direction, lone surrogates."""
    return "".join(c if c.isprintable() or c == "\t" else ascii(c)[1:-1] for c in text)
