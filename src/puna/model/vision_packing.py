"""Filling a decoder's tower and cross-attention layers for use; `puna.model.packing.Packer` calls it.

The tower keeps its floats, whatever bits the text is brought to: it is a small part of every model (0.9 of 109 and 0.9
of 10.6 billion parameters), and its errors would reach every later token. Cross-attention layers are part of the text.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from puna.model.packed import packable
from puna.model.quantized import Weight, plain
from puna.model.vision_tower import PackedAffine

Read = Callable[[str], Weight]


def fill_tower(tower: nn.Module, read: Read, dtype: torch.dtype, device: torch.device) -> None:
    """Every parameter in `dtype`; the matrices of affine layers packed where our kernels take them."""

    def constant(name: str) -> nn.Parameter:
        return nn.Parameter(plain(read(f"vision.{name}")).to(device, dtype).contiguous(), requires_grad=False)

    modules = dict(tower.named_modules())
    for name in [name for name, _ in tower.named_parameters()]:
        at, _, part = name.rpartition(".")
        module = modules[at]
        if isinstance(module, nn.Linear) and part == "bias":
            continue  # comes with the weight
        setattr(module, part, constant(name))
        if isinstance(module, nn.Linear):
            module.bias = None if module.bias is None else constant(f"{at}.bias")
            if packable(module.weight):
                owner, _, own = at.rpartition(".")
                setattr(modules[owner], own, PackedAffine(module.weight, module.bias))


def tower_weights(tower: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a tower under its canonical name, however it is held."""
    for at, module in tower.named_modules():
        prefix = f"vision.{at}." if at else "vision."
        if isinstance(module, PackedAffine):
            yield f"{prefix}weight", plain(module.linear.packed.unpack())
        for name, parameter in module.named_parameters(recurse=False):
            yield f"{prefix}{name}", parameter.detach()
