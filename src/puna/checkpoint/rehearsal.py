"""What loading will hold in memory, found by loading on the meta device: shapes and types, no bytes of weights."""

import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from puna.checkpoint.ready import packer_for
from puna.checkpoint.source import Source, _empty_decoder
from puna.model import Decoder
from puna.model.quantized import Weight


@dataclass(frozen=True)
class Routed:
    """Bytes of routed experts. bytes: of all of them, as packed. largest: of a single one. making: what reading and
    packing it holds at most, itself included. before: the most that loading holds until the first of them is read."""

    bytes: int
    largest: int
    making: int
    before: int


@dataclass(frozen=True)
class Footprint:
    """weights: bytes of the model as it will lie in memory. peak: the most that loading holds at once, these included.
    dtype: of its activations. routed: None where there are no routed experts."""

    weights: int
    peak: int
    dtype: torch.dtype
    routed: Routed | None = None


def rehearse(
    source: Source, dtype: torch.dtype | None = None, quantize: str | None = None, model: Decoder | None = None
) -> Footprint:
    """Load without loading: the same steps as `load_ready` on the CPU, each tensor only counted.

    Arguments as for `load_ready`. Raises PunaError as it does, except for what only the weights themselves can show.
    """
    model = model or _empty_decoder(source)
    before = [0, 0]

    def routed_begin() -> int:
        before[:] = counter.live, counter.peak
        return sys.maxsize

    with torch.device("meta"), _Counter(model) as counter:
        packer = packer_for(source, "meta", dtype, quantize, model, routed_begin)
        packer.fill()
        weights, peak = counter.live, counter.peak
        ones = [counter.sizes(partial(packer.one, layer, 0)) for layer in source.config.moe_layers]
    routed = None
    if ones:
        largest, making = (max(sizes) for sizes in zip(*ones, strict=True))
        routed = Routed(weights - before[0], largest, making, before[1])
    return Footprint(weights, peak, packer.dtype, routed)


def kinds(source: Source) -> Iterator[tuple[str, Weight | list[Weight]]]:
    """Every weight as `Source.read_packed` gives it, on the meta device: nothing is read."""
    model = _empty_decoder(source)
    with torch.device("meta"), _Counter(model):
        yield from [(name, source.read_packed(name)) for name in model.state_dict()]


def _pointwise(one: Any, other: Any) -> Tensor:
    shapes = [each.shape for each in (one, other) if isinstance(each, Tensor)]
    return torch.empty(np.broadcast_shapes(*shapes), dtype=torch.result_type(one, other), device="meta")


def _cat(parts: list[Tensor], dim: int = 0) -> Tensor:
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    dtype = parts[0].dtype
    for part in parts[1:]:
        dtype = torch.promote_types(dtype, part.dtype)
    return torch.empty(shape, dtype=dtype, device="meta")


def _pad(tensor: Tensor, pad: list[int], _: float = 0) -> Tensor:
    shape = list(tensor.shape)
    for at, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        shape[-1 - at] += before + after
    return torch.empty(shape, dtype=tensor.dtype, device="meta")


# What PyTorch computes on the meta device with Python code that imports its compiler, which takes seconds.
_SHORTCUTS: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.cat: _cat,
    torch.ops.aten.empty_like: lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"),
    torch.ops.aten.constant_pad_nd: _pad,
    **dict.fromkeys((torch.ops.aten.add, torch.ops.aten.sub, torch.ops.aten.mul, torch.ops.aten.bitwise_and,
                     torch.ops.aten.bitwise_or, torch.ops.aten.bitwise_xor, torch.ops.aten.bitwise_left_shift,
                     torch.ops.aten.__lshift__, torch.ops.aten.__rshift__, torch.ops.aten.__and__,
                     torch.ops.aten.__or__, torch.ops.aten.__xor__), _pointwise),
}  # fmt: skip


class _Counter(TorchDispatchMode):
    """Adds up the bytes of all tensors that operations give, for as long as somebody holds them; not of `empty`'s."""

    def __init__(self, empty: Decoder) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._held: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for parameter in empty.parameters():
            self._note(parameter.untyped_storage(), 0)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in here, and to say so PyTorch would import its compiler for seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shortcut = _SHORTCUTS.get(func.overloadpacket)
        out = shortcut(*args) if shortcut else func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, Tensor) and each.is_meta:  # not the file that Meta's tensors are views of
                self._note(storage := each.untyped_storage(), storage.nbytes())
        return out

    def sizes(self, make: Callable[[], object]) -> tuple[int, int]:
        """Bytes of what `make` gives, and the most that was held meanwhile."""
        start = self.peak = self.live
        made = make()
        size, most = self.live - start, self.peak - start
        del made
        return size, most

    def _note(self, storage: torch.UntypedStorage, size: int) -> None:
        key = id(storage)
        if key in self._held:
            return
        self.live += size
        self.peak = max(self.peak, self.live)

        def freed(_: object) -> None:
            self.live -= size
            del self._held[key]

        self._held[key] = weakref.ref(storage, freed)
