"""The small steps between products. Where nothing is differentiated on a CPU they run in our kernels, because PyTorch
computes the end of an array by other instructions than its middle: a row's bits would depend on its neighbours.

Legend: M rows, D and F widths.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.model.differentiable import swiglu
from puna.model.native import Kernels, kernels, threads


def fast(x: Tensor) -> Kernels | None:
    """Our kernels, for float32 and bfloat16 on the CPU without gradients or tracing."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        return None
    return None if torch.is_grad_enabled() or torch.compiler.is_compiling() else kernels()


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up [..., F] of both side by side [..., 2F]."""
    native = fast(gate_up)
    if native is None:
        gate, up = gate_up.chunk(2, -1)
        return swiglu(gate, up) if torch.is_grad_enabled() else F.silu(gate) * up
    width = gate_up.shape[-1] // 2
    gate_up = gate_up.contiguous()
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    native.silu_mul(
        gate_up.data_ptr(), out.data_ptr(), out.numel() // width,
        width, out.dtype == torch.bfloat16, threads(),
    )  # fmt: skip
    return out


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x) of float32."""
    native = fast(x) if x.dtype == torch.float32 else None
    if native is None:
        return x.sigmoid()
    x = x.contiguous()
    out = torch.empty_like(x)
    native.sigmoid(x.data_ptr(), out.data_ptr(), x.numel())
    return out
