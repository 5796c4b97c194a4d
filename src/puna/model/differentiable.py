"""The small steps between products, with gradients of their own: what PyTorch's would keep for the backward pass in
float32, these compute again from the inputs, which are there anyway.

Legend: M rows, D and F widths, S positions, K head width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows of products in training are filled up to multiples of this where their number varies: oneDNN makes code of its
# own for every number of rows that it meets (0.7 ms), and keeps it (0.8 MB).
FILL = 64


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _RMSNorm(torch.autograd.Function):
    """weight * round(x / sqrt(mean(x^2) + eps)); keeps x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        wide = _wide(x_MD)
        scale_M1 = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x_MD, weight_D, scale_M1)
        return (wide * scale_M1).to(x_MD.dtype) * weight_D

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_MD, weight_D, scale_M1 = ctx.saved_tensors
        normal, grad = _wide(x_MD) * scale_M1, _wide(out_grad)
        weight_grad = (normal * grad).flatten(0, -2).sum(0).to(weight_D.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, weight_grad, None
        grad = grad * weight_D
        along = (normal * grad).mean(-1, keepdim=True)
        return grad.addcmul_(normal, along, value=-1).mul_(scale_M1).to(x_MD.dtype), weight_grad, None


def rms_norm(x_MD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMS norm of rows [M, D], or of more axes before the last, with a weight [D] after the rounding to x's dtype."""
    out: Tensor = _RMSNorm.apply(x_MD, weight_D, eps)
    return out


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up; keeps both and nothing else."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(out_grad * up, gate), F.silu(gate).mul_(out_grad)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both [..., F]."""
    out: Tensor = _SwiGLU.apply(gate, up)
    return out


Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]


class _Turn(torch.autograd.Function):
    """A rotation; its gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos_SK: Tensor, sin_SK: Tensor, rotate: Rotate) -> Tensor:
        ctx.turns, ctx.rotate = (cos_SK, sin_SK), rotate
        return rotate(x, cos_SK, sin_SK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos_SK, sin_SK = ctx.turns
        return ctx.rotate(out_grad, cos_SK, -sin_SK), None, None, None


def turn(x_BSHK: Tensor, cos_SK: Tensor, sin_SK: Tensor, rotate: Rotate) -> Tensor:
    """What `rotate` gives, which turns pairs of x by angles with these cosines and sines."""
    out: Tensor = _Turn.apply(x_BSHK, cos_SK, sin_SK, rotate)
    return out
