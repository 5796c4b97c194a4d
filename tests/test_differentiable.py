"""Gradients of our own for norm, SwiGLU and rotation, against PyTorch's of the same formulas."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from puna.model.differentiable import reordered, rms_norm, swiglu, turn
from puna.model.norm import rms_normalise
from puna.model.rope import rotate_adjacent, rotate_halves


def both(mine: Callable[..., Tensor], theirs: Callable[..., Tensor], *inputs: Tensor, tolerance: float) -> None:
    """Values and gradients alike, for a random gradient from above."""
    found = []
    for function in (mine, theirs):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype))
        found.append([out, *(leaf.grad for leaf in leaves)])
    for ours, reference in zip(*found, strict=True):
        assert ours.dtype == reference.dtype
        torch.testing.assert_close(ours.double(), reference.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12), (torch.bfloat16, 0.06)]
)
def test_gradients_are_pytorchs(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    weight = 1 + 0.2 * random(21)
    both(lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: rms_normalise(x, 1e-5) * w, random(2, 7, 21), weight,
         tolerance=tolerance)  # fmt: skip
    both(swiglu, lambda gate, up: F.silu(gate) * up, random(5, 24), random(5, 24), tolerance=tolerance)
    wide = torch.promote_types(dtype, torch.float32)
    angles = torch.randn(6, 4, generator=generator).to(wide)
    for rotate in (rotate_adjacent, rotate_halves):
        both(lambda x, r=rotate: turn(x, angles.cos(), angles.sin(), r),
             lambda x, r=rotate: r(x, angles.cos(), angles.sin()), random(2, 6, 3, 8), tolerance=tolerance)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_in_another_order(dtype: torch.dtype) -> None:
    order = torch.randperm(37, generator=torch.Generator().manual_seed(4))
    both(lambda x: reordered(x, order, order.argsort()), lambda x: x[order], torch.randn(37, 5).to(dtype), tolerance=0)
