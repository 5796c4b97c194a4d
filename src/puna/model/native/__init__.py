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

SUFFIXES = {2: "_avx512", 1: "_avx2"}


class Kernels:
    """The functions of the best instruction set that this processor has: `kernels.linear` and so on."""

    def __init__(self, library: ctypes.CDLL, suffix: str) -> None:
        self._library = library
        self._suffix = suffix
        self.instructions = suffix.strip("_")

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._library, name + self._suffix)
        function.restype = None
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


def threads() -> int:
    """How many threads a kernel may use: PyTorch's setting."""
    return torch.get_num_threads()
