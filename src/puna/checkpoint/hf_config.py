"""Hugging Face's config.json to `ModelConfig` and back, in both spellings: `rope_theta`, `rope_scaling`, `torch_dtype`
of the published files, `rope_parameters`, `dtype` of newer transformers.

Defaults for absent keys are those of transformers' `LlamaConfig` and `Llama4TextConfig`.
"""

from pathlib import Path
from typing import Any

import torch

from puna.checkpoint.hf_vision import cross_attention_before, read_llama4_vision, read_llama32_vision, write_vision
from puna.checkpoint.source import GenerationDefaults
from puna.checkpoint.validate import Fields, read_json
from puna.errors import PunaError
from puna.family.config import AttentionTemperature, ModelConfig, RopeScaling
from puna.family.llama23 import LONG
from puna.family.vision import Llama32Vision

_BY_MODEL_TYPE = {
    "llama": "LlamaForCausalLM",
    "llama4_text": "Llama4ForCausalLM",
    "llama4": "Llama4ForConditionalGeneration",
    "mllama": "MllamaForConditionalGeneration",
}
_SUPPORTED = tuple(_BY_MODEL_TYPE.values())
_SEEING = ("Llama4ForConditionalGeneration", "MllamaForConditionalGeneration")


def read_config(path: Path) -> ModelConfig:
    """The decoder's shape from a config.json.

    Raises PunaError for a missing or invalid file, a missing or mistyped key, and for what is not supported:
    other architectures, biases, other activations and rope scalings.
    """
    top = Fields(read_json(path), path)
    architecture = _architecture(top)
    fields = top
    if architecture in _SEEING:
        section = top.section("text_config")
        if section is None:
            raise top.error("text_config", "is missing")
        fields = section
    try:
        if architecture == "MllamaForConditionalGeneration":
            return _llama32_vision(fields, top)
        return _llama(fields) if architecture == "LlamaForCausalLM" else _llama4(fields, top)
    except ValueError as error:
        raise PunaError(
            f"{path} describes an impossible model: {error}. Mend it, or fetch the file again."
        ) from None


def _architecture(top: Fields) -> str:
    listed = top.values.get("architectures")
    if listed is not None and not (isinstance(listed, list) and all(isinstance(name, str) for name in listed)):
        raise top.error("architectures", f"must be a list of names, not {listed!r}")
    model_type = top.text("model_type")
    name = listed[0] if listed else _BY_MODEL_TYPE.get(model_type or "", model_type)
    if name not in _SUPPORTED:
        raise PunaError(
            f"{top.path}: architecture {name!r} is not of this family. Choose another checkpoint. "
            f"Supported: {', '.join(_SUPPORTED)}."
        )
    return str(name)


def _common(fields: Fields, theta: float, eps: float) -> dict[str, Any]:
    for key in ("attention_bias", "mlp_bias"):
        if fields.flag(key, False):
            raise fields.error(key, "is true: weights with biases are not supported; no released Llama has them")
    if fields.text("hidden_act", "silu") != "silu":
        raise fields.error("hidden_act", f"is {fields.text('hidden_act')!r}; only 'silu' is supported")
    rope_theta, scaling = read_rope(fields, theta)
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": fields.integer("hidden_size"),
        "num_layers": fields.layers("num_hidden_layers"),
        "num_heads": fields.integer("num_attention_heads"),
        "context_length": fields.integer("max_position_embeddings"),
        "rms_norm_eps": fields.number("rms_norm_eps", eps),
        "rope_theta": rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": fields.flag("tie_word_embeddings", False),
        "bos_token_id": fields.integer("bos_token_id", None),
        "eos_token_ids": fields.integers("eos_token_id") or (),
        "pad_token_id": fields.integer("pad_token_id", None),
    }


def _head_dim(fields: Fields, heads: int) -> int:
    if "head_dim" not in fields and heads > 0 and fields.integer("hidden_size") % heads:
        raise fields.error("hidden_size", f"is not a multiple of num_attention_heads {heads}, and head_dim is missing")
    return fields.integer("head_dim", fields.integer("hidden_size") // max(heads, 1))


def _llama(fields: Fields) -> ModelConfig:
    common = _common(fields, theta=10_000.0, eps=1e-6)
    return ModelConfig(
        architecture="llama",
        num_kv_heads=fields.integer("num_key_value_heads", common["num_heads"]),
        head_dim=_head_dim(fields, common["num_heads"]),
        intermediate_size=fields.integer("intermediate_size"),
        **common,
    )


def _llama32_vision(text: Fields, top: Fields) -> ModelConfig:
    """The layers of the text model are those that are left without the cross-attention layers."""
    usual = {"vocab_size": 128_256, "hidden_size": 4096, "num_hidden_layers": 40, "num_attention_heads": 32,
             "num_key_value_heads": 8, "intermediate_size": 14_336, "max_position_embeddings": LONG,
             "rope_theta": 500_000.0, "rms_norm_eps": 1e-5, "bos_token_id": 128_000, "eos_token_id": 128_001,
             "pad_token_id": 128_004}  # fmt: skip
    cross = len(cross_attention_before(text))
    filled = usual | {key: value for key, value in text.values.items() if value is not None}
    config = _llama(Fields(filled | {"num_hidden_layers": filled["num_hidden_layers"] - cross}, text.path, text.prefix))
    return config.with_(vision=read_llama32_vision(top, text))


def _llama4(fields: Fields, top: Fields) -> ModelConfig:
    common = _common(fields, theta=500_000.0, eps=1e-5)
    for key, name in (("bos_token_id", "bos_token_id"), ("pad_token_id", "pad_token_id")):
        common[name] = common[name] if common[name] is not None else top.integer(key, None)
    common["eos_token_ids"] = common["eos_token_ids"] or top.integers("eos_token_id") or ()
    layers = common["num_layers"]
    moe = fields.integers("moe_layers")
    if moe is None:
        step = fields.integer("interleave_moe_layer_step", 1)
        if step < 1:
            raise fields.error("interleave_moe_layer_step", f"must be positive, not {step}")
        moe = tuple(range(step - 1, layers, step))
    nope = _nope_layers(fields, layers)
    temperature = AttentionTemperature(fields.number("attn_scale", 0.1), fields.integer("floor_scale", 8192))
    return ModelConfig(
        architecture="llama4",
        num_kv_heads=fields.integer("num_key_value_heads", 8),
        # transformers takes 128 where the key is absent, and derives it where it is null
        head_dim=_head_dim(fields, common["num_heads"]) if "head_dim" in fields.values else 128,
        intermediate_size=fields.integer("intermediate_size_mlp", 16384),
        num_experts=fields.integer("num_local_experts", 16) if moe else 0,
        num_experts_per_token=fields.integer("num_experts_per_tok", 1) if moe else 1,
        expert_intermediate_size=fields.integer("intermediate_size") if moe else 0,
        moe_layers=tuple(sorted(moe)),
        nope_layers=nope,
        attention_chunk_size=_chunk_size(fields, nope, layers),
        attention_temperature=temperature if fields.flag("attn_temperature_tuning", True) else None,
        qk_norm=fields.flag("use_qk_norm", True),
        vision=read_llama4_vision(top) if top is not fields else None,
        **common,
    )


def _nope_layers(fields: Fields, layers: int) -> tuple[int, ...]:
    """`no_rope_layers` is inverted: 1 means rotary. Empty means every `no_rope_layer_interval`-th layer has none."""
    rotary = fields.integers("no_rope_layers")
    if not rotary:
        interval = fields.integer("no_rope_layer_interval", 4)
        if interval < 1:
            raise fields.error("no_rope_layer_interval", f"must be positive, not {interval}")
        return tuple(range(interval - 1, layers, interval))
    if len(rotary) < layers or any(item not in (0, 1) for item in rotary):
        raise fields.error("no_rope_layers", f"must hold a 0 or 1 for each of the {layers} layers, not {list(rotary)}")
    return tuple(i for i in range(layers) if not rotary[i])


def _chunk_size(fields: Fields, nope: tuple[int, ...], layers: int) -> int | None:
    """Chunks on exactly the rotary layers, or on none (`layer_types` all "full_attention")."""
    size = fields.integer("attention_chunk_size", None if "attention_chunk_size" in fields.values else 8192)
    kinds = fields.values.get("layer_types")
    if size is None or kinds is None:
        return size
    if kinds == ["full_attention"] * layers:
        return None
    if kinds != ["full_attention" if i in nope else "chunked_attention" for i in range(layers)]:
        raise fields.error("layer_types", "must be chunked_attention on the rotary layers and full_attention elsewhere")
    return size


def read_rope(fields: Fields, default_theta: float) -> tuple[float, RopeScaling | None]:
    """Theta and scaling of a config.json. `rope_scaling`, where both spellings stand, wins as in transformers. Raises
    PunaError for other kinds of scaling."""
    new, old = fields.section("rope_parameters"), fields.section("rope_scaling")
    section = old if old is not None and old.values else new
    theta = fields.number("rope_theta", default_theta)
    for candidate in (new, old):
        if candidate is not None:
            theta = candidate.number("rope_theta", theta)
    if section is None:
        return theta, None
    if section.number("partial_rotary_factor", 1.0) != 1.0:
        raise section.error("partial_rotary_factor", "must be 1: every Llama rotates whole heads")
    kind = section.text("rope_type") or section.text("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise section.error("rope_type", f"is {kind!r}; supported are 'default' and 'llama3'")
    scaling = RopeScaling(
        factor=section.number("factor"),
        low_freq_factor=section.number("low_freq_factor"),
        high_freq_factor=section.number("high_freq_factor"),
        original_context=section.integer("original_max_position_embeddings"),
    )
    if min(scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_context) <= 0:
        raise section.error("factor", "and the other scaling values must be positive")
    return theta, scaling


def read_generation(path: Path, config: ModelConfig) -> GenerationDefaults:
    """Sampling defaults from a generation_config.json; where it is absent only the config's end tokens are known."""
    if not path.is_file():
        return GenerationDefaults(eos_token_ids=config.eos_token_ids)
    fields = Fields(read_json(path), path)
    return GenerationDefaults(
        temperature=fields.number("temperature", None),
        top_p=fields.number("top_p", None),
        top_k=fields.integer("top_k", None),
        eos_token_ids=fields.integers("eos_token_id") or config.eos_token_ids,
    )


def write_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of a decoder, with old and new spellings of the same facts.

    Raises PunaError where the architecture's Hugging Face class cannot express the shape.
    """
    if config.vision is None:
        return _write_text(config, dtype)
    text = _write_text(config, dtype)
    top, vision = write_vision(config.vision)
    own = {key: text.pop(key) for key in ("dtype", "torch_dtype")}
    text.pop("architectures")
    if isinstance(config.vision, Llama32Vision):
        if config.head_dim * config.num_heads != config.hidden_size:
            raise PunaError("Llama 3.2 Vision's config.json knows no head_dim beside hidden_size / num_heads.")
        places = list(config.vision.cross_attention_layers())
        text |= {"model_type": "mllama_text_model", "cross_attention_layers": places,
                 "num_hidden_layers": config.num_layers + len(places)}  # fmt: skip
    ends = {key: text[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")}
    return {**top, **own, **ends, "text_config": text, "vision_config": vision}


def _write_text(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    eos = config.eos_token_ids
    name = str(dtype).removeprefix("torch.")
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": False,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": config.pad_token_id,
        "dtype": name,
        "torch_dtype": name,
        **_write_rope(config),
    }
    if config.architecture == "llama4":
        return {"architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text", **fields, **_write_llama4(config)}
    if config.moe_layers or config.nope_layers or config.attention_chunk_size or config.qk_norm:
        raise PunaError("Experts, NoPE layers, chunked attention and qk-norm exist only in Llama 4's config.json.")
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **fields, "mlp_bias": False}


def _write_rope(config: ModelConfig) -> dict[str, Any]:
    if config.rope_scaling is None:
        kind: dict[str, Any] = {"rope_type": "default"}
    else:
        kind = {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_context,
        }
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": kind if config.rope_scaling else None,
        "rope_parameters": {"rope_theta": config.rope_theta, **kind},
    }


def _write_llama4(config: ModelConfig) -> dict[str, Any]:
    temperature = config.attention_temperature or AttentionTemperature()
    rotary = [int(config.uses_rope(i)) for i in range(config.num_layers)]
    chunked = [config.chunk(i) is not None for i in range(config.num_layers)]
    return {
        "intermediate_size": config.expert_intermediate_size or config.intermediate_size,
        "intermediate_size_mlp": config.intermediate_size,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_token,
        "moe_layers": list(config.moe_layers),
        "interleave_moe_layer_step": 1,
        "no_rope_layers": rotary,
        "layer_types": ["chunked_attention" if chunk else "full_attention" for chunk in chunked],
        "attention_chunk_size": config.attention_chunk_size,
        "use_qk_norm": config.qk_norm,
        "attn_temperature_tuning": config.attention_temperature is not None,
        "attn_scale": temperature.scale,
        "floor_scale": temperature.floor,
    }
