"""Which of Meta's tensors make which of the decoder's, and how the ranks' shards join.

Shard axes: llama-models 0.3.0 `checkpoint.py` (`reshard_mp`); names and layouts: the load hooks in `llama4/model.py`,
`moe.py`, `ffn.py`. A join takes, for each stored name, the list of that tensor's shards in rank order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from puna.checkpoint.rotary import to_halves
from puna.family.config import ModelConfig

Parts = list[Tensor]


@dataclass(frozen=True)
class Recipe:
    """Stored names, and how their shards become one tensor of the decoder."""

    stored: tuple[str, ...]
    join: Callable[..., Tensor]


def same(parts: Parts) -> Tensor:
    """Replicated: every rank has the whole."""
    return parts[0]


def joined(parts: Parts, dim: int) -> Tensor:
    """Split along one axis: column-parallel linears along 0 (output), row-parallel ones along -1 (input)."""
    if len(parts) == 1:
        return parts[0]
    return _joined_shape(parts, dim) if parts[0].is_meta else torch.cat(parts, dim)


def _joined_shape(parts: Parts, dim: int) -> Tensor:
    """`torch.cat` on the meta device; torch's own imports 800 modules (70 MB) for it."""
    shapes = [list(part.shape) for part in parts]
    size = sum([shape.pop(dim) for shape in shapes])
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"shapes differ beside axis {dim}")
    shapes[0].insert(dim % parts[0].ndim, size)
    return torch.empty(shapes[0], dtype=parts[0].dtype, device="meta")


def _distinct(parts: Parts, rows: int) -> Parts:
    """One copy of each key/value head: where ranks outnumber these heads, neighbouring ranks hold the same one."""
    copies = sum(part.shape[0] for part in parts) // rows
    return parts[::copies] if copies > 1 and len(parts) % copies == 0 else parts


def _query(parts: Parts, config: ModelConfig) -> Tensor:
    return to_halves(joined(parts, 0), config.num_heads)


def _key(parts: Parts, config: ModelConfig) -> Tensor:
    return to_halves(_value(parts, config), config.num_kv_heads)


def _value(parts: Parts, config: ModelConfig) -> Tensor:
    return joined(_distinct(parts, config.num_kv_heads * config.head_dim), 0)


def _embedding(parts: Parts, width: int) -> Tensor:
    """Llama 2 splits the embedding's columns, later generations its rows."""
    return joined(parts, 0 if parts[0].shape[-1] == width else -1)


def _half(parts: Parts, half: int) -> Tensor:
    """Gate (0) or up (1) of a fused dense layer: each rank holds [gate; up]."""
    return joined([part.chunk(2, 0)[half] for part in parts], 0)


def _qkv(parts: Parts, config: ModelConfig, index: int) -> Tensor:
    """q, k or v of the fused projection: each rank holds [q; k; v] of its own heads."""
    queries = config.num_heads * config.head_dim // len(parts)
    keys = (parts[0].shape[0] - queries) // 2
    chosen = [part.split((queries, keys, keys), 0)[index] for part in parts]
    return _value(chosen, config) if index else joined(chosen, 0)


def _experts_in(gates: Parts, ups: Parts, experts: int) -> Tensor:
    """Per rank [E*D, F/ranks] each -> [E, D, 2F], gate and up side by side."""
    return joined([part.unflatten(0, (experts, -1)) for part in (*gates, *ups)], -1)


def _experts_out(parts: Parts, experts: int) -> Tensor:
    """Per rank [E*F/ranks, D] -> [E, F, D]."""
    return joined([part.unflatten(0, (experts, -1)) for part in parts], 1)


def _transposed(parts: Parts) -> Tensor:
    return parts[0].T


ROWS, COLUMNS = partial(joined, dim=0), partial(joined, dim=-1)


def recipes(config: ModelConfig) -> dict[str, Recipe]:
    """Decoder's tensor name -> recipe, for every tensor of a decoder of this shape."""
    table = {
        "embed_tokens.weight": Recipe(("tok_embeddings.weight",), partial(_embedding, width=config.hidden_size)),
        "norm.weight": Recipe(("norm.weight",), same),
        "lm_head.weight": Recipe(("output.weight",), ROWS),
    }
    for i in range(config.num_layers):
        layer = _llama_layer(config) if config.architecture == "llama" else _llama4_layer(config, i)
        for name, (stored, join) in layer.items():
            names = (stored,) if isinstance(stored, str) else stored
            table[f"layers.{i}.{name}"] = Recipe(tuple(f"layers.{i}.{part}" for part in names), join)
    return table


_Layer = dict[str, tuple[str | tuple[str, ...], Callable[..., Tensor]]]


def _llama_layer(config: ModelConfig) -> _Layer:
    return {
        "input_layernorm.weight": ("attention_norm.weight", same),
        "self_attn.q_proj.weight": ("attention.wq.weight", partial(_query, config=config)),
        "self_attn.k_proj.weight": ("attention.wk.weight", partial(_key, config=config)),
        "self_attn.v_proj.weight": ("attention.wv.weight", partial(_value, config=config)),
        "self_attn.o_proj.weight": ("attention.wo.weight", COLUMNS),
        "post_attention_layernorm.weight": ("ffn_norm.weight", same),
        "feed_forward.gate_proj.weight": ("feed_forward.w1.weight", ROWS),
        "feed_forward.down_proj.weight": ("feed_forward.w2.weight", COLUMNS),
        "feed_forward.up_proj.weight": ("feed_forward.w3.weight", ROWS),
    }


def _llama4_layer(config: ModelConfig, layer: int) -> _Layer:
    attention: _Layer = {
        "input_layernorm.weight": ("attention.wqkv.layer_norm_weight", same),
        "self_attn.q_proj.weight": ("attention.wqkv.weight", partial(_qkv, config=config, index=0)),
        "self_attn.k_proj.weight": ("attention.wqkv.weight", partial(_qkv, config=config, index=1)),
        "self_attn.v_proj.weight": ("attention.wqkv.weight", partial(_qkv, config=config, index=2)),
        "self_attn.o_proj.weight": ("attention.wo.weight", COLUMNS),
    }
    if not config.is_moe(layer):
        return attention | {
            "post_attention_layernorm.weight": ("feed_forward.mlp.layer_norm_weight", same),
            "feed_forward.gate_proj.weight": ("feed_forward.mlp.fc1_weight", partial(_half, half=0)),
            "feed_forward.up_proj.weight": ("feed_forward.mlp.fc1_weight", partial(_half, half=1)),
            "feed_forward.down_proj.weight": ("feed_forward.mlp.fc2_weight", COLUMNS),
        }
    experts = "feed_forward.experts.moe_w_"
    return attention | {
        "post_attention_layernorm.weight": ("feed_forward.norm.weight", same),
        "feed_forward.router.weight": ("feed_forward.router_DE", _transposed),
        "feed_forward.experts.gate_up_proj": (
            (f"{experts}in_eD_F", f"{experts}swiglu_eD_F"),
            partial(_experts_in, experts=config.num_experts),
        ),
        "feed_forward.experts.down_proj": (f"{experts}out_eF_D", partial(_experts_out, experts=config.num_experts)),
        "feed_forward.shared_expert.gate_proj.weight": ("feed_forward.w_in_shared_FD.weight", ROWS),
        "feed_forward.shared_expert.up_proj.weight": ("feed_forward.w_swiglu_FD.weight", ROWS),
        "feed_forward.shared_expert.down_proj.weight": ("feed_forward.w_out_shared_DF.weight", COLUMNS),
    }
