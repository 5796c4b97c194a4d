"""Integers of 4 and 8 bits in int32 words, as compressed-tensors' `pack-quantized` stores them.

Value i of a row takes bits i*b.. of the row, lowest first, as `value + 2**(b-1)`; a row ends with whole words
(compressed-tensors 0.20 `compressors/pack_quantized/helpers.py`). One byte is never shared by three values, so both
widths are rearrangements of bytes.
"""

import torch
from torch import Tensor

BITS = (4, 8)
_CHUNK = 1 << 19  # values unpacked at a time, so that intermediate results stay in the processor's cache


def unpack_int32(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Words [N, W] int32 -> values [N, columns] int8, -8..7 or -128..127."""
    rows = packed.shape[0]
    octets = packed.contiguous().view(torch.uint8).view(rows, -1)
    if bits == 8:
        return (octets ^ 0x80).view(torch.int8)[:, :columns].contiguous()
    values = torch.empty(rows, 2 * octets.shape[1], dtype=torch.int8, device=packed.device)
    if packed.is_meta:
        return values[:, :columns]
    step = max(1, _CHUNK // max(1, values.shape[1]))
    for source, target in zip(octets.split(step), values.split(step), strict=True):
        wide = source.to(torch.int16)
        torch.bitwise_left_shift(wide, 4, out=target.view(torch.int16))
        target.view(torch.int16).bitwise_or_(wide).bitwise_and_(0x0F0F)  # the nibbles, each in a byte
        target.sub_(8)
    return values if values.shape[1] == columns else values[:, :columns].contiguous()


def pack_int32(values: Tensor, bits: int) -> Tensor:
    """The inverse of `unpack_int32`: values [N, K] int8 -> words [N, ceil(K * bits / 32)] int32."""
    rows, columns = values.shape
    words = -(-columns * bits // 32)
    octets = torch.zeros(rows, words * 32 // bits, dtype=torch.uint8)  # what fills the last word is zero
    octets[:, :columns] = values.view(torch.uint8) + (1 << (bits - 1))  # wraps round as it should
    if bits == 4:
        octets = octets[:, ::2] | (octets[:, 1::2] << 4)
    return octets.contiguous().view(torch.int32)
