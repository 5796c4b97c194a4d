"""Whether a model fits into the memory there is, and what is given up where it doesn't."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from puna.engine.forecast import Needs
from puna.engine.sizes import SMALLEST, CacheSize, cache_size, chunk_blocks
from puna.errors import PunaError
from puna.family.config import ModelConfig
from puna.model.memory import available_bytes, resident
from puna.model.paged import BLOCK, blocks_for

if TYPE_CHECKING:
    from puna.checkpoint.source import Source

Fewer = Callable[[], dict[str, Needs]]  # what the same model needs with other settings, by their names


@dataclass(frozen=True)
class Planned:
    """needs: as `forecast` counts. cache: that fits. weights: bytes that the model's own weights may take."""

    needs: Needs
    cache: CacheSize
    weights: int


def planned(
    source: "Source",
    dtype: torch.dtype | None,
    quantize: str | None,
    context: int | None,
    kv: str | None,
    memory: int | None,
    draft: Needs | None = None,
    ngrams: bool = False,
) -> Planned:
    """For `puna.load` on the CPU: what will be needed, and what fits.

    memory: bytes for the whole process; None: what it has and all that is available. draft, ngrams: see `Needs`.
    Raises PunaError as `fitted`.
    """
    if memory is not None and (isinstance(memory, bool) or not isinstance(memory, int) or memory < 1):
        raise PunaError(f"memory must be a whole number of bytes above 0, not {memory!r}")
    needs = replace(Needs.of(source, dtype, quantize, kv), draft=draft, ngrams=ngrams)
    room = resident() + available_bytes(torch.device("cpu")) if memory is None else memory
    size = cache_size(source.config, needs.dtype, kv, context)
    least = size if context is not None else _cut(size, min(size.blocks, blocks_for(SMALLEST)), source.config)
    if needs.routed is not None and needs.most(least).total > room:
        needs = needs.on_demand()

    def fewer() -> dict[str, Needs]:
        return dict(_fewer(source, dtype, quantize, kv, needs))

    size = fitted(needs, size, context, room, fewer)
    left = room - needs.most(size).total
    if needs.routed is not None and needs.experts:
        kept = min(needs.routed.bytes - 1, needs.routed.largest + left)  # with all of them, none were on demand
        needs = needs.on_demand(kept)
        return Planned(needs, size, needs.weights + kept)
    return Planned(needs, size, needs.weights + needs.most(size).loading + left)


def fitted(needs: Needs, size: CacheSize, context: int | None, room: int, fewer: Fewer) -> CacheSize:
    """`size`, or the largest cache that fits.

    context: what the user asked for; None leaves it open. room: bytes for the whole process. fewer: see `Fewer`.
    Raises PunaError, saying what would fit, where the weights don't or an explicit context doesn't.
    """
    if needs.most(size).total <= room:
        return size
    smallest = needs.most(_cut(size, 1, needs.config))
    if smallest.total > room:
        raise PunaError(
            f"the model doesn't fit into {room / 1e9:.2f} GB: even with the smallest cache it {smallest.needed}. "
            + _advice(fewer, BLOCK, room)
        )
    low, high = 1, size.blocks  # low fits, high doesn't
    while high - low > 1:
        middle = (low + high) // 2
        fits = needs.most(_cut(size, middle, needs.config)).total <= room
        low, high = (middle, high) if fits else (low, middle)
    if context is not None and low * BLOCK < context:
        raise PunaError(
            f"a context of {context:,} tokens doesn't fit into {room / 1e9:.2f} GB: the model then "
            f"{needs.forecast(context).needed}. Give a context of at most {low * BLOCK:,}, or more memory. "
            + _advice(fewer, context, room)
        )
    return _cut(size, low, needs.config)


def _cut(size: CacheSize, blocks: int, config: ModelConfig) -> CacheSize:
    """The same with fewer blocks; as long as one sequence's chunk has its place, the local layers' share stays."""
    share = size.local_blocks / max(1, size.blocks)
    local = max(math.ceil(share * blocks), min(blocks, chunk_blocks(config)))
    return CacheSize(blocks, min(size.local_blocks, local))


def _fewer(
    source: "Source", dtype: torch.dtype | None, quantize: str | None, kv: str | None, needs: Needs
) -> Iterator[tuple[str, Needs]]:
    if needs.draft is not None:
        yield "no draft model", replace(needs, draft=None)
    narrower = {None: ("int8", "int4"), "int8": ("int4",)}.get(quantize, ())
    for bits in (quantize, *narrower):
        for cache in dict.fromkeys((kv, "int8")):
            if (bits, cache) != (quantize, kv):
                name = " with ".join([f"quantize {bits}"] * (bits != quantize) + [f"kv {cache}"] * (cache != kv))
                changed = replace(Needs.of(source, dtype, bits, cache), draft=needs.draft, ngrams=needs.ngrams)
                yield name, changed.on_demand() if needs.experts else changed


def _advice(fewer: Fewer, context: int, room: int) -> str:
    """Settings with which the context fits, and what they need."""
    totals = {name: needs.forecast(context).total for name, needs in fewer().items()}
    fits = [f"{name} needs {total / 1e9:.2f} GB" for name, total in totals.items() if total <= room]
    if fits:
        return f"That fits: {', '.join(fits)}."
    if not totals:
        return "Take a smaller model, or more memory."
    least = min(totals, key=lambda name: totals[name])
    return f"Even {least} needs {totals[least] / 1e9:.2f} GB: take a smaller model, or more memory."
