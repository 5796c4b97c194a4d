"""Meta's params.json to `ModelConfig`.

Defaults and formulas: llama-models 0.3.0 `llama3/` and `llama4/args.py`, `model.py`, `moe.py`.
"""

from collections.abc import Mapping
from pathlib import Path

from puna.checkpoint.meta_bits import Quantisation, read_quantisation
from puna.checkpoint.meta_vision import TEXT, read_vision
from puna.checkpoint.validate import Fields, read_json
from puna.errors import PunaError
from puna.family.config import AttentionTemperature, ModelConfig, RopeScaling

_LLAMA4_KEYS = ("moe_args", "nope_layer_interval", "attention_chunk_size", "use_qk_norm", "ffn_exp")
_SMALL_WIDTHS = (2048, 3072)  # Llama 3.2 1B and 3B
_LLAMA3_VOCABULARY = 128_256


def read_params(
    path: Path, shapes: Mapping[str, tuple[int, ...]], ranks: int
) -> tuple[ModelConfig, Quantisation | None]:
    """The decoder's shape from params.json and, for what that leaves out, from one rank's tensor shapes; and how its
    weights are quantised.

    Raises PunaError for a missing or invalid file, a missing or mistyped key, unknown quantisations.
    """
    fields = Fields(read_json(path, hint="Meta's weights need it: download it into the same folder."), path)
    fields = fields.section("model") or fields
    quantisation = read_quantisation(fields)
    tower, shapes = shapes, {name.removeprefix(TEXT): shape for name, shape in shapes.items()}
    fused = any(name.endswith("attention.wqkv.weight") for name in shapes)
    try:
        read = _llama4 if fused or any(k in fields for k in _LLAMA4_KEYS) else _llama
        config = read(fields, shapes, ranks)
        return config.with_(vision=read_vision(fields, tower, ranks, config)), quantisation
    except ValueError as error:
        raise PunaError(
            f"{path} describes an impossible model: {error}. Mend it, or fetch the file again."
        ) from None


def feed_forward_width(width: int, multiplier: float | None, multiple_of: int, divisor: float = 1) -> int:
    """Hidden width of SwiGLU: two thirds of `width`, times the multiplier, over the divisor, rounded up."""
    hidden = int(2 * width / 3)
    hidden = int(hidden if multiplier is None else multiplier * hidden)
    hidden = int(hidden / divisor)
    return -(-hidden // multiple_of) * multiple_of


def _vocabulary(fields: Fields, shapes: Mapping[str, tuple[int, ...]], ranks: int, dim: int) -> int:
    """From the tensors: params.json may say -1, or something wrong (Llama 4)."""
    for name in ("output.weight", "tok_embeddings.weight"):
        shape = shapes.get(name, ())
        if len(shape) == 2:
            return shape[0] * ranks if shape[1] == dim else shape[0]
    return fields.integer("vocab_size")


def _heads(fields: Fields, dim: int) -> tuple[int, int]:
    heads = fields.integer("n_heads")
    if heads < 1 or dim % heads:
        raise fields.error("n_heads", f"is {heads}, which does not divide dim {dim}")
    return heads, fields.integer("n_kv_heads", heads)


def _multiple_of(fields: Fields) -> int:
    multiple = fields.integer("multiple_of", 256)
    if multiple < 1:
        raise fields.error("multiple_of", f"must be positive, not {multiple}")
    return multiple


def _llama(fields: Fields, shapes: Mapping[str, tuple[int, ...]], ranks: int) -> ModelConfig:
    dim = fields.integer("dim")
    heads, kv_heads = _heads(fields, dim)
    vocabulary = _vocabulary(fields, shapes, ranks, dim)
    theta = fields.number("rope_theta", 10_000.0)  # absent in Llama 2's files
    scaling = None
    context = 8192 if theta > 10_000 else 4096
    if fields.flag("use_scaled_rope", False):
        # Meta's own code has 8 for every model; 1B and 3B were trained with 32, as their Hugging Face configs say.
        small = dim in _SMALL_WIDTHS and vocabulary == _LLAMA3_VOCABULARY
        factor = fields.number("rope_scaling_factor", 32.0 if small else 8.0)
        scaling = RopeScaling(factor, 1.0, fields.number("rope_high_freq_factor", 4.0), 8192)
        context = 131_072
    return ModelConfig(
        architecture="llama",
        vocab_size=vocabulary,
        hidden_size=dim,
        num_layers=fields.layers("n_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim // heads,
        intermediate_size=feed_forward_width(4 * dim, fields.number("ffn_dim_multiplier", None), _multiple_of(fields)),
        context_length=fields.integer("max_seq_len", context),
        rms_norm_eps=fields.number("norm_eps", 1e-5),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings="output.weight" not in shapes,
    )


def _llama4(fields: Fields, shapes: Mapping[str, tuple[int, ...]], ranks: int) -> ModelConfig:
    dim, layers = fields.integer("dim"), fields.layers("n_layers")
    heads, kv_heads = _heads(fields, dim)
    moe = fields.section("moe_args")
    moe_layers: tuple[int, ...] = ()
    expert_width = 0
    multiplier, multiple = fields.number("ffn_dim_multiplier", None), _multiple_of(fields)
    if moe is not None:
        step = moe.integer("interleave_moe_layer_step", 1)
        if step < 1:
            raise moe.error("interleave_moe_layer_step", f"must be positive, not {step}")
        moe_layers = tuple(range(step - 1, layers, step))
        divisor = moe.number("capacity_factor", 1.0) + 1 if moe.flag("auto_scale_F", True) else 1.0
        expert_width = feed_forward_width(int(fields.number("ffn_exp", 4.0) * dim), multiplier, multiple, divisor)
    scaling = None
    if fields.flag("use_scaled_rope", False):
        factor, high = fields.number("rope_scaling_factor", 16.0), fields.number("rope_high_freq_factor", 1.0)
        scaling = RopeScaling(factor, 1.0, high, 8192)
    interval = fields.integer("nope_layer_interval", None)
    temperature = AttentionTemperature(fields.number("attn_scale", 0.1), fields.integer("floor_scale", 8192))
    return ModelConfig(
        architecture="llama4",
        vocab_size=_vocabulary(fields, shapes, ranks, dim),
        hidden_size=dim,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim // heads,
        intermediate_size=feed_forward_width(4 * dim, multiplier, multiple),
        # The file does not say: 256K is what the base models were trained to, 8K what Llama Guard 4 (no experts) was.
        context_length=fields.integer("max_seq_len", 262_144 if moe_layers else 8192),
        rms_norm_eps=fields.number("norm_eps", 1e-5),
        rope_theta=fields.number("rope_theta", 500_000.0),
        rope_scaling=scaling,
        tie_word_embeddings="output.weight" not in shapes,
        num_experts=moe.integer("num_experts") if moe is not None and moe_layers else 0,
        num_experts_per_token=moe.integer("top_k", 1) if moe is not None and moe_layers else 1,
        expert_intermediate_size=expert_width,
        moe_layers=moe_layers,
        nope_layers=tuple(range(interval - 1, layers, interval)) if interval else (),
        attention_chunk_size=fields.integer("attention_chunk_size", None),
        attention_temperature=temperature if fields.flag("attn_temperature_tuning", False) else None,
        qk_norm=fields.flag("use_qk_norm", False),
    )
