"""Findings as SARIF 2.1.0 (OASIS), which code hosts and editors read."""

from typing import Any
from urllib.parse import quote

from puna.guard.code.finding import Finding

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
RANK = {"low": 30.0, "medium": 60.0, "high": 90.0}


def sarif(findings: list[Finding], version: str) -> dict[str, Any]:
    """One run with its rules and results; what a person has allowed is there too, as suppressed with the reason."""
    rules: dict[str, dict[str, Any]] = {}
    for f in findings:
        number = f.cwe.removeprefix("CWE-")
        rules.setdefault(f.rule, {
            "id": f.rule,
            "shortDescription": {"text": f.message},
            "fullDescription": {"text": f.why or f.message},
            "help": {"text": f.fix},
            "helpUri": f"https://cwe.mitre.org/data/definitions/{number}.html",
            "properties": {"tags": ["security", f"external/cwe/cwe-{number}"]},
        })  # fmt: skip
    order = list(rules)
    driver = {
        "name": "puna", "version": version, "informationUri": "https://pypi.org/project/puna/",
        "rules": list(rules.values()),
    }  # fmt: skip
    results = [_result(f, order.index(f.rule)) for f in findings]
    run = {"tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "results": results}
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def _result(f: Finding, index: int) -> dict[str, Any]:
    result: dict[str, Any] = {
        "ruleId": f.rule,
        "ruleIndex": index,
        "level": f.severity,
        "rank": RANK[f.confidence],
        "message": {"text": f"{f.message} {f.fix}"},
        "locations": [_location(f.path, f.line, f.column, f.end_line, f.end_column)],
    }
    if f.trace:
        result["relatedLocations"] = [
            {**_location(f.path, line, 1, line, 1), "message": {"text": f"comes from {text}"}} for line, text in f.trace
        ]
    if f.allowed:
        result["suppressions"] = [{"kind": "inSource", "justification": f.allowed}]
    return result


def _location(path: str, line: int, column: int, end_line: int, end_column: int) -> dict[str, Any]:
    region = {"startLine": line, "startColumn": column, "endLine": end_line, "endColumn": max(end_column, 1)}
    return {
        "physicalLocation": {
            "artifactLocation": {"uri": _address(path)},
            "region": region,
        }
    }


def _address(path: str) -> str:
    """A file's path, and the part of it after `.ipynb#`, as a relative address."""
    file, cell, part = path.replace("\\", "/").partition(".ipynb#cell-")
    return quote(file, safe="/@!$&'()*+,;=~") + cell + quote(part)
