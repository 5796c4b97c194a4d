"""Rotary positions, with both of the family's scalings and both storage orders of the pairs."""

import math

import torch
from torch import Tensor

from puna.family.config import ModelConfig, RopeScaling
from puna.model.norm import at_least_float32


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
