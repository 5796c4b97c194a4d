"""What checkpoints do to weights in few bits: join them, reorder their rows, and say in int8 what no class can keep."""

from collections.abc import Iterable

import torch
from torch import Tensor

from puna.model.packing import HEAD_BITS, requantized
from puna.model.quantized import Quantized, Weight, plain, quantize

FINEST = 16  # inputs that share a scale in our kernels (`puna.model.packed`), at least
FALLBACK_GROUP = 32  # inputs that share a scale where stored bits can't be kept


def fallback(weight: Tensor) -> Quantized:
    """Stored bits that neither `Quantized` nor `Float8` can say, from their exact values: int8 in small groups."""
    return quantize(weight, 8, FALLBACK_GROUP)


def quantised(name: str, weight: Weight | list[Weight], bits: int, tied: bool) -> Weight | list[Weight]:
    """A decoder's weight in few bits: `bits` for what is multiplied in each layer, HEAD_BITS of them for the output.

    Norms, routers, towers and an embedding that is not `tied` to the output stay as they are, and so do integers that
    have these bits already; integers of 4 bits become 8 bits wide without a change of value. Routed experts [E, K, N]
    give one matrix [N, K] an expert.
    """
    if name.startswith("vision."):
        return weight
    if isinstance(weight, list):
        return [requantized(one, bits) for one in weight]
    if isinstance(weight, Tensor) and weight.ndim == 1:
        return weight
    if name.endswith("router.weight") or (name == "embed_tokens.weight" and not tied):
        return weight
    if isinstance(weight, Tensor) and weight.ndim == 3:
        return [requantized(one.T, bits) for one in weight]
    return requantized(weight, HEAD_BITS[bits] if name in ("embed_tokens.weight", "lm_head.weight") else bits)


def beside(weights: Iterable[Weight]) -> Weight:
    """Weights of equal height, their columns side by side: integers in whole groups keep their bits, else float32."""
    parts = list(weights)
    if len(parts) == 1:
        return parts[0]
    integers = [part for part in parts if isinstance(part, Quantized)]
    whole = all(part.shape[1] % part.group == 0 for part in integers)
    if len(integers) == len(parts) and whole and len({(p.group, p.scales.dtype) for p in integers}) == 1:
        values, scales = torch.cat([p.values for p in integers], 1), torch.cat([p.scales for p in integers], 1)
        return Quantized(max(part.bits for part in integers), values, scales, integers[0].group)
    return torch.cat([plain(part) for part in parts], 1)
