"""A Scout-like mixture of experts against the dense model that is as wide where it works: `python benchmarks/moe.py`.

16 experts, one of them for a token beside a shared one, chunked attention: sizes in `shapes.EXPERTS`. Decoding is
compared with our own dense model of equal active parameters, prefill with transformers' Llama 4.
"""

import statistics
from itertools import pairwise
from pathlib import Path

import shapes
from contenders import Contender, Entry, Puna, Transformers
from rows import machine, parser, write_rows

from puna.family.arithmetic import count_parameters

NOTES = (
    "{total:.2f} B parameters, {active:.2f} B of them active for a token, against a dense model of {dense:.2f} B. "
    "Decode: time between tokens, the median of all, answers of {answer} in turns; prefill: time to the first token "
    "after {prompt} tokens."
)


def main() -> None:
    """Measure, print and record."""
    arguments = parser("A mixture of experts against a dense model and against transformers")
    arguments.add_argument("--experts", default="experts", choices=shapes.SHAPES)
    arguments.add_argument("--dense", default="dense", choices=shapes.SHAPES)
    arguments.add_argument("--bits", nargs="+", default=["int4", "bf16"], choices=["int4", "int8", "bf16"])
    for name, value in (("prompt", 1024), ("answer", 64), ("repeats", 3)):
        arguments.add_argument(f"--{name}", type=int, default=value)
    args = arguments.parse_args()
    sparse, dense = shapes.checkpoint(args.experts), shapes.checkpoint(args.dense)
    ids = shapes.random_ids(args.experts, args.prompt)
    peer = Contender(Entry("transformers", Transformers, (sparse,)), args.threads)
    rows = []
    for bits in args.bits:
        ours = Contender(Entry("experts", Puna, (sparse, bits)), args.threads)
        other = Contender(Entry("dense", Puna, (dense, bits)), args.threads)
        for contender in (ours, other, peer):
            contender.answer(ids[: args.prompt // 4], 2)
        times = [(ours.answer(ids, args.answer), other.answer(ids, args.answer), peer.answer(ids, 1))
                 for _ in range(args.repeats)]  # fmt: skip
        ours.close()
        other.close()
        steps = [statistics.median(after - before for t in column for before, after in pairwise(t))
                 for column in list(zip(*times, strict=True))[:2]]  # fmt: skip
        first = [statistics.median(t[0] for t in column) for column in zip(*times, strict=True)]
        rows += [
            f"| decode, experts against dense, {bits} | {steps[0] * 1e3:.1f} ms a token | dense {steps[1] * 1e3:.1f} "
            f"ms | {steps[0] / steps[1]:.2f}x its time |",
            f"| prefill of {args.prompt}, {bits} | {first[0]:.2f} s | transformers' Llama 4 bf16 {first[2]:.2f} s | "
            f"{first[2] / first[0]:.1f}x |",
            f"| prefill of {args.prompt}, experts against dense, {bits} | {first[0]:.2f} s | dense {first[1]:.2f} s | "
            f"{first[0] / first[1]:.2f}x its time |",
        ]
    peer.close()
    counts = count_parameters(shapes.SHAPES[args.experts]), count_parameters(shapes.SHAPES[args.dense])
    notes = NOTES.format(total=counts[0].total / 1e9, active=counts[0].active / 1e9, dense=counts[1].total / 1e9,
                         answer=args.answer, prompt=args.prompt)  # fmt: skip
    print(notes, *rows, sep="\n")
    write_rows(Path(__file__), "A mixture of experts", rows, f"{machine()}; medians, interleaved", notes=notes,
               columns=("what", "ours", "peer", "ratio"), document=args.document)  # fmt: skip


if __name__ == "__main__":
    main()
