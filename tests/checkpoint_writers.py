"""Writers of formats that puna only reads, for round trips: Meta shards, split experts, llama2.c."""

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from puna.checkpoint.hf_config import write_config
from puna.checkpoint.safetensors_write import hf_name, write_file
from puna.family.config import ModelConfig
from puna.model import Decoder

_LLAMA = {
    "self_attn.o_proj": ("attention.wo", 1),
    "feed_forward.gate_proj": ("feed_forward.w1", 0),
    "feed_forward.down_proj": ("feed_forward.w2", 1),
    "feed_forward.up_proj": ("feed_forward.w3", 0),
}
_LLAMA4 = {
    "input_layernorm.weight": ("attention.wqkv.layer_norm_weight", None),
    "self_attn.o_proj.weight": ("attention.wo.weight", 1),
    "feed_forward.down_proj.weight": ("feed_forward.mlp.fc2_weight", 1),
    "feed_forward.shared_expert.gate_proj.weight": ("feed_forward.w_in_shared_FD.weight", 0),
    "feed_forward.shared_expert.up_proj.weight": ("feed_forward.w_swiglu_FD.weight", 0),
    "feed_forward.shared_expert.down_proj.weight": ("feed_forward.w_out_shared_DF.weight", 1),
}


def pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows from rotary halves to Meta's adjacent pairs, one row at a time."""
    size = weight.shape[0] // heads
    order = [h * size + half * (size // 2) + j for h in range(heads) for j in range(size // 2) for half in (0, 1)]
    return weight[order]


def params_json(config: ModelConfig) -> dict[str, Any]:
    """params.json for the widths of `tiny.CONFIGS`."""
    params: dict[str, Any] = {
        "dim": config.hidden_size,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "vocab_size": -1,
        "max_seq_len": config.context_length,
        "multiple_of": 16,
        "ffn_dim_multiplier": 0.5,
    }
    if config.rope_scaling:
        params["use_scaled_rope"] = True
        params["rope_scaling_factor"] = config.rope_scaling.factor
        params["rope_high_freq_factor"] = config.rope_scaling.high_freq_factor
    if config.architecture == "llama":
        return params
    params |= {"ffn_dim_multiplier": 0.7, "ffn_exp": 4.0, "use_qk_norm": config.qk_norm, "nope_layer_interval": 4}
    params |= {"attention_chunk_size": config.attention_chunk_size, "attn_temperature_tuning": True}
    params |= {"attn_scale": config.attention_temperature.scale, "floor_scale": config.attention_temperature.floor}
    if config.moe_layers:
        step = config.moe_layers[0] + 1
        params["moe_args"] = {"num_experts": config.num_experts, "top_k": 1, "interleave_moe_layer_step": step}
    return params


def write_meta(folder: Path, model: Decoder, ranks: int, nested: bool = False) -> None:
    """Write `consolidated.NN.pth` and params.json as Meta ships them."""
    config = model.config
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    shards: list[dict[str, Tensor]] = [{"rope.freqs": torch.ones(4)} for _ in range(ranks)]

    def put(name: str, tensor: Tensor, dim: int | None) -> None:
        for rank, part in enumerate(tensor.chunk(ranks, dim) if dim is not None else [tensor] * ranks):
            shards[rank][name] = part.clone()

    def copied(tensor: Tensor) -> Tensor:
        """Where ranks outnumber the key/value heads, neighbouring ranks hold the same head."""
        heads = tensor.unflatten(0, (config.num_kv_heads, -1))
        return heads.repeat_interleave(max(1, ranks // config.num_kv_heads), 0).flatten(0, 1)

    old = config.architecture == "llama" and config.rope_scaling is None
    put("tok_embeddings.weight", state["embed_tokens.weight"], 1 if old else 0)
    put("norm.weight", state["norm.weight"], None)
    put("output.weight", state.get("lm_head.weight", state["embed_tokens.weight"]), 0)
    for i in range(config.num_layers):
        layer = {n.removeprefix(f"layers.{i}."): t for n, t in state.items() if n.startswith(f"layers.{i}.")}
        q, k, v = (layer[f"self_attn.{x}_proj.weight"] for x in "qkv")
        at = f"layers.{i}."
        if config.architecture == "llama":
            put(f"{at}attention_norm.weight", layer["input_layernorm.weight"], None)
            put(f"{at}ffn_norm.weight", layer["post_attention_layernorm.weight"], None)
            put(f"{at}attention.wq.weight", pairs(q, config.num_heads), 0)
            put(f"{at}attention.wk.weight", copied(pairs(k, config.num_kv_heads)), 0)
            put(f"{at}attention.wv.weight", copied(v), 0)
            for name, (meta, dim) in _LLAMA.items():
                put(f"{at}{meta}.weight", layer[f"{name}.weight"], dim)
            continue
        for rank, parts in enumerate(zip(*(w.chunk(ranks, 0) for w in (q, copied(k), copied(v))), strict=True)):
            shards[rank][f"{at}attention.wqkv.weight"] = torch.cat(parts)
        for name, (meta, dim) in _LLAMA4.items():
            if name in layer:
                put(at + meta, layer[name], dim)
        norm = "feed_forward.norm.weight" if config.is_moe(i) else "feed_forward.mlp.layer_norm_weight"
        put(at + norm, layer["post_attention_layernorm.weight"], None)
        if not config.is_moe(i):
            gate, up = (layer[f"feed_forward.{x}_proj.weight"].chunk(ranks) for x in ("gate", "up"))
            for rank in range(ranks):
                shards[rank][f"{at}feed_forward.mlp.fc1_weight"] = torch.cat((gate[rank], up[rank]))
            continue
        put(f"{at}feed_forward.router_DE", layer["feed_forward.router.weight"].T.contiguous(), None)
        put(f"{at}feed_forward.expert_activation_DE", torch.zeros(config.hidden_size, config.num_experts), None)
        gate, up = layer["feed_forward.experts.gate_up_proj"].chunk(2, -1)
        put(f"{at}feed_forward.experts.moe_w_in_eD_F", gate.flatten(0, 1), 1)
        put(f"{at}feed_forward.experts.moe_w_swiglu_eD_F", up.flatten(0, 1), 1)
        for rank, part in enumerate(layer["feed_forward.experts.down_proj"].chunk(ranks, 1)):
            shards[rank][f"{at}feed_forward.experts.moe_w_out_eF_D"] = part.flatten(0, 1).clone()
    folder.mkdir(parents=True, exist_ok=True)
    for rank, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{rank:02}.pth")
    params = params_json(config)
    (folder / "params.json").write_text(json.dumps({"model": params} if nested else params))


def split_experts(model: Decoder) -> dict[str, Tensor]:
    """Hugging Face's names and weights, with one tensor an expert and projection, as quantisation tools want it."""
    config, state = model.config, {}
    for name, tensor in model.state_dict().items():
        stored = hf_name(name, config)
        if match := re.fullmatch(r"(.*\.experts)\.(gate_up|down)_proj", stored):
            for expert, weight in enumerate(tensor):
                if match[2] == "down":
                    state[f"{match[1]}.{expert}.down_proj.weight"] = weight.T
                else:
                    gate, up = weight.chunk(2, -1)
                    state[f"{match[1]}.{expert}.gate_proj.weight"] = gate.T
                    state[f"{match[1]}.{expert}.up_proj.weight"] = up.T
        else:
            state[stored] = tensor
    return state


def write_split_experts(folder: Path, model: Decoder) -> None:
    """Write a Llama 4 folder with split experts."""
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "model.safetensors", split_experts(model))
    (folder / "config.json").write_text(json.dumps(write_config(model.config, model.dtype)))


def write_llama2c(path: Path, model: Decoder) -> None:
    """Write a llama2.c version 0 file."""
    config, state = model.config, model.state_dict()
    vocabulary = config.vocab_size if config.tie_word_embeddings else -config.vocab_size
    sizes = (config.hidden_size, config.intermediate_size, config.num_layers, config.num_heads, config.num_kv_heads)
    with path.open("wb") as file:
        file.write(struct.pack("<7i", *sizes, vocabulary, config.context_length))

        def put(tensor: Tensor) -> None:
            file.write(tensor.detach().numpy().astype("<f4").tobytes())

        put(state["embed_tokens.weight"])
        kinds = ("input_layernorm", *(f"self_attn.{x}_proj" for x in "qkvo"), "post_attention_layernorm")
        for kind in (*kinds, *(f"feed_forward.{x}_proj" for x in ("gate", "down", "up"))):
            for i in range(config.num_layers):
                weight = state[f"layers.{i}.{kind}.weight"]
                heads = {"q": config.num_heads, "k": config.num_kv_heads}.get(kind[len("self_attn.")], 0)
                put(pairs(weight, heads) if kind.startswith("self_attn.") and heads else weight)
        put(state["norm.weight"])
        file.write(np.full(config.context_length * config.head_dim, 9.0, "<f4").tobytes())  # tables to be skipped
        if not config.tie_word_embeddings:
            put(state["lm_head.weight"])
