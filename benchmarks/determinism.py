"""What the fixed order of additions costs: a layer's products by our kernels against PyTorch's own of the same bits.

`python benchmarks/determinism.py`. PyTorch's products may add in another order for every number of rows, and do; ours
add a row in one order whatever stands beside it, in every release of the engine: there is no other mode.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from rows import machine, parser, write_rows
from torch import Tensor

from puna.model.packed import Panels
from puna.model.quantized import Quantized, quantize

PRODUCTS = ((2048, 3072), (2048, 2048), (2048, 16384), (8192, 2048))  # inputs, outputs: Llama 3.2 1B's layer
ROWS = (1, 2, 4, 8, 16, 32, 64)
COLD = 256 << 20  # bytes of weights between two readings of the same: more than any cache holds
Product = Callable[[Tensor], Tensor]
Shapes = tuple[tuple[int, int], ...]
NOTES = (
    "The four products of a layer of the 1B shape together, bfloat16 activations, weights larger than the caches; "
    "medians. Ours: the engine's kernels, one order of additions a row at every number of rows. Free: the fastest "
    "that PyTorch has for these bits (bf16: torch.mm; int8: _weight_int8pack_mm, with a scale a row instead of one for "
    "128 inputs; int4: _weight_int4pack_mm_for_cpu). Cost: ours / free - 1; below 0 the fixed order costs nothing."
)


@dataclass(frozen=True)
class Pair:
    """One matrix as ours and as PyTorch's product, and the bytes that it takes."""

    ours: Product
    free: Product
    bytes: int


def made(bits: str, inputs: int, outputs: int) -> Pair:
    """A random matrix of that shape."""
    weight = torch.randn(outputs, inputs, dtype=torch.bfloat16)
    if bits == "bf16":
        across = weight.t()
        return Pair(Panels(weight).product, lambda x: torch.mm(x, across), weight.nbytes)
    few = quantize(weight, int(bits[-1]))
    free = _int8(quantize(weight, 8, inputs)) if bits == "int8" else _int4(few)
    return Pair(Panels(few).product, free, few.values.numel() * few.bits // 8)


def _int8(few: Quantized) -> Product:
    values, scales = few.values, few.scales[:, 0].bfloat16()
    return lambda x: torch._weight_int8pack_mm(x, values, scales)


def _int4(few: Quantized) -> Product:
    packed = torch._convert_weight_to_int4pack_for_cpu(few.values.int() + 8, 1)
    scales = torch.stack((few.scales.T.bfloat16(), torch.zeros_like(few.scales.T).bfloat16()), -1).contiguous()
    return lambda x: torch._weight_int4pack_mm_for_cpu(x, packed, few.group, scales)


def pairs(bits: str, inputs: int, outputs: int, cold: int) -> list[Pair]:
    """So many copies that each reading comes from memory."""
    first = made(bits, inputs, outputs)
    return [first, *(made(bits, inputs, outputs) for _ in range(cold // first.bytes))]


def seconds(products: Iterator[Product], x: Tensor, least: float) -> float:
    """Median of one product's time, over `least` seconds."""
    times: list[float] = []
    while sum(times) < least or len(times) < 5:
        product = next(products)
        begin = time.perf_counter()
        product(x)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def measure(bits: str, products: Shapes, rows: tuple[int, ...], cold: int, least: float) -> list[str]:
    """The table's rows of one width."""
    totals = {count: [0.0, 0.0] for count in rows}
    for inputs, outputs in products:
        copies = pairs(bits, inputs, outputs, cold)
        for count in rows:
            x = torch.randn(count, inputs, dtype=torch.bfloat16)
            totals[count][0] += seconds(cycle([each.ours for each in copies]), x, least)
            totals[count][1] += seconds(cycle([each.free for each in copies]), x, least)
    return [
        f"| {bits} | {count} | {ours * 1e3:.2f} ms | {free * 1e3:.2f} ms | {ours / free - 1:+.0%} |"
        for count, (ours, free) in totals.items()
    ]


def main() -> None:
    """Measure, print and record."""
    arguments = parser("Cost of the fixed order of additions")
    arguments.add_argument("--bits", nargs="+", default=["bf16", "int8", "int4"], choices=["bf16", "int8", "int4"])
    arguments.add_argument("--seconds", type=float, default=0.3, help="of each product at each number of rows")
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for bits in args.bits:
        rows += measure(bits, PRODUCTS, ROWS, COLD, args.seconds)
        print("\n".join(rows[-len(ROWS) :]), flush=True)
    columns = ("bits", "rows", "ours, one order", "PyTorch, free order", "cost")
    write_rows(Path(__file__), "Determinism: what it costs", rows, machine(), columns=columns, notes=NOTES,
               document=args.document)  # fmt: skip


if __name__ == "__main__":
    main()
