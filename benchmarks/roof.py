"""What this machine can do at best, measured in the same run as what is compared with it."""

import ctypes
import threading
import time
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

READ_BYTES = 1 << 30  # far more than any cache holds
PIECE_BYTES = 1 << 23


def read_bandwidth(repeats: int = 20) -> float:
    """Bytes a second that all threads together read from memory: the best of `repeats` passes over 1 GiB.

    The loop is the C library's `memchr` for a byte that isn't there: it does nothing but load (45 GB/s on a machine
    where torch's sum reaches 30 and its matrix-vector product 18). Threads take pieces in turn, so that one that is
    held up doesn't hold up the rest.
    """
    find = ctypes.CDLL(None).memchr
    find.restype, find.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    memory, count = _memory(READ_BYTES), torch.get_num_threads()

    def once() -> float:
        pieces = iter(range(memory.ctypes.data, memory.ctypes.data + READ_BYTES, PIECE_BYTES))

        def read() -> None:
            for address in pieces:  # one iterator for all threads
                find(address, 2, PIECE_BYTES)

        threads = [threading.Thread(target=read) for _ in range(count)]
        begun = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return READ_BYTES / (time.perf_counter() - begun)

    return max(once() for _ in range(repeats))


@cache
def _memory(size: int) -> NDArray[np.int8]:
    return np.ones(size, np.int8)  # NumPy asks for large pages, as our weights do: they read a fifth faster


def matrix_rate(dtype: torch.dtype, rows: int, inputs: int, outputs: int, repeats: int = 5) -> float:
    """Floating-point operations a second of torch's product [rows, inputs] x [inputs, outputs], at best."""
    left, right = torch.ones(rows, inputs, dtype=dtype), torch.ones(outputs, inputs, dtype=dtype)
    best = float("inf")
    for _ in range(repeats + 1):  # the first one warms up
        begun = time.perf_counter()
        torch.nn.functional.linear(left, right)
        best = min(best, time.perf_counter() - begun)
    return 2 * rows * inputs * outputs / best
