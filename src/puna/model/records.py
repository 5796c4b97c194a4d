"""How a paged cache lays out keys and values, read and written with PyTorch. native/records.c does the same, faster.

A block holds BLOCK tokens at consecutive positions. Its record for one layer and key/value head is keys
[head_dim][BLOCK], then values [BLOCK][head_dim]; int8 records end with a float32 scale a token for the keys [BLOCK] and
for the values [BLOCK]. All layers of a block lie together.

Legend: N blocks or tokens, G key/value heads, K head width, T the BLOCK tokens of a block.
"""

import numpy as np
import torch
from torch import Tensor

BLOCK = 32
SMALLEST = 1e-30  # below it a head's largest value counts as zero


def record_bytes(head_dim: int, stored: torch.dtype) -> int:
    """Bytes of one block's keys and values in one layer, for one head."""
    return 2 * BLOCK * (head_dim * stored.itemsize + (4 if stored == torch.int8 else 0))


class Records:
    """The blocks of a group of layers, in one piece of memory that the system hands out as it is first written to."""

    def __init__(
        self, layers: int, blocks: int, heads: int, head_dim: int, stored: torch.dtype, device: torch.device
    ) -> None:
        self.stored = stored
        self.head_dim = head_dim
        self.blocks = blocks
        shape = (blocks, layers, heads, record_bytes(head_dim, stored))
        # NumPy's zeros are pages that nobody has touched; PyTorch's are written at once
        self.memory = torch.from_numpy(np.zeros(shape, np.uint8)) if device.type == "cpu" else torch.zeros(
            shape, dtype=torch.uint8, device=device
        )  # fmt: skip

    def bytes(self) -> int:
        """Bytes of all blocks, touched or not."""
        return self.memory.numel()

    def _parts(self, layer: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Views of one layer: keys [N, G, K, T], values [N, G, T, K], scales [N, G, 2, T] of int8."""
        records = self.memory[:, layer]
        size = self.head_dim * BLOCK * self.stored.itemsize
        keys = records[..., :size].view(self.stored).unflatten(-1, (self.head_dim, BLOCK))
        values = records[..., size : 2 * size].view(self.stored).unflatten(-1, (BLOCK, self.head_dim))
        if self.stored != torch.int8:
            return keys, values, None
        return keys, values, records[..., 2 * size :].view(torch.float32).unflatten(-1, (2, BLOCK))

    def write(self, layer: int, blocks_N: Tensor, slots_N: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> None:
        """Put N tokens at (block, slot)."""
        keys, values, scales = self._parts(layer)
        if scales is not None:
            (k_NGK, k_scale_NG), (v_NGK, v_scale_NG) = _quantised(k_NGK), _quantised(v_NGK)
            scales[blocks_N, :, 0, slots_N] = k_scale_NG
            scales[blocks_N, :, 1, slots_N] = v_scale_NG
        keys[blocks_N, :, :, slots_N] = k_NGK.to(self.stored)
        values[blocks_N, :, slots_N] = v_NGK.to(self.stored)

    def read(self, layer: int, blocks_N: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of whole blocks, [N * BLOCK, G, K] each, in `dtype`."""
        keys, values, scales = self._parts(layer)
        k, v = keys[blocks_N].to(dtype).permute(0, 3, 1, 2), values[blocks_N].to(dtype).permute(0, 2, 1, 3)
        if scales is not None:
            k_scale, v_scale = scales[blocks_N].to(dtype).permute(2, 0, 3, 1)[..., None]
            k, v = k * k_scale, v * v_scale
        return k.flatten(0, 1), v.flatten(0, 1)


def _quantised(x_NGK: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values and float32 scales [N, G], one a token and head."""
    wide = x_NGK.float()
    top = wide.abs().amax(-1)
    inverse = torch.where(top > SMALLEST, 127 / top, 0)
    return (wide * inverse[..., None]).round().to(torch.int8), top / 127
