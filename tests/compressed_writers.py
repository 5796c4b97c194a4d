"""Writer of compressed-tensors folders in all the shapes that others make, for round trips; packs bit by bit."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoint_writers import split_experts
from puna.checkpoint.hf_config import write_config
from puna.model import Decoder

NUMPY = {torch.int8: "I8", torch.int32: "I32", torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3",
         torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # fmt: skip


@dataclass(frozen=True)
class Scheme:
    """What stands in `quantization_config`, and what the writer does."""

    format: str
    bits: int = 8
    type: str = "int"
    strategy: str = "channel"
    group: int | None = None
    symmetric: bool = True
    block: tuple[int, int] | None = None
    scales: torch.dtype = torch.bfloat16

    def config(self, ignore: list[str]) -> dict[str, Any]:
        """As llm-compressor writes it."""
        weights = {"num_bits": self.bits, "type": self.type, "symmetric": self.symmetric, "strategy": self.strategy,
                   "group_size": self.group, "dynamic": False, "observer": "minmax"}  # fmt: skip
        if self.block:
            weights["block_structure"] = list(self.block)
        activations = {"num_bits": 8, "type": self.type, "strategy": "token", "dynamic": True, "symmetric": True}
        group = {"targets": ["Linear"], "weights": weights}
        if self.format in ("int-quantized", "float-quantized"):
            group["input_activations"] = activations
        return {"quant_method": "compressed-tensors", "format": self.format, "quantization_status": "compressed",
                "config_groups": {"group_0": group}, "ignore": ignore, "kv_cache_scheme": None}  # fmt: skip

    def spans(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        spans = {"tensor": (rows, columns), "channel": (1, columns), "group": (1, self.group or 0)}
        return spans.get(self.strategy, self.block or (1, 1))


def pack(values: np.ndarray, bits: int) -> Tensor:
    """[N, K] -> int32 [N, ceil(K * bits / 32)], one bit after the other."""
    rows = []
    for row in values:
        text = "".join(format(int(v) + (1 << bits - 1), f"0{bits}b")[::-1] for v in row)
        text += "0" * (-len(text) % 32)
        rows.append([int(text[i : i + 32][::-1], 2) for i in range(0, len(text), 32)])
    return torch.from_numpy(np.array(rows, dtype=np.uint32).view(np.int32))


def compress(weight: Tensor, scheme: Scheme, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """A module's tensors, and the weight that they stand for in float32. Values are drawn, not rounded from `weight`:
    every code occurs, and nothing depends on how anybody rounds."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = weight.shape
    down, across = scheme.spans(rows, columns)
    shape = (-(-rows // down), -(-columns // across))
    scales = (0.02 * (0.5 + torch.rand(shape, generator=generator))).to(scheme.scales)
    spread = scales.float().repeat_interleave(down, 0).repeat_interleave(across, 1)[:rows, :columns]
    if scheme.type == "float":
        values = torch.randn(rows, columns, generator=generator).mul(40).to(torch.float8_e4m3fn)
        return {"weight": values, "weight_scale": scales}, values.float() * spread
    low = -(1 << scheme.bits - 1)
    values = torch.randint(low, -low, (rows, columns), generator=generator, dtype=torch.int8)
    parts = {"weight": values, "weight_scale": scales}
    shifted = values.int()
    if not scheme.symmetric:
        zeros = torch.randint(low, -low, shape, generator=generator, dtype=torch.int8)
        shifted = shifted - zeros.repeat_interleave(down, 0).repeat_interleave(across, 1)[:rows, :columns]
        parts["weight_zero_point"] = zeros
    if scheme.format == "pack-quantized":
        parts["weight_packed"] = pack(parts.pop("weight").numpy(), scheme.bits)
        parts["weight_shape"] = torch.tensor([rows, columns])
        if not scheme.symmetric:
            parts["weight_zero_point"] = pack(parts["weight_zero_point"].T.numpy(), scheme.bits).T.contiguous()
    return parts, shifted * spread


def write_compressed(folder: Path, model: Decoder, scheme: Scheme, ignore: str = r".*(lm_head|router|norm|embed)"
                     ) -> dict[str, Tensor]:  # fmt: skip
    """Write the model with every matrix compressed but those that `ignore` matches.

    Returns the weights that stand in the file, by stored name, those of experts one by one.
    """
    stored, expected = {}, {}
    for seed, (name, tensor) in enumerate(split_experts(model).items()):
        module = name.removesuffix(".weight")
        if tensor.ndim < 2 or re.match(ignore, module):
            stored[name] = expected[name] = tensor.detach()
            continue
        parts, expected[name] = compress(tensor, scheme, seed)
        stored |= {f"{module}.{part}": value for part, value in parts.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_raw(folder / "model.safetensors", stored)
    config = write_config(model.config, model.dtype) | {"quantization_config": scheme.config([f"re:{ignore}"])}
    (folder / "config.json").write_text(json.dumps(config))
    return expected


def write_raw(path: Path, tensors: dict[str, Tensor]) -> None:
    """One safetensors file of any dtypes."""
    header: dict[str, Any] = {}
    at = 0
    for name, tensor in tensors.items():
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NUMPY[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header).encode()
    data = b"".join(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors.values())
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
