"""The compiled steps and attention of training, against PyTorch in float64."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from puna.model import native_steps
from puna.model.causal import attend
from puna.model.native import kernels
from puna.model.native_causal import Segments, attend_segments, causal_kernels
from puna.model.native_steps import AdamStep
from puna.train.loss import linear_cross_entropy
from puna.train.optimizer import Optimizer

needs_kernels = pytest.mark.skipif(kernels() is None, reason="the kernels are not built here")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers that the dtype can hold."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def off(found: Tensor, reference: Tensor) -> float:
    """Distance as a share of the reference's size."""
    found, reference = found.detach().double(), reference.detach().double()
    return float((found - reference).norm() / reference.norm())


@needs_kernels
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-3)])
@pytest.mark.parametrize("width", [5, 16, 1000])
def test_cross_entropy(dtype: torch.dtype, tolerance: float, width: int) -> None:
    native = kernels()
    assert native
    logits, targets, scales = random(7, width, dtype=dtype) * 4, torch.arange(7) % width, random(7, seed=1)
    reference = logits.double().requires_grad_()
    losses = F.cross_entropy(reference, targets, reduction="none")
    (losses * scales).sum().backward()
    kept = logits.clone()
    torch.testing.assert_close(native_steps.cross_entropy(native, kept, targets, None, False).double(), losses.detach(),
                               rtol=1e-5, atol=1e-5)  # fmt: skip
    assert torch.equal(kept, logits)
    native_steps.cross_entropy(native, kept, targets, scales, True)
    assert reference.grad is not None
    assert off(kept, reference.grad) < tolerance


@needs_kernels
def test_a_target_outside_the_vocabulary_is_no_number() -> None:
    native = kernels()
    assert native
    logits = random(3, 8)
    losses = native_steps.cross_entropy(native, logits, torch.tensor([1, 8, -5]), None, True)
    assert losses.isnan().tolist() == [False, True, True]


def test_losses_of_several_blocks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puna.train.loss.ROWS", 64)
    x, weight, targets = random(150, 16), random(40, 16, seed=1), torch.arange(150) % 40
    targets[3:9] = -100
    mine, theirs = ([each.clone().requires_grad_() for each in (x, weight)] for _ in range(2))
    (linear_cross_entropy(*mine, targets) / 7).backward()
    (F.cross_entropy(theirs[0] @ theirs[1].T, targets, reduction="sum") / 7).backward()
    for ours, reference in zip(mine, theirs, strict=True):
        torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-4, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [3, 16, 70])
def test_adam_keeps_masters_exactly(dtype: torch.dtype, count: int) -> None:
    """Many small updates, which bfloat16 alone would lose, as PyTorch's AdamW in float32."""
    weights = torch.nn.Parameter(random(count, 1, dtype=dtype))
    optimizer = Optimizer({"w": weights}, muon=False, rate=1e-4, weight_decay=0.1, clip=None)
    reference = torch.nn.Parameter(weights.detach().float())
    peer = torch.optim.AdamW([reference], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(40):
        gradient = random(count, 1, seed=step, dtype=dtype)
        weights.grad, reference.grad = gradient.clone(), gradient.float()
        optimizer.step(1.0)
        peer.step()
    torch.testing.assert_close(optimizer.state_dict()["w/master"], reference.detach(), rtol=2e-6, atol=2e-6)
    assert torch.equal(weights.detach().float(), reference.detach().to(dtype).float()) or dtype == torch.float32


@needs_kernels
def test_an_update_by_hand() -> None:
    native = kernels()
    assert native
    weights, gradient, first, second = torch.tensor([2.0]), torch.tensor([4.0]), torch.zeros(1), torch.zeros(1)
    native_steps.adam(native, weights, None, gradient, first, second, AdamStep(0.5, 0.9, 0.1, 2.0, (0.5, 0.75), 1.0))
    assert (first.item(), second.item()) == (1.0, 1.0)  # of the gradient times 0.5
    assert weights.item() == pytest.approx(2 * 0.9 - 0.1 * 1 / (2 * 1 + 1))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_of_squares_is_the_same_for_any_threads(dtype: torch.dtype) -> None:
    native = kernels()
    assert native
    x = random(200_003, dtype=dtype)
    assert native_steps.square_sum(native, x) == pytest.approx(float(x.double().square().sum()), rel=1e-5)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = native_steps.square_sum(native, x)
        torch.set_num_threads(3)
        assert native_steps.square_sum(native, x) == alone
    finally:
        torch.set_num_threads(before)


def reference_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], chunk: int | None) -> Tensor:
    """Each document by itself."""
    outputs, start = [], 0
    for length in lengths:
        part = slice(start, start + length)
        outputs.append(attend(q[None, part], k[None, part], v[None, part], 0, 0, chunk)[0])
        start += length
    return torch.cat(outputs)


@pytest.mark.skipif(causal_kernels(torch.empty(1, 16, dtype=torch.bfloat16)) is None, reason="needs AVX-512")
@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "width", "chunk"),
    [((1, 63, 64, 65, 130), 4, 4, 64, None), ((150, 7), 6, 3, 128, None), ((100, 200), 4, 1, 32, 48),
     ((64, 128), 2, 2, 16, 64), ((70, 40), 2, 1, 80, None)],
)  # fmt: skip
def test_attention_and_its_gradients(
    lengths: tuple[int, ...], heads: int, kv_heads: int, width: int, chunk: int | None
) -> None:
    """No further from float64 than the rounding of bfloat16; nothing leaks between documents or chunks."""
    tokens = sum(lengths)
    inputs = [random(tokens, count, width, seed=seed, dtype=torch.bfloat16)
              for seed, count in enumerate((heads, kv_heads, kv_heads))]  # fmt: skip
    above = random(tokens, heads, width, seed=9, dtype=torch.bfloat16)
    native = causal_kernels(inputs[0])
    assert native
    mine = [x.clone().requires_grad_() for x in inputs]
    found = attend_segments(native, mine[0], mine[1], mine[2], Segments.of(lengths, chunk))
    found.backward(above)
    exact = [x.double().requires_grad_() for x in inputs]
    reference = reference_attention(exact[0], exact[1], exact[2], lengths, chunk)
    reference.backward(above.double())
    assert off(found, reference) < 3e-3
    for ours, theirs in zip(mine, exact, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert off(ours.grad, theirs.grad) < 4e-3


@pytest.mark.skipif(causal_kernels(torch.empty(1, 16, dtype=torch.bfloat16)) is None, reason="needs AVX-512")
def test_scores_far_apart_stay_finite() -> None:
    """Weights that underflow, and a maximum that comes last."""
    q = torch.full((100, 1, 16), 30.0, dtype=torch.bfloat16)
    k = torch.linspace(-30, 30, 100).to(torch.bfloat16)[:, None, None].expand(100, 1, 16).contiguous()
    v = random(100, 1, 16, dtype=torch.bfloat16)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    native = causal_kernels(q)
    assert native
    out = attend_segments(native, q, k, v, Segments.of((100,), None))
    out.sum().backward()
    assert off(out, v) < 1e-2  # each token sees the last key alone
    assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves)
