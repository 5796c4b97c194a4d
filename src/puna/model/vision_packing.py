"""Filling a decoder's tower for use; `puna.model.packing.Packer` calls it.

Where the text is brought to few bits, a tower's layers, adapter and projector get 8 bits, be the text's 4 or 8: a tower
is a small part of every model (0.9 of 109 and 0.9 of 10.6 billion parameters), and its errors reach every later token.
The patch embedding, which all else follows from and which is half a percent of the work, keeps its floats.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from puna.model.packed import PackedLinear, packable
from puna.model.quantized import Weight, plain
from puna.model.unpacked import BlockwiseLinear
from puna.model.vision_tower import PackedAffine

Read = Callable[[str, int | None], Weight]

TOWER_BITS = 8
IN_FLOATS = "patch_embedding."


def fill_tower(tower: nn.Module, read: Read, dtype: torch.dtype, bits: int | None = None) -> None:
    """Every parameter; the matrices of affine layers packed where our kernels take them.

    read: a weight by its canonical name, on its device, floats in `dtype`, and brought to so many bits unless None.
    bits: TOWER_BITS, or None to keep what is stored.
    """

    def constant(name: str) -> nn.Parameter:
        weight = read(f"vision.{name}", None)
        return nn.Parameter(plain(weight).to(dtype).contiguous(), requires_grad=False)

    modules = dict(tower.named_modules())
    for name in [name for name, _ in tower.named_parameters()]:
        at, _, part = name.rpartition(".")
        module = modules[at]
        if not isinstance(module, nn.Linear):
            setattr(module, part, constant(name))
        elif part == "weight":
            linear = _linear(read(f"vision.{name}", None if at.startswith(IN_FLOATS) else bits), dtype)
            bias = None if module.bias is None else constant(f"{at}.bias")
            if isinstance(linear, nn.Parameter):
                module.weight, module.bias = linear, bias
            else:
                owner, _, own = at.rpartition(".")
                setattr(modules[owner], own, PackedAffine(linear, bias))


def _linear(weight: Weight, dtype: torch.dtype) -> PackedLinear | BlockwiseLinear | nn.Parameter:
    if packable(weight, dtype):
        return PackedLinear(weight)
    if isinstance(weight, Tensor):
        return nn.Parameter(weight.contiguous(), requires_grad=False)
    return BlockwiseLinear(weight)


def tower_modules(tower: nn.Module) -> Iterator[tuple[str, nn.Module | Tensor]]:
    """What holds each weight of a tower, under the weight's canonical name: a linear layer or the tensor itself."""
    for at, module in tower.named_modules():
        prefix = f"vision.{at}." if at else "vision."
        if isinstance(module, PackedAffine):
            yield f"{prefix}weight", module.linear
        for name, parameter in module.named_parameters(recurse=False):
            yield f"{prefix}{name}", parameter.detach()
