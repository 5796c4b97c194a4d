"""Parameters and bytes, counted exactly from shapes. Legend: D model width, F feed-forward width, E experts,
H query heads, G key/value heads, K head width, V vocabulary, N layers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from puna.family.config import ModelConfig
from puna.family.member import Encoder, Member
from puna.family.vision import Llama4Vision, Llama32Vision

Shapes = dict[str, tuple[int, ...]]

# Bits per weight. The block formats include their scales: Q8_0 has 34 bytes for 32 weights, Q4_0 18 for 32, Q4_K 144
# and Q6_K 210 for 256 (ggml-common.h).
BITS_PER_WEIGHT: Mapping[str, float] = {
    "float32": 32, "bfloat16": 16, "float16": 16, "float8": 8, "int8": 8, "int4": 4,
    "Q8_0": 8.5, "Q6_K": 6.5625, "Q4_K": 4.5, "Q4_0": 4.5,
}  # fmt: skip


@dataclass(frozen=True)
class Parameters:
    """Parameter counts. `active` counts are what one text token meets: embeddings, head, and one routed expert."""

    text: int
    vision: int
    active_text: int

    @property
    def total(self) -> int:
        return self.text + self.vision

    @property
    def active(self) -> int:
        """What is active when pictures are in play: the active text parameters and the whole vision part."""
        return self.active_text + self.vision


@dataclass(frozen=True)
class KVCache:
    """Bytes of the key/value cache of one sequence.

    `naive_per_token`: every layer keeps every token. `growing_per_token`: only layers that see all earlier tokens
    grow without end. `fixed`: what chunk-bounded layers hold once their chunk is full.
    """

    naive_per_token: int
    growing_per_token: int
    fixed: int


def decoder_shapes(config: ModelConfig) -> Shapes:
    """Every tensor of the decoder by its canonical name, in layer order; no `lm_head` where embeddings are tied."""
    d, v = config.hidden_size, config.vocab_size
    shapes: Shapes = {"embed_tokens.weight": (v, d)}
    for layer in range(config.num_layers):
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in _layer_shapes(config, layer)}
    shapes["norm.weight"] = (d,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (v, d)
    return shapes


def _layer_shapes(config: ModelConfig, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    d = config.hidden_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield "input_layernorm.weight", (d,)
    yield from _attention("self_attn", d, q, kv)
    yield "post_attention_layernorm.weight", (d,)
    if not config.is_moe(layer):
        yield from _swiglu("feed_forward", d, config.intermediate_size)
        return
    e, f = config.num_experts, config.expert_intermediate_size
    yield "feed_forward.router.weight", (e, d)
    yield "feed_forward.experts.gate_up_proj", (e, d, 2 * f)
    yield "feed_forward.experts.down_proj", (e, f, d)
    yield from _swiglu("feed_forward.shared_expert", d, f)


def _attention(prefix: str, d: int, q: int, kv: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.q_proj.weight", (q, d)
    yield f"{prefix}.k_proj.weight", (kv, d)
    yield f"{prefix}.v_proj.weight", (kv, d)
    yield f"{prefix}.o_proj.weight", (d, q)


def _swiglu(prefix: str, d: int, f: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.gate_proj.weight", (f, d)
    yield f"{prefix}.up_proj.weight", (f, d)
    yield f"{prefix}.down_proj.weight", (d, f)


def _with_bias(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def vision_shapes(vision: Llama4Vision | Llama32Vision, config: ModelConfig) -> Shapes:
    """Every tensor that the vision part adds to the decoder `config`, by its Hugging Face name.

    For Llama 3.2 that includes the cross-attention layers and the extra embedding rows, and the tile tables have
    Meta's shapes (a row for each tile of a 4 x 4 grid), which Hugging Face stores expanded by aspect ratio.
    """
    if isinstance(vision, Llama4Vision):
        return dict(_llama4_vision(vision, config.hidden_size))
    return dict(_llama32_vision(vision, config))


def _vision_layer(d: int, f: int, attention_bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
        if attention_bias:
            yield from _with_bias(f"self_attn.{projection}", (d, d))
        else:
            yield f"self_attn.{projection}.weight", (d, d)
    yield from _with_bias("mlp.fc1", (f, d))
    yield from _with_bias("mlp.fc2", (d, f))
    yield from _with_bias("input_layernorm", (d,))
    yield from _with_bias("post_attention_layernorm", (d,))


def _llama4_vision(vision: Llama4Vision, text_width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    d, adapter = vision.hidden_size, vision.adapter_size
    yield "vision_model.class_embedding", (d,)
    yield "vision_model.positional_embedding_vlm", (vision.patches + 1, d)
    yield "vision_model.patch_embedding.linear.weight", (d, 3 * vision.patch_side**2)
    yield from _with_bias("vision_model.layernorm_pre", (d,))
    yield from _with_bias("vision_model.layernorm_post", (d,))
    for layer in range(vision.num_layers):
        for name, shape in _vision_layer(d, vision.intermediate_size, attention_bias=True):
            yield f"vision_model.model.layers.{layer}.{name}", shape
    yield "vision_model.vision_adapter.mlp.fc1.weight", (adapter, d * vision.pixel_shuffle**2)
    yield "vision_model.vision_adapter.mlp.fc2.weight", (adapter, adapter)
    yield "multi_modal_projector.linear_1.weight", (text_width, adapter)


def _llama32_vision(vision: Llama32Vision, config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    d, grid = vision.hidden_size, vision.max_tiles**2
    yield "vision_model.class_embedding", (d,)
    yield "vision_model.patch_embedding.weight", (d, 3, vision.patch_side, vision.patch_side)
    yield "vision_model.gated_positional_embedding.gate", (1,)
    yield "vision_model.gated_positional_embedding.embedding", (vision.patches + 1, d)
    yield "vision_model.gated_positional_embedding.tile_embedding.weight", (grid, (vision.patches + 1) * d)
    for where in ("pre", "post"):
        yield f"vision_model.{where}_tile_positional_embedding.gate", (1,)
        yield f"vision_model.{where}_tile_positional_embedding.embedding.weight", (grid, d)
        yield from _with_bias(f"vision_model.layernorm_{where}", (d,))
    for stack, layers in (("transformer", vision.num_layers), ("global_transformer", vision.num_global_layers)):
        for layer in range(layers):
            prefix = f"vision_model.{stack}.layers.{layer}"
            for name, shape in _vision_layer(d, vision.intermediate_size, attention_bias=False):
                yield f"{prefix}.{name}", shape
            if stack == "global_transformer":
                yield f"{prefix}.gate_attn", (1,)
                yield f"{prefix}.gate_ffn", (1,)
    yield from _with_bias("multi_modal_projector", (config.hidden_size, vision.output_size))
    yield "language_model.extra_embeddings.weight", (vision.extra_embeddings, config.hidden_size)
    for layer in vision.cross_attention_layers():
        for name, shape in _cross_attention_layer(config):
            yield f"language_model.layers.{layer}.{name}", shape


def _cross_attention_layer(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    d, k = config.hidden_size, config.head_dim
    yield "cross_attn_attn_gate", (1,)
    yield "cross_attn_mlp_gate", (1,)
    yield from _attention("cross_attn", d, config.num_heads * k, config.num_kv_heads * k)
    yield "cross_attn.q_norm.weight", (k,)
    yield "cross_attn.k_norm.weight", (k,)
    yield from _swiglu("mlp", d, config.intermediate_size)
    yield "input_layernorm.weight", (d,)
    yield "post_attention_layernorm.weight", (d,)


def encoder_parameters(encoder: Encoder) -> tuple[int, int]:
    """Parameters of a DeBERTa-v2/v3 classifier: (backbone and head, token embeddings).

    Relative positions share the query and key projections; there is no table of absolute positions.
    """
    d, f = encoder.hidden_size, encoder.intermediate_size
    norm = 2 * d
    layer = 4 * (d * d + d) + norm + (f * d + f) + (d * f + d) + norm
    relative_positions = 2 * encoder.position_buckets * d + norm
    pooler, classifier = d * d + d, len(encoder.labels) * (d + 1)
    backbone = norm + encoder.num_layers * layer + relative_positions + pooler + classifier
    return backbone, encoder.vocab_size * d


def count(shapes: Shapes) -> int:
    """Number of elements of all tensors together."""
    return sum(prod(shape) for shape in shapes.values())


def count_parameters(config: ModelConfig, vision: Llama4Vision | Llama32Vision | None = None) -> Parameters:
    """Parameters of a decoder, and of its vision part where there is one."""
    text = count(decoder_shapes(config))
    idle_experts = config.num_experts - config.num_experts_per_token
    expert = 3 * config.hidden_size * config.expert_intermediate_size
    return Parameters(
        text=text,
        vision=count(vision_shapes(vision, config)) if vision else 0,
        active_text=text - len(config.moe_layers) * idle_experts * expert,
    )


def member_parameters(member: Member) -> Parameters | None:
    """Parameters of a member, or None where its shape is not published."""
    if member.encoder is not None:
        total = sum(encoder_parameters(member.encoder))
        return Parameters(text=total, vision=0, active_text=total)
    return count_parameters(member.config, member.vision) if member.config else None


def weight_bytes(parameters: int, dtype: str) -> int:
    """Bytes of that many weights, all of them in `dtype` (a key of BITS_PER_WEIGHT), rounded up.

    Real files of a quantised model keep norms, and often embeddings, wider.
    """
    return -(-int(parameters * BITS_PER_WEIGHT[dtype] * 16) // 128)


def kv_cache(config: ModelConfig, dtype: str = "bfloat16") -> KVCache:
    """Cache bytes per token of context, counted naively and as chunked layers need."""
    per_layer = _kv_bytes_per_layer(config, dtype)
    chunks = [chunk for i in range(config.num_layers) if (chunk := config.chunk(i)) is not None]
    return KVCache(
        naive_per_token=per_layer * config.num_layers,
        growing_per_token=per_layer * (config.num_layers - len(chunks)),
        fixed=per_layer * sum(chunks),
    )


def kv_bytes(config: ModelConfig, tokens: int, dtype: str = "bfloat16") -> int:
    """Cache bytes of one sequence of `tokens` tokens, where no layer keeps more than it can see."""
    per_layer = _kv_bytes_per_layer(config, dtype)
    seen = (config.chunk(i) for i in range(config.num_layers))
    return per_layer * sum(tokens if chunk is None else min(tokens, chunk) for chunk in seen)


def _kv_bytes_per_layer(config: ModelConfig, dtype: str) -> int:
    return weight_bytes(2 * config.num_kv_heads * config.head_dim, dtype)
