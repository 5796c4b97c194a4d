"""Pictures of prompts in the engine: checked, looked at once, and kept by what they show.

A picture's features depend on nothing but the picture. So they are computed before the tokens that need them, a few
tiles a step while answers go on, and are found again by whoever shows the same picture.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from puna.engine.gallery import Gallery, picture_bytes
from puna.engine.pace import LONGEST
from puna.engine.reply import Inputs
from puna.errors import PunaError
from puna.family.config import ModelConfig
from puna.family.vision import Llama4Vision, Llama32Vision
from puna.model import Decoder
from puna.model.pictures import PassPictures, PatchFeatures, SequencePictures

TILES = 8  # looked at in one step at most, where no answer waits


@dataclass(frozen=True, eq=False)
class Shown:
    """One picture in a prompt.

    place: of its first placeholder. first: the first token that has to do with it, which may stand before that; those
    from `end` on have not (None: all of them have).
    """

    key: bytes
    tiles_T3SS: Tensor
    grid: tuple[int, int]
    place: int
    first: int
    end: int | None


def shown(inputs: Inputs, token_ids: Sequence[int], config: ModelConfig) -> list[Shown]:
    """The pictures of inputs, whose token ids are checked already. Raises PunaError naming the field that is wrong."""
    vision, pixels, grids = config.vision, inputs.pixel_values, inputs.grids
    grids = None if grids is None or not len(grids) else grids
    if pixels is None and grids is None:
        return []
    if vision is None:
        raise PunaError("these Inputs hold pictures, but this model reads text only")
    if pixels is None or grids is None:
        raise PunaError(f"Inputs.{'pixel_values' if pixels is None else 'grids'} is missing: pictures need both")
    checked = _grids(grids, vision)
    counts = [vision.tiles(grid) for grid in checked]
    tiles = _pixels(pixels, sum(counts), vision).split(counts)
    places = np.flatnonzero(np.asarray(token_ids, np.int64) == vision.image_token_id).tolist()
    each = [count * vision.tokens_per_tile if isinstance(vision, Llama4Vision) else 1 for count in counts]
    if len(places) != sum(each):
        raise PunaError(
            f"Inputs.token_ids has {len(places)} places for pictures (token {vision.image_token_id}), but Inputs.grids "
            f"{[list(grid) for grid in checked]!r:.120} need {sum(each)}; let `prepare` lay out the prompt"
        )
    ends = _ends(places, each, vision)
    first = np.cumsum([0, *each[:-1]]).tolist()
    # there, tokens before the first picture read all pictures
    reads_ahead = isinstance(vision, Llama32Vision) and vision.reference == "transformers"
    return [
        Shown(_key(tiles_T3SS, grid), tiles_T3SS, grid, places[at], 0 if reads_ahead else places[at], end)
        for tiles_T3SS, grid, at, end in zip(tiles, checked, first, ends, strict=True)
    ]


def _ends(places: list[int], each: list[int], vision: Llama4Vision | Llama32Vision) -> list[int | None]:
    """Where tokens cease to have to do with each picture."""
    if isinstance(vision, Llama4Vision):
        return [places[last - 1] + 1 for last in np.cumsum(each).tolist()]
    ends: list[int | None] = [None]
    for place, following in zip(places[-2::-1], places[:0:-1], strict=True):
        ends.append(ends[-1] if following == place + 1 else following)  # neighbours are seen together
    return ends[::-1]


def _grids(grids: Sequence[Any], vision: Llama4Vision | Llama32Vision) -> list[tuple[int, int]]:
    checked = []
    for at, grid in enumerate(grids):
        pair = grid.tolist() if hasattr(grid, "tolist") else grid
        whole = isinstance(pair, Sequence) and len(pair) == 2 and all(type(side) is int and side > 0 for side in pair)
        if not whole or pair[0] * pair[1] > vision.max_tiles:
            raise PunaError(
                f"Inputs.grids[{at}] must be (rows, columns) of at most {vision.max_tiles} tiles, not {grid!r:.80}"
            )
        checked.append((pair[0], pair[1]))
    return checked


def _pixels(given: Tensor, tiles: int, vision: Llama4Vision | Llama32Vision) -> Tensor:
    pixels = torch.from_numpy(given) if isinstance(given, np.ndarray) else given
    shape = [tiles, 3, vision.tile_side, vision.tile_side]
    if not isinstance(pixels, Tensor) or list(pixels.shape) != shape:
        found = list(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
        raise PunaError(f"Inputs.pixel_values must be {shape} for these grids"
                        f"{' (a global tile where there is more than one)' if isinstance(vision, Llama4Vision) else ''}"
                        f", not {found}")  # fmt: skip
    if pixels.dtype != torch.float32:
        raise PunaError(f"Inputs.pixel_values must be float32, not {str(pixels.dtype).removeprefix('torch.')}")
    finite_T = pixels.isfinite().flatten(1).all(1)
    if not finite_T.all():
        raise PunaError(f"Inputs.pixel_values has values in tile {int(finite_T.int().argmin())} that are not finite")
    return pixels.detach().to("cpu").contiguous()


def _key(tiles_T3SS: Tensor, grid: tuple[int, int]) -> bytes:
    """What a picture is found by: its grid and every pixel."""
    return blake2b(tiles_T3SS.numpy().data, digest_size=24, key=b"%d %d" % grid).digest()


@dataclass(eq=False)
class TaskPictures:
    """The pictures of one request, on their way through the engine.

    placed: the features, tied to the prompt's tokens, from the moment on that all of `held` are known.
    """

    prompt: Sequence[int]
    all: Sequence[Shown]
    held: Sequence[Shown] = ()
    placed: SequencePictures | None = None

    @property
    def marks(self) -> dict[int, bytes]:
        """Which pictures there are from which place on: token ids alone don't tell."""
        marks: dict[int, bytes] = {}
        for picture in self.all:
            marks[picture.first] = marks.get(picture.first, b"") + picture.key
        return marks

    def needed(self, computed: int) -> Sequence[Shown]:
        """Those that the tokens from `computed` on have to do with."""
        return [picture for picture in self.all if picture.end is None or picture.end > computed]

    def share(self, start: int, count: int, at: int) -> PassPictures:
        """See `SequencePictures.share`."""
        return self.placed.share(start, count, at) if self.placed else PassPictures()

    def ready(self, computed: int) -> int | None:
        """Tokens from here on can't be computed yet; None where nothing is waited for."""
        needed = () if self.placed else self.needed(computed)
        return needed[0].first if needed else None


@dataclass
class Looker:
    """Looks at the pictures of running requests, some in each step, so that answers in progress keep their pace."""

    decoder: Decoder
    gallery: Gallery
    fixed: bool = False  # whether every step must look at as many, whatever the time
    _begun: dict[bytes, list[Tensor]] = field(default_factory=dict)  # rows of the tiles seen so far
    _cost: float | None = None  # seconds a tile
    _debt: float = 0.0  # seconds that answers waited, and have not made up for yet

    def check(self, pictures: Sequence[Shown]) -> None:
        """Raises PunaError where a prompt's pictures could never be held together."""
        needed = sum(self._sizes(pictures).values())
        if needed > self.gallery.room:
            raise PunaError(
                f"the {len(pictures)} pictures of this prompt take {needed / 1e6:.0f} MB, but there is room for "
                f"{self.gallery.room / 1e6:.0f} MB at once; give fewer or smaller ones"
            )

    def _sizes(self, pictures: Sequence[Shown]) -> dict[bytes, int]:
        config, size = self.decoder.config, self.decoder.dtype.itemsize
        return {one.key: picture_bytes(config, len(one.tiles_T3SS), size) for one in pictures}

    def leave(self, pictures: TaskPictures) -> None:
        """A request no longer needs what it held: done, or preempted."""
        self.gallery.release({one.key for one in pictures.held})
        self._begun = {key: rows for key, rows in self._begun.items() if key in self.gallery}
        pictures.held, pictures.placed = (), None

    def settle(self, pictures: TaskPictures, computed: int, may_hold: bool = True) -> bool:
        """Let go of pictures that no further token has to do with; place those that are known. False: some aren't.

        may_hold: whether it is its turn to be given room.
        """
        needed = pictures.needed(computed)
        if pictures.placed is not None:
            if not needed:
                self.leave(pictures)
            return True
        if not pictures.held:
            if not needed:
                return True
            if not (may_hold and self.gallery.hold(self._sizes(needed))):
                return False
            pictures.held = needed
        known = [features for one in pictures.held if (features := self.gallery.get(one.key))]
        if len(known) < len(pictures.held):
            return False
        # what comes before is in the cache already, and has nothing to do with these
        place = pictures.held[0].place
        pictures.placed = self.decoder.place([-1] * place + list(pictures.prompt[place:]), known)
        return True

    def look(self, waiting: Sequence[TaskPictures], answers: bool) -> bool:
        """Look at some of what these wait for, the first ones first. False: nothing was to be looked at now."""
        pending = list({one.key: one for each in waiting for one in each.held
                        if self.gallery.get(one.key) is None}.values())  # fmt: skip
        if not pending or (answers and self._debt > 0 and not self.fixed):
            return False
        start = time.perf_counter()
        seen = self._tiles(pending, self._count(answers)) if isinstance(
            self.decoder.config.vision, Llama4Vision) else self._picture(pending[0])  # fmt: skip
        seconds = max(time.perf_counter() - start, 1e-9)
        self._cost = seconds / seen
        self._debt = seconds
        return True

    def worked(self, seconds: float) -> None:
        """A step for answers took so long: at most half of the time goes into looking while they go on."""
        self._debt -= seconds

    def _count(self, answers: bool) -> int:
        if answers or self.fixed or self._cost is None:
            return 1
        return int(min(max(LONGEST / self._cost, 1), TILES))

    def _tiles(self, pending: list[Shown], count: int) -> int:
        """Llama 4: its tiles don't see each other, so each is looked at as a picture of its own."""
        left = [(one, at) for one in pending for at in range(len(self._begun.get(one.key, ())), len(one.tiles_T3SS))]
        now = left[:count]
        found = self.decoder.look(torch.stack([one.tiles_T3SS[at] for one, at in now]), [(1, 1)] * len(now))
        for (one, _), features in zip(now, found, strict=True):
            rows = self._begun.setdefault(one.key, [])
            assert isinstance(features, PatchFeatures)
            rows.append(features.rows_RD)
            if len(rows) == len(one.tiles_T3SS):
                self.gallery.put(one.key, PatchFeatures(torch.cat(self._begun.pop(one.key))))
        return len(now)

    def _picture(self, one: Shown) -> int:
        (features,) = self.decoder.look(one.tiles_T3SS, [one.grid])
        self.gallery.put(one.key, features)
        return len(one.tiles_T3SS)
