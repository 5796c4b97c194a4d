"""One .safetensors file: header checked in full before any weight is touched, tensors read one by one.

Tensors are read into memory of their own, so that a model never rests on a file that may change; but for whoever
keeps little of each (`mapped`), and for large words of packed integers: nobody computes with those, and rearranging
them right out of the file's pages spares a copy. Format: 8 bytes little-endian header length N, N bytes of JSON
{name: {dtype, shape, data_offsets: [begin, end]}}, then the data (huggingface/safetensors README).
"""

import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import FileIO, IOBase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from puna.errors import PunaError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What quantised weights are made of; nobody else's weights are integers.
BITS = {"I8": torch.int8, "I32": torch.int32, "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn}
_MAPPED = 1 << 20  # bytes of words from which mapping them is quicker than copying
_MAX_HEADER = 100_000_000  # bytes; the safetensors library's own limit
_AGAIN = "Download the file again."


@dataclass(frozen=True)
class Entry:
    """One tensor's place: stored dtype name, shape, first and last+1 byte of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class _Version(NamedTuple):
    """What changes when a file is written anew."""

    place: tuple[int, int]  # device and inode
    size: int
    written: int  # nanoseconds


def _version(file: IOBase) -> _Version:
    found = os.fstat(file.fileno())
    return _Version((found.st_dev, found.st_ino), found.st_size, found.st_mtime_ns)


class SafetensorsFile:
    """An opened file. Raises PunaError, naming file and tensor, for a header that is not exactly right."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.mapped = False  # whole tensors that are read are the file's own pages, which processes share
        with path.open("rb") as file:
            self._version = _version(file)
            size = self._version.size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8:
                raise PunaError(f"{path} is truncated: {size} bytes are too few for a safetensors file. {_AGAIN}")
            if length > _MAX_HEADER:
                raise PunaError(f"{path} claims a header of {length} bytes: it is no safetensors file. {_AGAIN}")
            if 8 + length > size:
                raise PunaError(f"{path} is truncated: header ends at byte {8 + length}, file at {size}. {_AGAIN}")
            raw = file.read(length)
        try:
            header = json.loads(raw, object_pairs_hook=self._unique)
        except (ValueError, RecursionError) as error:
            raise PunaError(f"{path} has a damaged header: {error}. {_AGAIN}") from None
        if not isinstance(header, dict):
            raise PunaError(f"{path} has a damaged header: no JSON object. {_AGAIN}")
        metadata = header.pop("__metadata__", None)
        self.metadata: dict[str, Any] = metadata if isinstance(metadata, dict) else {}
        self.entries = {name: self._entry(name, value, 8 + length) for name, value in header.items()}
        self._check_layout(8 + length, size)

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise PunaError(f"{self.path} has a damaged header: a name stands twice. {_AGAIN}")
        return dict(pairs)

    def _entry(self, name: str, value: Any, start: int) -> Entry:
        try:
            dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
            numbers = (*shape, begin, end)
            valid = isinstance(dtype, str) and all(type(x) is int and 0 <= x < 2**63 for x in numbers)
        except (KeyError, TypeError, ValueError):
            valid = False
        if not valid:
            raise PunaError(f"{self.path}, tensor {name}: damaged header entry. {_AGAIN}")
        known = (DTYPES | BITS).get(dtype)
        if known is not None and end - begin != math.prod(shape) * known.itemsize:
            raise PunaError(
                f"{self.path}, tensor {name}: {dtype} {list(shape)} does not fill bytes {begin} to {end}. {_AGAIN}"
            )
        return Entry(dtype, shape, start + begin, start + end)

    def _check_layout(self, start: int, size: int) -> None:
        """Tensors must follow each other without overlap or hole and end with the file."""
        at, previous = start, "the header"
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin < at:
                raise PunaError(f"{self.path}: tensor {name} overlaps {previous}. Do not trust this file.")
            if entry.begin > at:
                raise PunaError(f"{self.path}: a hole of {entry.begin - at} bytes before tensor {name}. {_AGAIN}")
            if entry.end > size:
                raise PunaError(
                    f"{self.path} is truncated: tensor {name} ends at byte {entry.end}, the file at {size}. {_AGAIN}"
                )
            at, previous = entry.end, f"tensor {name}"
        if at != size:
            raise PunaError(f"{self.path}: {size - at} bytes after the last tensor. {_AGAIN}")

    def read(self, name: str) -> Tensor:
        """One tensor, in its stored dtype. Raises PunaError for a dtype that is no plain float."""
        entry = self.entries[name]
        kind = DTYPES.get(entry.dtype)
        if self.mapped and kind and entry.end > entry.begin and entry.begin % kind.itemsize == 0:
            count = math.prod(entry.shape)
            return torch.frombuffer(self._pages, dtype=kind, count=count, offset=entry.begin).view(entry.shape)
        return self._read(name, entry.shape, entry.begin, DTYPES)

    @cached_property
    def _pages(self) -> mmap.mmap:
        with self._opened() as file:  # written to, they are this process's alone
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def read_bits(self, name: str) -> Tensor:
        """As `read`, of the integers and 8-bit floats too that make up a quantised weight.

        Large int32 words are the file's own pages, mapped as long as the tensor lives."""
        entry = self.entries[name]
        size = entry.end - entry.begin
        if entry.dtype != "I32" or size < _MAPPED or entry.begin % 4 or torch.get_default_device().type == "meta":
            return self._read(name, entry.shape, entry.begin, DTYPES | BITS)
        before = entry.begin % mmap.ALLOCATIONGRANULARITY
        with self._opened(name) as file:
            pages = mmap.mmap(file.fileno(), before + size, access=mmap.ACCESS_COPY, offset=entry.begin - before)
        return torch.frombuffer(pages, dtype=torch.int32, count=size // 4, offset=before).view(entry.shape)

    @contextmanager
    def _opened(self, name: str = "") -> Iterator[FileIO]:
        """The file, as long as it is the one whose header was read: in another, a tensor's place holds anything."""
        where = f"{self.path}, tensor {name}" if name else f"{self.path}"
        try:
            with self.path.open("rb", buffering=0) as file:
                now = _version(file)
                if now.size < self._version.size:
                    raise PunaError(f"{where}: the file ends early. {_AGAIN}")
                if now != self._version:
                    raise PunaError(f"{self.path} was written anew while it was read. Load it again when that is done.")
                yield file
        except OSError as error:
            raise PunaError(f"{where}: can't be read any more ({error.strerror}). Load it again when it can.") from None

    def read_rows(self, name: str, start: int, stop: int, bits: bool = False) -> Tensor:
        """Rows start..stop-1 along the first axis, and no other bytes of the tensor; otherwise as `read` or, with
        `bits`, as `read_bits`."""
        entry = self.entries[name]
        row_bytes = (entry.end - entry.begin) // entry.shape[0]
        dtypes = DTYPES | BITS if bits else DTYPES
        return self._read(name, (stop - start, *entry.shape[1:]), entry.begin + start * row_bytes, dtypes)

    def _read(self, name: str, shape: tuple[int, ...], begin: int, dtypes: Mapping[str, torch.dtype]) -> Tensor:
        entry = self.entries[name]
        if entry.dtype not in dtypes:
            raise PunaError(
                f"{self.path}, tensor {name}: dtype {entry.dtype} is not supported. "
                f"Save it as one of {', '.join(dtypes)}."
            )
        tensor = torch.empty(shape, dtype=dtypes[entry.dtype])
        if tensor.is_meta:
            return tensor
        buffer = tensor.view(-1).view(torch.uint8).numpy().data
        with self._opened(name) as file:
            file.seek(begin)
            done = 0
            while done < len(buffer):
                count = os.readv(file.fileno(), [buffer[done:]])
                if not count:
                    raise PunaError(f"{self.path}, tensor {name}: the file ends early. {_AGAIN}")
                done += count
        return tensor
