"""Calls of the compiled steps between products (native/training.c, native/elementwise.c): contiguous tensors, float32
or bfloat16.

Legend: R rows, V vocabulary, D model width.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from puna.model.native import Kernels, kernels, threads

_pointer, _long, _int, _float = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float


class _CrossEntropyCall(ctypes.Structure):
    _fields_ = (
        ("logits", _pointer), ("targets", _pointer), ("scales", _pointer), ("losses", _pointer),
        ("rows", _long), ("width", _long), ("bf16", _int), ("errors", _int), ("threads", _int),
    )  # fmt: skip


class _AdamCall(ctypes.Structure):
    _fields_ = (
        ("weights", _pointer), ("lows", _pointer), ("gradients", _pointer), ("first", _pointer), ("second", _pointer),
        ("count", _long), ("scale", _float), ("keep", _float), ("step", _float), ("root", _float),
        ("beta1", _float), ("beta2", _float), ("eps", _float), ("half_gradients", _int), ("threads", _int),
    )  # fmt: skip


class _NormCall(ctypes.Structure):
    _fields_ = (
        ("x", _pointer), ("weight", _pointer), ("above", _pointer), ("out", _pointer), ("weight_out", _pointer),
        ("rows", _long), ("width", _long), ("eps", _float), ("bf16", _int), ("threads", _int),
    )  # fmt: skip


def steps_for(*tensors: Tensor) -> Kernels | None:
    """Our kernels, where all tensors are ones that they take."""
    for x in tensors:
        if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
            return None
    return None if torch.compiler.is_compiling() else kernels()


def cross_entropy(
    native: Kernels, logits_RV: Tensor, targets_R: Tensor, scales_R: Tensor | None, errors: bool
) -> Tensor:
    """Each row's loss in nats, float32 [R], at int64 targets within the vocabulary. With `errors` the logits become the
    gradient of losses times scales (float32; None: 1) by themselves, in place."""
    losses_R = torch.empty(len(logits_RV))
    assert logits_RV.is_contiguous()
    assert targets_R.is_contiguous()
    call = _CrossEntropyCall(
        logits_RV.data_ptr(), targets_R.data_ptr(), None if scales_R is None else scales_R.data_ptr(),
        losses_R.data_ptr(), *logits_RV.shape, logits_RV.dtype == torch.bfloat16, errors, threads(),
    )  # fmt: skip
    native.cross_entropy(ctypes.byref(call))
    return losses_R


@dataclass(frozen=True)
class AdamStep:
    """The numbers of one update. scale: of the gradients; keep: of the weights (1 - rate * decay); step and root: rate
    and second moment with their corrections for the first steps, rate / (1 - beta1^t) and (1 - beta2^t)^-1/2."""

    scale: float
    keep: float
    step: float
    root: float
    betas: tuple[float, float]
    eps: float


def adam(
    native: Kernels, weights: Tensor, lows: Tensor | None, gradient: Tensor, first: Tensor, second: Tensor, by: AdamStep
) -> None:
    """One AdamW update in place (arXiv 1711.05101) of float32 weights, or of bfloat16 ones with what the rounding of
    their masters took (int16), from a gradient in either dtype."""
    assert all(x.is_contiguous() for x in (weights, gradient, first, second))
    call = _AdamCall(
        weights.data_ptr(), None if lows is None else lows.data_ptr(), gradient.data_ptr(), first.data_ptr(),
        second.data_ptr(), weights.numel(), by.scale, by.keep, by.step, by.root, *by.betas, by.eps,
        gradient.dtype == torch.bfloat16, threads(),
    )  # fmt: skip
    native.adam(ctypes.byref(call))


def square_sum(native: Kernels, x: Tensor) -> float:
    """Sum of squares of a contiguous tensor: the same for any number of threads."""
    assert x.is_contiguous()
    found: float = native.square_sum(x.data_ptr(), x.numel(), x.dtype == torch.bfloat16, threads())
    return found


def rms_norm(x_MD: Tensor, weight_D: Tensor, eps: float, native: Kernels) -> Tensor:
    """x / sqrt(mean(x^2) + eps), rounded to x's dtype, times the weight (which has that dtype, too)."""
    x_MD = x_MD.contiguous()
    out_MD = torch.empty_like(x_MD)
    native.rms_norm(
        x_MD.data_ptr(), weight_D.data_ptr(), out_MD.data_ptr(),
        x_MD.numel() // x_MD.shape[-1], x_MD.shape[-1], eps,
        x_MD.dtype == torch.bfloat16, threads(),
    )  # fmt: skip
    return out_MD


def swiglu(native: Kernels, gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    out = torch.empty_like(gate)
    native.swiglu(
        gate.data_ptr(), up.data_ptr(), out.data_ptr(), gate.numel(), gate.dtype == torch.bfloat16, threads()
    )
    return out


def swiglu_gradient(native: Kernels, gate: Tensor, up: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients by gate and up, given the one from above."""
    to_gate, to_up = torch.empty_like(gate), torch.empty_like(up)
    native.swiglu_gradient(
        gate.data_ptr(), up.data_ptr(), above.data_ptr(), to_gate.data_ptr(), to_up.data_ptr(), gate.numel(),
        gate.dtype == torch.bfloat16, threads(),
    )  # fmt: skip
    return to_gate, to_up


def norm_gradient(
    native: Kernels, x_RD: Tensor, weight_D: Tensor, above_RD: Tensor, eps: float, with_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of weight * x / sqrt(mean(x^2) + eps) by x, and by the weight in its dtype where wanted."""
    width, count = x_RD.shape[-1], threads()
    out_RD = torch.empty_like(x_RD)
    sums = torch.zeros(count, width) if with_weight else None
    call = _NormCall(
        x_RD.data_ptr(), weight_D.data_ptr(), above_RD.data_ptr(), out_RD.data_ptr(),
        None if sums is None else sums.data_ptr(), x_RD.numel() // width, width, eps, x_RD.dtype == torch.bfloat16,
        count,
    )  # fmt: skip
    native.norm_gradient(ctypes.byref(call))
    return out_RD, None if sums is None else sums.sum(0).to(weight_D.dtype)
