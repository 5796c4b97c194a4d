"""Weights in few bits as compressed-tensors stores them, and the `quantization_config` that says so.

Integers are written `pack-quantized`, 8-bit floats `float-quantized`; routed experts one by one, as quantisation tools
want them. The layout is that of compressed-tensors 0.20, which vLLM, transformers and llm-compressor share.
"""

import re
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from puna.model.quantized import Float8, Weight, Words, by_rows, stored_bits
from puna.model.words import pack_int32

_Key = tuple[str, int, str, int | None]  # format, bits, strategy, group


class CompressedWriter:
    """Turns weights into stored tensors, and remembers what its configuration must say."""

    def __init__(self) -> None:
        self._modules: dict[_Key, list[str]] = {}
        self._plain: list[str] = []

    def tensors(self, name: str, weight: Weight | list[Weight]) -> Iterator[tuple[str, Tensor]]:
        """The tensors to store for a weight of that Hugging Face name, one module after the other."""
        if not isinstance(weight, list):
            yield from self._module(name, weight)
            return
        prefix, _, kind = name.rpartition(".")
        for expert, both in enumerate(weight):
            if kind == "down_proj":
                yield from self._module(f"{prefix}.{expert}.down_proj.weight", both)
                continue
            inner = both.shape[0] // 2
            for part, rows in (("gate_proj", slice(0, inner)), ("up_proj", slice(inner, None))):
                yield from self._module(f"{prefix}.{expert}.{part}.weight", by_rows(both, itemgetter(rows)))

    def _module(self, name: str, weight: Weight) -> Iterator[tuple[str, Tensor]]:
        module = name.removesuffix(".weight")
        if isinstance(weight, Tensor):
            if weight.ndim == 2 and not module.endswith("embed_tokens"):
                self._plain.append(module)
            yield name, weight
            return
        columns = weight.shape[1]
        if isinstance(weight, Float8):
            self._modules.setdefault(("float-quantized", 8, "channel", None), []).append(module)
            yield f"{module}.weight", weight.values
        else:
            by_row = weight.group >= columns
            shared: tuple[str, int | None] = ("channel", None) if by_row else ("group", weight.group)
            bits = stored_bits(weight.bits)
            self._modules.setdefault(("pack-quantized", bits, *shared), []).append(module)
            words = weight.words if isinstance(weight, Words) else pack_int32(weight.values.contiguous(), bits)
            yield f"{module}.weight_packed", words
            yield f"{module}.weight_shape", torch.tensor([weight.shape[0], columns])
        yield f"{module}.weight_scale", weight.scales

    def config(self) -> dict[str, Any] | None:
        """`quantization_config` for all that was written, None where nothing was in few bits.

        The scheme of most linear layers targets their class; the head and whatever else differs are named. Linear
        layers that stay plain are ignored by name.
        """
        if not self._modules:
            return None
        usual = max(self._modules, key=lambda key: len(self._modules[key]))
        groups = {}
        for number, (key, modules) in enumerate(sorted(self._modules.items(), key=lambda item: item[0] != usual)):
            groups[f"group_{number}"] = _group(key, ["Linear"] if key == usual else [_target(name) for name in modules])
        formats = sorted({key[0] for key in self._modules})
        return {
            "quant_method": "compressed-tensors",
            "format": formats[0] if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": [_target(module) for module in self._plain],
            "kv_cache_scheme": None,
        }


def _target(module: str) -> str:
    """A module by its name. Readers know the head, and all of a model with a tower, under several prefixes."""
    if module.endswith("lm_head"):
        return "re:.*lm_head$"
    if not module.startswith(("language_model.", "vision_model.", "multi_modal_projector")):
        return module
    return f"re:.*{re.escape(module.replace('language_model.model.', 'language_model.'))}$".replace(
        "language_model\\.", "language_model\\.(model\\.)?"
    )


def _group(key: _Key, targets: list[str]) -> dict[str, Any]:
    format, bits, strategy, size = key
    weights = {
        "num_bits": bits,
        "type": "float" if format == "float-quantized" else "int",
        "symmetric": True,
        "strategy": strategy,
        "group_size": size,
        "dynamic": False,
    }
    return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None,
            "format": format}  # fmt: skip
