"""Grouped-query attention: rotary or position-free, full or in chunks, with or without a cache.

Legend: B batch, S queries, D model width, H query heads, G key/value heads, K head width.
"""

from torch import Tensor, nn

from puna.family.config import ModelConfig
from puna.model.cache import LayerCache
from puna.model.causal import attend
from puna.model.linear import Linear
from puna.model.rope import Positions, Rotary


class Attention(nn.Module):
    """One layer's attention. On RoPE layers queries and keys are rotated and, in Scout, normalised afterwards; on NoPE
    layers the query may be scaled by position (llama-models `llama4/model.py`, `Attention.forward`)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.read_as(config, layer)
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj: nn.Module = Linear(config.hidden_size, width)
        self.k_proj: nn.Module = Linear(config.hidden_size, kv_width)
        self.v_proj: nn.Module = Linear(config.hidden_size, kv_width)
        self.o_proj: nn.Module = Linear(width, config.hidden_size)
        self.qkv_proj: nn.Module | None = None

    def read_as(self, config: ModelConfig, layer: int) -> None:
        """What the layer does with positions, and how far it sees."""
        self.rotary = Rotary.of(config, layer)
        self.chunk = config.chunk(layer)

    def fuse(self, qkv_proj: nn.Module, rows: list[int]) -> None:
        """One product for all three projections, whose outputs are so many `rows` of it, in place of theirs."""
        self.qkv_proj, self._qkv_rows = qkv_proj, rows
        del self.q_proj, self.k_proj, self.v_proj

    def project(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, S, H, K], keys and values [B, S, G, K]: new tensors, which their user may write over."""
        if self.qkv_proj is not None:
            parts = self.qkv_proj(x_BSD).split(self._qkv_rows, -1)
        else:
            parts = self.q_proj(x_BSD), self.k_proj(x_BSD), self.v_proj(x_BSD)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        return q, k, v

    def forward(self, x_BSD: Tensor, positions: Positions, cache: LayerCache | None) -> Tensor:
        q_BSHK, k_BSGK, v_BSGK = self.project(x_BSD)
        q_BSHK, k_BSGK = self.rotary(q_BSHK, k_BSGK, positions)
        if cache is None:
            out_BSHK = attend(q_BSHK, k_BSGK, v_BSGK, 0, 0, self.chunk)
        else:
            out_BSHK = cache.attend(q_BSHK, k_BSGK, v_BSGK)
        return self.o_proj(out_BSHK.flatten(2))
