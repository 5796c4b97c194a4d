"""How much memory a model will take, said before anything is loaded; and whether that fits.

Weights and what loading needs beside them are counted by rehearsing the load (`puna.checkpoint.rehearsal`); cache and
work follow from the shape. Legend: D model width, F feed-forward width, V vocabulary, K head width.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch

from puna.engine.pace import LARGEST
from puna.engine.sizes import CacheSize, cache_size
from puna.errors import PunaError
from puna.family.arithmetic import count_parameters
from puna.family.config import ModelConfig
from puna.model.memory import available_bytes, resident
from puna.model.paged import BLOCK, PagedPool, blocks_for

if TYPE_CHECKING:
    from puna.checkpoint.source import Source

LIBRARIES = 10_000_000  # bytes of code and buffers that the first answer brings in, measured with a tiny model
MOST = 64  # requests that run at once (`Core`)
GROUP = 32  # inputs that share a scale of activations at least, in the kernels' scratch


@dataclass(frozen=True)
class Forecast:
    """Bytes. weights: as packed. loading: beyond everything else, while weights are packed. cache: keys and values of
    `requests` sequences of `context` tokens. work: activations of the largest step. process: interpreter, libraries and
    tokenizer."""

    weights: int
    cache: int
    work: int
    loading: int
    process: int
    context: int
    requests: int

    @property
    def total(self) -> int:
        """The largest resident size of the process."""
        return self.weights + self.cache + self.work + self.loading + self.process

    @property
    def needed(self) -> str:
        """The numbers, for people."""
        many = f"{self.requests} x " if self.requests > 1 else ""
        return (
            f"needs {self.total / 1e9:.2f} GB: weights {self.weights / 1e9:.2f}, cache {self.cache / 1e9:.2f} "
            f"({many}{self.context:,} tokens), work {self.work / 1e9:.2f}, loading {self.loading / 1e9:.2f}, "
            f"process {self.process / 1e9:.2f}"
        )

    def record(self) -> dict[str, int]:
        """For programs."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class Needs:
    """What doesn't depend on context and requests; `forecast` adds these. Bytes; loading with the weights in it."""

    config: ModelConfig
    dtype: torch.dtype
    kv: str | None
    weights: int
    loading: int
    process: int

    @property
    def chunk_blocks(self) -> int:
        """Blocks of a chunked layer that one sequence holds at most; 0 where there are none."""
        chunk = self.config.attention_chunk_size
        return blocks_for(chunk) + (chunk % BLOCK != 0) if chunk else 0

    @classmethod
    def of(cls, source: "Source", dtype: torch.dtype | None, quantize: str | None, kv: str | None) -> "Needs":
        """By rehearsing the load of an opened checkpoint on the CPU; arguments as for `puna.load`. What the process
        holds by now counts, so its tokenizer should be read before.

        Raises PunaError where loading would, as far as shapes and types tell.
        """
        from puna.checkpoint.rehearsal import rehearse

        found = rehearse(source, dtype, quantize)
        process = resident() + LIBRARIES
        return cls(source.config, found.dtype, kv, found.weights, found.peak, process)

    def forecast(self, context: int, requests: int = 1) -> Forecast:
        """With so many requests at once, each of `context` tokens with its answer."""
        cache = requests * cache_bytes(self.config, self.dtype, self.kv, context)
        work = work_bytes(self.config, self.dtype, min(requests * context, LARGEST + requests), requests)
        beyond = max(0, self.loading - self.weights - cache - work)
        return Forecast(self.weights, cache, work, beyond, self.process, context, requests)

    def most(self, size: CacheSize) -> Forecast:
        """With the whole cache in use by as many requests as run at once."""
        return self.used(size, LARGEST + MOST, min(MOST, max(1, size.blocks)))

    def used(self, size: CacheSize, tokens: int, answers: int) -> Forecast:
        """With so many blocks in use, and steps of so many tokens of which some get logits."""
        full, local = PagedPool.block_bytes(self.config, self.dtype, self.kv)
        cache = size.blocks * full + size.local_blocks * local
        work = work_bytes(self.config, self.dtype, min(tokens, size.blocks * BLOCK), answers)
        beyond = max(0, self.loading - self.weights - cache - work)
        return Forecast(self.weights, cache, work, beyond, self.process, size.blocks * BLOCK, 1)


def cache_bytes(config: ModelConfig, dtype: torch.dtype, kv: str | None, tokens: int) -> int:
    """Of one sequence in whole blocks; chunked layers hold one chunk at most."""
    full, local = PagedPool.block_bytes(config, dtype, kv)
    blocks, chunk = blocks_for(tokens), config.attention_chunk_size
    held = blocks if not chunk else min(blocks, blocks_for(chunk) + (chunk % BLOCK != 0))
    return blocks * full + held * local


def work_bytes(config: ModelConfig, dtype: torch.dtype, tokens: int, answers: int) -> int:
    """Activations of a step of so many tokens, of which `answers` get logits: the most that is held at once."""
    size, d = dtype.itemsize, config.hidden_size
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    f = max(config.intermediate_size, 2 * config.expert_intermediate_size)
    stream = 2 * d * size + 4 * config.head_dim  # residual and normalised, angles
    steps = (
        heads * size + _scratch(d),
        (heads + config.num_heads * config.head_dim) * size,
        2 * f * size + _scratch(d),
        3 * f * size,
        (f + d) * size + _scratch(f),
    )
    head = answers * (config.vocab_size * (size + 8) + _scratch(d))
    return max(tokens * (stream + max(steps)), tokens * stream + head)


def _scratch(inputs: int) -> int:
    """What our product kernel needs for one row beside input and output."""
    return 4 * inputs + 8 * (inputs // GROUP)


def fitted(needs: Needs, size: CacheSize, context: int | None, room: int, fewer: "Fewer") -> CacheSize:
    """`size`, or the largest cache that fits.

    context: what the user asked for; None leaves it open. room: bytes for the whole process. fewer: see `Fewer`.
    Raises PunaError, saying what would fit, where the weights don't or an explicit context doesn't.
    """
    if needs.most(size).total <= room:
        return size
    share = size.local_blocks / max(1, size.blocks)

    def cut(blocks: int) -> CacheSize:
        local = max(math.ceil(share * blocks), min(blocks, needs.chunk_blocks))
        return CacheSize(blocks, min(size.local_blocks, local))

    smallest = needs.most(cut(1))
    if smallest.total > room:
        raise PunaError(
            f"the model doesn't fit into {room / 1e9:.2f} GB: even with the smallest cache it {smallest.needed}. "
            + _advice(fewer, BLOCK, room)
        )
    low, high = 1, size.blocks  # low fits, high doesn't
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needs.most(cut(middle)).total <= room else (low, middle)
    if context is not None and low * BLOCK < context:
        raise PunaError(
            f"a context of {context:,} tokens doesn't fit into {room / 1e9:.2f} GB: the model then "
            f"{needs.forecast(context).needed}. Give a context of at most {low * BLOCK:,}, or more memory. "
            + _advice(fewer, context, room)
        )
    return cut(low)


Fewer = Callable[[], dict[str, Needs]]  # what the same model needs with other settings, by their names


def _advice(fewer: Fewer, context: int, room: int) -> str:
    """Settings with which the context fits, and what they need."""
    totals = {name: needs.forecast(context).total for name, needs in fewer().items()}
    fits = [f"{name} needs {total / 1e9:.2f} GB" for name, total in totals.items() if total <= room]
    least = min(totals, key=lambda name: totals[name])
    if fits:
        return f"That fits: {', '.join(fits)}."
    return f"Even {least} needs {totals[least] / 1e9:.2f} GB: take a smaller model, or more memory."


def planned(
    source: "Source",
    dtype: torch.dtype | None,
    quantize: str | None,
    context: int | None,
    kv: str | None,
    memory: int | None,
) -> tuple[Needs, CacheSize, int]:
    """For `puna.load` on the CPU: what will be needed, the cache that fits, and how many bytes weights may take.

    memory: bytes for the whole process; None: what it has and all that is available. Raises PunaError as `fitted`.
    """
    if memory is not None and (isinstance(memory, bool) or not isinstance(memory, int) or memory < 1):
        raise PunaError(f"memory must be a whole number of bytes above 0, not {memory!r}")
    needs = Needs.of(source, dtype, quantize, kv)
    config = source.config
    room = resident() + available_bytes(torch.device("cpu")) if memory is None else memory
    size = cache_size(config, needs.dtype, kv, context)
    if config.num_experts and needs.most(size).total > room:  # then experts are read on demand
        parameters = count_parameters(config)
        resident_share = parameters.active_text / parameters.text
        weights = int(needs.weights * resident_share)
        needs = replace(needs, weights=weights, loading=min(needs.loading, 2 * weights))

    def fewer() -> dict[str, Needs]:
        cache = {} if kv else {"kv int8": replace(needs, kv="int8")}
        bits = {f"quantize {kind}": Needs.of(source, dtype, kind, kv) for kind in ("int8", "int4") if kind != quantize}
        return {**cache, **bits, "quantize int4 with kv int8": Needs.of(source, dtype, "int4", "int8")}

    size = fitted(needs, size, context, room, fewer)
    others = needs.most(size)
    return needs, size, room - others.cache - others.work - others.process
