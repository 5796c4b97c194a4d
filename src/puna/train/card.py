"""The model card of a run, made from its lineage record."""

import csv
from pathlib import Path
from typing import Any

CARD = """---
library_name: puna
pipeline_tag: text-generation
---

# {name}

Trained with `puna train`. {parameters:,} parameters, from base `{base}`.

| | |
|---|---|
| steps | {steps:,} |
| tokens seen | {tokens:,} |
| last training loss | {loss} nats a token |
| held-out | {heldout} |
| data | {data} |

`lineage.json` has the hashes of base and data and the whole configuration, `metrics.csv` every step and
`curves.png` their picture.
"""


def write_card(out: Path, record: dict[str, Any]) -> None:
    """Write README.md into a finished run's folder, from its record and its metrics.csv."""
    with (out / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    scored = [row["heldout_bpb"] for row in rows if row.get("heldout_bpb")]
    card = CARD.format(
        name=out.resolve().name,
        parameters=record["parameters"],
        base=record["base"]["name"],
        steps=int(rows[-1]["step"]),
        tokens=int(rows[-1]["tokens"]),
        loss=rows[-1]["loss"],
        heldout=f"{float(scored[-1]):.4f} bits per byte" if scored else "not scored",
        data=", ".join(record["data"]),
    )
    (out / "README.md").write_text(card, encoding="utf-8")
