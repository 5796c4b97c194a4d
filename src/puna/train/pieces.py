"""Which part of a whole tensor a process holds, and saved tensors put together from the parts of any number of them."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from puna.errors import PunaError
from puna.family.sharding import Cut, Range

KEY = "pieces"  # of a file's metadata: each tensor's `Piece`; a file without holds whole tensors
Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Piece:
    """A part of a tensor of some `shape`: of each axis the ranges that are held, joined in order."""

    shape: tuple[int, ...]
    axes: tuple[tuple[Range, ...], ...]

    @staticmethod
    def whole(shape: Sequence[int]) -> "Piece":
        """All of it."""
        return Piece(tuple(shape), tuple(((0, size),) for size in shape))

    @property
    def held(self) -> tuple[int, ...]:
        """The shape of the part."""
        return tuple(sum(stop - start for start, stop in ranges) for ranges in self.axes)

    def cut(self, cuts: Sequence[Cut]) -> "Piece":
        """The part of a whole tensor that these cuts leave."""
        axes = list(self.axes)
        for cut in cuts:
            axes[cut.axis] = cut.ranges
        return Piece(self.shape, tuple(axes))

    def part(self, axis: int, first: int, last: int) -> "Piece":
        """Of what is held, first..last-1 along an axis."""
        found, at = [], 0
        for start, stop in self.axes[axis]:
            begin, end = max(first, at), min(last, at + stop - start)
            if begin < end:
                found.append((start + begin - at, start + end - at))
            at += stop - start
        return Piece(self.shape, (*self.axes[:axis], tuple(found), *self.axes[axis + 1 :]))

    def overlaps(self, other: "Piece") -> Iterator[tuple[Slices, Slices]]:
        """The blocks that both hold: where they lie in this part, and where in the other."""
        for block in product(*(_common(mine, theirs) for mine, theirs in zip(self.axes, other.axes, strict=True))):
            yield tuple(slice(a, a + n) for a, _, n in block), tuple(slice(b, b + n) for _, b, n in block)


def _common(mine: tuple[Range, ...], theirs: tuple[Range, ...]) -> list[tuple[int, int, int]]:
    """Of one axis: where common runs begin in either part, and their lengths."""
    found, at = [], 0
    for start, stop in mine:
        other = 0
        for first, last in theirs:
            begin, end = max(start, first), min(stop, last)
            if begin < end:
                found.append((at + begin - start, other + begin - first, end - begin))
            other += last - first
        at += stop - start
    return found


def described(pieces: Mapping[str, Piece]) -> str:
    """As JSON."""
    return json.dumps({name: [piece.shape, piece.axes] for name, piece in pieces.items()})


def understood(text: str) -> dict[str, Piece]:
    """What `described` wrote."""
    return {
        name: Piece(tuple(shape), tuple(tuple((start, stop) for start, stop in ranges) for ranges in axes))
        for name, (shape, axes) in json.loads(text).items()
    }


class SavedTensors:
    """Files that processes saved together, each its parts. Tensors are read when asked for, and no more of them.

    Raises PunaError where a part is missing.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files: list[tuple[Any, dict[str, Piece]]] = []
        for path in files:
            file = safe_open(path, "pt")
            given = understood((file.metadata() or {}).get(KEY, "{}"))
            whole = {name: Piece.whole(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            self._files.append((file, whole | given))
        self.shapes = {name: piece.shape for _, pieces in self._files for name, piece in pieces.items()}

    def read(self, name: str, piece: Piece) -> Tensor:
        """A part of a tensor, of whatever parts were saved."""
        out: Tensor | None = None
        seen: set[Piece] = set()
        missing = math.prod(piece.held)
        for file, pieces in self._files:
            stored = pieces.get(name)
            if stored is None or stored in seen:
                continue  # several processes may hold the same
            seen.add(stored)
            part = file.get_slice(name)
            for mine, theirs in piece.overlaps(stored):
                found = part[theirs]
                out = found.new_empty(piece.held) if out is None else out
                out[mine] = found
                missing -= found.numel()
        if missing:
            raise PunaError(f"the saved state lacks a part of {name}; begin anew in another folder")
        return torch.empty(piece.held) if out is None else out

    def parts(self, pieces: Mapping[str, Piece]) -> "Parts":
        """Those parts, read when asked for."""
        return Parts(self, pieces)


class Parts(Mapping[str, Tensor]):
    """The parts of saved tensors that one process holds."""

    def __init__(self, saved: SavedTensors, pieces: Mapping[str, Piece]) -> None:
        self._saved, self._pieces = saved, pieces

    def __getitem__(self, name: str) -> Tensor:
        return self._saved.read(name, self._pieces[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)
