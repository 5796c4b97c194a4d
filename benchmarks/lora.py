"""Speed and peak memory of adapter tuning against PEFT, same weights, batch and updates: `python benchmarks/lora.py`.

The peer is what PEFT's examples run: transformers' model in bfloat16 with float32 adapters under bfloat16 autocast, and
all in float32; then clipping and AdamW. qlora: our base in four bits.
"""

from pathlib import Path

import numpy as np
import torch
from training_contenders import Case, Stepper, arguments, compare, loaded_peer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, RATE = 16, 1e-3


def ours(case: Case) -> Stepper:
    """puna's loop."""
    from puna.checkpoint.source import load
    from puna.model.frozen import FrozenLinear
    from puna.model.linear import Linear
    from puna.model.quantized import quantize
    from puna.train.config import TrainConfig
    from puna.train.loop import gradients
    from puna.train.method import Batch, Document, Example
    from puna.train.methods import METHODS
    from puna.train.optimizer import Optimizer
    from puna.train.roof import operations
    from puna.train.routing import Routing
    from puna.train.session import Session

    torch.set_flush_denormal(True)
    model = load(case.checkpoint, dtype=torch.bfloat16).model.train()
    if "qlora" in case.contender:
        for path, module in list(model.named_modules()):
            if path.startswith("layers.") and path.endswith("_proj") and isinstance(module, Linear):
                owner, _, name = path.rpartition(".")
                setattr(model.get_submodule(owner), name, FrozenLinear(quantize(module.weight.detach(), 4)))
    config = TrainConfig.model_validate({
        "method": "lora", "options": {"rank": RANK, "alpha": 2 * RANK, "targets": ["attention", "feed_forward"]},
        "steps": 10, "stages": [{"sources": [{"file": "-"}]}],
    })  # fmt: skip
    method = METHODS["lora"](config)
    method.prepare(model, 0)
    optimizer = Optimizer(dict(model.named_parameters()), muon=False, rate=RATE, clip=1.0)
    session = Session(config, model, None, method, None, optimizer, Routing(model, "none", 0.0))  # type: ignore[arg-type]
    counted = np.arange(case.length) > 0
    batch = Batch.of([Example((Document(ids.astype(np.uint32), counted),)) for ids in case.batch()], model.device)

    def step() -> float:
        loss, _ = gradients(session, [batch], 1.0)
        optimizer.step(1.0)
        return loss

    return Stepper(step, operations(session, [batch]))


def theirs(case: Case) -> Stepper:
    """PEFT's adapters under transformers' model."""
    from peft import LoraConfig, get_peft_model

    half = "bf16" in case.contender
    base = loaded_peer(case, torch.bfloat16 if half else torch.float32)
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS)).train()
    ids = torch.from_numpy(case.batch())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return Stepper(step)


def main() -> None:
    """Measure, print and record."""
    args = arguments("Adapter tuning against PEFT", ["dense-25M", "dense-110M", "moe-45M"])
    makers = {"puna, lora": ours, "puna, qlora": ours, "PEFT": theirs, "PEFT, bf16": theirs}
    compare(Path(__file__), "Training adapters", f"LoRA of rank {RANK} at attention and feed-forward", makers, args)


if __name__ == "__main__":
    main()
