"""Which GGUF tensors make up which of our parameters, for architectures `llama` and `llama4`.

Legend: V vocabulary, D model width, H query heads, G key/value heads, K head width, F feed-forward width, E experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from puna.family.config import ModelConfig

Kind = Literal["matrix", "vector", "router", "rotary", "gate_up", "down_experts"]


@dataclass(frozen=True)
class Slot:
    """One of our parameters and the GGUF tensors that hold it.

    `rotary` rows are permuted for architecture llama; `gate_up` [E, D, 2F] is two tensors [E, F, D]; `down_experts`
    [E, F, D] is stored [E, D, F]. `vector` and `router` stay float32 in every file that we write.
    """

    name: str
    shape: tuple[int, ...]
    tensors: tuple[str, ...]
    kind: Kind = "matrix"
    heads: int = 0  # of a rotary matrix

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Row-major shape of each GGUF tensor."""
        if self.kind == "gate_up":
            experts, width, twice = self.shape
            return experts, twice // 2, width
        if self.kind == "down_experts":
            return self.shape[0], self.shape[2], self.shape[1]
        return self.shape


def slots(config: ModelConfig) -> Iterator[Slot]:
    """Every parameter of the model, in file order."""
    vocabulary, width = config.vocab_size, config.hidden_size
    yield Slot("embed_tokens.weight", (vocabulary, width), ("token_embd.weight",))
    for layer in range(config.num_layers):
        yield from _attention(config, f"layers.{layer}.", f"blk.{layer}.")
        yield from _feed_forward(config, layer)
    yield Slot("norm.weight", (width,), ("output_norm.weight",), "vector")
    if not config.tie_word_embeddings:
        yield Slot("lm_head.weight", (vocabulary, width), ("output.weight",))


def _attention(config: ModelConfig, ours: str, theirs: str) -> Iterator[Slot]:
    width, queries = config.hidden_size, config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    attention = ours + "self_attn."
    yield Slot(ours + "input_layernorm.weight", (width,), (theirs + "attn_norm.weight",), "vector")
    yield Slot(attention + "q_proj.weight", (queries, width), (theirs + "attn_q.weight",), "rotary", config.num_heads)
    yield Slot(attention + "k_proj.weight", (keys, width), (theirs + "attn_k.weight",), "rotary", config.num_kv_heads)
    yield Slot(attention + "v_proj.weight", (keys, width), (theirs + "attn_v.weight",))
    yield Slot(attention + "o_proj.weight", (width, queries), (theirs + "attn_output.weight",))
    yield Slot(ours + "post_attention_layernorm.weight", (width,), (theirs + "ffn_norm.weight",), "vector")


def _feed_forward(config: ModelConfig, layer: int) -> Iterator[Slot]:
    ours, theirs, width = f"layers.{layer}.feed_forward.", f"blk.{layer}.ffn_", config.hidden_size
    if not config.is_moe(layer):
        yield from _gated(ours, theirs, "", width, config.intermediate_size)
        return
    experts, inner = config.num_experts, config.expert_intermediate_size
    yield Slot(ours + "router.weight", (experts, width), (theirs + "gate_inp.weight",), "router")
    yield Slot(ours + "experts.gate_up_proj", (experts, width, 2 * inner),
               (theirs + "gate_exps.weight", theirs + "up_exps.weight"), "gate_up")  # fmt: skip
    yield Slot(ours + "experts.down_proj", (experts, inner, width), (theirs + "down_exps.weight",), "down_experts")
    yield from _gated(ours + "shared_expert.", theirs, "_shexp", width, inner)


def _gated(ours: str, theirs: str, suffix: str, width: int, inner: int) -> Iterator[Slot]:
    for part, shape in (("gate", (inner, width)), ("up", (inner, width)), ("down", (width, inner))):
        yield Slot(f"{ours}{part}_proj.weight", shape, (f"{theirs}{part}{suffix}.weight",))
