"""Bytes that each rank of a sharded decoder holds: weights in a storage format, and keys and values of a context."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Literal

from puna.family.arithmetic import kv_bytes
from puna.family.config import ModelConfig
from puna.family.sharding import Sharding

Part = Literal["vocabulary", "attention", "feed-forward", "experts", "whole"]


@dataclass(frozen=True)
class Format:
    """How weights are stored: parts of the model in few bits with scales, the rest in 16 bits."""

    text: str
    parts: Mapping[Part, tuple[int, int | None]] = field(default_factory=dict)  # bits, and inputs that share a scale
    scale_bits: int = 0
    edges: bool = True  # whether the first and last layer are stored in few bits too

    def tensor_bytes(self, part: Part, shape: tuple[int, ...], edge: bool) -> int:
        """Bytes of one tensor or slice: a vector, a matrix [outputs, inputs], or experts [E, inputs, outputs]."""
        if part not in self.parts or (edge and not self.edges):
            return 2 * prod(shape)
        (bits, group), inputs = self.parts[part], shape[1]  # in both layouts
        scales = prod(shape) // inputs * (-(-inputs // group) if group else 1)  # without a group: one a row
        return -(-prod(shape) * bits // 8) + scales * self.scale_bits // 8


_LINEAR: tuple[Part, ...] = ("attention", "feed-forward", "experts")
_FP8 = "8-bit floats and a float32 scale a row, the rest bfloat16; as Meta stores its own:"


def formats(config: ModelConfig) -> Mapping[str, Format]:
    """The formats to count in. fp8 is what Meta's releases of 405B and Maverick have (llama-models'
    `quantization/loader.py` of both generations), int8 and int4 what `puna.load(quantize=...)` makes."""
    fp8 = (
        Format(f"{_FP8} routed experts", {"experts": (8, None)}, 32)
        if config.moe_layers
        else Format(
            f"{_FP8} feed-forward, but not the first and last layer's", {"feed-forward": (8, None)}, 32, edges=False
        )
    )
    eight: Mapping[Part, tuple[int, int]] = {"vocabulary": (8, 128), **dict.fromkeys(_LINEAR, (8, 128))}
    four: Mapping[Part, tuple[int, int]] = {"vocabulary": (6, 128), **dict.fromkeys(_LINEAR, (4, 32))}
    return {
        "bf16": Format("bfloat16 throughout"),
        "fp8": fp8,
        "int8": Format("all matrices but routers in 8 bits with a float16 scale for 128 inputs", eight, 16),
        "int4": Format("linear layers in 4 bits with a float16 scale for 32 inputs, embedding and output in 6 bits "
                       "with one for 128", four, 16),
    }  # fmt: skip


def part_of(sharding: Sharding, name: str) -> Part:
    """The part of the model that a tensor belongs to."""
    kind = sharding.rule(name).kind
    if kind in ("vocabulary", "experts", "whole"):
        return kind  # type: ignore[return-value]
    return "feed-forward" if kind.startswith("width") else "attention"


def tensor_bytes(sharding: Sharding, name: str, rank: int, format: Format) -> int:
    """Bytes that `rank` holds of one tensor."""
    edge = name.startswith(("layers.0.", f"layers.{sharding.config.num_layers - 1}."))
    return format.tensor_bytes(part_of(sharding, name), sharding.shape(name, rank), edge)


def weight_bytes_per_rank(sharding: Sharding, format: Format) -> int:
    """Bytes of weights on the rank that holds most; ranks differ by a row of the vocabulary at most."""
    fullest = sharding.mesh.ranks - 1  # `part` gives later parts what is left over
    return sum(tensor_bytes(sharding, name, fullest, format) for name in sharding.shapes)


def kv_bytes_per_rank(sharding: Sharding, tokens: int) -> int:
    """Bytes of one sequence's keys and values on each rank, bfloat16; a rank has one head at least."""
    return kv_bytes(sharding.local_config(), tokens)
