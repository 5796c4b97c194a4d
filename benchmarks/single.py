"""One request: prefill and decoding, ours against llama.cpp and transformers: `python benchmarks/single.py`.

Engines of the same bits are loaded together, each in its own process, and take turns. Decoding is compared with what
the machine can read, prefill with what torch's bfloat16 product reaches at the model's shapes, both measured here.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path

import roof
import shapes
import torch
from contenders import Contender, entries
from rows import machine, parser, write_rows

from puna.family.arithmetic import count_parameters, kv_bytes
from puna.family.config import ModelConfig

NOTES = (
    "Decode: tokens a second after the first; share = (bytes of the weights but a separate input embedding + keys and "
    "values of the middle position) x tokens/s / read roof: two threads of the C library's `memchr` over 1 GiB. What "
    "it gives changes from second to second ({low:.0f} to {best:.0f} GB/s), so each answer stands beside what was "
    "read just before and after it: the median of these shares, and the median speed's share of the best reading. "
    "Prefill: prompt / time to the first token; share = 2 x layer weights x tokens/s / product roof: torch's bfloat16 "
    "product at the model's shapes, {bf16:.2f} TFLOP/s (float32: {f32:.2f})."
)
READS = 4  # passes over 1 GiB before and after an answer; the best counts


@dataclass
class Figures:
    """Medians of one engine."""

    name: str
    weight_bytes: int
    prefill: float  # tokens a second
    decode: float
    reading: float  # decoded tokens a second over what the machine read beside them, bytes a second


def measure(
    contenders: list[Contender], ids: list[int], answer: int, repeats: int, reads: list[float]
) -> list[Figures]:
    """Every engine in turn, `repeats` times after a short warm-up; what was read from memory between joins `reads`."""
    times: dict[str, list[list[float]]] = {contender.name: [] for contender in contenders}
    beside: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for contender in contenders:
        contender.answer(ids[: len(ids) // 4], 4)
    for _ in range(repeats):
        for contender in contenders:
            reads.append(roof.read_bandwidth(READS))
            times[contender.name].append(contender.answer(ids, answer))
            reads.append(roof.read_bandwidth(READS))
            beside[contender.name].append(statistics.mean(reads[-2:]))
    figures = []
    for one in contenders:
        prefill = statistics.median(len(ids) / t[0] for t in times[one.name])
        speeds = [(answer - 1) / (t[-1] - t[0]) for t in times[one.name]]
        reading = statistics.median(speed / read for speed, read in zip(speeds, beside[one.name], strict=True))
        figures.append(Figures(one.name, one.weight_bytes, prefill, statistics.median(speeds), reading))
    return figures


def layer_weights(config: ModelConfig) -> int:
    """Weights that every prompt token meets: all active ones but embedding and head."""
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return count_parameters(config).active - tables


def product_roof(config: ModelConfig, rows: int, dtype: torch.dtype) -> float:
    """The best of torch's products at the shapes of a block."""
    d, f = config.hidden_size, config.intermediate_size
    return max(roof.matrix_rate(dtype, rows, *shape) for shape in ((d, f), (f, d), (d, d)))


def table(figures: dict[str, list[Figures]], config: ModelConfig, prompt: int, answer: int, read: float,
          product: float) -> list[str]:  # fmt: skip
    """A row for each phase, width and peer. transformers, which runs at bf16 only, stands beside every prefill."""
    rows = []
    cached = kv_bytes(config, prompt + answer // 2)
    everyone = {one.name: one for group in figures.values() for one in group}
    wide = everyone.get("transformers bf16")
    for bits, group in figures.items():
        ours, *peers = group
        if wide and wide not in peers:
            peers.append(wide)
        for peer in peers:
            share = 2 * layer_weights(config) * ours.prefill / product
            rows.append(f"| prefill of {prompt}, {bits} | {ours.prefill:.0f} tok/s | {peer.name} {peer.prefill:.0f} | "
                        f"{ours.prefill / peer.prefill:.2f}x | {share:.0%} of product roof |")
        for peer in (one for one in peers if bits == "bf16" or one is not wide):
            share, theirs = ((one.weight_bytes + cached) * one.reading for one in (ours, peer))
            of_best = (ours.weight_bytes + cached) * ours.decode / read
            rows.append(
                f"| decode of {answer}, {bits} ({ours.weight_bytes / 1e9:.2f} GB a token) | {ours.decode:.1f} tok/s | "
                f"{peer.name} ({peer.weight_bytes / 1e9:.2f} GB) {peer.decode:.1f} | {ours.decode / peer.decode:.2f}x "
                f"| {share:.0%} of read roof (peer {theirs:.0%}), {of_best:.0%} of its best |"
            )
    return rows


def main() -> None:
    """Measure, print and record."""
    arguments = parser("One request: prefill and decoding")
    arguments.add_argument("--shape", default="1b", choices=shapes.SHAPES)
    arguments.add_argument("--bits", nargs="+", default=["int4", "int8", "bf16"], choices=["int4", "int8", "bf16"])
    for name, value in (("prompt", 512), ("answer", 128), ("repeats", 3)):
        arguments.add_argument(f"--{name}", type=int, default=value)
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    config, ids = shapes.SHAPES[args.shape], shapes.random_ids(args.shape, args.prompt)
    reads: list[float] = []
    figures = {}
    for bits in args.bits:
        contenders = [Contender(entry, args.threads) for entry in entries(args.shape, bits)]
        figures[bits] = measure(contenders, ids, args.answer, args.repeats, reads)
        for contender in contenders:
            contender.close()
    product = {dtype: product_roof(config, args.prompt, dtype) for dtype in (torch.bfloat16, torch.float32)}
    bf16, f32 = (product[dtype] / 1e12 for dtype in (torch.bfloat16, torch.float32))
    notes = NOTES.format(low=min(reads) / 1e9, best=max(reads) / 1e9, bf16=bf16, f32=f32)
    rows = table(figures, config, args.prompt, args.answer, max(reads), product[torch.bfloat16])
    print(notes, *rows, sep="\n")
    write_rows(Path(__file__), f"One request, shape {args.shape}", rows,
               f"{machine()}; medians, interleaved", notes=notes,
               document=args.document)  # fmt: skip


if __name__ == "__main__":
    main()
