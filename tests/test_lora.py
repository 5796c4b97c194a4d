"""Low-rank updates on our own: few-bit bases, dropout, what trains, what is refused."""

import pytest
import torch
from torch import nn

from puna.errors import PunaError
from puna.model import Decoder
from puna.model.adapt import DEFAULT, Lora, attach, kinds, set_dropout, switched_off, updates
from puna.model.feedforward import MixtureOfExperts
from puna.model.frozen import FrozenLinear
from puna.model.linear import Linear
from puna.model.lora import LoRALinear, PairedExperts
from puna.model.quantized import quantize
from puna.train.loss import linear_cross_entropy
from tiny import decoder, token_ids


def in_few_bits(model: Decoder, bits: int) -> tuple[Decoder, Decoder]:
    """The model with its layers in few bits, and the same widened: what each computes is to be equal."""
    wide = decoder(model.config)
    for block, plain in zip(model.layers, wide.layers, strict=True):
        pairs = [(block.self_attn, plain.self_attn)]
        feed, plain_feed = block.feed_forward, plain.feed_forward
        if isinstance(feed, MixtureOfExperts):
            parts = {}
            for part in ("gate_up_proj", "down_proj"):
                few = [quantize(weight.T, bits) for weight in feed.experts.get_parameter(part).detach()]
                parts[part] = [FrozenLinear(one) for one in few]
                plain_feed.experts.get_parameter(part).data = torch.stack([one.dequantize().T for one in few])
            feed.experts = PairedExperts(*parts.values())
            feed, plain_feed = feed.shared_expert, plain_feed.shared_expert
        pairs.append((feed, plain_feed))
        for owner, other in pairs:
            for name, layer in list(owner.named_children()):
                if isinstance(layer, Linear):
                    few = quantize(layer.weight.detach(), bits)
                    setattr(owner, name, FrozenLinear(few))
                    getattr(other, name).weight.data = few.dequantize()
    return model, wide


def trained(model: Decoder, lora: Lora, seed: int = 1) -> dict[str, torch.Tensor]:
    """Gradients after one pass, with updates that are not zero."""
    attach(model, lora, seed=2)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("lora_B"):
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    ids = token_ids(model.config, seed=seed)
    linear_cross_entropy(model.hidden(ids)[0, :-1], model.head_weight, ids[0, 1:]).backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("kind", "dora"), [("llama3.1", True), ("scout", False), ("maverick", False)])
def test_a_few_bit_base_gives_the_widened_ones_gradients(kind: str, dora: bool, bits: int,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr("puna.model.frozen.BLOCK_VALUES", 100)  # several blocks even of these small weights
    few, wide = in_few_bits(decoder(kind), bits)
    ours, expected = (trained(model, Lora(rank=3, alpha=6, dora=dora)) for model in (few, wide))
    assert ours.keys() == expected.keys()
    assert ours
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for name, parameter in few.named_parameters() if name not in ours)


def test_nothing_widened_is_kept_for_the_backward_pass() -> None:
    layer = FrozenLinear(quantize(torch.randn(512, 512), 4))
    x = torch.randn(3, 512, requires_grad=True)
    kept = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x).sum().backward()
    assert kept == 0
    assert sum(buffer.nbytes for buffer in layer.buffers()) < 512 * 512 * 0.6


@pytest.mark.parametrize("kind", ["scout", "maverick"])
def test_every_expert_that_is_said_to_train_changes(kind: str) -> None:
    model = decoder(kind)
    names = attach(model, Lora(rank=2, targets=("experts", "router")), seed=0)
    assert set(kinds(names)) == {"experts", "router"}
    config = model.config
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(3):
        ids = token_ids(config, seed=step, length=200)
        linear_cross_entropy(model.hidden(ids)[0, :-1], model.head_weight, ids[0, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, update in updates(model).items():
        change = update.b @ update.a
        changed = change.abs().amax((-2, -1)) > 0
        assert bool(changed.all()), f"{name}: {changed}"
    loads = model.expert_load()
    assert all(count > 0 for load in loads.values() for count in load)


def test_an_expert_without_tokens_gets_no_gradient() -> None:
    model = decoder("scout")
    attach(model, Lora(rank=2, targets=("experts",)), seed=0)
    layer = model.layers[0].feed_forward.experts
    with torch.no_grad():
        layer.down_lora_B.fill_(0.1)
    layer(torch.randn(3, model.config.hidden_size), [2, 0, 1, 0]).sum().backward()
    used = layer.down_lora_A.grad.abs().amax((1, 2)) > 0
    assert used.tolist() == [True, False, True, False]


def test_dropout_follows_the_seed_and_is_off_in_evaluation() -> None:
    model = decoder("llama3.1")
    gradients = trained(model, Lora(rank=2, dropout=0.5))
    assert gradients
    ids = token_ids(model.config)
    model.train()
    results = []
    for seed in (1, 1, 2):
        set_dropout(model, seed)
        results.append(model(ids).detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_the_output_layer_alone_leaves_a_tied_embedding() -> None:
    model = decoder("llama3.2")
    before = model.embed_tokens.weight.detach().clone()
    ids = token_ids(model.config)
    base = model(ids).detach()
    names = attach(model, Lora(rank=2, targets=("output",)), seed=0)
    assert names == ("lm_head.weight",)
    with torch.no_grad():
        model.lm_head.lora_B.fill_(0.1)
    torch.testing.assert_close(model(ids), model.hidden(ids) @ model.head_weight.T)
    assert not torch.allclose(model(ids), base)
    with switched_off(model):
        assert torch.equal(model(ids), base)
    assert torch.equal(model.embed_tokens.weight, before)


def test_what_targets_mean() -> None:
    def count(kind: str, *targets: str) -> dict[str, int]:
        return {target: len(names) for target, names in kinds(attach(decoder(kind), Lora(rank=1, targets=targets),
                                                                     seed=0)).items()}  # fmt: skip

    assert count("maverick") == {"attention": 16, "feed_forward": 12, "experts": 4}
    assert count("maverick") == count("maverick", *DEFAULT)
    assert count("llama2") == {"attention": 8, "feed_forward": 6}
    assert count("scout", "q_proj", "router", "output") == {"attention": 4, "router": 4, "output": 1}
    for kind, lora, words in (
        ("llama2", Lora(targets=("experts",)), "has no experts"),
        ("llama2", Lora(targets=("attentoin",)), "'attentoin' is not one; choose from attention"),
        ("scout", Lora(targets=("experts",), dora=True), "DoRA is not defined for experts"),
    ):
        with pytest.raises(PunaError, match=words):
            attach(decoder(kind), lora, seed=0)


def test_the_same_seed_draws_the_same_values() -> None:
    def first(seed: int) -> nn.Parameter:
        model = decoder("scout")
        attach(model, Lora(rank=2), seed)
        layer = model.layers[2].self_attn.v_proj
        assert isinstance(layer, LoRALinear)
        return layer.lora_A

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))
