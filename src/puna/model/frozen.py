"""Few-bit weights under training: they stay in their bits, and forward and backward widen a block at a time.

Nothing widened is kept between the two: the gradient of x needs the weight alone, which is widened again.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from puna.model.unpacked import BLOCK_VALUES, BlockwiseLinear


class FrozenLinear(BlockwiseLinear):
    """x @ weight.T of a weight in few bits, differentiable in x."""

    def blocks(self) -> Iterator[slice]:
        """Rows to widen together."""
        step = max(1, BLOCK_VALUES // self.inputs)
        return (slice(start, min(start + step, self.outputs)) for start in range(0, self.outputs, step))

    def parts(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The weight, widened block by block."""
        return (self.weight(rows, dtype) for rows in self.blocks())

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _Product.apply(x, self)
        return product


class _Product(torch.autograd.Function):
    """x @ weight.T; only x has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return torch.cat([x @ part.T for part in layer.parts(x.dtype)], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        layer, grad = ctx.layer, grads[0]
        total = torch.zeros(*grad.shape[:-1], layer.inputs, dtype=torch.float32, device=grad.device)
        for rows, part in zip(layer.blocks(), layer.parts(grad.dtype), strict=True):
            total += grad[..., rows] @ part
        return total.to(grad.dtype), None
