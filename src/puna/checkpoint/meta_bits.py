"""Meta's own quantised releases: one rank's weights in few bits, from the shard and what lies beside it.

- Llama 3.2 1B and 3B, SpinQuant and QLoRA: int8 holders of 4-bit linears (`.weight`, `.scales`, optional `.zeros`),
  int8 embedding and head with a scale a row; QLoRA adds `.adaptor.A/B.weight`.
  Source: llama-models 0.3.0 `llama3/quantization/loader.py`.
- Llama 3.1 405B FP8 (feed-forward) and Llama 4 fp8_mixed, int4_mixed (routed experts), with the scales of rank R in
  `fp8_scales_R.pt` or `int4_scales_R.pt`: `llama4/quantization/loader.py`, `scripts/quantize.py`, `quantize_impls.py`.

Legend: E experts, D model width, F feed-forward width of this rank.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from puna.checkpoint.meta_shard import Shard
from puna.checkpoint.validate import Fields, check_finite
from puna.errors import PunaError
from puna.model.quantized import Float8, Quantized, Weight, plain

COMPANION = re.compile(r"(.*)\.(scales|zeros|adaptor\.[AB]\.weight)")
_SCHEME = "int4_weight_int8_dynamic_activation"
_EXPERTS = re.compile(r"layers\.(\d+)\.feed_forward\.experts\.(moe_w_in_eD_F|moe_w_swiglu_eD_F|moe_w_out_eF_D)")
_DENSE = re.compile(r"layers\.(\d+)\.feed_forward\.(w[123])\.weight")
_SCALES_KEY = {"moe_w_in_eD_F": "w1", "moe_w_swiglu_eD_F": "w3", "moe_w_out_eF_D": "w2"}
_INT4_GROUP = 128  # `int4_row_quantize`
_PER_ROW = ("tok_embeddings", "output")  # 8 bits, a scale a row


@dataclass(frozen=True)
class Quantisation:
    """What params.json says: the group of 4-bit linears, and the factor of QLoRA's adaptors."""

    group: int
    lora_scale: float | None


def read_quantisation(fields: Fields) -> Quantisation | None:
    """params.json's `quantization_args` and `lora_args`, or None. Raises PunaError, naming it, for another scheme."""
    section, lora = fields.section("quantization_args"), fields.section("lora_args")
    if section is None:
        if lora is not None:
            raise fields.error("lora_args", "stand without quantization_args. Load the bfloat16 release")
        return None
    if (scheme := section.text("scheme")) != _SCHEME:
        raise section.error("scheme", f"is {scheme!r}; supported is {_SCHEME!r}. Load the bfloat16 release")
    group = section.integer("group_size")
    if group < 1:
        raise section.error("group_size", f"must be positive, not {group}. Fetch the file again")
    return Quantisation(group, None if lora is None else lora.number("scale"))


class RankBits:
    """One rank's tensors, those in few bits with their scales."""

    def __init__(self, shard: Shard, rank: int, quantisation: Quantisation | None, experts: int) -> None:
        self.shard, self.rank, self.quantisation, self.experts = shard, rank, quantisation, experts
        self._fp8, self._int4 = (self._side_file(f"{kind}_scales_{rank}.pt") for kind in ("fp8", "int4"))

    def _side_file(self, name: str) -> Shard | None:
        path = self.shard.path.with_name(name)
        return Shard(path) if path.is_file() else None

    @property
    def side_files(self) -> list[Path]:
        """The scales that lie beside the shard."""
        return [side.path for side in (self._fp8, self._int4) if side is not None]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the weight that a stored tensor stands for: packed int4 experts have twice the rows."""
        shape = self.shard.shape(name)
        return (2 * shape[0], *shape[1:]) if self._int4_scales(name) is not None and len(shape) == 2 else shape

    @property
    def expert_names(self) -> set[str]:
        """Stored tensors that hold all experts of a layer."""
        return {name for name in self.shard.names if _EXPERTS.fullmatch(name)}

    def quantised(self, name: str) -> bool:
        """Whether a stored tensor is in few bits."""
        return f"{name.removesuffix('.weight')}.scales" in self.shard.names or self._side(name) is not None

    def adapted(self, name: str) -> bool:
        """Whether QLoRA's adaptors stand beside it."""
        return f"{name.removesuffix('.weight')}.adaptor.A.weight" in self.shard.names

    def tensor(self, name: str) -> Tensor:
        """The weight of one rank in the shape that `shape` says: as stored, or in float32 with adaptors added."""
        if not self.quantised(name):
            return self._plain(name)
        if _EXPERTS.fullmatch(name):
            return torch.stack([plain(weight).T for weight in self.expert_weights(name)]).flatten(0, 1)
        weight = plain(self.weight(name))
        if self.adapted(name):
            stem = name.removesuffix(".weight")
            assert self.quantisation is not None
            if self.quantisation.lora_scale is None:
                raise self._error(name, "has adaptors, but params.json has no lora_args")
            a, b = (self.shard.tensor(f"{stem}.adaptor.{part}.weight").float() for part in "AB")
            if a.shape[1:] != weight.shape[1:] or b.shape != (weight.shape[0], a.shape[0]):
                raise self._error(name, f"has adaptors of shapes {list(a.shape)} and {list(b.shape)}")
            check_finite(a, f"{self.shard.path}, tensor {stem}.adaptor.A.weight")
            check_finite(b, f"{self.shard.path}, tensor {stem}.adaptor.B.weight")
            weight = weight + self.quantisation.lora_scale * (b @ a)
        return weight

    def weight(self, name: str) -> Weight:
        """A stored matrix [N, K] in its own bits, without adaptors; zero points that don't fit make it float32."""
        if not self.quantised(name):
            return self.tensor(name)
        side = self._side(name)
        if side is not None:
            values = self._fp8_values(name)
            return Float8(values.clone(), self._shaped(*side, (values.shape[0],))[:, None])
        stem = name.removesuffix(".weight")
        if self.quantisation is None:
            raise self._error(name, "has scales beside it, but params.json has no quantization_args")
        values, scales = self.shard.tensor(name), self.shard.tensor(f"{stem}.scales")
        per_row = stem in _PER_ROW
        bits, group = (8, values.shape[-1]) if per_row else (4, self.quantisation.group)
        if values.dtype != torch.int8 or values.ndim != 2:
            raise self._error(name, f"is a {values.dtype} of shape {list(values.shape)}, where an int8 matrix belongs")
        wanted = (values.shape[0], -(-values.shape[1] // group))
        if scales.numel() != wanted[0] * wanted[1] or not scales.is_floating_point():
            raise PunaError(f"{self.shard.path}, tensor {stem}.scales is a {scales.dtype} of shape "
                            f"{list(scales.shape)}, needs {list(wanted)}. Fetch the file again.")  # fmt: skip
        check_finite(scales, f"{self.shard.path}, tensor {stem}.scales")
        if bits == 4 and not values.is_meta and (int(values.min()) < -8 or int(values.max()) > 7):
            raise self._error(name, "holds integers that are not of 4 bits")
        whole = Quantized(bits, values.clone(), scales.reshape(wanted).clone(), group)
        zeros = self.shard.tensor(f"{stem}.zeros") if f"{stem}.zeros" in self.shard.names else None
        if zeros is None or zeros.is_meta or not bool(zeros.any()):
            return whole
        if zeros.numel() != whole.scales.numel():
            raise self._error(f"{stem}.zeros", f"has shape {list(zeros.shape)}, needs {list(wanted)}")
        shifted = values.float() - zeros.float().reshape(wanted).repeat_interleave(group, 1)[:, : values.shape[1]]
        check_finite(shifted, f"{self.shard.path}, tensor {stem}.zeros")
        if bool((shifted == shifted.round()).all()) and float(shifted.abs().max()) <= 127:
            return Quantized(8, shifted.to(torch.int8), whole.scales, group)
        return shifted * whole.scales.float().repeat_interleave(group, 1)[:, : values.shape[1]]

    def _plain(self, name: str, rows: slice = slice(None)) -> Tensor:
        tensor = self.shard.tensor(name, rows)
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise self._error(name, f"has dtype {tensor.dtype} and no scales beside it")
        return tensor

    def expert(self, name: str, expert: int) -> Tensor:
        """As `tensor`, of one expert [inputs, outputs]."""
        if self.quantised(name):
            return plain(self.expert_weights(name, expert)[0]).T
        inputs = self.shape(name)[0] // self.experts
        return self._plain(name, slice(expert * inputs, (expert + 1) * inputs))

    def expert_weights(self, name: str, only: int | None = None) -> list[Weight]:
        """The routed experts' matrices one by one, outputs as rows; or only one of them."""
        shape, side = self.shard.shape(name), self._side(name)
        assert side is not None, "only asked where the experts are in few bits"
        if len(shape) != 2 or shape[0] % self.experts:
            raise self._error(name, f"has shape {list(shape)}, which {self.experts} experts don't fill")
        inputs = shape[0] // self.experts  # halved at 4 bits
        rows = slice(None) if only is None else slice(only * inputs, (only + 1) * inputs)
        experts = slice(None) if only is None else slice(only, only + 1)
        if self._int4_scales(name) is None:
            values = self._fp8_values(name, rows).view(torch.uint8).unflatten(0, (-1, inputs)).mT.contiguous()
            scales = self._shaped(*side, (self.experts, values.shape[1]))[experts]
            return [Float8(v.view(torch.float8_e4m3fn), s[:, None]) for v, s in zip(values, scales, strict=True)]
        # two values a byte, the low nibble first, held as 8-bit floats since parameters must be floating
        codes = self.shard.tensor(name, rows).view(torch.uint8).unflatten(0, (-1, inputs)).mT.contiguous()
        values = torch.stack((codes & 15, codes >> 4), -1).flatten(2)
        signed = (values ^ 8).view(torch.int8).sub_(8)
        groups = -(-signed.shape[2] // _INT4_GROUP)
        scales = self._shaped(*side, (self.experts, groups, signed.shape[1]))[experts].mT.contiguous()
        group = min(_INT4_GROUP, signed.shape[2])
        return [Quantized(4, v, s, group) for v, s in zip(signed, scales, strict=True)]

    def _fp8_values(self, name: str, rows: slice = slice(None)) -> Tensor:
        values = self.shard.tensor(name, rows)
        if values.dtype != torch.float8_e4m3fn:
            raise self._error(name, f"is a {values.dtype}, where float8_e4m3fn belongs to its scales")
        if not values.is_meta and bool(values.view(torch.uint8).bitwise_and(0x7F).eq(0x7F).any()):
            raise self._error(name, "holds NaN values")
        return values

    def _side(self, name: str) -> tuple[Shard, str] | None:
        """The side file and key of a stored tensor's scales."""
        if (match := _DENSE.fullmatch(name)) and self._fp8 is not None:
            key = f"{match[1]}_feed_forward.{match[2]}_{self.rank}"
            return (self._fp8, key) if key in self._fp8.names else None
        return self._int4_scales(name) or self._experts_key(name, self._fp8)

    def _int4_scales(self, name: str) -> tuple[Shard, str] | None:
        return self._experts_key(name, self._int4)

    def _experts_key(self, name: str, side: Shard | None) -> tuple[Shard, str] | None:
        match = _EXPERTS.fullmatch(name)
        if match is None or side is None:
            return None
        key = f"layers.{match[1]}.feed_forward.experts.{_SCALES_KEY[match[2]]}"
        return (side, key) if key in side.names else None

    def _shaped(self, side: Shard, key: str, shape: tuple[int, ...]) -> Tensor:
        scales = side.tensor(key)
        numel = torch.Size(shape).numel()
        if scales.numel() != numel or not scales.is_floating_point():
            raise PunaError(
                f"{side.path}, entry {key} is a {scales.dtype} of shape {list(scales.shape)}, needs {list(shape)}. "
                "Fetch the file again."
            )
        check_finite(scales, f"{side.path}, entry {key}")
        return scales.float().reshape(shape).clone()

    def _error(self, name: str, problem: str) -> PunaError:
        return PunaError(f"{self.shard.path}, tensor {name} {problem}. Fetch it again, or load the bfloat16 release.")
