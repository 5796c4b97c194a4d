"""Documents of one pass, end to end without padding, of which none sees another.

To the decoder this is a cache (`puna.model.cache.ModelCache`) for one row: it restarts the positions at each document
and attends within it, so chunked layers chunk from the document's start. Documents of about equal length attend
together, filled up at their end, where causal attention never looks.
Legend: N tokens of a pass, R documents of a group, L their filled length, H heads, K head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from puna.family.config import ModelConfig
from puna.model.causal import attend
from puna.model.native_causal import Segments, attend_segments, causal_kernels

_STEP = 16  # lengths are filled up to multiples of this: few groups, little filling


class _Gather(torch.autograd.Function):
    """x[index] where every row of x is taken at most once but for filling: the gradient is a gather too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor) -> Tensor:
        ctx.back = back
        return x[index]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return torch.cat((grads[0], grads[0].new_zeros(1, *grads[0].shape[1:])))[ctx.back], None, None


@dataclass(frozen=True)
class _Group:
    """Documents that attend together: which tokens they are, in a table of `rows` equally long ones."""

    rows: int
    take: Tensor  # [R * L] tokens of the pass, filling included
    back: Tensor  # [N] where the token stands in the table, or one past its end


class _Layer:
    def __init__(self, documents: "Separate", chunk: int | None) -> None:
        self.documents, self.chunk = documents, chunk

    def attend(self, q_1NHK: Tensor, k_1NGK: Tensor, v_1NGK: Tensor) -> Tensor:
        """Causal attention within each document."""
        lengths = self.documents.lengths
        if native := causal_kernels(q_1NHK):
            segments = self.documents.segments(self.chunk)
            return attend_segments(native, q_1NHK[0], k_1NGK[0], v_1NGK[0], segments)[None]
        if len(set(lengths)) == 1:
            q, k, v = (x[0].unflatten(0, (len(lengths), -1)) for x in (q_1NHK, k_1NGK, v_1NGK))
            return attend(q, k, v, 0, 0, self.chunk).flatten(0, 1)[None]
        outputs = []
        for group in self.documents.groups(q_1NHK.device):
            q, k, v = (
                _Gather.apply(x[0], group.take, group.back).unflatten(0, (group.rows, -1))
                for x in (q_1NHK, k_1NGK, v_1NGK)
            )
            outputs.append(attend(q, k, v, 0, 0, self.chunk).flatten(0, 1))
        return _Gather.apply(torch.cat(outputs), *self.documents.order(q_1NHK.device))[None]


class Separate:
    """A pass of documents with these lengths (predictions of each)."""

    def __init__(self, config: ModelConfig, lengths: Sequence[int]) -> None:
        self.lengths = tuple(lengths)
        self.layers = [_Layer(self, config.chunk(i)) for i in range(config.num_layers)]
        self._segments: dict[int | None, Segments] = {}
        self._groups: list[_Group] = []
        self._order: tuple[Tensor, Tensor] | None = None

    def positions(self, length: int, device: torch.device) -> Tensor:
        """Each document's from 0 [N]."""
        assert length == sum(self.lengths), "a pass goes through the model once, whole"
        return torch.cat([torch.arange(each, device=device) for each in self.lengths])

    def segments(self, chunk: int | None) -> Segments:
        """The documents, or their chunks; made once a pass."""
        if chunk not in self._segments:
            self._segments[chunk] = Segments.of(self.lengths, chunk)
        return self._segments[chunk]

    def groups(self, device: torch.device) -> list[_Group]:
        """The documents by filled length; made once a pass."""
        if not self._groups:
            starts = torch.tensor((0, *self.lengths)).cumsum(0).tolist()
            total = starts[-1]
            by_length = sorted(range(len(self.lengths)), key=lambda i: (-(-self.lengths[i] // _STEP), i))
            for size, members in groupby(by_length, key=lambda i: -(-self.lengths[i] // _STEP) * _STEP):
                documents = list(members)
                if not size:
                    continue
                begin = torch.tensor([starts[i] for i in documents])[:, None]
                last = torch.tensor([max(0, self.lengths[i] - 1) for i in documents])[:, None]
                place = torch.arange(size)[None]
                take = (begin + place.minimum(last)).flatten()
                real = (place <= last).flatten()
                back = torch.full((total,), len(take))
                back[take[real]] = torch.arange(len(take))[real]
                self._groups.append(_Group(len(documents), take.to(device), back.to(device)))
        return self._groups

    def order(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where each token stands in the groups' outputs laid end to end, and of each output which token it is."""
        if self._order is None:
            groups = self.groups(device)
            total = sum(self.lengths)
            index = torch.empty(total, dtype=torch.long, device=device)
            back, start = [], 0
            for group in groups:
                real = group.back < len(group.take)
                index[real] = group.back[real] + start
                filled = torch.full_like(group.take, total)  # filling gets the gradient zero
                filled[group.back[real]] = torch.arange(total, device=device)[real]
                back.append(filled)
                start += len(group.take)
            self._order = index, torch.cat(back)
        return self._order
