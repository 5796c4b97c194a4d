"""Root-mean-square normalisation, computed in float32 as the reference does (float64 weights stay float64)."""

import torch
from torch import Tensor, nn

from puna.model import differentiable
from puna.model.elementwise import fast
from puna.model.native_steps import rms_norm


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or as it is where it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_normalise(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, in float32 at least, then x's dtype: Llama 4's weightless norm."""
    wide = at_least_float32(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class RMSNorm(nn.Module):
    """RMS norm with a learned weight [D]; the product with the weight comes after the cast (llama-models `RMSNorm`)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        native = fast(x) if self.weight.dtype == x.dtype else None
        if native:
            return rms_norm(x, self.weight, self.eps, native)
        if torch.is_grad_enabled():
            return differentiable.rms_norm(x, self.weight, self.eps)
        return rms_normalise(x, self.eps) * self.weight
