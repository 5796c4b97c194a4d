"""Calls of the compiled steps of a vision tower (native/vision.c), with PyTorch where they can't serve.

Legend: M rows, D width, T tiles or pictures, S queries, N keys, H heads, K head width.
"""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.model import native
from puna.model.elementwise import fast
from puna.model.native_attention import WIDEST

_pointer, _long, _int = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


class LookCall(ctypes.Structure):
    """`Look` of native/vision.c."""

    _fields_ = (
        ("q", _pointer), ("k", _pointer), ("v", _pointer), ("out", _pointer),
        ("batches", _long), ("queries", _long), ("keys", _long),
        ("q_batch", _long), ("k_batch", _long), ("v_batch", _long),
        ("q_stride", _long), ("k_stride", _long), ("v_stride", _long),
        ("heads", _int), ("head_dim", _int), ("bf16", _int), ("threads", _int), ("failed", _int),
    )  # fmt: skip


def attend_all(q_TSHK: Tensor, k_TNHK: Tensor, v_TNHK: Tensor) -> Tensor:
    """Every query sees every key [T, S, H, K]."""
    head_dim = q_TSHK.shape[-1]
    kernels = fast(q_TSHK) if head_dim <= WIDEST and k_TNHK.shape[1] and q_TSHK.shape[1] else None
    if kernels is None:
        q, k, v = (x.transpose(1, 2) for x in (q_TSHK, k_TNHK, v_TNHK))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    q, k, v = (x if x.stride()[2:] == (head_dim, 1) else x.contiguous() for x in (q_TSHK, k_TNHK, v_TNHK))
    out = torch.empty(q.shape, dtype=q.dtype)
    call = LookCall(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), q.shape[0], q.shape[1], k.shape[1],
        q.stride(0), k.stride(0), v.stride(0), q.stride(1), k.stride(1), v.stride(1),
        q.shape[2], head_dim, q.dtype == torch.bfloat16, native.threads(),
    )  # fmt: skip
    kernels.look(ctypes.byref(call))
    if call.failed:
        raise MemoryError("no memory left for the buffers of attention")
    return out


def layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis."""
    kernels = fast(x) if weight_D.dtype == x.dtype else None
    if kernels is None:
        return F.layer_norm(x, weight_D.shape, weight_D, bias_D, eps)
    x = x.contiguous()
    out = torch.empty_like(x)
    kernels.layer_norm(
        x.data_ptr(), weight_D.data_ptr(), bias_D.data_ptr(), out.data_ptr(), x.numel() // x.shape[-1], x.shape[-1],
        eps, x.dtype == torch.bfloat16, native.threads(),
    )  # fmt: skip
    return out


def bias_gelu(x: Tensor, bias_D: Tensor) -> Tensor:
    """gelu(x + bias), exact; x, a product's fresh output, may be written over."""
    kernels = fast(x)
    if kernels is None:
        return F.gelu(x + bias_D)
    kernels.bias_gelu(x.data_ptr(), bias_D.data_ptr(), x.numel() // x.shape[-1], x.shape[-1],
                      x.dtype == torch.bfloat16, native.threads())  # fmt: skip
    return x


def bias_add(x: Tensor, bias_D: Tensor, to: Tensor) -> Tensor:
    """to + (x + bias); x, a product's fresh output, may be written over."""
    kernels = fast(x) if to.is_contiguous() else None
    if kernels is None:
        return to + (x + bias_D)
    kernels.bias_add(x.data_ptr(), bias_D.data_ptr(), to.data_ptr(), x.numel() // x.shape[-1], x.shape[-1],
                     x.dtype == torch.bfloat16, native.threads())  # fmt: skip
    return x
