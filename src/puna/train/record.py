"""What a finished run leaves beside its result: the lineage record, and logits that every export must reproduce."""

import platform
from pathlib import Path
from typing import Any

import torch

from puna.checkpoint.lineage import hashes, make_record, model_files, read_record
from puna.checkpoint.peft import is_adapter
from puna.checkpoint.recorded import Recorded
from puna.train.base import WEIGHTS
from puna.train.config import TrainConfig
from puna.train.read import data_files
from puna.train.session import Session
from puna.train.terms import Terms, named, prefix_of

PROMPTS, LONGEST = 8, 64  # of the data whose logits are recorded, and tokens of each


def authors_of(config: TrainConfig) -> list[str]:
    """The models that wrote data of a run."""
    sources = (source for stage in config.stages for source in stage.sources)
    return sorted({source.outputs_of for source in sources if source.outputs_of})


def run_record(session: Session, name: str, base: Path, terms: Terms, data: Path, out: Path,
               compute: dict[str, Any], scores: list[str]) -> dict[str, Any]:  # fmt: skip
    """The lineage record of a run whose result lies in `out`. name: of the base, as the user gave it."""
    config, model = session.config, session.model
    sources = sorted({data / source.file for stage in config.stages for source in stage.sources})
    prefix = prefix_of(terms, authors_of(config))
    parent = read_record(base)
    own = model_files(base)
    fresh = not any(file.suffix in WEIGHTS for file in own)
    return make_record(
        kind="adapter" if is_adapter(out) else "weights",
        name=named(out.resolve().name, prefix),
        base={"name": name, "files": hashes(own), **({"fresh": True} if fresh else {})},
        data=hashes([file for path in sources for file in data_files(path)]),
        method=config.model_dump(mode="json"),
        compute={"threads": torch.get_num_threads(), "device": str(model.device), "machine": platform.machine(),
                 "torch": torch.__version__, **compute},
        licence=terms.as_record(prefix),
        files=hashes(model_files(out)),
        parents=[parent] if parent else [],
        parameters=sum(p.numel() for p in model.parameters()),
        trained=session.trained,
        scores=scores,
    )  # fmt: skip


@torch.no_grad()
def recorded(session: Session) -> Recorded:
    """The model's logits after beginnings of its own data."""
    model = session.model
    prompts: list[list[int]] = []
    step = 0
    while len(prompts) < PROMPTS and step < session.config.steps:
        for example in session.order.examples(step):
            ids = example.documents[0].tokens[:LONGEST].tolist() if example.documents else []
            if len(ids) > 1 and ids not in prompts and len(prompts) < PROMPTS:
                prompts.append(ids)
        step += 1
    last = torch.tensor([-1], device=model.device)
    rows = [model(torch.tensor([ids], device=model.device), rows=last)[0, -1].float().cpu() for ids in prompts]
    return Recorded(prompts, torch.stack(rows), str(model.dtype).removeprefix("torch."))
