"""LoRA, DoRA and rsLoRA against PEFT: losses, gradients, and adapters that go both ways."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from adapted import adapted
from puna.checkpoint.merged import open_merged
from puna.checkpoint.peft import read_adapter
from puna.checkpoint.peft_write import write_adapter
from puna.checkpoint.safetensors_write import hf_name
from puna.checkpoint.source import load_source, open_source, save
from puna.errors import PunaError
from puna.model import Decoder
from puna.model.adapt import Lora, attach, kinds, set_updates, switched_off, updates
from puna.model.lora import Update
from tiny import CONFIGS, decoder, token_ids, transformers_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
ALL = ("attention", "feed_forward", "experts", "router", "output")
CASES = {
    "llama2": Lora(rank=3, alpha=6, targets=("attention", "feed_forward", "output")),
    "llama3.1": Lora(rank=4, alpha=6, dora=True, targets=("attention", "feed_forward", "output")),
    "llama3.2": Lora(rank=4, alpha=5, rslora=True),
    "scout": Lora(rank=3, alpha=6, targets=ALL),
    "maverick": Lora(rank=2, alpha=3, rslora=True, targets=("q_proj", "experts", "router")),
    "guard4": Lora(rank=2, alpha=3, dora=True, targets=("attention",)),
}


def shapes_of(model: Decoder) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


def base(kind: str) -> Any:
    """transformers' model with the weights of `decoder(kind)`."""
    model = transformers_model(kind, use_cache=False)
    ours = {hf_name(name, CONFIGS[kind]): weight for name, weight in decoder(kind).state_dict().items()}
    assert not model.load_state_dict(ours, strict=False).unexpected_keys
    return model


def theirs(kind: str, folder: Path) -> Any:
    """transformers' model with the adapter, loaded by PEFT for training."""
    return peft.PeftModel.from_pretrained(base(kind), folder, is_trainable=True).eval()


def loss(logits: Tensor, ids: Tensor) -> Tensor:
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize("kind", CASES)
def test_losses_and_gradients_are_pefts(kind: str, tmp_path: Path) -> None:
    lora = CASES[kind]
    model = adapted(kind, lora)
    write_adapter(tmp_path, updates(model), lora, CONFIGS[kind], "the-base")
    peer = theirs(kind, tmp_path)
    ids = token_ids(CONFIGS[kind], batch=2)
    ours = loss(model(ids), ids)
    ours.backward()
    expected = loss(peer(ids).logits, ids)
    expected.backward()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)
    gradients = {name: p.grad for name, p in peer.named_parameters() if p.grad is not None and "lora_" in name}
    assert len(gradients) == sum(p.requires_grad for p in model.parameters())
    peers = sum(float(grad.square().sum()) for grad in gradients.values())
    own = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad is not None for grad in own)
    assert sum(float(grad.square().sum()) for grad in own if grad is not None) == pytest.approx(peers, rel=1e-4)


@pytest.mark.parametrize("kind", ["llama3.1", "scout"])
def test_each_gradient_is_pefts(kind: str, tmp_path: Path) -> None:
    lora = CASES[kind]
    model = adapted(kind, lora)
    write_adapter(tmp_path, updates(model), lora, CONFIGS[kind], "the-base")
    peer = theirs(kind, tmp_path)
    ids = token_ids(CONFIGS[kind])
    loss(model(ids), ids).backward()
    loss(peer(ids).logits, ids).backward()
    module, other = model.layers[1].self_attn.q_proj, peer.base_model.model.model.layers[1].self_attn.q_proj
    torch.testing.assert_close(module.lora_A.grad, other.lora_A["default"].weight.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(module.lora_B.grad, other.lora_B["default"].weight.grad, rtol=1e-3, atol=1e-4)
    if lora.dora:
        magnitude = other.lora_magnitude_vector["default"].weight.grad
        torch.testing.assert_close(module.magnitude.grad, magnitude, rtol=1e-3, atol=1e-4)
    if kind == "scout":
        experts = model.layers[1].feed_forward.experts
        wrapper = peer.base_model.model.model.layers[1].feed_forward.experts
        flat = experts.down_lora_B.grad.mT.flatten(0, 1)
        torch.testing.assert_close(flat, wrapper.lora_A["default"].weight.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", CASES)
def test_a_peft_made_adapter_is_read(kind: str, tmp_path: Path) -> None:
    lora, config = CASES[kind], CONFIGS[kind]
    model = base(kind)
    linear = {"attention": ["q_proj", "k_proj", "v_proj", "o_proj"], "output": ["lm_head"], "q_proj": ["q_proj"],
              "feed_forward": ["gate_proj", "up_proj", "down_proj"]}  # fmt: skip
    fused = {"experts": ["experts.gate_up_proj", "experts.down_proj"], "router": ["router.weight"]}
    targets = lora.targets or ("attention", "feed_forward")
    settings = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, use_rslora=lora.rslora, use_dora=lora.dora, init_lora_weights=False,
        target_modules=[name for target in targets for name in linear.get(target, ())],
        target_parameters=[name for target in targets for name in fused.get(target, ())] or None,
    )  # fmt: skip
    torch.manual_seed(1)
    peer = peft.get_peft_model(model, settings).eval()
    peer.save_pretrained(tmp_path / "adapter")
    save(decoder(kind), config, None, tmp_path / "base")
    ids = token_ids(config)
    with torch.no_grad():
        expected = peer(ids).logits
        merged = load_source(open_merged(tmp_path / "adapter", tmp_path / "base"))
        torch.testing.assert_close(merged.model(ids), expected, rtol=1e-4, atol=1e-4)
        assert (merged.model(ids) - decoder(kind)(ids)).abs().max() > 0.01


def test_what_is_written_is_read(tmp_path: Path) -> None:
    for kind, lora in CASES.items():
        model = adapted(kind, lora)
        folder = tmp_path / kind
        folder.mkdir()
        write_adapter(folder, updates(model), lora, CONFIGS[kind], "the-base")
        back = read_adapter(folder, CONFIGS[kind], shapes_of(decoder(kind)))
        assert back.base == "the-base"
        again = decoder(kind)
        attach(again, lora, seed=9)
        set_updates(again, back.updates)
        ids = token_ids(CONFIGS[kind])
        assert torch.equal(again(ids), model(ids))


def split(updates: Mapping[str, Update]) -> dict[str, Tensor]:
    """An adapter of fused experts as if each had been adapted for itself."""
    tensors: dict[str, Tensor] = {}
    for name, update in updates.items():
        module = name.rpartition(".")[0]
        halves = ("down",) if name.endswith("down_proj") else ("gate", "up")
        for half, b in zip(halves, update.b.chunk(len(halves), 1), strict=True):
            for expert in range(len(b)):
                key = f"base_model.model.model.{module}.{expert}.{half}_proj"
                tensors[f"{key}.lora_A.weight"] = update.a[expert].clone()
                tensors[f"{key}.lora_B.weight"] = b[expert].contiguous()
    return tensors


def test_experts_adapted_one_by_one_are_fused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    lora = Lora(rank=2, alpha=3, targets=("experts",))
    model = adapted("scout", lora)
    write_adapter(tmp_path, updates(model), lora, CONFIGS["scout"], "the-base")
    save_file(split(updates(model)), tmp_path / "adapter_model.safetensors")
    back = read_adapter(tmp_path, CONFIGS["scout"], shapes_of(decoder("scout")))
    for name, update in updates(model).items():
        weight = decoder("scout").get_parameter(name)
        torch.testing.assert_close(back.updates[name].merged(weight), update.merged(weight))


@pytest.mark.parametrize("kind", CASES)
def test_nothing_changes_before_training_and_when_switched_off(kind: str) -> None:
    ids = token_ids(CONFIGS[kind])
    with torch.no_grad():
        base = decoder(kind)(ids)
        fresh = decoder(kind)
        names = attach(fresh, CASES[kind], seed=0)
        torch.testing.assert_close(fresh(ids), base, rtol=1e-5, atol=1e-5)
        model = adapted(kind, CASES[kind])
        assert (model(ids) - base).abs().max() > 0.01
        with switched_off(model):
            assert torch.equal(model(ids), base)
    assert set(kinds(names)) <= set(ALL)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_alpha": None}, "lora_alpha must be a number"),
    ],
)
def test_other_kinds_of_adapters_are_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    import json

    lora = CASES["llama2"]
    write_adapter(tmp_path, updates(adapted("llama2", lora)), lora, CONFIGS["llama2"], "the-base")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(PunaError, match=words):
        read_adapter(tmp_path, CONFIGS["llama2"], shapes_of(decoder("llama2")))


def test_another_models_adapter_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path, updates(adapted("scout", CASES["scout"])), CASES["scout"], CONFIGS["scout"], "the-base")
    with pytest.raises(PunaError, match=r"does not have|another model's adapter"):
        read_adapter(tmp_path, CONFIGS["llama2"], shapes_of(decoder("llama2")))
    save(decoder("llama2"), CONFIGS["llama2"], None, tmp_path / "base")
    with pytest.raises(PunaError, match="adapter of the-base"):
        open_merged(tmp_path)
    assert open_source(tmp_path / "base").config == CONFIGS["llama2"]
