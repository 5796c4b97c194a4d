"""What a pass over tokens needs of pictures. Plain data: nothing here computes attention.

Llama 4 (`PatchFeatures`): the tower's outputs take the place of the embeddings of `<|patch|>` tokens. Llama 3.2 Vision
(`CrossFeatures`): cross-attention layers read keys and values of the pictures that a token may see.

How an engine uses it: `decoder.look(pixel_values, grids)` gives one item a picture, to be kept by the picture's key (no
item depends on the text, the position or the other pictures). `decoder.place(token_ids, items)` ties a prompt to its
pictures. Each pass asks every sequence for the `share` of its span, and hands all shares to
`decoder(..., pictures=PassPictures.joined(shares))`; None where no token of the pass has to do with a picture.

Legend: R rows of features, N tokens of a picture, D model width, G key/value heads, K head width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from puna.errors import PunaError
from puna.family.vision import Llama4Vision, Llama32Vision


@dataclass(frozen=True)
class PatchFeatures:
    """One picture for Llama 4: rows [R, D], one for each `<|patch|>` token, tile by tile, the global tile last."""

    rows_RD: Tensor

    def bytes(self) -> int:
        """Bytes held."""
        return self.rows_RD.nbytes


@dataclass(frozen=True)
class CrossFeatures:
    """One picture for Llama 3.2 Vision: its keys (normalised) and values [N, G, K] in every cross-attention layer.

    The first `tokens` of N are of its real tiles; those of padding tiles follow where somebody reads them.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    tokens: int

    def bytes(self) -> int:
        """Bytes held."""
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)


PictureFeatures = PatchFeatures | CrossFeatures


@dataclass(frozen=True)
class Patches:
    """Rows [R, D] for the flattened positions [R] of a pass."""

    positions_R: Tensor
    rows_RD: Tensor


@dataclass(frozen=True)
class Seen:
    """The tokens at flattened positions start..stop-1 of a pass see exactly these pictures, as if they were one.

    before: they stand before their sequence's first picture, and see all of them, padding tiles too, but take no part
    in the layer's feed-forward: what transformers makes of rows that should see nothing (`Llama32Vision.reference`).
    """

    start: int
    stop: int
    pictures: tuple[CrossFeatures, ...]
    before: bool = False

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """What is seen in a cross-attention layer, [N, G, K] each."""
        ends = [None if self.before else picture.tokens for picture in self.pictures]
        parts = [
            (keys[:end], values[:end])
            for (keys, values), end in zip((picture.layers[layer] for picture in self.pictures), ends, strict=True)
        ]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([keys for keys, _ in parts]), torch.cat([values for _, values in parts])


@dataclass(frozen=True)
class PassPictures:
    """All that one pass needs: of tokens in no `Seen` no picture is seen, of positions in no `Patches` the embedding
    stays."""

    patches: tuple[Patches, ...] = ()
    seen: tuple[Seen, ...] = ()

    def put_into(self, x_BSD: Tensor) -> Tensor:
        """Embeddings with the patches in their places."""
        if not self.patches:
            return x_BSD
        positions_R = torch.cat([one.positions_R for one in self.patches]).to(x_BSD.device)
        rows_RD = torch.cat([one.rows_RD for one in self.patches]).to(x_BSD.device, x_BSD.dtype)
        return x_BSD.flatten(0, 1).index_copy(0, positions_R, rows_RD).view_as(x_BSD)

    @staticmethod
    def joined(shares: Iterable["PassPictures"]) -> "PassPictures | None":
        """The shares of a pass's spans as one; None where all are empty."""
        listed = list(shares)
        patches = tuple(one for share in listed for one in share.patches)
        seen = tuple(one for share in listed for one in share.seen)
        return PassPictures(patches, seen) if patches or seen else None


def check_pictures(
    pixel_values: Tensor, grids: Sequence[tuple[int, int]], vision: Llama4Vision | Llama32Vision | None
) -> None:
    """Raise PunaError unless these are tiles [T, 3, side, side] of pictures with these grids, for this tower."""
    if vision is None:
        raise PunaError("this model was loaded without a vision tower, or has none: it reads text only")
    for at, (rows, columns) in enumerate(grids):
        if rows < 1 or columns < 1 or rows * columns > vision.max_tiles:
            raise PunaError(
                f"picture {at} has a grid of {rows} x {columns} tiles; this model takes 1 to {vision.max_tiles} tiles. "
                "Let puna.sight cut it"
            )
    needed = sum(vision.tiles(grid) for grid in grids)
    shape = (needed, 3, vision.tile_side, vision.tile_side)
    if tuple(pixel_values.shape) != shape:
        raise PunaError(
            f"pixel_values has shape {list(pixel_values.shape)}, but pictures of grids {list(map(tuple, grids))} are "
            f"{list(shape)} here: tiles (Llama 4: and a global tile for each picture of several), channels, side, side"
        )


class SequencePictures(Protocol):
    """A sequence's pictures, tied to the places of its tokens.

    depends_from: for each picture, the first token whose states (and those of all later ones) depend on it.
    """

    depends_from: list[int]

    def share(self, start: int, count: int, at: int) -> PassPictures:
        """Of the sequence's tokens start..start+count-1, which stand at flattened positions at.. of a pass. Tokens
        behind the prompt (answers, guesses) may be asked for."""
        ...


class PlacedPatches:
    """Llama 4: the k-th `<|patch|>` token of a prompt takes the k-th row of all its pictures, in their order.

    Raises PunaError where there are not as many of one as of the other.
    """

    def __init__(self, token_ids: Sequence[int], image_token_id: int, pictures: Sequence[PatchFeatures]) -> None:
        self._places = _places(token_ids, image_token_id)
        rows = sum(len(picture.rows_RD) for picture in pictures)
        if rows != len(self._places):
            raise PunaError(
                f"the prompt has {len(self._places)} places for parts of pictures (token {image_token_id}), but its "
                f"{len(pictures)} picture(s) have {rows}; let `prepare` lay out the prompt, or mend token_ids or grids"
            )
        self._rows = torch.cat([picture.rows_RD for picture in pictures]) if pictures else torch.empty(0, 0)
        firsts = np.cumsum([0, *(len(picture.rows_RD) for picture in pictures)])[:-1]
        self.depends_from: list[int] = self._places[firsts].tolist()

    def share(self, start: int, count: int, at: int) -> PassPictures:
        """See `SequencePictures.share`."""
        first, last = np.searchsorted(self._places, (start, start + count)).tolist()
        if first == last:
            return PassPictures()
        rows = self._rows[first:last]
        positions = torch.from_numpy(self._places[first:last] - start + at).to(rows.device)
        return PassPictures(patches=(Patches(positions, rows),))


class PlacedCross:
    """Llama 3.2 Vision: from its `<|image|>` token on a picture is seen, until the next one's; pictures whose tokens
    stand side by side are seen together (transformers `get_cross_attention_token_mask`).

    before: earlier tokens take part, too (`Seen.before`).
    Raises PunaError where there are not as many pictures as `<|image|>` tokens.
    """

    def __init__(
        self, token_ids: Sequence[int], image_token_id: int, pictures: Sequence[CrossFeatures], before: bool
    ) -> None:
        places = _places(token_ids, image_token_id).tolist()
        if len(places) != len(pictures):
            raise PunaError(
                f"the prompt has {len(places)} places for pictures (token {image_token_id}), but there are "
                f"{len(pictures)} picture(s); let `prepare` lay out the prompt, or give as many of one as of the other"
            )
        self._starts = places
        self._seen: list[tuple[CrossFeatures, ...]] = []
        for i, place in enumerate(places):
            beside = i > 0 and places[i - 1] == place - 1
            self._seen.append((*(self._seen[-1] if beside else ()), pictures[i]))
        self._before = before and bool(places) and places[0] > 0
        self.depends_from: list[int] = [0] * len(places) if self._before else places
        self._all = tuple(pictures)

    def share(self, start: int, count: int, at: int) -> PassPictures:
        """See `SequencePictures.share`."""
        end = start + count
        ends = [*self._starts[1:], max(end, self._starts[-1] + 1)] if self._starts else []
        seen = [
            Seen(max(first, start) - start + at, min(last, end) - start + at, pictures)
            for first, last, pictures in zip(self._starts, ends, self._seen, strict=True)
            if first < end and last > start
        ]
        if self._before and start < self._starts[0]:
            seen.insert(0, Seen(at, min(self._starts[0], end) - start + at, self._all, before=True))
        return PassPictures(seen=tuple(seen))


def _places(token_ids: Sequence[int], image_token_id: int) -> NDArray[np.int64]:
    return np.flatnonzero(np.asarray(token_ids, np.int64) == image_token_id)
