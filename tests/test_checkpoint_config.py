"""config.json and params.json to `ModelConfig`: both spellings, defaults, published values."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from puna.checkpoint.hf_config import read_config, write_config
from puna.checkpoint.meta_params import feed_forward_width, read_params
from puna.family.config import AttentionTemperature, ModelConfig, RopeScaling

# The published config.json of Llama 3.1 8B Instruct, without keys that say nothing about the model.
LLAMA31: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
# Llama 4 Scout's text_config as first published: integer temperature flag, empty lists.
SCOUT_TEXT = {
    "model_type": "llama4_text",
    "attention_chunk_size": 8192,
    "attn_temperature_tuning": 4,
    "bos_token_id": 200000,
    "eos_token_id": [200001, 200007, 200008],
    "pad_token_id": 200018,
    "head_dim": 128,
    "hidden_size": 5120,
    "interleave_moe_layer_step": 1,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "max_position_embeddings": 10485760,
    "no_rope_layers": [],
    "num_attention_heads": 40,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "num_local_experts": 16,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 16.0,
        "high_freq_factor": 1.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "use_qk_norm": True,
    "vocab_size": 202048,
}


def read(tmp_path: Path, fields: dict[str, Any]) -> ModelConfig:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields))
    return read_config(path)


def test_published_llama31_in_both_spellings(tmp_path: Path) -> None:
    config = read(tmp_path, LLAMA31)
    assert config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    assert (config.rope_theta, config.head_dim, config.eos_token_ids) == (500_000.0, 128, (128001, 128008, 128009))
    new = {key: value for key, value in LLAMA31.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    new |= {"dtype": "bfloat16", "rope_parameters": LLAMA31["rope_scaling"] | {"rope_theta": 500000.0}}
    assert read(tmp_path, new) == config
    scaling = {key: value for key, value in LLAMA31["rope_scaling"].items() if key != "rope_type"}
    assert read(tmp_path, LLAMA31 | {"rope_scaling": scaling | {"type": "llama3"}}) == config


def test_published_scout(tmp_path: Path) -> None:
    nested = {"architectures": ["Llama4ForConditionalGeneration"], "text_config": SCOUT_TEXT, "vision_config": {}}
    config = read(tmp_path, nested)
    assert config.nope_layers == tuple(range(3, 48, 4))
    assert config.moe_layers == tuple(range(48))
    assert config.attention_temperature == AttentionTemperature(0.1, 8192)
    assert config.rope_scaling == RopeScaling(16.0, 1.0, 1.0, 8192)
    assert (config.intermediate_size, config.expert_intermediate_size) == (16384, 8192)
    assert (config.pad_token_id, config.attention_chunk_size, config.qk_norm) == (200018, 8192, True)
    assert read(tmp_path, {"architectures": ["Llama4ForCausalLM"], **SCOUT_TEXT}) == config


def test_variants_of_llama4(tmp_path: Path) -> None:
    base = {"architectures": ["Llama4ForCausalLM"], **SCOUT_TEXT}
    maverick = read(tmp_path, base | {"interleave_moe_layer_step": 2, "use_qk_norm": False, "rope_scaling": None})
    assert maverick.moe_layers == tuple(range(1, 48, 2))
    assert (maverick.qk_norm, maverick.rope_scaling) == (False, None)
    guard = read(tmp_path, base | {"moe_layers": []})
    assert (guard.moe_layers, guard.num_experts) == ((), 0)
    inverted = read(tmp_path, base | {"no_rope_layers": [0, 1] * 24})
    assert inverted.nope_layers == tuple(range(0, 48, 2))
    assert read(tmp_path, base | {"attn_temperature_tuning": False}).attention_temperature is None
    assert read(tmp_path, base | {"attention_chunk_size": None}).attention_chunk_size is None
    assert read(tmp_path, base | {"layer_types": ["full_attention"] * 48}).attention_chunk_size is None
    defaults = {k: v for k, v in base.items() if k not in ("attention_chunk_size", "head_dim", "use_qk_norm")}
    assert read(tmp_path, defaults) == read(tmp_path, base)


@pytest.mark.parametrize("kind", list(tiny.CONFIGS))
def test_written_configs_read_back_in_either_spelling(kind: str, tmp_path: Path) -> None:
    config = tiny.CONFIGS[kind].with_(bos_token_id=1, eos_token_ids=(2, 3), pad_token_id=0)
    fields = write_config(config, torch.bfloat16)
    for dropped in ((), ("rope_theta", "rope_scaling", "torch_dtype"), ("rope_parameters", "dtype")):
        assert read(tmp_path, {key: value for key, value in fields.items() if key not in dropped}) == config


@pytest.mark.parametrize(
    ("dim", "multiplier", "multiple", "width"),
    [
        (4096, None, 256, 11008),
        (4096, 1.3, 1024, 14336),
        (8192, 1.3, 4096, 28672),
        (16384, 1.2, 4096, 53248),
        (2048, 1.5, 256, 8192),
        (3072, 1.0, 256, 8192),
        (5120, 1.2, 2048, 16384),
    ],
)
def test_feed_forward_widths(dim: int, multiplier: float | None, multiple: int, width: int) -> None:
    assert feed_forward_width(4 * dim, multiplier, multiple) == width


PARAMS = {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "ffn_dim_multiplier": 1.5}
PARAMS |= {"multiple_of": 256, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True}


def params(tmp_path: Path, fields: dict[str, Any], shapes: dict[str, tuple[int, ...]], ranks: int = 1) -> ModelConfig:
    path = tmp_path / "params.json"
    path.write_text(json.dumps(fields))
    config, quantisation = read_params(path, shapes, ranks)
    assert quantisation is None
    return config


def test_meta_scaling_depends_on_the_model(tmp_path: Path) -> None:
    head = {"output.weight": (128256, 2048)}
    small = params(tmp_path, PARAMS, head)
    assert small.rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)
    assert small.context_length == 131072
    large = params(tmp_path, PARAMS | {"dim": 4096, "ffn_dim_multiplier": 1.3}, {"output.weight": (128256, 4096)})
    assert large.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    other = params(tmp_path, PARAMS, {"output.weight": (32000, 2048)})
    assert other.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)


def test_meta_llama2_defaults(tmp_path: Path) -> None:
    fields = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-5, "vocab_size": -1}
    config = params(tmp_path, fields, {"output.weight": (16000, 4096), "tok_embeddings.weight": (32000, 2048)}, 2)
    assert (config.vocab_size, config.num_kv_heads, config.rope_theta) == (32000, 32, 10_000.0)
    assert (config.intermediate_size, config.context_length, config.rope_scaling) == (11008, 4096, None)


def test_meta_scout_shape(tmp_path: Path) -> None:
    fields = {"dim": 5120, "n_layers": 48, "n_heads": 40, "n_kv_heads": 8, "ffn_exp": 4.0, "ffn_dim_multiplier": 1.2}
    fields |= {"multiple_of": 2048, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True}
    fields |= {"nope_layer_interval": 4, "use_qk_norm": True, "attention_chunk_size": 8192}
    fields |= {"moe_args": {"num_experts": 16, "interleave_moe_layer_step": 1}}
    config = params(tmp_path, fields, {"output.weight": (202048 // 8, 5120)}, 8)
    assert (config.architecture, config.vocab_size, config.num_experts) == ("llama4", 202048, 16)
    assert (config.intermediate_size, config.expert_intermediate_size) == (16384, 8192)
    assert config.rope_scaling == RopeScaling(16.0, 1.0, 1.0, 8192)
    assert config.nope_layers == tuple(range(3, 48, 4))
    assert config.attention_temperature is None  # Meta's default; params.json decides
