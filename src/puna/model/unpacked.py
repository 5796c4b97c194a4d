"""Few-bit weights where our kernels aren't: widened by PyTorch a block of outputs at a time, on any device.

Right and small in memory, but a single row costs as much arithmetic as many.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna.model.elementwise import silu_mul
from puna.model.quantized import Float8, Quantized, Weight

BLOCK_VALUES = 1 << 22  # widened at a time: 16 MB of float32


class BlockwiseLinear(nn.Module):
    """x @ weight.T for a `Quantized` or `Float8` weight; 4-bit values lie two in a byte."""

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        assert isinstance(weight, Quantized | Float8)
        self.outputs, self.inputs = weight.shape
        self.group = weight.group if isinstance(weight, Quantized) else self.inputs
        self.bits = weight.bits if isinstance(weight, Quantized) else 8
        self.halved = self.bits == 4
        values = F.pad(weight.values, (0, self.inputs % 2)) if self.halved else weight.values
        self.values: Tensor
        self.scales: Tensor
        self.register_buffer("values", (values[:, ::2] & 15 | values[:, 1::2] << 4) if self.halved else values)
        self.register_buffer("scales", weight.scales)

    def weight(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Some rows of the weight, widened."""
        values = self.values[rows]
        if self.halved:
            values = torch.stack(((values << 4) >> 4, values >> 4), -1).flatten(1)[:, : self.inputs]
        scales = self.scales[rows].float()
        if scales.shape[1] > 1:
            scales = scales.repeat_interleave(self.group, 1)[:, : self.inputs]
        return (values.float() * scales).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        step = max(1, BLOCK_VALUES // self.inputs)
        starts = range(0, self.outputs, step)
        return torch.cat([F.linear(x, self.weight(slice(start, start + step), x.dtype)) for start in starts], -1)


class BlockwiseExperts(nn.Module):
    """One pair of such layers an expert."""

    def __init__(self, gate_up: Sequence[Weight], down: Sequence[Weight]) -> None:
        super().__init__()
        self.gate_up = nn.ModuleList(map(BlockwiseLinear, gate_up))
        self.down = nn.ModuleList(map(BlockwiseLinear, down))

    def forward(self, x_CD: Tensor, counts: list[int]) -> Tensor:
        """Rows sorted by expert, `counts[e]` of them for expert e -> [C, D]."""
        work = zip(x_CD.split(counts), self.gate_up, self.down, strict=True)
        return torch.cat([down(silu_mul(gate_up(x))) for x, gate_up, down in work if len(x)])
