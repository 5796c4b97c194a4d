"""Memory of packed weights: in small pages while a model loads, which come quickly, and moved into large ones (2 MiB)
piece by piece while it serves: translating the addresses of small ones costs a product with a single row a fifth of its
time."""

import ctypes
import errno
import mmap
import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

LARGE = 2 << 20
_PIECE = 8 * LARGE  # the most that is moved at once
_TAKING = 0.02  # seconds that a piece may take: 16 MiB take 5 ms where large pages lie ready, 40 where they do not
_SHELF = 32 * LARGE  # room for small pieces side by side; what nobody writes to takes no memory
_LINE = 64
_COLLAPSE = 25  # MADV_COLLAPSE, Linux 6.1


@dataclass(frozen=True)
class _Stretch:
    """Memory that still lies in small pages, as long as its owner lives."""

    owner: "weakref.ref[mmap.mmap]"
    address: int
    size: int


_waiting: deque[_Stretch] = deque()
_pace = _PIECE / _TAKING  # bytes a second, as the last piece was moved


class _Shelf:
    """A stretch that is filled with small pieces, and lives as long as any of them."""

    def __init__(self) -> None:
        self._memory, self._whole = _mapped(_SHELF)
        self._used = 0

    def take(self, size: int) -> Tensor | None:
        """The next so many bytes; None where there is no room."""
        begin = self._used
        if begin + size > _SHELF:
            return None
        self._used = -(-(begin + size) // _LINE) * _LINE
        return self._whole[begin : begin + size]

    def close(self) -> None:
        """Nothing more comes: what lies there may move."""
        _wait(self._memory, self._whole, min(self._used, _SHELF))


_shelves: ContextVar[list[_Shelf] | None] = ContextVar("shelves", default=None)


@contextmanager
def side_by_side() -> Iterator[None]:
    """What is allocated within lies in few long stretches: for pieces that stay together, such as a layer's experts.

    Each by itself would be too small for large pages, or would move at a price (some milliseconds) of its own.
    """
    shelves: list[_Shelf] = []
    token = _shelves.set(shelves)
    try:
        yield
    finally:
        _shelves.reset(token)
        for shelf in shelves:
            shelf.close()


def suit(size: int) -> bool:
    """Whether so many bytes should be allocated here, rather than by PyTorch."""
    return size >= LARGE or _shelves.get() is not None


def _mapped(size: int) -> tuple[mmap.mmap, Tensor]:
    """Memory, and `size` of its bytes from the border of a large page on."""
    memory = mmap.mmap(-1, size + LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % LARGE
    return memory, whole[start : start + size]


def _wait(memory: mmap.mmap, whole: Tensor, size: int) -> None:
    _waiting.append(_Stretch(weakref.ref(memory), whole.data_ptr(), size // LARGE * LARGE))


def allocate(size: int) -> Tensor:
    """So many bytes, aligned to large pages, or within `side_by_side` to 64 bytes."""
    shelves = _shelves.get()
    if shelves is None or size > _SHELF:
        memory, whole = _mapped(size)
        _wait(memory, whole, size)
        return whole
    piece = shelves[-1].take(size) if shelves else None
    if piece is None:
        shelves.append(_Shelf())
        piece = shelves[-1].take(size)
        assert piece is not None
    return piece


def enlarge() -> bool:
    """Move a piece of what lies in small pages into large ones. False: there is nothing left to move."""
    global _pace  # engines may overwrite each other's: it is a reading, nothing more
    while True:
        try:
            stretch = _waiting.popleft()
        except IndexError:  # engines step in threads of their own, so that looking first would not do
            return False
        owner = stretch.owner()  # held while the system works on it
        if owner is None or not stretch.size:
            continue
        piece = min(max(int(_pace * _TAKING) // LARGE * LARGE, LARGE), _PIECE, stretch.size)
        if stretch.size > piece:
            _waiting.appendleft(_Stretch(stretch.owner, stretch.address + piece, stretch.size - piece))
        advise = ctypes.CDLL(None, use_errno=True).madvise
        advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        begin = time.perf_counter()
        if advise(stretch.address, piece, _COLLAPSE) and ctypes.get_errno() == errno.EINVAL:
            advise(stretch.address, piece, mmap.MADV_HUGEPAGE)  # an older Linux moves it when it finds the time
        _pace = piece / max(time.perf_counter() - begin, 1e-6)
        return True
