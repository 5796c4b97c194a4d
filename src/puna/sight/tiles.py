"""A picture as normalised tiles."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from puna.family.vision import Llama4Vision, Llama32Vision
from puna.sight.canvas import canvas_for


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture as a tower reads it.

    `pixels` [T, 3, side, side] float32 are the normalised tiles, row by row, and for Llama 4 the global tile last where
    there is more than one; `grid` is (rows, columns) of the tiles without it; `key` is the same for the same tiles on
    the same grid, and for no others; `note` says what of the source is not to be seen, as with animated files.
    """

    pixels: NDArray[np.float32]
    grid: tuple[int, int]
    key: str
    note: str = ""


def tile(image: Image.Image, vision: Llama4Vision | Llama32Vision) -> Picture:
    """An RGB image, as `read_picture` gives it, cut into tiles as the tower was trained.

    Resizing is bilinear with antialiasing; what the picture leaves of its canvas is black. Every size of picture has a
    canvas: a very long one is drawn small. Llama 4's global tile is the whole picture pressed into one tile.
    Source: see `canvas`.
    """
    canvas = canvas_for((image.height, image.width), vision)
    (rows, columns), (height, width), side = canvas.grid, canvas.drawn, vision.tile_side
    drawn = np.zeros((rows * side, columns * side, 3), np.uint8)
    drawn[:height, :width] = _resized(image, width, height)
    tiles = drawn.reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, side, side)
    if isinstance(vision, Llama4Vision) and rows * columns > 1:
        whole = _resized(image, side, side).transpose(2, 0, 1)
        tiles = np.concatenate((tiles, whole[None]))
    table = _levels(isinstance(vision, Llama32Vision))
    pixels = np.empty(tiles.shape, np.float32)
    for channel in range(3):
        np.take(table[channel], tiles[:, channel], out=pixels[:, channel], mode="clip")
    key = hashlib.sha256(f"{type(vision).__name__} {rows}x{columns} of {side}:".encode())
    key.update(np.ascontiguousarray(tiles).data)
    return Picture(pixels, canvas.grid, key.hexdigest(), image.info.get("note", ""))


def _resized(image: Image.Image, width: int, height: int) -> NDArray[np.uint8]:
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


@lru_cache
def _levels(cross: bool) -> NDArray[np.float32]:
    """What each channel's 256 values become: [3, 256]. Llama 4's reference computes in bfloat16, and so were its towers
    trained; Llama 3.2's in float32."""
    kind = Llama32Vision if cross else Llama4Vision
    values = np.arange(256, dtype=np.float32)
    means = np.array(kind.channel_means, np.float32)[:, None]
    deviations = np.array(kind.channel_deviations, np.float32)[:, None]
    if cross:
        return (values - means * 255) / (deviations * 255)
    shifted = _bfloat16(_bfloat16(values * np.float32(1 / 255)) - _bfloat16(means))
    return _bfloat16(shifted / _bfloat16(deviations))


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Finite values rounded to the nearest bfloat16, halves to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
