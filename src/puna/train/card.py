"""The model card of a run, made from its lineage record, with what the base's licence asks for."""

import csv
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LICENCE_FILES = ("LICENSE*", "USE_POLICY*", "Notice*", "NOTICE*")
CARD = """---
{header}
---

# {name}

{badge}{made} {parameters:,} parameters, from base `{base}`.

| | |
|---|---|
| method | {method} |
| steps | {steps:,} |
| tokens seen | {tokens:,} |
| last training loss | {loss} nats a token |
{scores}| data | {data} |

`lineage.json` has the hashes of base, data and result, the whole configuration, and the records of what this was made
from; `metrics.csv` has every step and `curves.png` their picture.
{use}{licence}"""
ADAPTER = """
```
puna serve {base} --adapter FOLDER
puna export FOLDER --out {name}.gguf --format gguf
```
"""
LICENCE = """
## Licence

{notice}

Whoever passes this on gives a copy of the agreement and the file `Notice` along, shows "{badge}" prominently, and keeps
a name that begins with "{prefix}". {files}
"""


def write_card(out: Path, record: Mapping[str, Any], base: Path) -> None:
    """Write README.md, and the licence's files where there are any, into a finished run's folder, from its record and
    its metrics.csv. `base`: where the base's own files lie."""
    with (out / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    copied = _copy_licence(base, out)
    licence = record["licence"]
    method = record["method"]["method"]
    scored = {name: [row[name] for row in rows if row.get(name)] for name in record["scores"]}
    lines = [f"| {name} | {float(values[-1]):.4f} |\n" for name, values in scored.items() if values]
    badge = licence.get("badge")
    text = CARD.format(
        header=_header(record),
        name=record["name"],
        badge=f"**{badge}**\n\n" if badge else "",
        made=f"Trained with `puna {'train' if method == 'pretrain' else 'tune'}`.",
        parameters=record["parameters"],
        base=record["base"]["name"],
        method=method,
        steps=int(rows[-1]["step"]),
        tokens=int(rows[-1]["tokens"]),
        loss=rows[-1]["loss"],
        scores="".join(lines),
        data=", ".join(record["data"]),
        use=ADAPTER.format(base=record["base"]["name"], name=record["name"]) if record["kind"] == "adapter" else "",
        licence=_licence(licence, copied),
    )
    (out / "README.md").write_text(text, encoding="utf-8")
    if licence.get("notice"):
        (out / "Notice").write_text(licence["notice"] + "\n", encoding="utf-8")


def _header(record: Mapping[str, Any]) -> str:
    """The hub's YAML: licence, base, and how this relates to it."""
    base, licence = record["base"], record["licence"]
    lines = ["library_name: " + ("peft" if record["kind"] == "adapter" else "transformers"),
             "pipeline_tag: text-generation", "tags: [puna]"]  # fmt: skip
    if licence.get("id"):
        lines.append(f"license: {licence['id']}")
    if not base.get("fresh"):
        relation = "adapter" if record["kind"] == "adapter" else "finetune"
        lines += [f"base_model: {base['name']}", f"base_model_relation: {relation}"]
    return "\n".join(lines)


def _licence(licence: Mapping[str, Any], copied: list[str]) -> str:
    if licence.get("notice"):
        files = f"Copied from the base: {', '.join(copied)}." if copied else "Add the agreement, which the base lacks."
        return LICENCE.format(notice=licence["notice"], badge=licence.get("badge") or "the licence",
                              prefix=licence.get("name_prefix") or "what you like", files=files)  # fmt: skip
    prefix = licence.get("name_prefix")
    return (
        f'\nIts data were written by a Llama: names of models made with it begin with "{prefix}".\n' if prefix else ""
    )


def _copy_licence(base: Path, out: Path) -> list[str]:
    folder = base if base.is_dir() else base.parent
    found = sorted({file for pattern in LICENCE_FILES for file in folder.glob(pattern) if file.is_file()})
    for file in found:
        shutil.copyfile(file, out / file.name)
    return [file.name for file in found]
