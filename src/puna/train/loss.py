"""Next-token cross-entropy that never holds all logits; over several processes, each has its part of the vocabulary.

Legend: N tokens, R rows of a block, D model width, V vocabulary (of a process's part: its rows).
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.model.differentiable import FILL
from puna.model.native_steps import cross_entropy, steps_for
from puna.model.ranks import VocabularyPart

IGNORED = -100  # a target that carries no loss, as in PyTorch and transformers
ROWS = 1024  # rows of logits held at once


def _blocks(
    x_ND: Tensor, targets_N: Tensor, part: VocabularyPart | None
) -> Iterator[tuple[slice, int, Tensor, Tensor, Tensor]]:
    """Places, their number, states, targets [R, 1] and whether these are this process's [R, 1] (float32) of so many
    rows at a time, filled up with zeros to few sizes."""
    for start in range(0, len(x_ND), ROWS):
        x, targets = x_ND[start : start + ROWS], targets_N[start : start + ROWS]
        spare = -len(x) % FILL
        index_R1 = F.pad(targets, (0, spare))[:, None]
        index_R1, mine = part.local(index_R1) if part else (index_R1, torch.ones_like(index_R1))
        yield slice(start, start + len(x)), len(x), F.pad(x, (0, 0, 0, spare)), index_R1, mine.float()


def row_bytes(weight_VD: Tensor) -> int:
    """What a row of logits takes at most, with what is made of it: our kernels need nothing beside it."""
    width = weight_VD.element_size()
    return len(weight_VD) * (width if steps_for(weight_VD) else 2 * width + 8)


def _log_softmax(logits_RV: Tensor, part: VocabularyPart | None) -> Tensor:
    """Over the whole vocabulary, of this process's part of it, in float32."""
    if part is None:
        return logits_RV.log_softmax(-1, dtype=torch.float32)
    logits_RV = logits_RV.float()
    logits_RV = logits_RV.sub_(part.ranks.largest(logits_RV.amax(-1, keepdim=True)))
    return logits_RV.sub_(part.ranks.sum(logits_RV.exp().sum(-1, keepdim=True)).log_())


def _losses(
    logits_RV: Tensor, index_R1: Tensor, mine_R1: Tensor, part: VocabularyPart | None, scale_R: Tensor | None = None,
    errors: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Each row's loss [R] (0 where the target is another process's) and, with `errors`, the gradients of losses times
    scales by the logits [R, V], which may be written over."""
    native = steps_for(logits_RV) if part is None else None
    if native:
        found = cross_entropy(native, logits_RV, index_R1[:, 0].contiguous(), scale_R, errors)
        return found, logits_RV if errors else None
    log_probs = _log_softmax(logits_RV, part)
    losses_R = -(log_probs.gather(1, index_R1) * mine_R1)[:, 0]
    if not errors:
        return losses_R, None
    gradient = log_probs.exp_().scatter_add_(1, index_R1, -mine_R1)
    if scale_R is not None:
        gradient.mul_(scale_R[:, None])
    return losses_R, gradient.to(logits_RV.dtype)


def _plus(total_VD: Tensor | None, errors_RV: Tensor, x_RD: Tensor) -> Tensor:
    """The output matrix's gradient so far and a block's: sums of several are float32."""
    block_VD = errors_RV.T @ x_RD
    return block_VD if total_VD is None else total_VD.float().add_(block_VD)


def _only_counted(x_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """States and targets that carry loss, and their places, None where all do: the others' logits are never made."""
    counted = targets_N != IGNORED
    if counted.all():
        return x_ND, targets_N, None
    places = counted.nonzero()[:, 0]
    return x_ND[places], targets_N[places], places


def _spread(taken: Tensor, places: Tensor | None, count: int) -> Tensor:
    """Rows back in their places, zeros elsewhere."""
    return taken if places is None else taken.new_zeros(count, *taken.shape[1:]).index_copy_(0, places, taken)


class _LinearCrossEntropy(torch.autograd.Function):
    """sum(cross_entropy(x @ weight.T, targets)) with gradients made in the same pass, block by block."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, part: VocabularyPart | None) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=x_ND.device)
        x_all, targets_all, places = _only_counted(x_ND, targets_N)
        x_grad = torch.empty_like(x_all) if ctx.needs_input_grad[0] else None
        wanted = any(ctx.needs_input_grad[:2])
        weight_grad = weight_VD.new_zeros(weight_VD.shape) if ctx.needs_input_grad[1] and not len(x_all) else None
        for place, rows, x, index, mine in _blocks(x_all, targets_all, part):
            losses, errors = _losses(x @ weight_VD.T, index, mine, part, errors=wanted)
            total += losses[:rows].sum()
            if errors is None:
                continue
            errors[rows:] = 0
            if x_grad is not None:
                x_grad[place] = (errors @ weight_VD)[:rows]
            if ctx.needs_input_grad[1]:
                weight_grad = _plus(weight_grad, errors, x)
        ctx.save_for_backward(
            None if x_grad is None else _spread(x_grad, places, len(x_ND)),
            None if weight_grad is None else weight_grad.to(weight_VD.dtype),
        )
        return part.ranks.sum(total) if part else total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        scaled = [None if saved is None else saved * grads[0] for saved in ctx.saved_tensors]
        return scaled[0], scaled[1], None, None


def linear_cross_entropy(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, part: VocabularyPart | None = None
) -> Tensor:
    """Summed next-token loss in nats, float32 scalar, of states [N, D] under an output matrix [V, D].

    Targets equal to `IGNORED` count nothing. The caller divides by the number of counted tokens of the whole step, so
    that any split into micro-batches gives the same gradient. part: whose rows of the vocabulary the matrix has
    (`Decoder.vocabulary`), where processes split it: each of them gives the same loss.
    """
    states = part.ranks.share(x_ND) if part else x_ND
    loss: Tensor = _LinearCrossEntropy.apply(states, weight_VD, targets_N, part)
    return loss


class _TokenLosses(torch.autograd.Function):
    """cross_entropy(x @ weight.T, targets) of each token; the backward pass makes the logits again."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, part: VocabularyPart | None) -> Tensor:
        x_all, targets_all, places = _only_counted(x_ND, targets_N)
        losses = torch.zeros(len(x_all), dtype=torch.float32, device=x_ND.device)
        for place, rows, x, index, mine in _blocks(x_all, targets_all, part):
            losses[place] = _losses(x @ weight_VD.T, index, mine, part, errors=False)[0][:rows]
        ctx.part = part
        ctx.save_for_backward(x_ND, weight_VD, targets_N)
        losses = part.ranks.sum(losses) if part else losses
        return _spread(losses, places, len(x_ND))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x_ND, weight_VD, targets_N = ctx.saved_tensors
        x_all, targets_all, places = _only_counted(x_ND, targets_N)
        scale = grads[0] if places is None else grads[0][places]
        x_grad = torch.empty_like(x_all)
        weight_grad = weight_VD.new_zeros(weight_VD.shape) if ctx.needs_input_grad[1] and not len(x_all) else None
        for place, rows, x, index, mine in _blocks(x_all, targets_all, ctx.part):
            by = F.pad(scale[place], (0, len(x) - rows))  # what fills up counts nothing
            _, errors = _losses(x @ weight_VD.T, index, mine, ctx.part, by)
            assert errors is not None
            x_grad[place] = (errors @ weight_VD)[:rows]
            if ctx.needs_input_grad[1]:
                weight_grad = _plus(weight_grad, errors, x)
        return (
            _spread(x_grad, places, len(x_ND)),
            None if weight_grad is None else weight_grad.to(weight_VD.dtype),
            None,
            None,
        )


def token_losses(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, part: VocabularyPart | None = None) -> Tensor:
    """Each token's loss in nats, float32 [N], zero where the target is `IGNORED`: for losses that weigh tokens by more
    than whether they count (preferences, rewards). part: as in `linear_cross_entropy`."""
    states = part.ranks.share(x_ND) if part else x_ND
    losses: Tensor = _TokenLosses.apply(states, weight_VD, targets_N, part)
    return losses
