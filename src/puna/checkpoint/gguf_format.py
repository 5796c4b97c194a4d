"""The GGUF container: typed metadata and a table of tensors, checked before anything is believed.

Source: ggml `docs/gguf.md`. Type numbers and block sizes come from the `gguf` package; its reader is not used, since it
believes the counts and offsets of a broken file, and takes seconds over a vocabulary of 200,000 tokens.
"""

import mmap
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from puna.errors import PunaError

MAGIC = b"GGUF"
VERSION = 3
READABLE_VERSIONS = (2, 3)  # version 1 had 32-bit lengths and went out of use within weeks
_MAX_DIMENSIONS = 4

_SCALARS = {
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H", GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i", GGUFValueType.FLOAT32: "f", GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q", GGUFValueType.INT64: "q", GGUFValueType.FLOAT64: "d",
}  # fmt: skip

# the type of a list without items, where a reader asks for one: llama.cpp refuses to load merges that aren't texts
_EMPTY = {"tokenizer.ggml.merges": GGUFValueType.STRING}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. `shape` is row-major (the file's order reversed), `offset` in bytes from the start."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return encoded_bytes(self.shape, self.type)


@dataclass(frozen=True)
class GGUFFile:
    """The checked header of one file."""

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


def encoded_bytes(shape: Iterable[int], type: GGMLQuantizationType) -> int:
    """Bytes that a tensor takes in `type`; rows must be whole blocks."""
    block, size = GGML_QUANT_SIZES[type]
    return prod(shape) // block * size


def read_header(path: Path) -> GGUFFile:
    """Read and check everything before the tensor data.

    Raises:
        PunaError: not GGUF, an unknown version, truncated, or tensors that overlap or leave the file.
    """
    size = path.stat().st_size
    if size < len(MAGIC) + 20:
        raise PunaError(f"{path}: {size} bytes are too few for a GGUF file; fetch it again")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _HeaderReader(path, data, size).read()


class _HeaderReader:
    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size, self.position = path, data, size, 0

    def fail(self, what: str) -> PunaError:
        return PunaError(f"{self.path}: {what} (near byte {self.position}); the file is damaged, fetch it again")

    def read(self) -> GGUFFile:
        magic = bytes(self.data[:4])
        if magic != MAGIC:
            raise PunaError(
                f"{self.path}: starts with {magic!r}, not {MAGIC!r}: this is not a GGUF file; fetch it again"
            )
        self.position = 4
        version = self.scalar("I")
        if version not in READABLE_VERSIONS:
            hint = "big-endian files are not supported" if version & 0xFFFF == 0 else "convert the model again"
            raise PunaError(f"{self.path}: GGUF version {version} is not one of {READABLE_VERSIONS}; {hint}")
        tensor_count, field_count = self.scalar("Q"), self.scalar("Q")
        self.count(tensor_count, 24, "tensors")
        self.count(field_count, 13, "metadata entries")
        fields: dict[str, Any] = {}
        for _ in range(field_count):
            key = self.string("a metadata key")
            if key in fields:
                raise self.fail(f"metadata key {key!r} appears twice")
            fields[key] = self.value(self.scalar("I"), key)
        tensors = [self.tensor() for _ in range(tensor_count)]
        alignment = fields.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise self.fail(f"general.alignment is {alignment!r}, not a power of two")
        start = -(-self.position // alignment) * alignment
        return GGUFFile(self.path, fields, self.placed(tensors, start, alignment))

    def scalar(self, code: str) -> Any:
        width = struct.calcsize(code)
        if self.position + width > self.size:
            raise self.fail("the file ends inside its header")
        (value,) = struct.unpack_from("<" + code, self.data, self.position)
        self.position += width
        return value

    def count(self, number: int, least_bytes: int, what: str) -> None:
        """Refuse a count that the rest of the file could not hold, before allocating for it."""
        if number * least_bytes > self.size - self.position:
            raise self.fail(f"claims {number} {what}, more than the file can hold")

    def string(self, what: str) -> str:
        length = self.scalar("Q")
        self.count(length, 1, f"bytes in {what}")
        raw = self.data[self.position : self.position + length]
        self.position += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8") from error

    def value(self, kind: int, key: str) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string(key)
        if kind == GGUFValueType.ARRAY:
            return self.array(key)
        if kind not in _SCALARS:
            raise self.fail(f"metadata {key!r} has the unknown type {kind}")
        return self.scalar(_SCALARS[GGUFValueType(kind)])

    def array(self, key: str) -> list[Any]:
        kind, length = self.scalar("I"), self.scalar("Q")
        if kind == GGUFValueType.STRING:
            self.count(length, 8, f"strings in {key}")
            return [self.string(key) for _ in range(length)]
        if kind not in _SCALARS:
            raise self.fail(f"metadata {key!r} is an array of the unsupported type {kind}")
        code = np.dtype(_SCALARS[GGUFValueType(kind)]).newbyteorder("<")
        self.count(length, code.itemsize, f"values in {key}")
        values = np.frombuffer(self.data, code, length, self.position).tolist()
        self.position += length * code.itemsize
        return values

    def tensor(self) -> TensorInfo:
        name = self.string("a tensor name")
        dimensions = self.scalar("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self.fail(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self.scalar("Q") for _ in range(dimensions))[::-1]
        kind, offset = self.scalar("I"), self.scalar("Q")
        try:
            type_ = GGMLQuantizationType(kind)
        except ValueError as error:
            raise PunaError(
                f"{self.path}: tensor {name!r} has the unknown type {kind}; convert the model again"
            ) from error
        if not all(shape):
            raise self.fail(f"tensor {name!r} has the empty shape {shape}")
        block = GGML_QUANT_SIZES[type_][0]
        if shape[-1] % block:
            raise self.fail(f"tensor {name!r}: rows of {shape[-1]} are not whole {type_.name} blocks of {block}")
        return TensorInfo(name, type_, shape, offset)

    def placed(self, tensors: list[TensorInfo], start: int, alignment: int) -> dict[str, TensorInfo]:
        """The tensors with absolute offsets, each inside the file and clear of the others."""
        end, before = start, "the header"
        placed: dict[str, TensorInfo] = {}
        for info in sorted(tensors, key=lambda t: t.offset):
            absolute = TensorInfo(info.name, info.type, info.shape, start + info.offset)
            if info.name in placed:
                raise self.fail(f"tensor {info.name!r} appears twice")
            if info.offset % alignment:
                raise self.fail(f"tensor {info.name!r} lies at {info.offset}, not a multiple of {alignment}")
            if absolute.offset < end:
                raise self.fail(f"tensor {info.name!r} overlaps {before}")
            end, before = absolute.offset + absolute.nbytes, f"tensor {info.name!r}"
            if end > self.size:
                raise self.fail(f"tensor {info.name!r} ends at byte {end} of a file of {self.size} bytes")
            placed[info.name] = absolute
        return placed


def pack_header(
    fields: Mapping[str, Any], tensors: Iterable[tuple[str, tuple[int, ...], GGMLQuantizationType]]
) -> bytes:
    """The bytes before the tensor data, which follows in the given order, each tensor padded to 32 bytes.

    Python values map to GGUF types: bool, int (uint32; int32 in arrays and where negative), float (float32), str, and
    lists of one of these.
    """
    table, offset, rows = list(tensors), 0, bytearray()
    for name, shape, type_ in table:
        rows += _string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        rows += struct.pack("<IQ", type_, offset)
        offset += padded(encoded_bytes(shape, type_))
    header = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(table), len(fields)))
    for key, value in fields.items():
        header += _string(key) + _typed(value, _EMPTY.get(key, GGUFValueType.INT32))
    header += rows
    return bytes(header.ljust(padded(len(header)), b"\0"))


def padded(length: int) -> int:
    """`length` rounded up to the alignment."""
    return -(-length // GGUF_DEFAULT_ALIGNMENT) * GGUF_DEFAULT_ALIGNMENT


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _typed(value: Any, empty: GGUFValueType) -> bytes:
    if isinstance(value, list | tuple):
        kinds = {_kind(item, in_array=True) for item in value} or {empty}
        if len(kinds) > 1:
            raise TypeError(f"a GGUF array holds one type, not {sorted(kinds)}")
        kind = kinds.pop()
        items = b"".join(_plain(item, kind) for item in value)
        return struct.pack("<IIQ", GGUFValueType.ARRAY, kind, len(value)) + items
    kind = _kind(value)
    return struct.pack("<I", kind) + _plain(value, kind)


def _kind(value: Any, in_array: bool = False) -> GGUFValueType:
    if isinstance(value, bool):
        return GGUFValueType.BOOL
    if isinstance(value, int):
        return GGUFValueType.INT32 if in_array or value < 0 else GGUFValueType.UINT32
    if isinstance(value, float):
        return GGUFValueType.FLOAT32
    if isinstance(value, str):
        return GGUFValueType.STRING
    raise TypeError(f"GGUF metadata cannot hold {value!r}")


def _plain(value: Any, kind: GGUFValueType) -> bytes:
    return _string(value) if kind == GGUFValueType.STRING else struct.pack("<" + _SCALARS[kind], value)
