"""Memory of packed weights: in small pages while a model loads, which come quickly, and moved into large ones (2 MiB)
piece by piece while it serves: translating the addresses of small ones costs a product with a single row a fifth of its
time."""

import ctypes
import errno
import mmap
import weakref
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

LARGE = 2 << 20
_PIECE = 8 * LARGE  # moved at once: some milliseconds
_COLLAPSE = 25  # MADV_COLLAPSE, Linux 6.1


@dataclass(frozen=True)
class _Stretch:
    """Memory that still lies in small pages, as long as its owner lives."""

    owner: "weakref.ref[mmap.mmap]"
    address: int
    size: int


_waiting: deque[_Stretch] = deque()


def allocate(size: int) -> Tensor:
    """So many bytes, aligned to large pages."""
    memory = mmap.mmap(-1, size + LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % LARGE
    _waiting.append(_Stretch(weakref.ref(memory), whole.data_ptr() + start, size // LARGE * LARGE))
    return whole[start : start + size]


def enlarge() -> bool:
    """Move a piece of what lies in small pages into large ones. False: there is nothing left to move."""
    while True:
        try:
            stretch = _waiting.popleft()
        except IndexError:  # engines step in threads of their own, so that looking first would not do
            return False
        owner = stretch.owner()  # held while the system works on it
        if owner is None or not stretch.size:
            continue
        piece = min(_PIECE, stretch.size)
        if stretch.size > piece:
            _waiting.appendleft(_Stretch(stretch.owner, stretch.address + piece, stretch.size - piece))
        advise = ctypes.CDLL(None, use_errno=True).madvise
        advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        if advise(stretch.address, piece, _COLLAPSE) and ctypes.get_errno() == errno.EINVAL:
            advise(stretch.address, piece, mmap.MADV_HUGEPAGE)  # an older Linux moves it when it finds the time
        return True
