"""The forecast of memory against the peak that a process really reaches: `python benchmarks/memory.py`.

Each case loads in a process of its own and answers `batch` requests at once that fill the context.
"""

import itertools
import multiprocessing
import random
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import shapes
import torch
from rows import machine, parser, write_rows
from services import Asked, together

import puna
from puna.model.memory import resident_peak

ANSWER = 4
NOTES = (
    "Peak: VmHWM of a process that loads the model and answers `batch` requests at once, each of `context` tokens with "
    "its answer. Forecast: computed before anything is loaded. Error: forecast / peak - 1."
)


@dataclass(frozen=True)
class Case:
    """One combination."""

    shape: str
    bits: str
    context: int
    batch: int

    @property
    def quantize(self) -> str | None:
        """As `puna.load` takes it."""
        return None if self.bits == "bf16" else self.bits


def promised_and_peak(case: Case, threads: int) -> tuple[int, int]:
    """What a fresh process forecasts before it loads, and its peak after it has answered, in bytes."""
    spawn = multiprocessing.get_context("spawn")
    mine, theirs = spawn.Pipe()
    path = "cria" if case.shape == "cria" else shapes.checkpoint(case.shape)
    process = spawn.Process(target=_run, args=(theirs, case, path, threads))
    process.start()
    theirs.close()
    figures = mine.recv()
    process.join()
    return figures


def _run(pipe: Connection, case: Case, path: Path | str, threads: int) -> None:
    torch.set_num_threads(threads)
    llama = puna.load(path, dtype="bfloat16", quantize=case.quantize, context=case.context, prefix_cache=False)
    ids = range(3, llama.config.vocab_size)
    prompts = [random.Random(seed).choices(ids, k=case.context - ANSWER) for seed in range(case.batch)]
    asked = [Asked(prompt, ANSWER) for prompt in prompts]
    together(lambda ids, count: (len(piece.token_ids) for piece in
             llama.stream(ids, max_tokens=count, temperature=0.0, ignore_eos=True)), asked)  # fmt: skip
    assert llama.needs is not None
    pipe.send((llama.needs.forecast(case.context, case.batch).total, resident_peak()))


def main() -> None:
    """Measure, print and record."""
    arguments = parser("Forecast of memory against the real peak")
    arguments.add_argument("--shapes", nargs="+", default=["cria", "1b"], choices=["cria", *shapes.SHAPES])
    arguments.add_argument("--bits", nargs="+", default=["int4", "int8", "bf16"], choices=["int4", "int8", "bf16"])
    arguments.add_argument("--contexts", nargs="+", type=int, default=[512, 2048])
    arguments.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    args = arguments.parse_args()
    rows, errors = [], []
    for one in itertools.product(args.shapes, args.bits, args.contexts, args.batches):
        case = Case(*one)
        promised, peak = promised_and_peak(case, args.threads)
        errors.append(promised / peak - 1)
        rows.append(
            f"| {case.shape}, {case.bits}, context {case.context}, batch {case.batch} "
            f"| {promised / 1e9:.3f} GB | {peak / 1e9:.3f} GB | {errors[-1]:+.1%} |"
        )
        print(rows[-1], flush=True)
    print(f"largest error {max(errors, key=abs):+.1%}")
    write_rows(Path(__file__), f"Forecast of memory, {len(rows)} cases", rows, machine(), notes=NOTES,
               columns=("case", "forecast", "peak", "error"), document=args.document)  # fmt: skip


if __name__ == "__main__":
    main()
