"""Next-token cross-entropy that never holds all logits. Legend: N tokens, D model width, V vocabulary."""

from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # a target that carries no loss, as in PyTorch and transformers
ROWS = 512  # rows of logits held at once: few enough to stay in a CPU's cache


class _LinearCrossEntropy(torch.autograd.Function):
    """sum(cross_entropy(x @ weight.T, targets)) with gradients made in the same pass, block by block."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=x_ND.device)
        x_grad = torch.empty_like(x_ND) if ctx.needs_input_grad[0] else None
        weight_grad = torch.zeros_like(weight_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(x_ND), ROWS):
            x, targets = x_ND[start : start + ROWS], targets_N[start : start + ROWS]
            counted = targets != IGNORED
            log_probs = (x @ weight_VD.T).log_softmax(-1, dtype=torch.float32)
            index = targets.clamp(min=0)[:, None]
            total -= (log_probs.gather(1, index)[:, 0] * counted).sum()
            if x_grad is None and weight_grad is None:
                continue
            errors = log_probs.exp_()
            errors.scatter_add_(1, index, torch.full_like(index, -1, dtype=errors.dtype))
            errors = errors.mul_(counted[:, None]).to(x.dtype)
            if x_grad is not None:
                x_grad[start : start + ROWS] = errors @ weight_VD
            if weight_grad is not None:
                weight_grad += errors.T @ x
        ctx.save_for_backward(x_grad, weight_grad if weight_grad is None else weight_grad.to(weight_VD.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        scaled = [None if saved is None else saved * grads[0].to(saved.dtype) for saved in ctx.saved_tensors]
        return scaled[0], scaled[1], None


def linear_cross_entropy(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Summed next-token loss in nats, float32 scalar, of states [N, D] under an output matrix [V, D].

    Targets equal to `IGNORED` count nothing. The caller divides by the number of counted tokens of the whole step, so
    that any split into micro-batches gives the same gradient.
    """
    loss: Tensor = _LinearCrossEntropy.apply(x_ND, weight_VD, targets_N)
    return loss


class _TokenLosses(torch.autograd.Function):
    """cross_entropy(x @ weight.T, targets) of each token; the backward pass makes the logits again."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        losses_N = torch.zeros(len(x_ND), dtype=torch.float32, device=x_ND.device)
        for start in range(0, len(x_ND), ROWS):
            x, targets = x_ND[start : start + ROWS], targets_N[start : start + ROWS]
            log_probs = (x @ weight_VD.T).log_softmax(-1, dtype=torch.float32)
            taken = log_probs.gather(1, targets.clamp(min=0)[:, None])[:, 0]
            losses_N[start : start + ROWS] = -taken * (targets != IGNORED)
        ctx.save_for_backward(x_ND, weight_VD, targets_N)
        return losses_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x_ND, weight_VD, targets_N = ctx.saved_tensors
        x_grad = torch.empty_like(x_ND)
        weight_grad = torch.zeros_like(weight_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(x_ND), ROWS):
            x, targets = x_ND[start : start + ROWS], targets_N[start : start + ROWS]
            errors = (x @ weight_VD.T).softmax(-1, dtype=torch.float32)
            index = targets.clamp(min=0)[:, None]
            errors.scatter_add_(1, index, torch.full_like(index, -1, dtype=errors.dtype))
            scale = grads[0][start : start + ROWS] * (targets != IGNORED)
            errors = errors.mul_(scale[:, None]).to(x.dtype)
            x_grad[start : start + ROWS] = errors @ weight_VD
            if weight_grad is not None:
                weight_grad += errors.T @ x
        return x_grad, None if weight_grad is None else weight_grad.to(weight_VD.dtype), None


def token_losses(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Each token's loss in nats, float32 [N], zero where the target is `IGNORED`: for losses that weigh tokens by more
    than whether they count (preferences, rewards)."""
    losses: Tensor = _TokenLosses.apply(x_ND, weight_VD, targets_N)
    return losses
