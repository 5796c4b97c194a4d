"""The context that an adapter's base is to be read with, where training extended it: Hugging Face's own keys of
config.json, under `base_config` of adapter_config.json."""

from typing import Any

import torch

from puna.checkpoint.hf_config import read_rope, write_config
from puna.checkpoint.validate import Fields
from puna.family.config import AttentionTemperature, ModelConfig

KEY = "base_config"
_KEYS = ("max_position_embeddings", "rope_parameters")
_LLAMA4 = ("attention_chunk_size", "attn_temperature_tuning", "attn_scale", "floor_scale")


def write_context(config: ModelConfig) -> dict[str, Any]:
    """What `config` says of its context: given to transformers' `from_pretrained` with the base, they are its."""
    written = write_config(config, torch.float32)
    fields = written.get("text_config", written)
    return {key: fields[key] for key in (*_KEYS, *_LLAMA4) if key in fields}


def read_context(fields: Fields, config: ModelConfig) -> ModelConfig:
    """The base's `config` with the context that these keys say. Raises PunaError for a key that says something else."""
    known = (*_KEYS, *_LLAMA4) if config.architecture == "llama4" else _KEYS
    for key in fields.values:
        if key not in known:
            raise fields.error(key, "is no part of a context, and can't be applied; merge the adapter where it was "
                               "made, and load the whole model")  # fmt: skip
    theta, scaling = read_rope(fields, config.rope_theta)
    length = fields.integer("max_position_embeddings")
    changed = config.with_(context_length=length, rope_theta=theta, rope_scaling=scaling)
    if config.architecture != "llama4":
        return changed
    temperature = AttentionTemperature(fields.number("attn_scale", 0.1), fields.integer("floor_scale", 8192))
    return changed.with_(
        attention_chunk_size=fields.integer("attention_chunk_size", None),
        attention_temperature=temperature if fields.flag("attn_temperature_tuning", True) else None,
    )
