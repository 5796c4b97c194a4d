"""Tiny random models of every kind in the family: as `ModelConfig`, as our decoder, as transformers' model."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from puna.family.config import AttentionTemperature, ModelConfig, RopeScaling
from puna.model import Decoder

LLAMA: dict[str, Any] = {
    "architecture": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "context_length": 256,
}
LLAMA4: dict[str, Any] = LLAMA | {
    "architecture": "llama4",
    "num_layers": 4,
    "intermediate_size": 64,
    "nope_layers": (3,),
    "attention_chunk_size": 8,
    "attention_temperature": AttentionTemperature(scale=0.1, floor=4),
}
EXPERTS = {"num_experts": 4, "expert_intermediate_size": 32}
# One of each kind that the family has. Chunks of 8 tokens and a floor of 4, so that 40 tokens cross several of each.
CONFIGS: dict[str, ModelConfig] = {
    "llama2": ModelConfig(**LLAMA | {"num_kv_heads": 4, "rope_theta": 10_000.0}),
    "llama3.1": ModelConfig(**LLAMA, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32)),
    "llama3.2": ModelConfig(**LLAMA, rope_scaling=RopeScaling(32.0, 1.0, 4.0, 32), tie_word_embeddings=True),
    "scout": ModelConfig(
        **LLAMA4,
        **EXPERTS,
        moe_layers=(0, 1, 2, 3),
        qk_norm=True,
        rope_scaling=RopeScaling(16.0, 1.0, 1.0, 32),
    ),
    "maverick": ModelConfig(**LLAMA4, **EXPERTS, moe_layers=(1, 3)),
    "guard4": ModelConfig(**LLAMA4, qk_norm=True, rope_scaling=RopeScaling(16.0, 1.0, 1.0, 32)),
}
TOKENS = 40  # five chunks


def token_ids(config: ModelConfig, length: int = TOKENS, batch: int = 1, seed: int = 1) -> Tensor:
    """Random ids [batch, length]."""
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Weights that keep activations and logits of order 1, with norms that differ from 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(module.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.copy_(1 + 0.2 * noise)
            elif "embed_tokens" in name:
                weight.copy_(noise * (weight.shape[1] ** -0.5))
            else:  # linears are [out, in], fused experts [expert, in, out]
                weight.copy_(noise / math.sqrt(weight.shape[1]))


def decoder(kind: str | ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Decoder:
    """A random decoder in eval mode, of a kind in `CONFIGS` or any shape."""
    model = Decoder(CONFIGS[kind] if isinstance(kind, str) else kind)
    randomise(model, seed)
    return model.to(dtype).eval()


def transformers_config(kind: str, **changes: Any) -> Any:
    """transformers' config of a kind, written by hand: `puna.checkpoint.hf_config` takes no part in it."""
    from transformers import Llama4TextConfig, LlamaConfig

    config = CONFIGS[kind]
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if scaling := config.rope_scaling:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    common: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "eager",
    }
    if config.architecture == "llama":
        return LlamaConfig(intermediate_size=config.intermediate_size, **common | changes)
    temperature = config.attention_temperature
    llama4: dict[str, Any] = {
        "intermediate_size": config.expert_intermediate_size or 8,
        "intermediate_size_mlp": config.intermediate_size,
        "num_local_experts": config.num_experts or 4,
        "num_experts_per_tok": 1,
        "moe_layers": {"scout": None, "maverick": None, "guard4": []}[kind],
        "interleave_moe_layer_step": 2 if kind == "maverick" else 1,
        "no_rope_layers": [],
        "attention_chunk_size": config.attention_chunk_size,
        "use_qk_norm": config.qk_norm,
        "attn_temperature_tuning": temperature is not None,
        "attn_scale": temperature.scale if temperature else 0.1,
        "floor_scale": temperature.floor if temperature else 8192,
    }
    return Llama4TextConfig(**common | llama4 | changes)


def transformers_model(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A random transformers model of a kind in eval mode, float32."""
    from transformers import Llama4ForCausalLM, LlamaForCausalLM

    config = transformers_config(kind, **changes)
    model = (LlamaForCausalLM if CONFIGS[kind].architecture == "llama" else Llama4ForCausalLM)(config)
    randomise(model, seed)
    return model.eval()
