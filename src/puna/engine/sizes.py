"""How large the cache is."""

from dataclasses import dataclass

import torch

from puna.family.config import ModelConfig
from puna.model.memory import available_bytes
from puna.model.paged import BLOCK, PagedPool, blocks_for

SMALLEST = 16_384  # tokens: several short chats at once also with a short context
SHARE = 0.25  # of the available memory, for a context that nobody asked for by number
CHUNKS = 4  # sequences that can be deep in a chunk at once


@dataclass(frozen=True)
class CacheSize:
    """Blocks of 32 tokens in the full and in the local (chunked) layers; none where a model has no such layers."""

    blocks: int
    local_blocks: int = 0


def cache_size(config: ModelConfig, dtype: torch.dtype, kv: str | None = None, context: int | None = None,
               device: torch.device | str = "cpu") -> CacheSize:
    """The default: one whole context, but without an explicit `context` at most a quarter of the memory that is
    available; and never fewer than 16,384 tokens. The memory is taken up only as it is used."""
    one, one_local = PagedPool.block_bytes(config, dtype, kv)
    smallest = blocks_for(SMALLEST)
    blocks = max(blocks_for(context or config.context_length), smallest)
    local = _local(config, blocks)
    if context is None and one:
        room = SHARE * available_bytes(torch.device(device)) - local * one_local
        blocks = max(min(blocks, int(room / one)), smallest)
    return CacheSize(blocks, local)


def for_draft(config: ModelConfig, size: CacheSize) -> CacheSize:
    """The cache of a draft model, which reads the same tokens as the model whose cache has that size."""
    return CacheSize(size.blocks, _local(config, size.blocks))


def chunk_blocks(config: ModelConfig) -> int:
    """Blocks of a chunked layer that one sequence holds at most; 0 where there are none."""
    chunk = config.attention_chunk_size
    return blocks_for(chunk) + (chunk % BLOCK != 0) if chunk else 0


def _local(config: ModelConfig, blocks: int) -> int:
    if not any(config.chunk(layer) for layer in range(config.num_layers)):
        return 0
    return min(blocks, max(CHUNKS * chunk_blocks(config), blocks_for(SMALLEST)))
