"""Training speed and peak memory against transformers, same weights, batch and machine: `python benchmarks/train.py`.

The peer's loop is what its Trainer does in a step: forward with labels, backward, clipping, AdamW (fused), zero_grad;
in float32, the Trainer's default, and under bfloat16 autocast (`bf16=True`).
"""

from pathlib import Path

import numpy as np
import torch
from training_contenders import SHAPES, Case, Stepper, arguments, compare, loaded_peer

RATE = 1e-3


def ours(case: Case) -> Stepper:
    """puna's loop."""
    from puna.checkpoint.source import load
    from puna.train.config import TrainConfig
    from puna.train.loop import gradients
    from puna.train.method import Batch, Document, Example
    from puna.train.methods import Full
    from puna.train.optimizer import Optimizer
    from puna.train.plan import forecast
    from puna.train.roof import operations
    from puna.train.routing import Routing
    from puna.train.session import Session

    torch.set_flush_denormal(True)
    model = load(case.checkpoint, dtype=torch.bfloat16).model.train()
    config = TrainConfig.model_validate({
        "method": "full", "steps": 10, "recompute": "recompute" in case.contender,
        "stages": [{"sources": [{"file": "-"}]}],
    })  # fmt: skip
    method = Full(config)
    method.prepare(model, 0)
    optimizer = Optimizer(dict(model.named_parameters()), muon=False, rate=RATE, clip=1.0)
    session = Session(config, model, None, method, None, optimizer, Routing(model, "none", 0.0))  # type: ignore[arg-type]
    counted = np.arange(case.length) > 0
    batch = Batch.of([Example((Document(ids.astype(np.uint32), counted),)) for ids in case.batch()], model.device)

    def step() -> float:
        loss, _ = gradients(session, [batch], 1.0)
        optimizer.step(1.0)
        return loss

    return Stepper(step, operations(session, [batch]), forecast(session, [batch]).total)


def theirs(case: Case) -> Stepper:
    """transformers' Trainer."""
    model = loaded_peer(case, torch.float32)
    ids = torch.from_numpy(case.batch())
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    autocast = "bf16" in case.contender

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return Stepper(step)


def main() -> None:
    """Measure, print and record."""
    args = arguments("Training speed and memory against transformers", [*SHAPES])
    makers = {"puna": ours, "puna, recompute": ours, "transformers": theirs, "transformers, bf16": theirs}
    compare(Path(__file__), "Training all weights", "A whole step: forward, backward, clipping, AdamW", makers, args)


if __name__ == "__main__":
    main()
