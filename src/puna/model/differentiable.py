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

from puna.model import native_steps
from puna.model.native import Kernels
from puna.model.native_steps import steps_for

# Rows of products in training are filled up to multiples of this where their number varies: oneDNN makes code of its
# own for every number of rows that it meets (0.7 ms), and keeps it (0.8 MB).
FILL = 64


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _RMSNorm(torch.autograd.Function):
    """weight * round(x / sqrt(mean(x^2) + eps)); keeps x alone."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x_MD = x_MD.contiguous()
        ctx.save_for_backward(x_MD, weight_D)
        ctx.eps = eps
        if native := _steps(x_MD, weight_D):
            return native_steps.rms_norm(x_MD, weight_D, eps, native)
        wide = _wide(x_MD)
        return (wide * _norm_scale(wide, eps)).to(x_MD.dtype) * weight_D

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_MD, weight_D = ctx.saved_tensors
        if native := _steps(x_MD, weight_D, out_grad):
            above = out_grad.contiguous()
            return *native_steps.norm_gradient(native, x_MD, weight_D, above, ctx.eps, ctx.needs_input_grad[1]), None
        wide = _wide(x_MD)
        scale_M1 = _norm_scale(wide, ctx.eps)
        normal, grad = wide * scale_M1, _wide(out_grad)
        weight_grad = (normal * grad).flatten(0, -2).sum(0).to(weight_D.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, weight_grad, None
        grad = grad * weight_D
        along = (normal * grad).mean(-1, keepdim=True)
        return grad.addcmul_(normal, along, value=-1).mul_(scale_M1).to(x_MD.dtype), weight_grad, None


def _norm_scale(wide_MD: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(wide_MD.square().mean(-1, keepdim=True) + eps)


def _steps(*tensors: Tensor) -> Kernels | None:
    """Our kernels for tensors of one dtype."""
    return steps_for(*tensors) if len({x.dtype for x in tensors}) == 1 else None


def rms_norm(x_MD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMS norm of rows [M, D], or of more axes before the last, with a weight [D] after the rounding to x's dtype."""
    out: Tensor = _RMSNorm.apply(x_MD, weight_D, eps)
    return out


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up; keeps both and nothing else."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        if native := _steps(gate, up):
            return native_steps.swiglu(native, gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        if native := _steps(gate, up, out_grad):
            return native_steps.swiglu_gradient(native, gate, up, out_grad.contiguous())
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


class _LowRank(torch.autograd.Function):
    """x W^T + scale (x A^T) B^T of a frozen W; nothing of x's or y's size beside the products."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_OK: Tensor, a_RK: Tensor, b_OR: Tensor, scale: float) -> Tensor:
        inner_MR, scaled_OR = x_MK @ a_RK.T, b_OR * scale
        ctx.scale = scale
        ctx.save_for_backward(x_MK, weight_OK, a_RK, scaled_OR, inner_MR)
        return (x_MK @ weight_OK.T).addmm_(inner_MR, scaled_OR.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, None]:
        x_MK, weight_OK, a_RK, scaled_OR, inner_MR = ctx.saved_tensors
        inner_grad = out_grad @ scaled_OR
        x_grad = (out_grad @ weight_OK).addmm_(inner_grad, a_RK) if ctx.needs_input_grad[0] else None
        return x_grad, None, inner_grad.T @ x_MK, (out_grad.T @ inner_MR).mul_(ctx.scale), None


def low_rank(x: Tensor, weight_OK: Tensor, a_RK: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """x [..., K] through a frozen matrix and its trainable update, weight + scale * b @ a."""
    out: Tensor = _LowRank.apply(x.flatten(0, -2), weight_OK, a_RK, b_OR, scale)
    return out.unflatten(0, x.shape[:-1])


class _Reordered(torch.autograd.Function):
    """Rows in another order. The gradient of `x[order]` adds row by row, in case that one was taken twice."""

    @staticmethod
    def forward(ctx: Any, x_CD: Tensor, order_C: Tensor, back_C: Tensor) -> Tensor:
        ctx.save_for_backward(back_C)
        return x_CD.index_select(0, order_C)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor, None, None]:
        (back_C,) = ctx.saved_tensors
        return out_grad.index_select(0, back_C), None, None


def reordered(x_CD: Tensor, order_C: Tensor, back_C: Tensor) -> Tensor:
    """Rows [C, D] in an order [C] that has each of them once; `back_C` is the way back, order_C[back_C] = 0, 1, 2..."""
    out: Tensor = _Reordered.apply(x_CD, order_C, back_C)
    return out
