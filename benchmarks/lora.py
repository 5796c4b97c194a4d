"""Speed and peak memory of adapter tuning against PEFT, same weights, batch and updates: `python benchmarks/lora.py`.

The peer is what PEFT's examples run: transformers' model in bfloat16 with float32 adapters under bfloat16 autocast, and
all in float32; then clipping and AdamW. qlora: our base in four bits.
"""

from pathlib import Path

import torch
from training_contenders import Case, Stepper, arguments, compare, loaded_peer, our_steps, their_steps

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16


def ours(case: Case) -> Stepper:
    """puna's loop."""
    from puna.checkpoint.frozen import load_frozen
    from puna.checkpoint.source import load_source, open_source

    source, place = open_source(case.checkpoint), ("cpu", torch.bfloat16)
    loaded = load_frozen(source, *place, 4) if "qlora" in case.contender else load_source(source, *place)
    options = {"rank": RANK, "alpha": 2 * RANK, "targets": ["attention", "feed_forward"]}
    return our_steps(case, loaded.model, {"method": "lora", "options": options})


def theirs(case: Case) -> Stepper:
    """PEFT's adapters under transformers' model."""
    from peft import LoraConfig, get_peft_model

    base = loaded_peer(case, torch.bfloat16 if "bf16" in case.contender else torch.float32)
    adapters = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS)
    return their_steps(case, get_peft_model(base, adapters).train())


def main() -> None:
    """Measure, print and record."""
    args = arguments("Adapter tuning against PEFT", ["dense-25M", "dense-110M", "moe-45M"])
    makers = {"puna, lora": ours, "puna, qlora": ours, "PEFT": theirs, "PEFT, bf16": theirs}
    compare(Path(__file__), "Training adapters", f"LoRA of rank {RANK} at attention and feed-forward", makers, args)


if __name__ == "__main__":
    main()
