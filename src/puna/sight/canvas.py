"""Which grid of tiles a picture gets, and how large it is drawn on it. Sizes are (height, width) in pixels.

Both families draw on the canvas that asks for the least enlarging, else for the least shrinking, and of those on the
smallest; the picture keeps its proportions, lies in the upper left corner, and is never drawn larger than it is but to
fill one tile. The references compute this with different roundings (Llama 4 in PyTorch's float32, Llama 3.2 in numpy's
float64), which decide between canvases that tie and cost a row of pixels now and then, so both are kept.

Source: transformers `image_processing_llama4.py`, `image_processing_mllama.py`; llama-models `llama4/preprocess.py`,
`llama3/multimodal/image_transform.py`.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from puna.family.vision import Llama4Vision, Llama32Vision

Grid = tuple[int, int]
Size = tuple[int, int]


@dataclass(frozen=True)
class Canvas:
    """A grid of tiles (rows, columns) and the size (height, width) at which the picture is drawn on it."""

    grid: Grid
    drawn: Size


def canvas_for(size: Size, vision: Llama4Vision | Llama32Vision) -> Canvas:
    """The canvas of a picture of this size, both sides at least 1 pixel: at most `vision.max_tiles` tiles."""
    if isinstance(vision, Llama4Vision):
        return _llama4_canvas(size, vision.tile_side, vision.max_tiles)
    return _llama32_canvas(size, vision.tile_side, vision.aspect_ratios)


def _llama4_canvas(size: Size, side: int, max_tiles: int) -> Canvas:
    grids = np.array(_llama4_grids(max_tiles))
    scales = np.divide(grids * side, np.array(size), dtype=np.float32).min(1)
    grid = _least_change(grids, scales)
    # a side that the canvas bounds comes to the reference as a float32 tensor, one that it leaves alone as an int
    limits = [np.float32(n * side) if n * side < max(own, side) else float(max(own, side))
              for n, own in zip(grid, size, strict=True)]
    by_height, by_width = (limit / own for limit, own in zip(limits, size, strict=True))
    height, width = int(limits[0]), int(limits[1])
    if by_width < by_height:
        height = min(math.floor(size[0] * by_width), height)
    else:
        width = min(math.floor(size[1] * by_height), width)
    return Canvas(grid, (max(height, 1), max(width, 1)))


@lru_cache
def _llama4_grids(max_tiles: int) -> list[Grid]:
    """All grids of at most `max_tiles` tiles in the reference's order, which breaks ties: by aspect ratio, each at its
    first appearance in the factors of max_tiles, max_tiles - 1, ... 1."""
    by_ratio: dict[float, list[Grid]] = {}
    for tiles in range(max_tiles, 0, -1):
        for rows in range(1, tiles + 1):
            if tiles % rows == 0:
                by_ratio.setdefault(rows / (tiles // rows), []).append((rows, tiles // rows))
    return [grid for same in by_ratio.values() for grid in same]


def _llama32_canvas(size: Size, side: int, allowed: tuple[Grid, ...]) -> Canvas:
    grids = np.array(allowed)
    scales = (grids * side / np.array(size)).min(1)
    grid = _least_change(grids, scales)
    height, width = (min(max(own, side), n * side) for own, n in zip(size, grid, strict=True))
    by_height, by_width = height / size[0], width / size[1]
    if by_width < by_height:
        height = min(math.floor(size[0] * by_width) or 1, height)
    else:
        width = min(math.floor(size[1] * by_height) or 1, width)
    return Canvas(grid, (height, width))


def _least_change(grids: NDArray[np.int64], scales: NDArray[np.floating]) -> Grid:
    """The grid [2] of those [N, 2] with the smallest scale [N] of at least 1, else with the largest; ties go to the
    fewest tiles, then to the first."""
    enlarging = scales[scales >= 1]
    tied = grids[scales == (enlarging.min() if len(enlarging) else scales.max())]
    rows, columns = tied[tied.prod(1).argmin()].tolist()
    return rows, columns
