"""A model's shape as GGUF metadata, and back.

llama.cpp fixes Llama 4's attention constants in its code. What differs from them is written under `puna.*`, which
llama.cpp ignores; `differences` says in plain words what it will do instead.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from puna.checkpoint import gguf_rope
from puna.checkpoint.validate import _REQUIRED, Fields
from puna.errors import PunaError
from puna.family.config import Architecture, AttentionTemperature, ModelConfig, RopeScaling

# Source: llama.cpp src/models/llama4.cpp, load_arch_hparams.
LLAMA_CPP_CHUNK = 8192
LLAMA_CPP_NOPE_INTERVAL = 4
LLAMA_CPP_TEMPERATURE = AttentionTemperature(0.1, 8192)
_LLAMA_CPP_EXPERTS_WITHOUT_QK_NORM = 128


def runtime_constants(architecture: Architecture, num_layers: int, num_experts: int) -> dict[str, Any]:
    """The fields of ModelConfig that llama.cpp does not read from a file."""
    if architecture == "llama":
        return {"attention_chunk_size": None, "nope_layers": (), "attention_temperature": None, "qk_norm": False}
    return {
        "attention_chunk_size": LLAMA_CPP_CHUNK,
        "nope_layers": every(num_layers, LLAMA_CPP_NOPE_INTERVAL),
        "attention_temperature": LLAMA_CPP_TEMPERATURE,
        "qk_norm": num_experts != _LLAMA_CPP_EXPERTS_WITHOUT_QK_NORM,
    }


def every(num_layers: int, step: int) -> tuple[int, ...]:
    """Layers i with (i + 1) % step == 0; none for step 0."""
    return tuple(range(step - 1, num_layers, step)) if step > 0 else ()


class Metadata(Fields):
    """GGUF metadata, with the type checked and file and key named in every error."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        super().__init__(values, path, "metadata ")

    def integer(self, key: str, default: Any = _REQUIRED) -> Any:
        """One integer, or a list with the same integer for every layer."""
        value = self.values.get(key)
        if isinstance(value, list):
            if len(set(map(repr, value))) != 1 or type(value[0]) is not int:
                raise self.error(key, "differs between layers; Llama layers are alike")
            return value[0]
        return super().integer(key, default)

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        """A finite float32 of at least 0, as the shortest decimal: 1e-05, not 9.99999974e-06."""
        value = super().number(key, default)
        if value is not None and value < 0:
            raise self.error(key, f"must be at least 0, not {value!r}")
        return value if value is None else float(str(np.float32(value)))


def read_config(path: Path, raw: Mapping[str, Any], *, vocab_size: int, tied: bool, blocks: int,
                rope_divisors: "np.ndarray[Any, Any] | None") -> ModelConfig:  # fmt: skip
    """ModelConfig from metadata and from what the tensor table tells.

    `blocks` is the number of layers that the tensor names show, which bounds everything that is counted by layer.

    Raises:
        PunaError: not a Llama text model, or something that ModelConfig cannot represent.
    """
    fields = Metadata(path, raw)
    name = fields.text("general.architecture")
    if name not in ("llama", "llama4"):
        raise PunaError(f"{path}: architecture {name!r} is not a Llama; give a file of 'llama' or 'llama4'")
    architecture: Architecture = "llama4" if name == "llama4" else "llama"
    prefix = name + "."
    layers = fields.integer(prefix + "block_count")
    if layers != blocks:
        raise fields.error(prefix + "block_count", f"is {layers}, but the file has tensors of {blocks} layers")
    _refuse_foreign(fields, prefix)
    hidden, heads = fields.integer(prefix + "embedding_length"), fields.integer(prefix + "attention.head_count")
    head_dim = fields.integer(prefix + "attention.key_length", hidden // max(1, heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if (width := fields.integer(prefix + key, head_dim)) != head_dim:
            raise fields.error(prefix + key, f"is {width}, but heads are {head_dim} wide; Llama models have one width")
    theta = fields.number(prefix + "rope.freq_base", 10_000.0)
    if not theta > 1:
        raise fields.error(prefix + "rope.freq_base", f"is {theta}")
    experts = fields.integer(prefix + "expert_count", 0)
    try:
        return ModelConfig(
            architecture=architecture,
            vocab_size=vocab_size,
            hidden_size=hidden,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=fields.integer(prefix + "attention.head_count_kv", heads) or -1,
            head_dim=head_dim,
            intermediate_size=fields.integer(prefix + "feed_forward_length"),
            context_length=fields.integer(prefix + "context_length"),
            rms_norm_eps=fields.number(prefix + "attention.layer_norm_rms_epsilon"),
            rope_theta=theta,
            rope_scaling=_rope_scaling(fields, rope_divisors, theta, head_dim),
            tie_word_embeddings=tied,
            **_experts(fields, prefix, layers, experts),
            **_attention(fields, architecture, layers, experts),
            **_token_ids(fields, vocab_size),
        )
    except (ValueError, ZeroDivisionError) as error:
        raise PunaError(f"{path}: the metadata describes no Llama: {error}") from error


def _refuse_foreign(fields: Metadata, prefix: str) -> None:
    """Settings that llama.cpp applies and our decoder does not have."""
    if (kind := fields.text(prefix + "rope.scaling.type", "none")) != "none":
        raise fields.error(prefix + "rope.scaling.type", f"is {kind!r}; puna knows Llama 3.1's scaling only")
    for key in ("rope.scale_linear", "rope.scaling.factor"):
        if (factor := fields.number(prefix + key, 1.0)) not in (0.0, 1.0):
            raise fields.error(prefix + key, f"is {factor}; puna knows Llama 3.1's scaling only")
    if prefix == "llama." and fields.integer(prefix + "attention.sliding_window", 0):
        raise fields.error(prefix + "attention.sliding_window", "is set: this is not a Llama model")
    for key in ("attention.scale", "logit_scale", "residual_scale", "embedding_scale"):
        if fields.number(prefix + key, 0.0):
            raise fields.error(prefix + key, "is set: this is not a Llama model")


def _experts(fields: Metadata, prefix: str, layers: int, experts: int) -> dict[str, Any]:
    if not experts:
        return {}
    if prefix == "llama.":
        raise fields.error(prefix + "expert_count", f"is {experts}: Mixtral-like models are not of the Llama family")
    layers_with = fields.integers("puna.moe_layers")
    if layers_with is None:
        layers_with = every(layers, fields.integer(prefix + "interleave_moe_layer_step"))
    return {
        "num_experts": experts,
        "num_experts_per_token": fields.integer(prefix + "expert_used_count"),
        "expert_intermediate_size": fields.integer(prefix + "expert_feed_forward_length"),
        "moe_layers": layers_with,
    }


def _attention(fields: Metadata, architecture: Architecture, layers: int, experts: int) -> dict[str, Any]:
    constants = runtime_constants(architecture, layers, experts)
    if architecture == "llama4" and fields.integer("llama4.attention.sliding_window", LLAMA_CPP_CHUNK) == 0:
        # llama.cpp's sign for a llama4 without chunks and with rotary positions everywhere (MobileLLM)
        constants |= {"attention_chunk_size": None, "nope_layers": (), "attention_temperature": None}
    if "puna.attention.chunk_size" in fields:
        constants["attention_chunk_size"] = fields.integer("puna.attention.chunk_size") or None
    if "puna.attention.nope_layers" in fields:
        constants["nope_layers"] = fields.integers("puna.attention.nope_layers") or ()
    if "puna.attention.temperature_scale" in fields:
        scale = fields.number("puna.attention.temperature_scale")
        floor = fields.integer("puna.attention.temperature_floor", LLAMA_CPP_TEMPERATURE.floor)
        if floor < 1:
            raise fields.error("puna.attention.temperature_floor", f"is {floor}")
        constants["attention_temperature"] = AttentionTemperature(scale, floor) if scale else None
    constants["qk_norm"] = fields.flag("puna.attention.qk_norm", constants["qk_norm"])
    return constants


def _rope_scaling(fields: Metadata, stored: "np.ndarray[Any, Any] | None", theta: float, head_dim: int
                  ) -> RopeScaling | None:  # fmt: skip
    if stored is None:
        return None
    where = f"{fields.path}: tensor {gguf_rope.TENSOR!r}"
    if stored.shape != (head_dim // 2,):
        raise PunaError(f"{where} has shape {stored.shape}, but heads of width {head_dim} have {head_dim // 2} pairs")
    if "puna.rope.scaling.factor" in fields:
        scaling = RopeScaling(
            fields.number("puna.rope.scaling.factor"),
            fields.number("puna.rope.scaling.low_freq_factor"),
            fields.number("puna.rope.scaling.high_freq_factor"),
            fields.integer("puna.rope.scaling.original_context_length"),
        )
        if not (scaling.factor and scaling.low_freq_factor and scaling.high_freq_factor) or not np.allclose(
            gguf_rope.divisors(scaling, theta, head_dim), stored, rtol=1e-4
        ):
            raise PunaError(f"{where} and the metadata 'puna.rope.scaling.*' contradict each other; export it again")
        return scaling
    try:
        return gguf_rope.infer_scaling(stored, theta, head_dim)
    except ValueError as error:
        raise PunaError(f"{where}: puna cannot represent these divisors: {error}") from error


def _token_ids(fields: Metadata, vocab_size: int) -> dict[str, Any]:
    def token(key: str) -> int | None:
        if key not in fields:
            return None
        value = fields.integer(key)
        # -1 and 2**32 - 1 are converters' words for none
        if value in (-1, 2**32 - 1):
            return None
        if not 0 <= value < vocab_size:
            raise fields.error(key, f"is {value}, outside the vocabulary of {vocab_size}")
        return value

    ends = fields.integers("puna.eos_token_ids")
    if ends is not None:
        if any(not 0 <= i < vocab_size for i in ends):
            raise fields.error("puna.eos_token_ids", f"leaves the vocabulary of {vocab_size}")
    else:
        known = (token(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
        ends = tuple(dict.fromkeys(i for i in known if i is not None))
    bos, pad = (token(f"puna.{k}_token_id") if f"puna.{k}_token_id" in fields else token(f"tokenizer.ggml.{k}_token_id")
                for k in ("bos", "padding"))  # fmt: skip
    return {"bos_token_id": bos, "eos_token_ids": ends, "pad_token_id": pad}


def config_fields(config: ModelConfig) -> dict[str, Any]:
    """The metadata that describes `config`, ready for `pack_header`."""
    prefix = config.architecture + "."
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.context_length,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_theta),
        "rope.dimension_count": config.head_dim,
    }
    if config.architecture == "llama4":
        fields |= {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_token,
                   "expert_feed_forward_length": config.expert_intermediate_size,
                   "interleave_moe_layer_step": moe_step(config) or 0}  # fmt: skip
        if not config.num_experts:
            fields["expert_used_count"] = 0
    return {prefix + key: value for key, value in fields.items()} | _puna_fields(config)


def moe_step(config: ModelConfig) -> int | None:
    """The interval of the mixture-of-experts layers: 0 where there are none, None where there is no interval."""
    if not config.moe_layers:
        return 0
    step = config.moe_layers[0] + 1
    return step if config.moe_layers == every(config.num_layers, step) else None


def _puna_fields(config: ModelConfig) -> dict[str, Any]:
    constants = runtime_constants(config.architecture, config.num_layers, config.num_experts)
    fields: dict[str, Any] = {}
    if config.attention_chunk_size != constants["attention_chunk_size"]:
        fields["puna.attention.chunk_size"] = config.attention_chunk_size or 0
    if config.nope_layers != constants["nope_layers"]:
        fields["puna.attention.nope_layers"] = list(config.nope_layers)
    if config.attention_temperature != constants["attention_temperature"]:
        temperature = config.attention_temperature or AttentionTemperature(0.0)
        fields["puna.attention.temperature_scale"] = float(temperature.scale)
        fields["puna.attention.temperature_floor"] = temperature.floor
    if config.qk_norm != constants["qk_norm"]:
        fields["puna.attention.qk_norm"] = config.qk_norm
    if moe_step(config) is None:
        fields["puna.moe_layers"] = list(config.moe_layers)
    if (scaling := config.rope_scaling) is not None:
        fields |= {
            "puna.rope.scaling.factor": float(scaling.factor),
            "puna.rope.scaling.low_freq_factor": float(scaling.low_freq_factor),
            "puna.rope.scaling.high_freq_factor": float(scaling.high_freq_factor),
            "puna.rope.scaling.original_context_length": scaling.original_context,
        }
    for key, token in (("bos", config.bos_token_id), ("padding", config.pad_token_id)):
        if token is not None:
            fields[f"puna.{key}_token_id"] = token
    if config.eos_token_ids:
        fields["puna.eos_token_ids"] = list(config.eos_token_ids)
    return fields


def differences(config: ModelConfig) -> list[str]:
    """What llama.cpp would do otherwise with this model, one sentence each; [] where it does the same."""
    constants = runtime_constants(config.architecture, config.num_layers, config.num_experts)
    notes = []
    if config.architecture == "llama4" and not config.moe_layers:
        notes.append("llama.cpp refuses a llama4 model without experts; puna reads the file.")
    if moe_step(config) is None:
        notes.append(f"llama.cpp wants experts at a fixed interval of layers, not in layers {list(config.moe_layers)}, "
                     "and will refuse the file; puna reads it.")
    chunk, fixed = config.attention_chunk_size, constants["attention_chunk_size"]
    if chunk != fixed:
        bound = min(chunk or math.inf, fixed or math.inf)
        notes.append(f"llama.cpp attends in chunks of {fixed or 'no fixed size'}, this model in chunks of "
                     f"{chunk or 'no fixed size'}: answers differ past {bound:.0f} tokens.")
    if config.nope_layers != constants["nope_layers"]:
        notes.append(f"llama.cpp leaves out rotary positions in layers {list(constants['nope_layers'])}, this model in "
                     f"layers {list(config.nope_layers)}: answers differ from the first tokens on.")
    ours, theirs = config.attention_temperature, constants["attention_temperature"]
    if ours != theirs and (config.nope_layers or constants["nope_layers"]):
        first = min(t.floor - 1 for t in (ours, theirs) if t is not None)
        notes.append(f"llama.cpp scales queries of layers without rotary positions by {_temperature(theirs)}, this "
                     f"model by {_temperature(ours)}: answers differ from position {first} on.")
    if config.qk_norm != constants["qk_norm"]:
        words = {True: "normalises", False: "does not normalise"}
        notes.append(f"llama.cpp {words[constants['qk_norm']]} queries and keys at {config.num_experts} experts, this "
                     f"model {words[config.qk_norm]} them: answers differ from the first token on.")
    return notes


def _temperature(value: AttentionTemperature | None) -> str:
    return f"scale {value.scale}, floor {value.floor}" if value else "nothing"
