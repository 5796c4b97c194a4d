"""The comparison of the code guard with its peers: what is counted, the halves, the intervals, a peer's process."""

import json
import lzma
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from puna.cli.evaluate import app
from puna.errors import PunaError
from puna.evaluate import code_guard
from puna.evaluate.code_guard import Outcome, Row, latency, run_peer, run_puna, table
from puna.evaluate.intervals import wilson
from puna.evaluate.samples import HALVES, Sample, half, read_samples

BAD = "import os\ndef f(x):\n    os.system('ls ' + x)\n"
GOOD = "def f(x):\n    return x\n"
ROWS = [
    *({"id": f"a-{i}", "language": "python", "cwe": "CWE-78", "code": BAD if i % 2 else GOOD} for i in range(20)),
    *(
        {
            "id": f"s-{i}",
            "language": "python",
            "cwe": "CWE-78",
            "vulnerable": BAD,
            "fixed": GOOD,
            "origin": {"commit": "c"},
        }
        for i in range(3)
    ),
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    with lzma.open(tmp_path / "rows.jsonl.xz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "prompts.jsonl").write_text('{"id": "x", "text": "hello"}\n')  # of another kind: left alone
    return tmp_path


def test_samples_and_halves(data: Path) -> None:
    samples = read_samples(data)
    assert len(samples) == 20 + 6
    assert len({s.half for s in samples if s.label != "insecure"}) == 1  # one commit, one half
    assert {s.half for s in samples} == set(HALVES)
    assert half("a-1") == half("a-1")


def test_the_table_counts_what_is_flagged(data: Path) -> None:
    samples = read_samples(data)
    rows = {(r.half, r.what): r for r in table("puna", run_puna(samples))}
    insecure = [s for s in samples if s.label == "insecure" and s.half == "development"]
    flagged = rows["development", "insecure, all: flagged"]
    assert (flagged.hits, flagged.total) == (sum(s.code == BAD for s in insecure), len(insecure))
    assert rows["development", "insecure, python: same CWE"].hits == flagged.hits
    pair = next(s.half for s in samples if s.label == "fixed")
    assert (rows[pair, "python: vulnerable flagged"].hits, rows[pair, "python: fixed flagged"].hits) == (3, 0)


def test_a_language_that_a_peer_does_not_know_is_left_out() -> None:
    sample = Sample("1", "insecure", "rust", "CWE-78", "", "development")
    assert table("peer", [Outcome(sample, None, 0.1)]) == []
    assert latency([Outcome(sample, None, 0.1), Outcome(sample, (), 0.002)]) == (2.0, 2.0)


@given(st.integers(0, 500), st.integers(1, 500))
def test_intervals(hits: int, more: int) -> None:
    total = hits + more
    low, high = wilson(hits, total)
    assert 0 <= low <= hits / total <= high <= 1
    wide_low, wide_high = wilson(hits * 100, total * 100)
    assert wide_high - wide_low < high - low
    mirrored = wilson(total - hits, total)
    assert mirrored == pytest.approx((1 - high, 1 - low))


def test_the_interval_of_wilson() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # as statsmodels' proportion_confint
    assert wilson(0, 0) == (0, 1)
    assert wilson(0, 161)[0] == 0  # exactly: rounding must not lift it above the share


def test_a_peer_runs_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Path) -> None:
    (tmp_path / "peer_worker.py").write_text(
        "import json, sys\n"
        "for line in sys.stdin:\n"
        "    row = json.loads(line)\n"
        "    print(json.dumps({'found': ['CWE-78'] if 'system' in row['code'] else [], 'seconds': 0.1}))\n"
    )
    monkeypatch.setattr(code_guard, "__file__", str(tmp_path / "code_guard.py"))
    samples = read_samples(data)
    outcomes = run_peer("codeshield", samples)
    assert [bool(o.found) for o in outcomes] == [s.code == BAD for s in samples]


def test_a_peer_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    samples = read_samples(data)
    with pytest.raises(PunaError, match="can't be started"):
        run_peer("bandit", samples, python="/no/such/python")
    monkeypatch.setitem(sys.modules, "bandit", None)
    with pytest.raises(PunaError, match=r"bandit stopped after 0 of 26 samples: .*pip install 'puna\[peers\]'"):
        run_peer("bandit", samples, python=sys.executable)


def test_command(data: Path) -> None:
    said = json.loads(CliRunner().invoke(app, ["code-guard", str(data), "--json", "--half", "development"]).stdout)
    assert {row["half"] for row in said["rows"]} == {"development"}
    shown = CliRunner().invoke(app, ["code-guard", str(data)])
    assert "insecure, all: flagged" in shown.stdout
    assert set(said["milliseconds"]) == {"puna"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no such file"),
        (["{data}/prompts.jsonl"], "no labelled code"),
        (["{data}", "--peer", "x"], "peers are"),
    ],
)
def test_mistakes(data: Path, arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["code-guard", *(a.format(data=data) for a in arguments)])
    assert isinstance(done.exception, PunaError)
    assert message in str(done.exception)


def test_a_row_of_the_table() -> None:
    assert Row("puna", "development", "x", 1, 4).as_dict()["share"] == 0.25
