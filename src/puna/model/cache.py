"""Keys and values of earlier tokens. Each layer's kind decides what it keeps; the model does not know which it has."""

import copy
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from puna.family.config import ModelConfig
from puna.model.causal import attend


class LayerCache(Protocol):
    """What attention needs of a layer's cache."""

    def attend(self, q_BSHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> Tensor:
        """Take the next S tokens; causal attention [B, S, H, K] of their queries over all that they may see."""
        ...


class ModelCache(Protocol):
    """What the decoder needs of a cache: one part a layer, and where the next tokens stand."""

    @property
    def layers(self) -> Sequence[LayerCache]:
        """One a layer."""
        ...

    def positions(self, length: int, device: torch.device) -> Tensor:
        """The positions [S] of the next `length` tokens."""
        ...


class FullCache:
    """Keeps every token, in buffers that double as they fill."""

    def __init__(self) -> None:
        self.length = 0
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    def append(self, k_BSGK: Tensor, v_BSGK: Tensor) -> tuple[Tensor, Tensor, int]:
        """Take the next S tokens; return all keys and values [B, T, G, K] and the first's position, 0."""
        end = self.length + k_BSGK.shape[1]
        self._k = _grown(self._k, self.length, end, k_BSGK)
        self._v = _grown(self._v, self.length, end, v_BSGK)
        self._k[:, self.length : end] = k_BSGK
        self._v[:, self.length : end] = v_BSGK
        self.length = end
        return self._k[:, :end], self._v[:, :end], 0

    def attend(self, q_BSHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> Tensor:
        """See `LayerCache.attend`."""
        start = self.length
        k_BTGK, v_BTGK, first = self.append(k_BSGK, v_BSGK)
        return attend(q_BSHK, k_BTGK, v_BTGK, start, first, None)

    def fork(self) -> "FullCache":
        """See `Cache.fork`."""
        return copy.copy(self)  # what it appends lies past this one's length

    def bytes(self) -> int:
        """Bytes held now, spare room included."""
        return sum(x.numel() * x.element_size() for x in (self._k, self._v) if x is not None)


class ChunkCache:
    """Keeps only the current chunk: a chunked layer's token never looks before the start of its own chunk."""

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk
        self.length = 0
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    def append(self, k_BSGK: Tensor, v_BSGK: Tensor) -> tuple[Tensor, Tensor, int]:
        """Take the next S tokens; return the keys and values of the chunk in progress and the new tokens [B, T, G, K],
        and the first's position."""
        kept = self.length % self.chunk
        first = self.length - kept
        new = k_BSGK.shape[1]
        if kept + new <= self.chunk:
            self._k, self._v = self._written(self._k, kept, k_BSGK), self._written(self._v, kept, v_BSGK)
            k, v = self._k[:, : kept + new], self._v[:, : kept + new]
        else:
            # The new tokens cross a chunk's end: show all of them, then keep what the next token may see.
            k = k_BSGK if not kept or self._k is None else torch.cat((self._k[:, :kept], k_BSGK), 1)
            v = v_BSGK if not kept or self._v is None else torch.cat((self._v[:, :kept], v_BSGK), 1)
            rest = (kept + new) % self.chunk
            if rest:
                self._k = self._written(self._k, 0, k[:, -rest:])
                self._v = self._written(self._v, 0, v[:, -rest:])
        self.length += new
        return k, v, first

    def _written(self, buffer: Tensor | None, start: int, new: Tensor) -> Tensor:
        buffer = _grown(buffer, start, start + new.shape[1], new, limit=self.chunk)
        buffer[:, start : start + new.shape[1]] = new
        return buffer

    def attend(self, q_BSHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> Tensor:
        """See `LayerCache.attend`."""
        start = self.length
        k_BTGK, v_BTGK, first = self.append(k_BSGK, v_BSGK)
        return attend(q_BSHK, k_BTGK, v_BTGK, start, first, self.chunk)

    def fork(self) -> "ChunkCache":
        """See `Cache.fork`."""
        other = copy.copy(self)  # the next chunk is written over this one
        other._k, other._v = (None if x is None else x.clone() for x in (self._k, self._v))
        return other

    def bytes(self) -> int:
        """Bytes held now: at most one chunk."""
        return sum(x.numel() * x.element_size() for x in (self._k, self._v) if x is not None)


def _grown(buffer: Tensor | None, used: int, needed: int, like: Tensor, limit: int | None = None) -> Tensor:
    """The buffer, or a larger copy of its used part, with room for `needed` tokens (never more than `limit`)."""
    if buffer is not None and buffer.shape[1] >= needed:
        return buffer
    room = max(needed, 2 * (0 if buffer is None else buffer.shape[1]), 64)
    grown = like.new_empty(like.shape[0], min(room, limit) if limit else room, *like.shape[2:])
    if buffer is not None and used:
        grown[:, :used] = buffer[:, :used]
    return grown


class Cache:
    """One cache a layer, of the kind the layer needs. All rows of a batch are equally long."""

    def __init__(self, config: ModelConfig) -> None:
        chunks = (config.chunk(i) for i in range(config.num_layers))
        self.layers = [ChunkCache(chunk) if chunk else FullCache() for chunk in chunks]

    @property
    def length(self) -> int:
        """Tokens seen so far."""
        return self.layers[0].length

    def positions(self, length: int, device: torch.device) -> Tensor:
        """See `ModelCache.positions`."""
        return torch.arange(self.length, self.length + length, device=device)

    def fork(self) -> "Cache":
        """A cache that goes on from here, to try something: it shares memory with this one, so that of a cache and its
        forks only the one made last may take tokens, and an earlier one after all later ones are done with."""
        other = copy.copy(self)
        other.layers = [layer.fork() for layer in self.layers]
        return other

    def bytes(self) -> int:
        """Bytes held by all layers now."""
        return sum(layer.bytes() for layer in self.layers)
