"""How much memory there is, how much this process takes, and how it gives some back."""

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# mallopt(3): requests from this size on get pages of their own, which go back to the system when freed; and so much may
# lie free at the end of the heap
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
_SMALL = 1 << 20
_LARGEST = 32 << 20  # glibc's limit for the first, which it reaches by itself as large tensors are freed


def available_bytes(device: torch.device) -> int:
    """Memory that could be had now without pushing anything out."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            found = dict(line.split(":", 1) for line in file)
        return int(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux: half of what is built in
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def resident() -> int:
    """Bytes of this process that are in memory now (0 where the system doesn't tell)."""
    return _status("VmRSS")


def resident_peak() -> int:
    """The most bytes of this process that were in memory at once, code included (0 where the system doesn't tell)."""
    return _status("VmHWM")


def _status(field: str) -> int:
    try:
        found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


@contextmanager
def returned_at_once() -> Iterator[None]:
    """While weights are read and packed, freed tensors go back to the system at once (glibc; elsewhere as ever).

    glibc would keep those below 32 MB in its heap, between others that stay, where the next ones don't fit: a fifth
    above what is really held. Afterwards it may keep them again: a step's activations should not cost page faults.
    """
    library = ctypes.CDLL(None)
    mallopt, trim = getattr(library, "mallopt", None), getattr(library, "malloc_trim", None)
    if mallopt is None or trim is None:
        yield
        return
    mallopt(_MMAP_THRESHOLD, _SMALL)
    try:
        yield
    finally:
        trim(0)
        mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, 2 * _LARGEST)
