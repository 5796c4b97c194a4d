"""Rotary positions, with both of the family's scalings and both storage orders of the pairs."""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from puna.family.config import AttentionTemperature, ModelConfig, RopeScaling
from puna.model.differentiable import Rotate, turn
from puna.model.native import Kernels
from puna.model.native_attention import kernels_for, run_angles, run_turn
from puna.model.norm import at_least_float32, rms_normalise


def scale_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's frequency scaling [K/2] -> [K/2] (llama-models `apply_scaling`).

    With low_freq_factor == high_freq_factor (Scout) the blended band is empty, so nothing is divided by zero.
    """
    wavelengths = 2 * math.pi / frequencies
    longest_kept = scaling.original_context / scaling.high_freq_factor
    shortest_divided = scaling.original_context / scaling.low_freq_factor
    divided = torch.where(wavelengths > shortest_divided, frequencies / scaling.factor, frequencies)
    if scaling.high_freq_factor == scaling.low_freq_factor:
        return divided
    blend = (scaling.original_context / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    between = (wavelengths >= longest_kept) & (wavelengths <= shortest_divided)
    return torch.where(between, blended, divided)


def inverse_frequencies(
    config: ModelConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """The rotation per position of each pair, radians [K/2], scaled where the config says so.

    float32 is the reference's: models were trained with its rounding of far positions.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device=device).to(dtype) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    return scale_frequencies(frequencies, config.rope_scaling) if config.rope_scaling else frequencies


def rotation(positions_S: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles [S, K/2], in the frequencies' dtype."""
    kernels = _kernels(frequencies, 2 * len(frequencies))
    if kernels and frequencies.dtype == torch.float32:
        return run_angles(kernels, positions_S, frequencies)
    angles = positions_S.to(frequencies.dtype)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate_adjacent(x_BSHK: Tensor, cos_SK: Tensor, sin_SK: Tensor) -> Tensor:
    """Rotate pairs (2j, 2j+1), float32 at least inside: Llama 4 and Meta's own files."""
    even, odd = at_least_float32(x_BSHK).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_SK[:, None], sin_SK[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x_BSHK.dtype)


def rotate_halves(x_BSHK: Tensor, cos_SK: Tensor, sin_SK: Tensor) -> Tensor:
    """Rotate pairs (j, j + K/2), float32 at least inside: Llama 2 and 3 as stored on the Hugging Face hub."""
    first, second = at_least_float32(x_BSHK).chunk(2, -1)
    cos, sin = cos_SK[:, None], sin_SK[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x_BSHK.dtype)


def _kernels(x: Tensor, head_dim: int) -> Kernels | None:
    """Our kernels, where nothing is differentiated, traced or elsewhere than on the CPU."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    return kernels_for(x.device, x.dtype, head_dim)


def _query_scale(positions_S: Tensor, temperature: AttentionTemperature) -> Tensor:
    """Llama 4's scale of a NoPE layer's queries [S], float64."""
    steps_S = (positions_S + 1) // temperature.floor
    if positions_S.device.type != "cpu" or torch.compiler.is_compiling():
        return 1 + temperature.scale * torch.log1p(steps_S.double())
    # one by one: the last bit of a vector's logarithm would depend on where in the vector it stands
    return torch.tensor([1 + temperature.scale * math.log1p(step) for step in steps_S.tolist()], dtype=torch.float64)


def _rotated(rotate: Rotate, x_BSHK: Tensor, cos_SK: Tensor, sin_SK: Tensor) -> Tensor:
    """A new tensor, by our kernels where they can serve."""
    kernels = kernels_for(x_BSHK.device, x_BSHK.dtype, x_BSHK.shape[-1])
    if kernels is None or torch.compiler.is_compiling() or cos_SK.dtype != torch.float32:
        return rotate(x_BSHK, cos_SK, sin_SK)
    x_BSHK = x_BSHK.clone(memory_format=torch.contiguous_format)
    adjacent = rotate is rotate_adjacent
    return run_turn(kernels, x_BSHK, x_BSHK[:, :, :0], (cos_SK, sin_SK), None, adjacent, None)[0]


@dataclass(frozen=True)
class Positions:
    """What depends on the tokens' positions, computed once a pass: rotations, and the queries' scale on NoPE layers."""

    turns: tuple[Tensor, Tensor]  # cosine and sine [S, K/2]
    scale_S: Tensor | None

    @staticmethod
    def of(positions_S: Tensor, frequencies: Tensor, temperature: AttentionTemperature | None) -> "Positions":
        """Of these positions, with `inverse_frequencies` of the config."""
        scale_S = None if temperature is None else _query_scale(positions_S, temperature).to(frequencies.dtype)
        return Positions(rotation(positions_S, frequencies), scale_S)


@dataclass(frozen=True)
class Rotary:
    """What one layer does with positions: rotate queries and keys (then normalise them, in Scout), or scale queries."""

    rotates: bool
    adjacent: bool  # the pairs' order
    norm_eps: float | None
    scales: bool

    @staticmethod
    def of(config: ModelConfig, layer: int) -> "Rotary":
        """Of a layer of this config."""
        rotates = config.uses_rope(layer)
        return Rotary(
            rotates,
            config.rope_pairs == "adjacent",
            config.rms_norm_eps if config.qk_norm and rotates else None,
            config.attention_temperature is not None and not rotates,
        )

    def __call__(self, q_BSHK: Tensor, k_BSGK: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """The queries and keys that attention takes; the arguments may be written over."""
        if not (self.rotates or self.scales):
            return q_BSHK, k_BSGK
        scale_S = positions.scale_S if self.scales else None
        kernels = _kernels(q_BSHK, q_BSHK.shape[-1])
        if kernels:
            turns = positions.turns if self.rotates else None
            return run_turn(kernels, q_BSHK, k_BSGK, turns, scale_S, self.adjacent, self.norm_eps)
        if scale_S is not None:
            return (q_BSHK * scale_S[:, None, None]).to(q_BSHK.dtype), k_BSGK
        rotate = rotate_adjacent if self.adjacent else rotate_halves
        if torch.is_grad_enabled():
            q_BSHK, k_BSGK = (turn(x, *positions.turns, partial(_rotated, rotate)) for x in (q_BSHK, k_BSGK))
        else:
            q_BSHK, k_BSGK = (rotate(x, *positions.turns) for x in (q_BSHK, k_BSGK))
        if self.norm_eps is None:
            return q_BSHK, k_BSGK
        return rms_normalise(q_BSHK, self.norm_eps), rms_normalise(k_BSGK, self.norm_eps)
