"""What the code guard and its peers find in insecure, vulnerable and mended code, in both halves of the data.

Peers are slow (Code Shield takes half a second a sample and more), so their outcomes are kept in --outcomes and taken
from there where a sample was judged before; Code Shield judges one sample in --share.
"""

import hashlib
import json
import sys
from pathlib import Path

import rows

from puna.evaluate.code_guard import PEERS, Outcome, latency, run_peer, run_puna, table
from puna.evaluate.samples import Sample, read_samples

STEP = 60  # samples of a peer that are judged and kept at once


def kept(path: Path, peer: str, samples: list[Sample], python: str) -> list[Outcome]:
    """The peer's outcomes: those in the file, then the rest, which are added to it."""
    known = {}
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        name, key, label, found, seconds = json.loads(line)
        known[name, key, label] = (None if found is None else tuple(found), seconds)
    missing = [s for s in samples if (peer, s.id, s.label) not in known]
    for at in range(0, len(missing), STEP):
        outcomes = run_peer(peer, missing[at : at + STEP], python)
        with path.open("a", encoding="utf-8") as file:
            for o in outcomes:
                known[peer, o.sample.id, o.sample.label] = (o.found, o.seconds)
                file.write(json.dumps([peer, o.sample.id, o.sample.label, o.found, o.seconds]) + "\n")
    return [Outcome(s, *known[peer, s.id, s.label]) for s in samples]


def main() -> None:
    parser = rows.parser(__doc__)
    parser.add_argument("data", type=Path, help="file or folder of labelled code")
    parser.add_argument("--peers", default=sys.executable, help="the interpreter that has the peers installed")
    parser.add_argument("--outcomes", type=Path, default=Path("peer-outcomes.jsonl"), help="peers' outcomes, kept")
    parser.add_argument("--share", type=int, default=6, help="Code Shield judges one sample in so many")
    parser.add_argument("--half", choices=("development", "held-out", "both"), default="both")
    options = parser.parse_args()
    samples = [s for s in read_samples(options.data) if options.half in ("both", s.half)]
    part = [s for s in samples if hashlib.sha256(s.id.encode()).digest()[1] % options.share == 0]
    runs = {"puna": run_puna(samples)}
    for peer in PEERS:
        runs[peer] = kept(options.outcomes, peer, part if peer == "codeshield" else samples, options.peers)
    shares = {(r.half, r.what, e): r.as_dict() for e, outcomes in runs.items() for r in table(e, outcomes)}
    lines = []
    for half, what in dict.fromkeys((half, what) for half, what, _ in shares):
        cells = [shares.get((half, what, engine)) for engine in runs]
        shown = [f"{c['share']:.1%} ({c['low']:.1%} to {c['high']:.1%}; n {c['total']})" if c else "-" for c in cells]
        lines.append(f"| {what} | {half} | {' | '.join(shown)} |")
    times = [latency(outcomes) for outcomes in runs.values()]
    lines.append(f"| ms a sample: median, 95 % | | {' | '.join(f'{a:.1f}, {b:.1f}' for a, b in times)} |")
    print("\n".join(lines))
    rows.write_rows(
        Path(__file__), "Code guard against its peers", lines, rows.machine(), columns=("what", "half", *runs),
        notes=f"Shares with 95 % intervals (Wilson). Code Shield judged one sample in {options.share}, with its broken "
        "`--project-root /` taken out (with it, its semgrep rules find nothing). bandit knows Python only.",
        document=options.document,
    )  # fmt: skip


if __name__ == "__main__":
    main()
