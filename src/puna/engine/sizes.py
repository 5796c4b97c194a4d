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
    local = 0
    if one_local:
        assert config.attention_chunk_size is not None
        chunk = blocks_for(config.attention_chunk_size) + (config.attention_chunk_size % BLOCK != 0)
        local = min(blocks, max(CHUNKS * chunk, smallest))
    if context is None and one:
        room = SHARE * available_bytes(torch.device(device)) - local * one_local
        blocks = max(min(blocks, int(room / one)), smallest)
    return CacheSize(blocks, local)
