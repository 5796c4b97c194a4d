"""A Scout-like expert layer, ours against transformers', in one run: `python benchmarks/experts.py`.

Interleaved repetitions, medians. FLOP counted = 2 * 3 * D * F * tokens * (1 routed + 1 shared) + router: what top-1
needs. The roof is this machine's own rate for one large matrix product of the same dtype, measured in the same run.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rows import machine, parser, write_rows
from transformers import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from puna.family.config import ModelConfig
from puna.model.feedforward import MixtureOfExperts


def seconds(function: Callable[..., object], *arguments: object) -> float:
    """Wall time of one call."""
    begun = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - begun


def layers(width: int, hidden: int, experts: int, dtype: torch.dtype) -> tuple[MixtureOfExperts, Llama4TextMoe]:
    """Our layer and transformers' with the same random weights."""
    config = ModelConfig(
        architecture="llama4", vocab_size=8, hidden_size=width, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=64,
        intermediate_size=hidden, context_length=8, num_experts=experts, expert_intermediate_size=hidden,
        moe_layers=(0,),
    )  # fmt: skip
    ours = MixtureOfExperts(config)
    theirs = Llama4TextMoe(
        Llama4TextConfig(hidden_size=width, intermediate_size=hidden, num_local_experts=experts, num_experts_per_tok=1)
    )
    theirs.load_state_dict(ours.state_dict())
    return ours.to(dtype).eval(), theirs.to(dtype).eval()


@torch.no_grad()
def main() -> None:
    """Measure, print and record one row a dtype."""
    arguments = parser("Experts against transformers")
    for name, value in (("width", 1024), ("hidden", 1024), ("experts", 16), ("tokens", 2048), ("repeats", 9)):
        arguments.add_argument(f"--{name}", type=int, default=value)
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = layers(args.width, args.hidden, args.experts, dtype)
        x = torch.randn(1, args.tokens, args.width, dtype=dtype)
        expected = theirs(x)
        expected = (expected[0] if isinstance(expected, tuple) else expected).view_as(x)
        gap = (ours(x) - expected).abs().max().item() / expected.abs().max().item()
        square = torch.randn(2048, 2048, dtype=dtype)
        times = [(seconds(ours, x), seconds(theirs, x), seconds(torch.mm, square, square))
                 for _ in range(args.repeats)]  # fmt: skip
        mine, peer, roof = (statistics.median(column) for column in zip(*times, strict=True))
        flop = 2 * args.tokens * args.width * (3 * args.hidden * 2 + args.experts)
        share = (flop / mine) / (2 * 2048**3 / roof)
        name = str(dtype).removeprefix("torch.")
        print(f"{name}: ours {mine * 1e3:.1f} ms, transformers {peer * 1e3:.1f} ms, ratio {peer / mine:.2f}x, "
              f"{flop / mine / 1e9:.0f} GFLOP/s = {share:.0%} of the roof, largest relative difference {gap:.1e}")
        rows.append(f"| expert layer D{args.width} F{args.hidden} E{args.experts}, {args.tokens} tokens, {name} | "
                    f"{mine * 1e3:.1f} ms | {peer * 1e3:.1f} ms | {peer / mine:.2f}x | {share:.0%} of matrix roof |")
    write_rows(Path(__file__), "Sparse experts against transformers' Llama4TextMoe", rows,
               f"{machine()}; medians, interleaved", document=args.document)  # fmt: skip


if __name__ == "__main__":
    main()
