"""Calls of the compiled attention and rotation (native/attention.c, native/rotary.c)."""

import ctypes

import torch
from torch import Tensor

from puna.model import native
from puna.model.native import Kernels

WIDEST = 256  # the largest head_dim that the kernels take
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_pointer, _long, _int = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


class AttentionCall(ctypes.Structure):
    """`Attention` of native/records.c."""

    _fields_ = (
        ("pool", _pointer), ("block_bytes", _long), ("record_bytes", _long), ("chunk", _long), ("spans", _long),
        ("starts", _pointer), ("counts", _pointer), ("tables", _pointer),
        ("q", _pointer), ("k", _pointer), ("v", _pointer), ("out", _pointer),
        ("q_stride", _long), ("k_stride", _long), ("v_stride", _long),
        ("kind", _int), ("bf16", _int), ("heads", _int), ("kv_heads", _int), ("head_dim", _int), ("threads", _int),
        ("failed", _int),
    )  # fmt: skip


class TurnCall(ctypes.Structure):
    """`Turn` of native/rotary.c."""

    _fields_ = (
        ("q", _pointer), ("k", _pointer), ("cosines", _pointer), ("sines", _pointer), ("scale", _pointer),
        ("rows", _long), ("q_stride", _long), ("k_stride", _long),
        ("heads", _int), ("kv_heads", _int), ("head_dim", _int), ("bf16", _int), ("adjacent", _int),
        ("norm_eps", ctypes.c_float), ("threads", _int),
    )  # fmt: skip


def kernels_for(device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernels | None:
    """The kernels, where they can serve such tensors."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16) or head_dim > WIDEST:
        return None
    return native.kernels()


def rows_of(x_BSHK: Tensor) -> Tensor:
    """The tensor, copied only if its heads aren't packed or its rows not evenly spaced."""
    batch, length, _, width = x_BSHK.shape
    packed = x_BSHK.stride()[2:] == (width, 1)
    even = batch == 1 or x_BSHK.stride(0) == length * x_BSHK.stride(1)
    return x_BSHK if packed and even else x_BSHK.contiguous()


def run_attention(kernels: Kernels, call: AttentionCall, q_BSHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> Tensor:
    """Append and attend: the rest of `call` is filled in already. Returns [B, S, H, K]."""
    q, k, v = rows_of(q_BSHK), rows_of(k_BSGK), rows_of(v_BSGK)
    out = torch.empty(q.shape, dtype=q.dtype)
    call.q, call.k, call.v, call.out = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
    call.q_stride, call.k_stride, call.v_stride = q.stride(1), k.stride(1), v.stride(1)
    kernels.attend(ctypes.byref(call))
    if call.failed:
        raise MemoryError("no memory left for the buffers of attention")
    return out


def run_turn(
    kernels: Kernels,
    q_BSHK: Tensor,
    k_BSGK: Tensor,
    turns: tuple[Tensor, Tensor] | None,
    scale_S: Tensor | None,
    adjacent: bool,
    norm_eps: float | None,
) -> tuple[Tensor, Tensor]:
    """Rotate, normalise and scale; B rows of S positions. The result may be written over the arguments."""
    q, k = rows_of(q_BSHK), rows_of(k_BSGK)
    call = TurnCall(
        cosines=turns[0].data_ptr() if turns else None, sines=turns[1].data_ptr() if turns else None,
        scale=None if scale_S is None else scale_S.data_ptr(), rows=q.shape[1], q_stride=q.stride(1),
        k_stride=k.stride(1), heads=q.shape[2], kv_heads=k.shape[2], head_dim=q.shape[3],
        bf16=q.dtype == torch.bfloat16, adjacent=adjacent, norm_eps=-1 if norm_eps is None else norm_eps,
        threads=native.threads(),
    )  # fmt: skip
    for row in range(q.shape[0]):
        call.q, call.k = q[row].data_ptr(), k[row].data_ptr()
        kernels.turn(ctypes.byref(call))
    return q, k


def run_angles(kernels: Kernels, positions_S: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine [S, K/2] float32 of each position's angles."""
    cos = torch.empty(len(positions_S), len(frequencies))
    sin = torch.empty_like(cos)
    kernels.angles(
        _pointer(positions_S.data_ptr()), _long(len(positions_S)), _pointer(frequencies.data_ptr()),
        _long(len(frequencies)), _pointer(cos.data_ptr()), _pointer(sin.data_ptr()), _int(native.threads()),
    )  # fmt: skip
    return cos, sin
