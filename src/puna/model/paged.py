"""The cache of the engine: keys and values in blocks of 32 tokens, and passes that serve many sequences at once.

Logical block j of a sequence holds its positions 32 j to 32 j + 31, wherever the block lies in the pool. Attention
walks them in that order for every token alone, so with our kernels a token's bits depend on nothing but its own
sequence: not on its neighbours in the pass, not on how the prompt was cut, not on where its prefix came from.

Legend: S tokens of all spans of a pass, H query heads, G key/value heads, K head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from puna.family.config import ModelConfig
from puna.model import native
from puna.model.causal import attend
from puna.model.native_attention import KINDS, AttentionCall, kernels_for, run_attention
from puna.model.records import BLOCK, Records, record_bytes

IntArray = NDArray[np.int32]


def blocks_for(tokens: int) -> int:
    """Blocks that hold so many tokens from position 0."""
    return -(-tokens // BLOCK)


def _stored(dtype: torch.dtype, kv: str | None) -> torch.dtype:
    if kv not in (None, "int8"):
        raise ValueError(f"kv is None or 'int8', not {kv!r}")
    return torch.int8 if kv else dtype


class PagedPool:
    """Keys and values of all layers in two groups: those that see everything before them ("full") and the chunked ones
    ("local"), whose earlier chunks' blocks may be used again. Memory is taken up as blocks are first written.

    kv "int8": 8-bit keys and values with a float32 scale for each token and head, instead of `dtype`.
    """

    def __init__(
        self,
        config: ModelConfig,
        blocks: int,
        local_blocks: int,
        dtype: torch.dtype,
        kv: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.device = torch.device(device)
        self.stored = _stored(dtype, kv)
        chunks = [config.chunk(layer) for layer in range(config.num_layers)]
        self.local_layers = [chunk is not None for chunk in chunks]
        shape = (config.num_kv_heads, config.head_dim, self.stored, self.device)
        self.full = Records(self.local_layers.count(False), blocks, *shape)
        self.local = Records(self.local_layers.count(True), local_blocks, *shape)

    def bytes(self) -> int:
        """Bytes of all blocks, whether in use or not."""
        return self.full.bytes() + self.local.bytes()

    @staticmethod
    def block_bytes(config: ModelConfig, dtype: torch.dtype, kv: str | None = None) -> tuple[int, int]:
        """Bytes of one block of the full layers together, and of one of the local layers."""
        one = config.num_kv_heads * record_bytes(config.head_dim, _stored(dtype, kv))
        local = sum(config.chunk(layer) is not None for layer in range(config.num_layers))
        return (config.num_layers - local) * one, local * one


@dataclass
class Span:
    """One sequence's share of a pass: `count` new tokens from position `start` on; everything before is in the cache.

    `blocks` and `local_blocks` give the pool's block for each logical block, as far as start + count; local entries
    wholly before the chunk of `start` may be anything.
    """

    start: int
    count: int
    blocks: IntArray
    local_blocks: IntArray


class Batch:
    """A cache for one pass over the tokens of all spans, one span after the other: `decoder(token_ids_1S, batch)`."""

    def __init__(self, pool: PagedPool, spans: Sequence[Span]) -> None:
        self.pool = pool
        self.spans = spans
        config = pool.config
        chunk = config.attention_chunk_size if any(pool.local_layers) else None
        if min((span.count for span in spans), default=0) < 1:
            raise ValueError("a pass needs at least one span, and each span at least one token")
        groups = (
            _Group(pool.full, spans, [span.blocks for span in spans], None),
            _Group(pool.local, spans, [span.local_blocks for span in spans], chunk) if chunk else None,
        )
        counts = [0, 0]
        self.layers: list[PagedLayer] = []
        for local in pool.local_layers:
            group = groups[local]
            assert group is not None
            self.layers.append(PagedLayer(pool, group, counts[local]))
            counts[local] += 1
        self.tokens = sum(span.count for span in spans)

    @classmethod
    def single(
        cls, config: ModelConfig, length: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> "Batch":
        """One sequence from position 0 with a pool of its own: the plain forward pass in the engine's arithmetic."""
        needed = blocks_for(length)
        blocks = np.arange(needed, dtype=np.int32)
        local = needed if config.attention_chunk_size else 0
        return cls(PagedPool(config, needed, local, dtype, device=device), [Span(0, length, blocks, blocks)])

    def positions(self, length: int, device: torch.device) -> Tensor:
        """Each token's position in its own sequence [S]; `length` is S.

        Raises:
            ValueError: the pass has another number of tokens.
        """
        if length != self.tokens:
            raise ValueError(f"{length} tokens for spans of {self.tokens}")
        return torch.cat([torch.arange(s.start, s.start + s.count) for s in self.spans]).to(device)


class _Group:
    """The spans' tables for one group of layers."""

    def __init__(self, records: Records, spans: Sequence[Span], tables: list[IntArray], chunk: int | None) -> None:
        self.records = records
        self.spans = spans
        self.chunk = chunk
        self.tables = [np.ascontiguousarray(table, np.int32) for table in tables]
        for span, table in zip(spans, self.tables, strict=True):
            used = table[self.first(span) // BLOCK : blocks_for(span.start + span.count)]
            if blocks_for(span.start + span.count) > len(table) or used.min() < 0 or used.max() >= records.blocks:
                raise ValueError(
                    f"the table of a span of {span.count} tokens at {span.start} has {len(table)} blocks, of which "
                    f"{used.tolist()[:8]}... are needed, in a pool of {records.blocks}"
                )
        self.starts = np.array([span.start for span in spans], np.int64)
        self.counts = np.array([span.count for span in spans], np.int64)
        self.pointers = np.array([table.ctypes.data for table in self.tables], np.uint64)
        self._call: AttentionCall | None = None

    def first(self, span: Span) -> int:
        """The first position that a span's tokens see."""
        return span.start // self.chunk * self.chunk if self.chunk else 0

    def call(self, layer: int, dtype: torch.dtype, heads: int) -> AttentionCall:
        """What the kernel has to know of the pool and the spans; made once, used by one layer after the other."""
        memory = self.records.memory
        if self._call is None:
            self._call = AttentionCall(
                block_bytes=memory.stride(0), record_bytes=memory.stride(2), chunk=self.chunk or 0,
                spans=len(self.spans), starts=self.starts.ctypes.data, counts=self.counts.ctypes.data,
                tables=self.pointers.ctypes.data, kind=KINDS[self.records.stored], bf16=dtype == torch.bfloat16,
                heads=heads, kv_heads=memory.shape[2], head_dim=self.records.head_dim, threads=native.threads(),
            )  # fmt: skip
        self._call.pool = memory.data_ptr() + layer * memory.stride(1)
        return self._call


class PagedLayer:
    """One layer's share of a batch: see `LayerCache`."""

    def __init__(self, pool: PagedPool, group: _Group, layer: int) -> None:
        self._pool = pool
        self._group = group
        self._layer = layer

    def call(self, dtype: torch.dtype, heads: int) -> AttentionCall:
        """What the kernel has to know but for queries, keys and values. Shared by layers: `pool` is this layer's."""
        return self._group.call(self._layer, dtype, heads)

    def attend(self, q_1SHK: Tensor, k_1SGK: Tensor, v_1SGK: Tensor) -> Tensor:
        """Keep the new keys and values; each span's queries over what they see of their own sequence [1, S, H, K].

        Raises:
            ValueError: more than one row of tokens.
        """
        if q_1SHK.shape[0] != 1:
            raise ValueError(f"a pass over spans is one row of tokens, not {q_1SHK.shape[0]}")
        kernels = kernels_for(q_1SHK.device, q_1SHK.dtype, self._group.records.head_dim)
        if kernels and self._pool.stored in KINDS:
            return run_attention(kernels, self.call(q_1SHK.dtype, q_1SHK.shape[2]), q_1SHK, k_1SGK, v_1SGK)
        return self._attend_by_torch(q_1SHK, k_1SGK, v_1SGK)

    def _attend_by_torch(self, q_1SHK: Tensor, k_1SGK: Tensor, v_1SGK: Tensor) -> Tensor:
        group, device, out, row = self._group, q_1SHK.device, [], 0
        for span, table in zip(group.spans, group.tables, strict=True):
            rows = slice(row, row := row + span.count)
            blocks = torch.from_numpy(table).to(device).long()
            positions = torch.arange(span.start, span.start + span.count, device=device)
            group.records.write(
                self._layer, blocks[positions // BLOCK], positions % BLOCK, k_1SGK[0, rows], v_1SGK[0, rows]
            )
            first, end = group.first(span), span.start + span.count
            seen = blocks[first // BLOCK : blocks_for(end)]
            k_TGK, v_TGK = group.records.read(self._layer, seen, q_1SHK.dtype)
            skip = slice(first % BLOCK, end - first // BLOCK * BLOCK)
            out.append(attend(q_1SHK[:, rows], k_TGK[None, skip], v_TGK[None, skip], span.start, first, group.chunk))
        return torch.cat(out, 1)
