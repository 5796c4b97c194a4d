"""Llama 3.2 Vision's cross-attention layers: gated, between layers of a text model that doesn't know of them.

Sources: llama-models `llama3/multimodal/model.py`, `CrossAttentionTransformerBlock`; transformers `modeling_mllama.py`.
Legend: S tokens of a pass, C of them that see a picture, N tokens of pictures, D model width, H query heads,
G key/value heads, K head width.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna.family.config import ModelConfig
from puna.family.vision import Llama32Vision
from puna.model.feedforward import FeedForward
from puna.model.linear import Linear
from puna.model.norm import RMSNorm
from puna.model.pictures import CrossFeatures, Seen

TOGETHER = 8  # tokens that read a picture at once


class CrossAttention(nn.Module):
    """Queries from text, keys and values from pictures; both are normalised per head, neither is rotated."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj: nn.Module = Linear(config.hidden_size, width)
        self.k_proj: nn.Module = Linear(config.hidden_size, kv_width)
        self.v_proj: nn.Module = Linear(config.hidden_size, kv_width)
        self.o_proj: nn.Module = Linear(width, config.hidden_size)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def keys_values(self, states_ND: Tensor) -> tuple[Tensor, Tensor]:
        """A picture's keys and values [N, G, K]."""
        keys, values = (
            project(states_ND).unflatten(-1, (-1, self.head_dim)) for project in (self.k_proj, self.v_proj)
        )
        return self.k_norm(keys), values

    def forward(self, x_CD: Tensor, pieces: Sequence[tuple[int, Tensor, Tensor]]) -> Tensor:
        """Attention [C, D]; each piece has so many tokens, and the keys and values [N, G, K] that they see."""
        q_CHK = self.q_norm(self.q_proj(x_CD).unflatten(-1, (-1, self.head_dim)))
        parts = q_CHK.split([count for count, _, _ in pieces])
        seen = [_attend(q, keys, values) for q, (_, keys, values) in zip(parts, pieces, strict=True)]
        return self.o_proj(torch.cat(seen).flatten(1))


class CrossBlock(nn.Module):
    """Cross-attention, then feed-forward, each normalised before, scaled by tanh of a learned gate, and added to the
    stream of those tokens that see a picture. The others pass as if the layer weren't there."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cross_attn = CrossAttention(config)
        self.cross_attn_attn_gate = nn.Parameter(torch.zeros(1))
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward: nn.Module = FeedForward(config.hidden_size, config.intermediate_size)
        self.cross_attn_mlp_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x_BSD: Tensor, seen: Sequence[Seen], layer: int) -> Tensor:
        """`layer`: which of the cross-attention layers this is, counted from 0."""
        x_SD = x_BSD.flatten(0, 1)
        runs = [slice(one.start, one.stop) for one in seen]
        x_CD = torch.cat([x_SD[run] for run in runs])
        pieces = [(one.stop - one.start, *one.keys_values(layer)) for one in seen]
        attended_CD = self.cross_attn(self.input_layernorm(x_CD), pieces)
        x_CD = x_CD + self.cross_attn_attn_gate.tanh() * attended_CD
        out_CD = self.feed_forward(self.post_attention_layernorm(x_CD)) * self.cross_attn_mlp_gate.tanh()
        if any(one.before for one in seen):
            counts = torch.tensor([one.stop - one.start for one in seen])
            behind = torch.tensor([not one.before for one in seen]).repeat_interleave(counts).to(x_CD.device)
            out_CD = out_CD * behind[:, None]
        return _replaced(x_SD, runs, x_CD + out_CD).view_as(x_BSD)


def features_of(
    states_ND: Tensor, grid: tuple[int, int], vision: Llama32Vision, blocks: nn.ModuleList
) -> CrossFeatures:
    """A picture's keys and values in every cross-attention layer, of its states as the tower gives them.

    Padding tiles are kept only for the one reference that reads them.
    """
    tokens = vision.tiles(grid) * (vision.patches + 1)
    if vision.reference == "meta":
        states_ND = states_ND[:tokens]
    layers = [block.cross_attn.keys_values(states_ND) for block in blocks if isinstance(block, CrossBlock)]
    return CrossFeatures(tuple(layers), tokens)


def _attend(q_CHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
    """Every query sees every key [C, H, K]. Heads of a group become rows, so that no key is copied for them.

    Always so many tokens at once, the last ones filled up: PyTorch chooses its products by their size, and a token's
    bits should not depend on how a prompt was cut.
    """
    groups, blocks = k_NGK.shape[1], -(-len(q_CHK) // TOGETHER)
    q_CHK, count = F.pad(q_CHK, (0, 0, 0, 0, 0, blocks * TOGETHER - len(q_CHK))), len(q_CHK)
    q = q_CHK.unflatten(1, (groups, -1)).unflatten(0, (blocks, TOGETHER)).transpose(1, 2).flatten(2, 3)
    k, v = (x.transpose(0, 1)[None].expand(blocks, -1, -1, -1) for x in (k_NGK, v_NGK))
    out = F.scaled_dot_product_attention(q, k, v)
    return out.unflatten(2, (TOGETHER, -1)).transpose(1, 2).flatten(0, 1).flatten(1, 2)[:count]


def _replaced(x_SD: Tensor, runs: Sequence[slice], new_CD: Tensor) -> Tensor:
    """The rows of the runs (in their order, none twice) replaced by new ones, as a new tensor."""
    if len(new_CD) == len(x_SD):
        return new_CD
    ends = [0, *(end for run in runs for end in (run.start, run.stop)), len(x_SD)]
    new = iter(new_CD.split([run.stop - run.start for run in runs]))
    parts = [next(new) if i % 2 else x_SD[start:stop] for i, (start, stop) in enumerate(pairwise(ends))]
    return torch.cat(parts)
