"""Llama 3.1's rotary scaling as GGUF stores it: one divisor for each frequency (`rope_freqs.weight`), and back."""

import math

import numpy as np
import numpy.typing as npt
import torch

from puna.family.config import RopeScaling
from puna.model.rope import scale_frequencies

Divisors = npt.NDArray[np.float64]

TENSOR = "rope_freqs.weight"
_ORIGINAL_CONTEXT = 8192  # of every published Llama 3.1, 3.2, 3.3 and 4 checkpoint (their config.json)
_BANDS = ((1.0, 4.0), (1.0, 1.0))  # low and high factors of Llama 3.x and of Scout
_TOLERANCE = 1e-5  # relative; converters compute in float32


def frequencies(theta: float, head_dim: int) -> Divisors:
    """Unscaled rotation per position of each pair, radians, [K/2]."""
    return theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


def divisors(scaling: RopeScaling, theta: float, head_dim: int) -> npt.NDArray[np.float32]:
    """What each frequency is divided by, float32 [K/2]."""
    base = torch.from_numpy(frequencies(theta, head_dim))
    return (base / scale_frequencies(base, scaling)).float().numpy()


def infer_scaling(stored: npt.NDArray[np.float32], theta: float, head_dim: int) -> RopeScaling | None:
    """The scaling that gives these divisors; None for all ones.

    Divisors fix factor, low * context and high * context only, so the context is taken to be 8192 (which changes no
    frequency). Tries the published bands, then fits a band to the blended frequencies.

    Raises:
        ValueError: no Llama 3.1 scaling gives them.
    """
    if not np.isfinite(stored).all() or (stored < 1 - _TOLERANCE).any():
        raise ValueError("they are not all finite and at least 1")
    if np.allclose(stored, 1, rtol=_TOLERANCE):
        return None
    factor = float(str(stored.max()))
    for low, high in (*_BANDS, *_fitted_band(stored, theta, head_dim)):
        scaling = RopeScaling(factor, low, high, _ORIGINAL_CONTEXT)
        if np.allclose(divisors(scaling, theta, head_dim), stored, rtol=_TOLERANCE, atol=0):
            return scaling
    raise ValueError("no Llama 3.1 scaling (factor, low and high frequency factor) gives them")


def _fitted_band(stored: npt.NDArray[np.float32], theta: float, head_dim: int) -> list[tuple[float, float]]:
    """(low, high) from the blended frequencies, or from the step where none is blended; [] where neither fits.

    A blended divisor d of wavelength w obeys 1/d = (1 - s)/factor + s with s = (context/w - low)/(high - low).
    """
    factor = float(stored.max())
    turns = _ORIGINAL_CONTEXT * frequencies(theta, head_dim) / (2 * math.pi)  # context / wavelength
    blended = (stored > 1 + _TOLERANCE) & (stored < factor * (1 - _TOLERANCE))
    if not blended.any():
        divided = np.isclose(stored, factor, rtol=_TOLERANCE)
        if divided.all():
            return []
        step = float(np.sqrt(turns[divided].max() * turns[~divided].min()))
        return [(step, step)]
    if blended.sum() < 2:
        return []
    share = (1 / stored[blended].astype(np.float64) - 1 / factor) / (1 - 1 / factor)
    slope, intercept = np.polyfit(turns[blended], share, 1)
    if slope <= 0:
        return []
    low, high = -intercept / slope, (1 - intercept) / slope
    return [(float(f"{low:.4g}"), float(f"{high:.4g}")), (float(low), float(high))]
