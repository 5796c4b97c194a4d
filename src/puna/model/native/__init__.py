"""The compiled kernels, where the installation could build them (see setup.py); None elsewhere.

They are called by ctypes, so other threads run while they work. Their parallel regions use the OpenMP threads that
PyTorch has already started: a second pool would spin against the first.
"""

import ctypes
import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
ARGUMENTS = {  # declared, so that plain numbers can be given: that halves the time of a call
    "linear": (_POINTER, _POINTER, _POINTER, _LONG, _LONG, _INT, _POINTER, _INT),
    "rows": (_POINTER, _POINTER, _POINTER, _LONG, _LONG, _INT, _INT),
    "rms_norm": (_POINTER, _POINTER, _POINTER, _LONG, _LONG, _FLOAT, _INT, _INT),
    "silu_mul": (_POINTER, _POINTER, _LONG, _LONG, _INT, _INT),
    "sigmoid": (_POINTER, _POINTER, _LONG),
    "panel_words": (_POINTER, _POINTER, _LONG, _LONG, _INT, _INT),
    "mixture": (_POINTER, _POINTER, _POINTER, _LONG, _LONG, _INT, _INT),
    "bias_gelu": (_POINTER, _POINTER, _LONG, _LONG, _INT, _INT),
    "bias_add": (_POINTER, _POINTER, _POINTER, _LONG, _LONG, _INT, _INT),
    "layer_norm": (_POINTER, _POINTER, _POINTER, _POINTER, _LONG, _LONG, _FLOAT, _INT, _INT),
    "swiglu": (_POINTER, _POINTER, _POINTER, _LONG, _INT, _INT),
    "swiglu_gradient": (_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _LONG, _INT, _INT),
    "square_sum": (_POINTER, _LONG, _INT, _INT),
    "panel_six": (_POINTER, _POINTER, _LONG, _LONG, _INT, _INT),
    "quantize": (_POINTER, _INT, _LONG, _LONG, _LONG, _INT, _POINTER, _POINTER, _INT),
}
RESULTS = {"square_sum": ctypes.c_double}
_SOFT = 1  # omp_pause_soft
SUFFIXES = {2: "_avx512", 1: "_avx2"}


class Kernels:
    """The functions of the best instruction set that this processor has: `kernels.linear` and so on."""

    def __init__(self, library: ctypes.CDLL, suffix: str) -> None:
        self._library = library
        self._suffix = suffix
        self.instructions = suffix.strip("_")

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._library, name + self._suffix)
        function.restype = RESULTS.get(name)
        function.argtypes = ARGUMENTS.get(name)
        setattr(self, name, function)
        return function


@cache
def kernels() -> Kernels | None:
    """The kernels for this processor, or None: not built, no AVX2, or a PyTorch without a shared OpenMP runtime."""
    files = sorted(Path(__file__).parent.glob("_kernels.*.so"))
    if platform.system() != "Linux" or not files or not hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        return None
    library = ctypes.CDLL(str(files[0]))
    suffix = SUFFIXES.get(library.isa())
    return Kernels(library, suffix) if suffix else None


def release_threads() -> None:
    """End the OpenMP threads that the calling thread has started (its next parallel region starts new ones).

    With more of them in a process than processors, libgomp lets those that compute sleep at every barrier instead of
    spinning: a decoded token takes a third longer. So who loads a model lets go before the engine's thread computes.
    """
    if kernels() is not None:
        pause = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
        if pause is not None:
            pause(_SOFT)


def threads() -> int:
    """How many threads a kernel may use: PyTorch's setting."""
    return torch.get_num_threads()
