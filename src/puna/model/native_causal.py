"""Causal attention of training by our kernels (native/causal.c), with gradients of their own: a third of the time that
PyTorch's takes.

Legend: N tokens, H query heads, G key/value heads, K head width.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from puna.model.native import Kernels, kernels, threads
from puna.model.native_attention import WIDEST

_pointer, _long, _int = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


class _CausalCall(ctypes.Structure):
    _fields_ = (
        ("q", _pointer), ("k", _pointer), ("v", _pointer), ("out", _pointer), ("lse", _pointer), ("above", _pointer),
        ("q_out", _pointer), ("k_out", _pointer), ("v_out", _pointer), ("starts", _pointer), ("lengths", _pointer),
        ("segments", _long), ("tokens", _long), ("q_stride", _long), ("k_stride", _long), ("v_stride", _long),
        ("heads", _int), ("kv_heads", _int), ("head_dim", _int), ("threads", _int), ("failed", _int),
    )  # fmt: skip


@dataclass(frozen=True)
class Segments:
    """Runs of tokens of which none sees another: first token and length of each, int64."""

    starts: Tensor
    lengths: Tensor

    @staticmethod
    def of(lengths: Sequence[int], chunk: int | None) -> "Segments":
        """Documents end to end, each cut at multiples of `chunk` from its start."""
        found, start = [], 0
        for length in lengths:
            step = chunk or max(length, 1)
            found += [(start + at, min(step, length - at)) for at in range(0, length, step)]
            start += length
        return Segments(*torch.tensor(found, dtype=torch.int64).reshape(-1, 2).T.contiguous())


def causal_kernels(q: Tensor) -> Kernels | None:
    """Our kernels, where they can serve such queries and are the faster ones: with AVX-512, in bfloat16."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or q.shape[-1] % 16 or q.shape[-1] > WIDEST:
        return None
    native = None if torch.compiler.is_compiling() else kernels()
    return native if native and native.instructions == "avx512" else None


def attend_segments(native: Kernels, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, segments: Segments) -> Tensor:
    """Causal attention [N, H, K] within each segment; every token is in one."""
    out: Tensor = _Causal.apply(q_NHK, k_NGK, v_NGK, native, segments)
    return out


def _packed(x: Tensor) -> Tensor:
    """With its heads side by side, which are copied only if they aren't."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, native: Kernels, segments: Segments) -> Tensor:
        q, k, v = _packed(q), _packed(k), _packed(v)
        out, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[1], len(q))
        _run(native, _call(q, k, v, out, lse, segments))
        ctx.native, ctx.segments = native, segments
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        above = grads[0].contiguous()
        found = [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)]
        call = _call(q, k, v, out, lse, ctx.segments)
        call.above = above.data_ptr()
        call.q_out, call.k_out, call.v_out = (x.data_ptr() for x in found)
        _run(ctx.native, call)
        return *found, None, None


def _call(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments) -> _CausalCall:
    return _CausalCall(
        q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), out=out.data_ptr(), lse=lse.data_ptr(),
        starts=segments.starts.data_ptr(), lengths=segments.lengths.data_ptr(), segments=len(segments.starts),
        tokens=len(q), q_stride=q.stride(0), k_stride=k.stride(0), v_stride=v.stride(0), heads=q.shape[1],
        kv_heads=k.shape[1], head_dim=q.shape[2], threads=threads(),
    )  # fmt: skip


def _run(native: Kernels, call: _CausalCall) -> None:
    native.causal(ctypes.byref(call))
    if call.failed:
        raise MemoryError("no memory left for the buffers of attention")
