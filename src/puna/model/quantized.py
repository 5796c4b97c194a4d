"""Weights in few bytes: integers with a scale for every group of inputs, and 8-bit floats with a scale a row.

Legend: N outputs, K inputs, S groups of inputs.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from puna.errors import PunaError
from puna.model.native import Kernels, kernels, threads
from puna.model.words import unpack_int32

GROUP = {4: 32, 6: 128, 8: 128}  # inputs that share a scale where nobody says; Llama's own 4-bit releases use 32


@dataclass(frozen=True)
class Quantized:
    """weight[n, k] = values[n, k] * scales[n, k // group]: symmetric integers."""

    bits: int  # 4, 6 or 8
    values: Tensor  # int8 [N, K]: -8..7, -32..31 or -128..127
    scales: Tensor  # [N, S], float16, bfloat16 or float32
    group: int  # inputs that share a scale; K where there is one a row

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K] of the weight."""
        return self.values.shape[0], self.values.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K]."""
        scales = self.scales.float().repeat_interleave(self.group, 1)[:, : self.values.shape[1]]
        return (self.values * scales).to(dtype)


class Words(Quantized):
    """The same with its values in int32 words, as `pack-quantized` files store them (6 bits in 8); unpacked only when
    asked for."""

    def __init__(self, bits: int, words: Tensor, columns: int, scales: Tensor, group: int) -> None:
        self.__dict__.update(bits=bits, words=words, columns=columns, scales=scales, group=group)

    words: Tensor  # int32 [N, ceil(K * stored_bits(bits) / 32)]
    columns: int  # K

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K] of the weight."""
        return self.words.shape[0], self.columns

    @cached_property
    def values(self) -> Tensor:
        """int8 [N, K]."""
        return unpack_int32(self.words, stored_bits(self.bits), self.columns)


@dataclass(frozen=True)
class Float8:
    """weight[n, k] = values[n, k] * scales[n]: 8-bit floats (e4m3), a scale a row."""

    values: Tensor  # float8_e4m3fn [N, K]
    scales: Tensor  # float32 [N, 1]

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K] of the weight."""
        return self.values.shape[0], self.values.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K]."""
        return (self.values.float() * self.scales.float()).to(dtype)


Weight = Tensor | Quantized | Float8


def stored_bits(bits: int) -> int:
    """What files hold such integers in: other readers know 4 and 8 bits."""
    return 4 if bits == 4 else 8


def quantize(weight_NK: Tensor, bits: int, group: int | None = None) -> Quantized:
    """The nearest symmetric integers, each group's scale chosen among a few for the least squared error.

    A scale that clips the largest weight a little often serves the others better: at 4 bits that saves about a tenth
    of the error. Raises PunaError for other widths than 4, 6 and 8 bits.
    """
    if bits not in GROUP:
        raise PunaError(f"weights can be quantised to 4, 6 or 8 bits, not {bits}")
    group = min(group or GROUP[bits], weight_NK.shape[1])
    native = kernels()
    if weight_NK.is_meta or (native and group % 16 == 0 and group <= 256 and weight_NK.device.type == "cpu"):
        return _quantize_natively(weight_NK, bits, group, native)
    N, K = weight_NK.shape
    top = 2 ** (bits - 1) - 1
    scales_NS = torch.empty(N, -(-K // group), dtype=torch.float16)
    values_NK = torch.empty(N, K, dtype=torch.int8)
    rows = max(1, (1 << 20) // K)  # blocks that stay in cache
    for start in range(0, N, rows):
        block = torch.nn.functional.pad(weight_NK[start : start + rows].float(), (0, -K % group))
        grouped = block.unflatten(1, (-1, group))
        largest = grouped.abs().amax(-1, keepdim=True)
        if bits != 4:
            scale = _storable(largest / top)
        else:
            signed = torch.where(grouped.amax(-1, keepdim=True) >= largest, -largest, largest)
            candidates = [_storable(signed / 8), *(_storable(largest * c / top) for c in (1.0, 0.92, 0.85))]
            errors = torch.stack([(_rounded(grouped, s, top) * s - grouped).square().sum(-1) for s in candidates])
            scale = torch.stack(candidates).gather(0, errors.argmin(0)[None, ..., None]).squeeze(0)
        scales_NS[start : start + rows] = scale.squeeze(-1)
        values_NK[start : start + rows] = _rounded(grouped, scale, top).flatten(1)[:, :K]
    return Quantized(bits, values_NK, scales_NS, group)


def _quantize_natively(weight_NK: Tensor, bits: int, group: int, native: Kernels | None) -> Quantized:
    N, K = weight_NK.shape
    weight_NK = weight_NK.contiguous() if weight_NK.dtype == torch.bfloat16 else weight_NK.float().contiguous()
    values_NK = torch.empty(N, K, dtype=torch.int8, device=weight_NK.device)
    scales_NS = torch.empty(N, -(-K // group), dtype=torch.float16, device=weight_NK.device)
    if native is None or weight_NK.is_meta:  # nothing to compute, only to count
        return Quantized(bits, values_NK, scales_NS, group)
    native.quantize(
        weight_NK.data_ptr(), weight_NK.dtype == torch.bfloat16, N,
        K, group, bits, values_NK.data_ptr(),
        scales_NS.data_ptr(), threads(),
    )  # fmt: skip
    return Quantized(bits, values_NK, scales_NS, group)


def _storable(scale: Tensor) -> Tensor:
    """As float16 will keep it; never zero, so that nothing is divided by it."""
    halved = scale.half().float()
    return torch.where(halved == 0, torch.full_like(halved, 2.0**-24), halved)


def _rounded(grouped: Tensor, scale: Tensor, top: int) -> Tensor:
    return (grouped / scale).round_().clamp_(-top - 1, top)


def stacked(weights: Iterable[Weight]) -> Weight:
    """Weights of equal width, their rows one below the other: bits kept where all are alike, else in float32."""
    parts = list(weights)
    if len(parts) == 1:
        return parts[0]
    integers = [part for part in parts if isinstance(part, Quantized)]
    floats = [part for part in parts if isinstance(part, Float8)]
    if len(integers) == len(parts) and len({(part.group, part.scales.dtype) for part in integers}) == 1:
        scales = torch.cat([part.scales for part in integers])
        words = [part for part in integers if isinstance(part, Words) and part.bits == integers[0].bits]
        if len(words) == len(parts):
            return Words(words[0].bits, torch.cat([p.words for p in words]), words[0].columns, scales, words[0].group)
        values = torch.cat([part.values for part in integers])
        return Quantized(max(part.bits for part in integers), values, scales, integers[0].group)
    if len(floats) == len(parts):
        values = torch.cat([part.values.view(torch.uint8) for part in floats]).view(torch.float8_e4m3fn)
        return Float8(values, torch.cat([part.scales for part in floats]))
    return torch.cat([plain(part) for part in parts])


def plain(weight: Weight) -> Tensor:
    """Floats as they are, few bits as float32."""
    return weight if isinstance(weight, Tensor) else weight.dequantize()


def by_rows(weight: Weight, change: Callable[[Tensor], Tensor]) -> Weight:
    """A change that moves, keeps or drops whole rows [N, ...] -> [N', ...], scales with their values."""
    if isinstance(weight, Words):
        return Words(weight.bits, change(weight.words), weight.columns, change(weight.scales), weight.group)
    if isinstance(weight, Quantized):
        return Quantized(weight.bits, change(weight.values), change(weight.scales), weight.group)
    if isinstance(weight, Float8):
        moved = change(weight.values.view(torch.uint8))  # few operations know 8-bit floats
        return Float8(moved.view(torch.float8_e4m3fn), change(weight.scales))
    return change(weight)
