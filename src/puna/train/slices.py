"""Which part of each tensor that trains a process holds, where several split the matrices; how gradients get whole.

Low-rank updates follow the weight that they change: where that is split by outputs, B is split and A whole; where by
inputs, A is split and B whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from puna.checkpoint.shard import narrowed
from puna.family.sharding import Cut
from puna.model import Decoder
from puna.model.lora import LoRAExperts, LoRALinear, uniform
from puna.model.parallel import Share

# what of an update's tensor lies along which axis of its weight: {weight's axis: own axis}
_LINEAR = {"lora_A": {1: 1}, "lora_B": {0: 0}, "magnitude": {0: 0}}
_EXPERTS = {"lora_A": {0: 0, 1: 2}, "lora_B": {0: 0, 2: 1}}  # the weight is [E, inputs, outputs]


@dataclass(frozen=True)
class Slices:
    """A process's slices of parameters, by the names that they have in a decoder that trains."""

    share: Share

    def cuts(self, name: str, rank: int | None = None) -> tuple[Cut, ...]:
        """What a process (None: this one) holds of a parameter; () is all of it."""
        weight, axes = self._place(name)
        cuts = self.share.sharding.cuts(weight, self.share.rank if rank is None else rank)
        return tuple(Cut(axes[cut.axis], cut.ranges) for cut in cuts if cut.axis in axes)

    def holders(self, name: str) -> list[int]:
        """The processes that hold the very same slice, this one among them."""
        own = self.cuts(name)
        return [rank for rank in range(self.share.peers.size) if self.cuts(name, rank) == own]

    def finish(self, gradients: Mapping[str, Tensor]) -> None:
        """Complete a step's gradients in place: of what several processes hold alike, but use in slices, each found a
        part. All processes call it with the same names."""
        for name, gradient in gradients.items():
            holders = self.holders(name)
            if len(holders) > 1 and self.share.sharding.rule(self._place(name)[0]).kind != "whole":
                everyone = self.share.peers.gather(gradient)
                gradient.copy_(torch.stack([everyone[rank].float() for rank in holders]).sum(0))

    def mine(self, name: str, whole: Tensor) -> Tensor:
        """This process's slice of a whole parameter, or of what has its shape, in memory of its own."""
        return narrowed(whole, self.cuts(name)).clone()

    def draw(self, decoder: Decoder, seed: int) -> None:
        """Give the updates that `puna.model.adapt.attach` made of slices the first values that whole ones have."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for path, module in decoder.named_modules():
                if isinstance(module, LoRALinear | LoRAExperts):
                    for name, a in module.named_parameters(path, recurse=False):
                        if name.endswith("lora_A"):
                            a.copy_(self.mine(name, uniform(self.whole_shape(name, a.shape), generator)))

    def whole_shape(self, name: str, mine: Sequence[int]) -> tuple[int, ...]:
        """A parameter's whole shape, from that of this process's slice."""
        weight, axes = self._place(name)
        whole = {own: self.share.sharding.shapes[weight][axis] for axis, own in axes.items()}
        return tuple(whole.get(axis, size) for axis, size in enumerate(mine))

    def _place(self, name: str) -> tuple[str, dict[int, int]]:
        """The weight that a parameter is or changes, and which axis of it is which of the parameter's."""
        owner, _, last = name.replace(".base.", ".").rpartition(".")
        if owner.endswith(".experts") and "_lora_" in last:
            part, factor = last.split("_lora_")
            return f"{owner}.{part}_proj", _EXPERTS[f"lora_{factor}"]
        weight = f"{owner}.{last}" if last not in _LINEAR else f"{owner}.weight"
        if weight not in self.share.sharding.shapes and owner == "lm_head":
            weight = "embed_tokens.weight"  # where the two are one
        axes = {axis: axis for axis in range(len(self.share.sharding.shapes[weight]))}
        return weight, _LINEAR.get(last, axes)
