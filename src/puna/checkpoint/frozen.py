"""Loading a base whose layers stay in few bits while updates beside them train."""

import torch
from torch import nn

from puna.checkpoint.source import Loaded, Source, _empty_decoder
from puna.checkpoint.validate import check_finite, check_shapes
from puna.model import Decoder
from puna.model.frozen import FrozenLinear
from puna.model.linear import Linear
from puna.model.lora import PairedExperts
from puna.model.packing import requantized
from puna.model.quantized import Quantized, Weight, plain


def load_frozen(
    source: Source, device: str | torch.device, dtype: torch.dtype, bits: int, model: Decoder | None = None
) -> Loaded:
    """As `load_source`, with attention, feed-forward and experts in 4 or 8 bits; a file that has as few keeps its own.
    Embedding, output layer, routers and norms are floats of `dtype`. Memory peaks a tensor above the result.

    Raises PunaError as `load` does.
    """
    model = model or _empty_decoder(source)
    check_shapes(source, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    for name in list(model.state_dict()):
        owner_name, _, last = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if name.startswith("layers.") and name.endswith("_proj.weight") and isinstance(owner, Linear):
            few = requantized(_checked(source, name), bits)
            _replace(model, owner_name, FrozenLinear(few).to(device))
        elif ".experts." in name:
            if last == "gate_up_proj":
                count = len(owner.get_parameter(last))
                _replace(model, owner_name, _experts(source, owner_name, count, bits).to(device))
        else:
            weight = plain(_checked(source, name)).to(device, dtype)
            setattr(owner, last, nn.Parameter(weight, requires_grad=False))
    return Loaded(model.eval(), source.config, source.tokenizer(), source.generation, source.format, source.path,
                  source.notes)  # fmt: skip


def _experts(source: Source, name: str, count: int, bits: int) -> PairedExperts:
    """Each expert's two matrices, read and quantised one by one."""
    parts = []
    for part in ("gate_up_proj", "down_proj"):
        ones: list[nn.Module] = []
        for expert in range(count):
            weight = source.read_expert(f"{name}.{part}", expert, packed=True)
            _check(weight, source.where(f"{name}.{part}"))
            ones.append(FrozenLinear(requantized(weight, bits)))
        parts.append(ones)
    return PairedExperts(*parts)


def _checked(source: Source, name: str) -> Weight:
    weight = source.read_packed(name)
    assert not isinstance(weight, list)
    _check(weight, source.where(name))
    return weight


def _check(weight: Weight, where: str) -> None:
    check_finite(weight.scales if isinstance(weight, Quantized) else plain(weight), where)


def _replace(model: Decoder, path: str, layer: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, layer)
