"""Training speed and peak memory against transformers, same weights, batch and machine: `python benchmarks/train.py`.

The peer's loop is what its Trainer does in a step: forward with labels, backward, clipping, AdamW (fused), zero_grad;
in float32, the Trainer's default, and under bfloat16 autocast (`bf16=True`).
"""

from pathlib import Path

import torch
from training_contenders import SHAPES, Case, Stepper, arguments, compare, loaded_peer, our_steps, their_steps


def ours(case: Case) -> Stepper:
    """puna's loop."""
    from puna.checkpoint.source import load

    model = load(case.checkpoint, dtype=torch.bfloat16).model
    return our_steps(case, model, {"method": "full", "recompute": "recompute" in case.contender})


def theirs(case: Case) -> Stepper:
    """transformers' Trainer."""
    return their_steps(case, loaded_peer(case, torch.float32))


def main() -> None:
    """Measure, print and record."""
    args = arguments("Training speed and memory against transformers", [*SHAPES])
    makers = {"puna": ours, "puna, recompute": ours, "transformers": theirs, "transformers, bf16": theirs}
    compare(Path(__file__), "Training all weights", "A whole step: forward, backward, clipping, AdamW", makers, args)


if __name__ == "__main__":
    main()
