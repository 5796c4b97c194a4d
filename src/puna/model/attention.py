"""Grouped-query attention: rotary or position-free, full or in chunks, with or without a cache.

Legend: B batch, S queries, T keys, D model width, H query heads, G key/value heads, K head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna.family.config import ModelConfig
from puna.model.cache import LayerCache
from puna.model.linear import Linear
from puna.model.norm import rms_normalise
from puna.model.rope import rotate_adjacent, rotate_halves


class Attention(nn.Module):
    """One layer's attention. On RoPE layers queries and keys are rotated and, in Scout, normalised afterwards; on NoPE
    layers the query may be scaled by position (llama-models `llama4/model.py`, `Attention.forward`)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.uses_rope = config.uses_rope(layer)
        self.rotate = rotate_adjacent if config.rope_pairs == "adjacent" else rotate_halves
        self.chunk = config.chunk(layer)
        self.qk_norm_eps = config.rms_norm_eps if config.qk_norm and self.uses_rope else None
        self.temperature = None if self.uses_rope else config.attention_temperature
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, width)
        self.k_proj = Linear(config.hidden_size, kv_width)
        self.v_proj = Linear(config.hidden_size, kv_width)
        self.o_proj = Linear(width, config.hidden_size)

    def forward(
        self, x_BSD: Tensor, positions_S: Tensor, rotation: tuple[Tensor, Tensor], cache: LayerCache | None
    ) -> Tensor:
        q_BSHK = self.q_proj(x_BSD).unflatten(-1, (-1, self.head_dim))
        k_BSGK = self.k_proj(x_BSD).unflatten(-1, (-1, self.head_dim))
        v_BSGK = self.v_proj(x_BSD).unflatten(-1, (-1, self.head_dim))
        if self.uses_rope:
            q_BSHK, k_BSGK = self.rotate(q_BSHK, *rotation), self.rotate(k_BSGK, *rotation)
            if self.qk_norm_eps is not None:
                q_BSHK, k_BSGK = rms_normalise(q_BSHK, self.qk_norm_eps), rms_normalise(k_BSGK, self.qk_norm_eps)
        elif self.temperature is not None:
            blocks = torch.floor((positions_S.float() + 1) / self.temperature.floor)
            scale_S = 1 + self.temperature.scale * torch.log1p(blocks)
            q_BSHK = (q_BSHK * scale_S[:, None, None]).to(q_BSHK.dtype)
        if cache is None:
            start, first, k_BTGK, v_BTGK = 0, 0, k_BSGK, v_BSGK
        else:
            start = cache.length
            k_BTGK, v_BTGK, first = cache.append(k_BSGK, v_BSGK)
        return self.o_proj(attend(q_BSHK, k_BTGK, v_BTGK, start, first, self.chunk).flatten(2))


def attend(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, start: int, first: int, chunk: int | None) -> Tensor:
    """Causal attention [B, S, H, K] of queries at positions start.. over keys at positions first.. .

    With `chunk`, position p sees only positions of its own aligned block floor(p / chunk).
    """
    S, T = q_BSHK.shape[1], k_BTGK.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q_BSHK, k_BTGK, v_BTGK))
    if S == 1:
        return _attend_one(q, k, v).transpose(1, 2)
    if chunk is not None and first // chunk == (first + T - 1) // chunk:
        chunk = None  # all in one chunk: plain causal attention
    if S == T and chunk is not None and first % chunk == 0:
        return _attend_blocks(q_BSHK, k_BTGK, v_BTGK, chunk)
    if S == T and chunk is None:
        return F.scaled_dot_product_attention(q, *_repeated(q, k, v), is_causal=True).transpose(1, 2)
    queries = torch.arange(start, start + S, device=q.device)[:, None]
    keys = torch.arange(first, first + T, device=q.device)[None, :]
    mask = keys <= queries
    if chunk is not None:
        mask &= keys // chunk == queries // chunk
    return F.scaled_dot_product_attention(q, *_repeated(q, k, v), attn_mask=mask).transpose(1, 2)


def _attend_one(q_BH1K: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
    """One query a row sees every key it is shown: the heads of a group become rows, so no key is read twice."""
    q_BGRK = q_BH1K.squeeze(2).unflatten(1, (k_BGTK.shape[1], -1))
    return F.scaled_dot_product_attention(q_BGRK, k_BGTK, v_BGTK).flatten(1, 2).unsqueeze(2)


def _attend_blocks(q_BSHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, chunk: int) -> Tensor:
    """Chunked attention from a chunk's start as a batch of short causal ones: work grows with S, not S squared."""
    B, S = q_BSHK.shape[:2]
    padded = [F.pad(x, (0, 0, 0, 0, 0, -S % chunk)) for x in (q_BSHK, k_BSGK, v_BSGK)]
    q, k, v = (x.unflatten(1, (-1, chunk)).flatten(0, 1).transpose(1, 2) for x in padded)
    out = F.scaled_dot_product_attention(q, *_repeated(q, k, v), is_causal=True).transpose(1, 2)
    return out.unflatten(0, (B, -1)).flatten(1, 2)[:, :S]


def _repeated(q_BHSK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values once a query head."""
    times = q_BHSK.shape[1] // k_BGTK.shape[1]
    if times == 1:
        return k_BGTK, v_BGTK
    return k_BGTK.repeat_interleave(times, 1), v_BGTK.repeat_interleave(times, 1)
