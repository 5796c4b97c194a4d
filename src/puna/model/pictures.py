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


@dataclass(frozen=True)
class PatchFeatures:
    """One picture for Llama 4: rows [R, D], one for each `<|patch|>` token, tile by tile, the global tile last."""

    rows_RD: Tensor

    def bytes(self) -> int:
        """Bytes held."""
        return self.rows_RD.nbytes


@dataclass(frozen=True)
class CrossFeatures:
    """One picture for Llama 3.2 Vision: its keys (normalised) and values [N, G, K] in every cross-attention layer."""

    layers: tuple[tuple[Tensor, Tensor], ...]

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
    """The tokens at flattened positions start..stop-1 of a pass see exactly these pictures, as if they were one."""

    start: int
    stop: int
    pictures: tuple[CrossFeatures, ...]


@dataclass(frozen=True)
class PassPictures:
    """All that one pass needs: of tokens in no `Seen` no picture is seen, of positions in no `Patches` the embedding
    stays."""

    patches: tuple[Patches, ...] = ()
    seen: tuple[Seen, ...] = ()

    @staticmethod
    def joined(shares: Iterable["PassPictures"]) -> "PassPictures | None":
        """The shares of a pass's spans as one; None where all are empty."""
        listed = list(shares)
        patches = tuple(one for share in listed for one in share.patches)
        seen = tuple(one for share in listed for one in share.seen)
        return PassPictures(patches, seen) if patches or seen else None


class SequencePictures(Protocol):
    """A sequence's pictures, tied to the places of its tokens."""

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

    Raises PunaError where there are not as many pictures as `<|image|>` tokens.
    """

    def __init__(self, token_ids: Sequence[int], image_token_id: int, pictures: Sequence[CrossFeatures]) -> None:
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

    def share(self, start: int, count: int, at: int) -> PassPictures:
        """See `SequencePictures.share`."""
        end = start + count
        ends = [*self._starts[1:], max(end, self._starts[-1] + 1)] if self._starts else []
        seen = [
            Seen(max(first, start) - start + at, min(last, end) - start + at, pictures)
            for first, last, pictures in zip(self._starts, ends, self._seen, strict=True)
            if first < end and last > start
        ]
        return PassPictures(seen=tuple(seen))


def _places(token_ids: Sequence[int], image_token_id: int) -> NDArray[np.int64]:
    return np.flatnonzero(np.asarray(token_ids, np.int64) == image_token_id)
