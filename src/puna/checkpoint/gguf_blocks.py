"""Weights in few bits as GGUF's blocks of 32: Q8_0 and Q4_0 keep integers and scales where both fit exactly."""

import torch
from gguf.constants import GGMLQuantizationType as Q
from torch import Tensor

from puna.model.quantized import Float8, Quantized, Weight

BLOCK = 32  # values of a row that share a float16 scale
_BITS = {Q.Q8_0: 8, Q.Q4_0: 4}


def own_type(weight: Weight | list[Weight]) -> Q | None:
    """The type that keeps a weight as it is, or nearest to it; None for plain floats, whose dtype says it."""
    first = weight[0] if isinstance(weight, list) else weight
    if isinstance(first, Quantized):
        return Q.Q4_0 if first.bits == 4 else Q.Q8_0
    return Q.BF16 if isinstance(first, Float8) else None


def encoded(weight: Weight, type: Q) -> Tensor | None:
    """Blocks [N, K/32, bytes] of just these integers and scales, or None where `type` can't hold them."""
    if not isinstance(weight, Quantized) or _BITS.get(type, 0) < weight.bits:
        return None
    columns = weight.shape[1]
    halves = weight.scales.to(torch.float16)
    if columns % BLOCK or not torch.equal(halves.to(weight.scales.dtype), weight.scales):
        return None
    if weight.group < columns and weight.group % BLOCK:
        return None
    spread = halves.repeat_interleave(min(weight.group, columns) // BLOCK, 1)[:, : columns // BLOCK]
    blocks = weight.values.unflatten(1, (-1, BLOCK))
    if type == Q.Q4_0:
        codes = (blocks + 8).view(torch.uint8)
        data = codes[..., : BLOCK // 2] | (codes[..., BLOCK // 2 :] << 4)  # low nibbles are the first half
    else:
        data = blocks.view(torch.uint8)
    return torch.cat((spread.contiguous().view(torch.uint8).unflatten(1, (-1, 2)), data), -1)
