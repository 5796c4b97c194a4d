"""Training whose weights, gradients and optimizer state are dealt to the data groups' processes (FSDP2).

Each process keeps rows of every tensor (in float32 those that train: the masters). A block's weights are gathered in
the run's dtype when it computes and let go again; gradients are summed in float32, each process gets its rows'.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna.model import Decoder
from puna.model.ranks import Ranks
from puna.train.optimizer import Optimizer, matrix_update
from puna.train.pieces import Piece, described, understood
from puna.train.processes import Processes
from puna.train.slices import Slices
from puna.train.tensor_parallel import connect_training


def deal(model: Decoder, processes: Processes) -> dict[str, Piece]:
    """Join a decoder with the other processes' and keep this one's part of it; what trains is to be chosen before.

    Gives what this process holds of each parameter: slices where matrices are split (the decoder holds them already),
    and of these the rows that fall to it.
    """
    pieces = {name: Piece.whole(p.shape) for name, p in model.named_parameters()}
    if processes.share is not None:
        slices = Slices(processes.share)
        pieces = {name: Piece.whole(slices.whole_shape(name, piece.shape)).cut(slices.cuts(name))
                  for name, piece in pieces.items()}  # fmt: skip
        connect_training(model, processes.share)
    if processes.data.size > 1:
        _shard(model, processes)
    return {name: _chunk(piece, processes.data) for name, piece in pieces.items()}


def dealt_axis(shape: Sequence[int], groups: int) -> int:
    """The axis along which so many processes divide a tensor: its rows, of experts their inputs where that is even and
    whole experts would not be."""
    return 1 if len(shape) == 3 and shape[0] % groups and not shape[1] % groups else 0


def _shard(model: Decoder, processes: Processes) -> None:
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import Shard

    groups = processes.data.size
    dtype = model.dtype
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    blocks: list[nn.Module] = [*model.layers, *(model.cross_layers or ()), *filter(None, [model.vision])]
    for part in (*blocks, model):
        for parameter in part.parameters():
            if parameter.requires_grad and not hasattr(parameter, "full_tensor"):
                parameter.data = parameter.data.float()
        fully_shard(
            part, mesh=processes.mesh, mp_policy=policy, reshard_after_forward=part is not model,
            shard_placement_fn=lambda parameter: Shard(dealt_axis(parameter.shape, groups)),
        )  # fmt: skip
        assert isinstance(part, FSDPModule)
        part.set_gradient_divide_factor(1.0)  # the loss is divided by the whole step's count already
        part.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "hidden")


def held(parameter: Tensor) -> Tensor:
    """What this process keeps of a parameter: its rows, or all."""
    local = getattr(parameter, "_local_tensor", parameter)
    assert isinstance(local, Tensor)
    return local


def _own(parameter: nn.Parameter) -> nn.Parameter:
    """What the optimizer steps in its place: the same memory."""
    return parameter if held(parameter) is parameter else nn.Parameter(held(parameter))


def _chunk(piece: Piece, data: Ranks) -> Piece:
    """What of a piece falls to one of a data group's processes: even chunks, as FSDP2 deals them."""
    axis = dealt_axis(piece.held, data.size)
    count = piece.held[axis]
    chunk = -(-count // data.size)
    start = min(count, data.rank * chunk)
    return piece.part(axis, start, min(count, start + chunk))


class ShardedOptimizer(Optimizer):
    """Steps what this process holds of each trainable parameter; norms and orthogonal updates are the whole ones'."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], pieces: Mapping[str, Piece], processes: Processes, **options: Any
    ) -> None:
        """`pieces`: of each parameter, what this process holds of it."""
        self._dealt = {name: p for name, p in parameters.items() if p.requires_grad}
        super().__init__({name: _own(p) for name, p in self._dealt.items()}, **options)
        self._own = {name: pieces[name] for name in self.parameters}
        assert all(p.shape == self._own[name].held for name, p in self.parameters.items()), "as FSDP2 deals them"
        self._processes = processes
        self._slices = None if processes.share is None else Slices(processes.share)
        told = processes.tell(described(self._own))
        self._everyones = [understood(text) for text in told]
        holders = {name: [each[name] for each in self._everyones] for name in self._own}
        self._copies = {name: holders[name].count(piece) for name, piece in self._own.items()}

    def pieces(self) -> dict[str, Piece]:
        """What this process holds of each trainable parameter."""
        return self._own

    def gradients(self) -> dict[str, Tensor]:
        """Of the step so far, this process's rows, summed over all passes of all data groups."""
        for name, parameter in self._dealt.items():
            if parameter.grad is not None and parameter is not self.parameters[name]:
                self.parameters[name].grad = held(parameter.grad)
        return super().gradients()

    def step(self, schedule: float) -> float:
        """As `Optimizer.step`. All processes take it together."""
        if self._slices is not None:
            self._slices.finish(self.gradients())
        norm = super().step(schedule)
        for parameter in self._dealt.values():
            parameter.grad = None
        return norm

    def norm(self, grads: Mapping[str, Tensor]) -> float:
        """Of all processes' gradients, each element counted once."""
        squares = [grad.norm(dtype=torch.float32).double() ** 2 / self._copies[name] for name, grad in grads.items()]
        own = torch.stack(squares).sum().cpu() if squares else torch.zeros((), dtype=torch.float64)
        return float(self._processes.everyone.sum(own)) ** 0.5

    def updates(self, grads: Mapping[str, Tensor], scale: float) -> Iterator[tuple[str, Tensor]]:
        """This process's part of each update. Matrices are dealt to the processes: one gets a matrix's parts from all,
        computes its update and gives everyone theirs. Whole experts are updated where they are."""
        everyone = self._processes.everyone
        directions = {name: self.direction(name, grad, scale) for name, grad in grads.items()}
        dealt = [name for name in grads if any(each[name].axes[-2:] != Piece.whole(each[name].shape).axes[-2:]
                                               for each in self._everyones)]  # fmt: skip
        for name in filter(lambda each: each not in dealt, grads):
            held_here = directions.pop(name)
            yield name, matrix_update(name, held_here) if held_here.numel() else held_here
        for start in range(0, len(dealt), everyone.size):
            group = dealt[start : start + everyone.size]
            parts = [everyone.collect(self._flat(name, directions.pop(name).bfloat16()), owner)
                     for owner, name in enumerate(group)]  # fmt: skip
            mine = self._updated(group[everyone.rank], parts[everyone.rank]) if everyone.rank < len(group) else []
            for owner, name in enumerate(group):
                room = torch.empty(self._longest(name), device=self.parameters[name].device)
                own = self._own[name].held
                yield name, everyone.hand_out(mine, room, owner)[: prod(own)].view(own)

    def _longest(self, name: str) -> int:
        return max(prod(each[name].held) for each in self._everyones)

    def _flat(self, name: str, part: Tensor) -> Tensor:
        """As long as everyone's."""
        return F.pad(part.reshape(-1), (0, self._longest(name) - part.numel()))

    def _updated(self, name: str, parts: list[Tensor]) -> list[Tensor]:
        """Everyone's parts of a whole matrix's update, from everyone's parts of its gradient."""
        pieces, whole = [each[name] for each in self._everyones], Piece.whole(self._own[name].shape)
        grad = parts[0].new_empty(whole.shape)
        for piece, part in zip(pieces, parts, strict=True):
            given = part[: prod(piece.held)].view(piece.held)
            for there, here in whole.overlaps(piece):
                grad[there] = given[here]
        update = matrix_update(name, grad)
        found = []
        for piece in pieces:
            out = update.new_empty(piece.held)
            for there, here in piece.overlaps(whole):
                out[there] = update[here]
            found.append(self._flat(name, out))
        return found
