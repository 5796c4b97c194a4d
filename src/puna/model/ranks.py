"""What processes that work together do to tensors: gather and add them, with gradients.

Legend: N tokens, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """Processes that work together: this one's number among them, and how they reach each other."""

    rank: int
    size: int
    group: Any = None  # a torch.distributed group; None: all processes

    def gather(self, x: Tensor) -> list[Tensor]:
        """Everyone's `x` (alike in shape and dtype), in order of rank. Has no gradient."""
        everyone = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(everyone, x.detach().contiguous(), group=self.group)
        return everyone

    def collect(self, x: Tensor, owner: int) -> list[Tensor]:
        """Everyone's `x` (alike in shape and dtype), in order of rank, for one of all processes; [] for the others."""
        everyone = [torch.empty_like(x) for _ in range(self.size if self.rank == owner else 0)]
        dist.gather(x.contiguous(), everyone or None, dst=owner)
        return everyone

    def hand_out(self, parts: list[Tensor], room: Tensor, owner: int) -> Tensor:
        """What one of all processes has for each, in order of rank, written into `room` (alike on all)."""
        dist.scatter(room, parts if self.rank == owner else None, src=owner)
        return room

    def sum(self, x: Tensor) -> Tensor:
        """The sum of everyone's `x`, added in order of rank in float32 at least, then x's dtype.

        A ring's all-reduce adds each part of the buffer in an order of its own, so with three ranks or more a row's
        bits would depend on the rows beside it. Gathering keeps one order, and costs the same bytes for two ranks.
        Its gradient is the sum's own: what everyone computes from the sum is the same, so nothing is added up.
        """
        if self.size == 1:
            return x
        total: Tensor = _Sum.apply(x, self) if x.requires_grad and torch.is_grad_enabled() else self._added(x)
        return total

    def share(self, x: Tensor) -> Tensor:
        """`x`, which everyone has alike, where each goes on with slices of its own: the gradients are added."""
        if self.size == 1:
            return x
        shared: Tensor = _Share.apply(x, self)
        return shared

    def largest(self, x: Tensor) -> Tensor:
        """The largest of everyone's, element by element. Has no gradient."""
        return x if self.size == 1 else torch.stack(self.gather(x)).amax(0)

    def _added(self, x: Tensor) -> Tensor:
        first, *others = self.gather(x)
        total = first.to(torch.promote_types(x.dtype, torch.float32))
        for other in others:
            total = total + other
        return total.to(x.dtype)


class _Sum(torch.autograd.Function):
    """Everyone's parts become one; the gradient goes to each part as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:  # noqa: ARG004
        return ranks._added(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grads[0], None


class _Share(torch.autograd.Function):
    """One tensor enters everyone's part; everyone's gradients become one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks._added(grads[0]), None


@dataclass(frozen=True)
class VocabularyPart:
    """The rows of the vocabulary that a process holds, and who holds the others."""

    first: int
    last: int
    ranks: Ranks

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Local row numbers of token ids, 0 in place of other ranks', and which of them are this rank's."""
        mine = (ids >= self.first) & (ids < self.last)
        return (ids - self.first).where(mine, 0), mine
