"""The mixture of experts: few rows and many give the same bits, and every token is counted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from puna.family.config import ModelConfig
from puna.model import Decoder
from puna.model.feedforward import MixtureOfExperts
from puna.model.native import kernels
from puna.model.packed import PackedLinear
from puna.model.packing import pack

torch.set_num_threads(1)
needs_kernels = pytest.mark.skipif(kernels() is None, reason="the compiled kernels were not built")


def config(top_k: int) -> ModelConfig:
    return tiny.CONFIGS["scout"].with_(num_experts=6, num_experts_per_token=top_k, hidden_size=64, head_dim=16)


def mixture(top_k: int, bits: int | None, dtype: torch.dtype) -> MixtureOfExperts:
    decoder = tiny.decoder(config(top_k), dtype=dtype)
    pack(decoder, bits)
    found = decoder.get_submodule("layers.1.feed_forward")
    assert isinstance(found, MixtureOfExperts)
    return found


@needs_kernels
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize(
    ("bits", "dtype"), [(None, torch.float32), (None, torch.bfloat16), (8, torch.bfloat16), (4, torch.bfloat16)]
)
def test_a_row_alone_has_the_bits_that_it_has_among_others(top_k: int, bits: int | None, dtype: torch.dtype) -> None:
    layer = mixture(top_k, bits, dtype)

    @settings(max_examples=40, deadline=None)
    @given(rows=st.integers(1, 40), seed=st.integers(0, 10**6))
    def check(rows: int, seed: int) -> None:
        x = torch.randn(1, rows, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)
        with torch.no_grad():
            together = layer(x)
            alone = torch.cat([layer(x[:, i : i + 1]) for i in range(rows)], 1)
            cut = seed % rows
            halves = torch.cat([layer(part) for part in (x[:, :cut], x[:, cut:]) if part.shape[1]], 1)
        assert torch.equal(together, alone)
        assert torch.equal(together, halves)

    check()


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize(
    ("bits", "dtype"), [(None, torch.float32), (None, torch.bfloat16), (8, torch.bfloat16), (4, torch.float32)]
)
def test_one_call_gives_the_bits_of_its_steps(
    top_k: int, bits: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded router weights make equal logits frequent: the first of equals is chosen on both ways."""
    layer = mixture(top_k, bits, dtype)
    router = torch.randint(-1, 2, (6, 64), generator=torch.Generator().manual_seed(1)) / 4
    layer.router = PackedLinear(router.to(dtype))
    for rows in (1, 2, 7, 150):
        x = torch.randint(-2, 3, (1, rows, 64), generator=torch.Generator().manual_seed(rows)).to(dtype)
        results, loads = [], []
        for call in (MixtureOfExperts.call, lambda *_: None):
            layer.load_E[:] = 0
            monkeypatch.setattr(MixtureOfExperts, "call", call)
            assert (layer.call(dtype) is None) == (len(results) == 1)
            results.append(layer(x))
            loads.append(layer.load_E.tolist())
            monkeypatch.undo()
        assert torch.equal(*results)
        assert loads[0] == loads[1]


@needs_kernels
@torch.no_grad()
def test_hooks_and_exchanged_parts_are_heeded() -> None:
    layer = mixture(1, 8, torch.bfloat16)
    x = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    before, shared = layer(x), layer.shared_expert
    layer.shared_expert = torch.nn.Identity()
    assert not torch.equal(layer(x), before)
    layer.shared_expert = shared
    assert torch.equal(layer(x), before)
    hooked = mixture(1, 8, torch.bfloat16)
    hooked.shared_expert.register_forward_hook(lambda _, __, out: torch.zeros_like(out))
    assert not torch.equal(hooked(x), before)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_it_is_the_sum_of_what_its_choices_give(top_k: int, rows: int) -> None:
    layer = tiny.decoder(config(top_k), dtype=torch.float64).get_submodule("layers.1.feed_forward")
    assert isinstance(layer, MixtureOfExperts)
    x = torch.randn(1, rows, 64, dtype=torch.float64, requires_grad=True)
    expected = layer.shared_expert(x)
    weights = layer.experts.get_parameter("gate_up_proj"), layer.experts.get_parameter("down_proj")
    for row in range(rows):
        logits, chosen = layer.router(x[0, row]).topk(top_k)
        for logit, expert in zip(logits.float().sigmoid().double(), chosen.tolist(), strict=True):
            gate, up = (x[0, row] * logit @ weights[0][expert]).chunk(2)
            routed = torch.nn.functional.silu(gate) * up @ weights[1][expert]
            expected = expected.index_add(1, torch.tensor([row]), routed[None, None])
    found = layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # the gate is a float32
    for one, other in zip(torch.autograd.grad(found.sum(), [x, *weights]),
                          torch.autograd.grad(expected.sum(), [x, *weights]), strict=True):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_load_counts_every_token_once_for_each_choice() -> None:
    decoder = tiny.decoder(config(2))
    assert decoder.expert_load() == {layer: [0] * 6 for layer in range(4)}
    decoder(tiny.token_ids(decoder.config, 20))
    decoder(tiny.token_ids(decoder.config, 1))
    load = decoder.expert_load()
    assert all(sum(counts) == 42 for counts in load.values())
    assert len({tuple(counts) for counts in load.values()}) > 1  # layers choose differently
    assert Decoder(tiny.CONFIGS["llama3.1"]).expert_load() == {}
    assert list(tiny.decoder("maverick").expert_load()) == [1, 3]


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_gradients_are_those_of_every_expert_on_every_row(top_k: int) -> None:
    """The formula itself: each expert on all rows, weighted by zero where it was not chosen."""
    layer = tiny.decoder(config(top_k), dtype=torch.float64).layers[0].feed_forward
    assert isinstance(layer, MixtureOfExperts)
    x_1SD = torch.randn(1, 40, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    found = []
    for dense in (False, True):
        layer.zero_grad()
        x = x_1SD.clone().requires_grad_()
        if dense:
            gates, chosen = layer.route(x[0])
            y = layer.shared_expert(x)
            experts = layer.experts
            for e, (gate_up, down) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
                scaled = x[0] * (gates * (chosen == e)).sum(-1, keepdim=True)
                gate, up = (scaled @ gate_up).chunk(2, -1)
                y = y + (torch.nn.functional.silu(gate) * up) @ down
        else:
            y = layer(x)
        y.backward(torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(6)))
        found.append([y, x.grad, *(weight.grad for weight in layer.parameters())])
    for ours, formula in zip(*found, strict=True):
        torch.testing.assert_close(ours, formula, rtol=1e-9, atol=1e-9)
