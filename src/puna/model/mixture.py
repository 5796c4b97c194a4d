"""A packed mixture of experts as one call of the compiled kernels (native/experts.c).

Legend: N tokens, D model width, E experts.
"""

import ctypes

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from puna.model.native import Kernels, threads
from puna.model.packed import PackedExperts, PackedFeedForward, PackedLinear


class MixtureCall(ctypes.Structure):
    """`Mixture` of native/experts.c. kept: what lies at its addresses."""

    kept: tuple[object, ...] = ()

    _fields_ = (
        ("router", ctypes.c_void_p), ("gate_up", ctypes.c_void_p), ("down", ctypes.c_void_p),
        ("experts", ctypes.c_void_p),
        ("count", ctypes.c_long), ("choices", ctypes.c_long), ("hidden", ctypes.c_long),
        ("load", ctypes.c_void_p), ("failed", ctypes.c_int),
    )  # fmt: skip


def mixture_call(router: nn.Module, shared: nn.Module, experts: nn.Module, choices: int, load_E: NDArray[np.int64],
                 bf16: bool) -> MixtureCall | None:  # fmt: skip
    """None where a part isn't just what the kernels compute. Rows that an expert serves are counted in `load_E`."""
    if type(experts) is not PackedExperts or type(shared) is not PackedFeedForward:
        return None
    linears = router, shared.gate_up_proj, shared.down_proj
    panels = [each.packed for each in linears if type(each) is PackedLinear]
    if len(panels) < len(linears) or any(map(hooked, (experts, shared, *linears))):
        return None
    table = experts.addresses(bf16)
    call = MixtureCall(*(each.address(bf16) for each in panels), ctypes.addressof(table), len(load_E), choices,
                       panels[2].width, load_E.ctypes.data)  # fmt: skip
    call.kept = table, load_E, panels, experts
    return call


def hooked(module: nn.Module) -> bool:
    """Whether something else happens when it is called than its own forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def run_mixture(kernels: Kernels, call: MixtureCall, x_ND: Tensor) -> Tensor:
    """What the mixture gives [N, D]. Raises MemoryError."""
    x_ND = x_ND.contiguous()
    out_ND = torch.empty_like(x_ND)
    kernels.mixture(
        ctypes.addressof(call), x_ND.data_ptr(), out_ND.data_ptr(), len(x_ND), x_ND.shape[1],
        x_ND.dtype == torch.bfloat16, threads(),
    )  # fmt: skip
    if call.failed:
        raise MemoryError("no memory left for the experts' buffers")
    return out_ND
