"""Next-token cross-entropy that never holds all logits, and the experts' load-balancing term."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # a target that carries no loss, as in PyTorch and transformers
_ROWS = 512  # rows of logits held at once: few enough to stay in a CPU's cache


class _LinearCrossEntropy(torch.autograd.Function):
    """sum(cross_entropy(x @ weight.T, targets)) with gradients made in the same pass, block by block."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=x_ND.device)
        x_grad = torch.empty_like(x_ND)
        weight_grad = torch.zeros_like(weight_VD, dtype=torch.float32)
        for start in range(0, len(x_ND), _ROWS):
            x, targets = x_ND[start : start + _ROWS], targets_N[start : start + _ROWS]
            counted = targets != IGNORED
            log_probs = (x @ weight_VD.T).log_softmax(-1, dtype=torch.float32)
            index = targets.clamp(min=0)[:, None]
            total -= (log_probs.gather(1, index)[:, 0] * counted).sum()
            errors = log_probs.exp_()
            errors.scatter_add_(1, index, torch.full_like(index, -1, dtype=errors.dtype))
            errors = errors.mul_(counted[:, None]).to(x.dtype)
            x_grad[start : start + _ROWS] = errors @ weight_VD
            weight_grad += errors.T @ x
        ctx.save_for_backward(x_grad, weight_grad.to(weight_VD.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x_grad, weight_grad = ctx.saved_tensors
        return x_grad * grads[0].to(x_grad.dtype), weight_grad * grads[0].to(weight_grad.dtype), None


def linear_cross_entropy(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Summed next-token loss in nats, float32 scalar, of states [N, D] under an output matrix [V, D].

    Targets equal to `IGNORED` count nothing. The caller divides by the number of counted tokens of the whole step, so
    that any split into micro-batches gives the same gradient.
    """
    loss: Tensor = _LinearCrossEntropy.apply(x_ND, weight_VD, targets_N)
    return loss


def balance_loss(router_logits_NE: Tensor, top_k: int) -> Tensor:
    """Switch Transformer's term E * sum_e share_e * probability_e, which is 1 where even (arXiv 2101.03961, eq. 4)."""
    experts = router_logits_NE.shape[-1]
    chosen = router_logits_NE.topk(top_k, dim=-1).indices
    share_E = F.one_hot(chosen, experts).float().mean((0, 1))
    return experts * (share_E * router_logits_NE.float().softmax(-1).mean(0)).sum()


class RouterWatch:
    """Collects the router logits of every mixture-of-experts layer during a forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self.logits: list[Tensor] = []
        for name, module in model.named_modules():
            if name.endswith(".router"):
                module.register_forward_hook(lambda _module, _inputs, output: self.logits.append(output))

    def take(self) -> list[Tensor]:
        """The logits since the last call, one [N, E] a layer."""
        logits, self.logits = self.logits, []
        return logits
