"""Writing an adapter that PEFT loads (0.19 or later: see `puna.checkpoint.peft` for its layout of experts)."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from puna.checkpoint.hf_context import KEY, write_context
from puna.checkpoint.peft import CONFIG, WEIGHTS
from puna.checkpoint.safetensors_write import hf_name, write_file
from puna.errors import PunaError
from puna.family.config import ModelConfig
from puna.model.adapt import Lora
from puna.model.lora import Update

LAYOUT = "0.19.0"  # PEFT's version whose layout this is
_PARAMETERS = ("router.weight", "experts.gate_up_proj", "experts.down_proj")


def write_adapter(folder: Path, updates: Mapping[str, Update], lora: Lora, config: ModelConfig, base: str,
                  extended: bool = False) -> None:  # fmt: skip
    """Write adapter_config.json and adapter_model.safetensors into an existing folder. `base`: its name or path.
    extended: its context is not the base's, but `config`'s."""
    tensors: dict[str, Tensor] = {}
    paired = {name.rpartition(".")[0] for name in updates if name.endswith("experts.gate_up_proj")}
    paired &= {name.rpartition(".")[0] for name in updates if name.endswith("experts.down_proj")}
    for name, update in updates.items():
        if abs(update.scale - lora.scale) > 1e-9 * abs(lora.scale):
            raise PunaError(f"{name} has scale {update.scale}, but rank and alpha give {lora.scale}")
        if update.a.dim() == 3:
            owner = name.rpartition(".")[0]
            inner = owner in paired and name.endswith("gate_up_proj")
            module = hf_name(owner, config) + (".base_layer" if inner else "")
            a = update.b.mT.flatten(0, 1)
            b = update.a.permute(2, 1, 0).flatten(1)
        else:
            module, a, b = hf_name(name, config).removesuffix(".weight"), update.a, update.b
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
        if update.magnitude is not None:
            tensors[f"base_model.model.{module}.lora_magnitude_vector"] = update.magnitude
    write_file(folder / WEIGHTS, tensors)
    linear = (name for name, update in updates.items() if update.a.dim() == 2 and not name.endswith(_PARAMETERS))
    modules = sorted({name.removesuffix(".weight").rpartition(".")[2] for name in linear})
    parameters = [name for name in _PARAMETERS if any(each.endswith(f".{name}") for each in updates)]
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0 if parameters else lora.dropout,  # PEFT knows none for parameters
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "target_modules": modules,
        "target_parameters": parameters or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "peft_version": LAYOUT,
        **({KEY: write_context(config)} if extended else {}),
    }
    (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
