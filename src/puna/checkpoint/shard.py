"""One rank's share of a checkpoint, as a checkpoint of its own: of every tensor only the rank's slices are given."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from puna.checkpoint.fewbits import FINEST, fallback
from puna.checkpoint.huggingface import HuggingFaceSource
from puna.checkpoint.source import GenerationDefaults, Source
from puna.checkpoint.validate import check_shapes
from puna.family.config import ModelConfig
from puna.family.sharding import Cut, Range, Sharding
from puna.model.quantized import Float8, Quantized, Weight, by_rows, plain
from puna.text.tokenizer import Tokenizer

_BLOCK = 1 << 24  # elements read at a time where only some columns of a tensor are kept


class ShardSource:
    """A rank's share of an opened checkpoint (see `Source`), for `puna.model.parallel.local_decoder` to be filled with.

    Floats in safetensors are read in slices, never more than a block above the share; anything else is read whole
    before it is cut, so memory peaks one tensor above the share. `config` is the whole model's.
    Raises PunaError where the checkpoint lacks a tensor, or has one too many or of another shape.
    """

    def __init__(self, source: Source, sharding: Sharding, rank: int) -> None:
        check_shapes(source, sharding.shapes)
        self._source, self._sharding, self._rank = source, sharding, rank
        self.path: Path = source.path
        self.format: str = source.format
        self.config: ModelConfig = sharding.config
        self.generation: GenerationDefaults = source.generation

    @property
    def notes(self) -> tuple[str, ...]:
        """See `Source.notes`."""
        return self._source.notes

    @property
    def packed_notes(self) -> tuple[str, ...]:
        """See `Source.packed_notes`."""
        return self._source.packed_notes

    def tokenizer(self) -> Tokenizer | None:
        """See `Source.tokenizer`."""
        return self._source.tokenizer()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the share."""
        return {name: self._sharding.shape(name, self._rank) for name in self._sharding.shapes}

    def where(self, name: str) -> str:
        """See `Source.where`."""
        return self._source.where(name)

    def read(self, name: str) -> Tensor:
        """The rank's part of a tensor."""
        cuts = self._sharding.cuts(name, self._rank)
        if cuts and self._plain(name):
            return self._slices(name, cuts)
        return narrowed(self._source.read(name), cuts).clone() if cuts else self._source.read(name)

    def read_packed(self, name: str) -> Weight | list[Weight]:
        """The rank's part of a tensor, in the bits that it is stored in."""
        cuts = self._sharding.cuts(name, self._rank)
        if cuts and self._plain(name):
            return self._slices(name, cuts)
        weight = self._source.read_packed(name)
        if isinstance(weight, list):
            return _narrowed_experts(weight, cuts)
        for cut in cuts:
            weight = _narrowed_weight(weight, cut)
        return weight.clone() if isinstance(weight, Tensor) and cuts else weight

    def read_expert(self, name: str, expert: int, packed: bool) -> Weight:
        """See `Source.read_expert`: the rank's part of its own expert of that number."""
        cuts = self._sharding.cuts(name, self._rank)
        mine = next((cut.ranges for cut in cuts if cut.axis == 0), ((0, self.config.num_experts),))
        whole = [each for start, stop in mine for each in range(start, stop)][expert]
        others = tuple(cut for cut in cuts if cut.axis)
        return _narrowed_experts([self._source.read_expert(name, whole, packed)], others)[0]

    def _plain(self, name: str) -> bool:
        return isinstance(self._source, HuggingFaceSource) and self._source.is_plain(name)

    def _slices(self, name: str, cuts: tuple[Cut, ...]) -> Tensor:
        assert isinstance(self._source, HuggingFaceSource), "only these read rows"
        return _read_slices(self._source.read_rows, name, self._sharding.shapes[name], cuts)


def _read_slices(
    read_rows: Callable[[str, int, int], Tensor], name: str, shape: tuple[int, ...], cuts: tuple[Cut, ...]
) -> Tensor:
    rows = next((cut.ranges for cut in cuts if cut.axis == 0), ((0, shape[0]),))
    others = tuple(cut for cut in cuts if cut.axis)
    if not others and len(rows) == 1:
        return read_rows(name, *rows[0])
    step = max(1, _BLOCK // math.prod(shape[1:]))
    out, at = torch.empty(0), 0
    for first, last in rows:
        for start in range(first, last, step):
            block = narrowed(read_rows(name, start, min(last, start + step)), others)
            if not at:
                out = block.new_empty(sum(stop - start for start, stop in rows), *block.shape[1:])
            out[at : at + len(block)] = block
            at += len(block)
    return out


def narrowed(tensor: Tensor, cuts: tuple[Cut, ...]) -> Tensor:
    """The part of a whole tensor that the cuts describe, often a view of it."""
    for cut in cuts:
        parts = [tensor.narrow(cut.axis, start, stop - start) for start, stop in cut.ranges]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts, cut.axis)
    return tensor


def _narrowed_experts(experts: list[Weight], cuts: tuple[Cut, ...]) -> list[Weight]:
    """As `narrowed` for [E, inputs, outputs], of experts that come as one [outputs, inputs] matrix each."""
    for cut in cuts:
        if cut.axis == 0:
            experts = [expert for start, stop in cut.ranges for expert in experts[start:stop]]
        else:
            experts = [_narrowed_weight(expert, Cut(2 - cut.axis, cut.ranges)) for expert in experts]
    return experts


def _narrowed_weight(weight: Weight, cut: Cut) -> Weight:
    if isinstance(weight, Tensor):
        return narrowed(weight, (cut,))
    if cut.axis == 0:
        return by_rows(weight, lambda rows: narrowed(rows, (cut,)).clone())
    ((start, stop),) = cut.ranges
    if isinstance(weight, Float8):
        return Float8(weight.values[:, start:stop].clone(), weight.scales)
    return _columns(weight, (start, stop))


def _columns(weight: Quantized, columns: Range) -> Quantized:
    """Some inputs of integers: their own bits, with finer groups where a cut goes through one."""
    start, stop = columns
    values = weight.values[:, start:stop].clone()
    if weight.group >= weight.shape[1]:
        return Quantized(weight.bits, values, weight.scales, stop - start)
    group = math.gcd(weight.group, start)
    if group < FINEST:
        return fallback(plain(weight)[:, start:stop])
    scales = weight.scales.repeat_interleave(weight.group // group, 1)
    return Quantized(weight.bits, values, scales[:, start // group : -(-stop // group)].clone(), group)
