"""Meta's quantised releases equal the same weights in float32, and keep their bits when packed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from meta_bits_writers import edit, write_experts, write_fp8_dense, write_integers
from puna.checkpoint import Loaded, Source, load_source, open_source
from puna.errors import PunaError
from puna.model.quantized import Float8, Quantized, plain

torch.set_num_threads(1)
# wide enough for groups of 128 in each of two ranks
WIDE = tiny.CONFIGS["scout"].with_(hidden_size=128, head_dim=32, expert_intermediate_size=256)


def both(folder: Path) -> tuple[Source, Loaded]:
    """The source in few bits, and the model of the float32 folder, which must be equal."""
    source = open_source(folder)
    loaded, wide = load_source(source), load_source(open_source(folder.with_name(folder.name + "-plain")))
    weights = loaded.model.state_dict()
    assert weights.keys() == wide.model.state_dict().keys()
    for name, weight in wide.model.state_dict().items():
        assert torch.equal(weights[name], weight), name
    return source, wide


@pytest.mark.parametrize("kind", ["llama3.1", "llama3.2"])
def test_spinquant(kind: str, tmp_path: Path) -> None:
    write_integers(tmp_path / "m", tiny.decoder(kind))
    source, wide = both(tmp_path / "m")
    for name, weight in wide.model.state_dict().items():
        packed = source.read_packed(name)
        if weight.ndim == 1:
            assert isinstance(packed, torch.Tensor)
            continue
        assert isinstance(packed, Quantized)
        per_row = name in ("embed_tokens.weight", "lm_head.weight")
        assert (packed.bits, packed.group) == ((8, 32) if per_row else (4, 16))
        assert torch.equal(packed.dequantize(), weight), name  # rows of q and k in the same order as their scales


@pytest.mark.parametrize(("zeros", "bits"), [(3, 8), (-5, 8)])
def test_zero_points_are_taken_off_in_eight_bits(zeros: int, bits: int, tmp_path: Path) -> None:
    write_integers(tmp_path / "m", tiny.decoder("llama3.1"), zeros=zeros)
    source, wide = both(tmp_path / "m")
    packed = source.read_packed("layers.1.self_attn.k_proj.weight")
    assert isinstance(packed, Quantized)
    assert packed.bits == bits
    assert torch.equal(packed.dequantize(), wide.model.state_dict()["layers.1.self_attn.k_proj.weight"])


def test_qlora_is_merged(tmp_path: Path) -> None:
    write_integers(tmp_path / "m", tiny.decoder("llama3.1"), rank=4)
    source, wide = both(tmp_path / "m")
    weight = wide.model.state_dict()["layers.1.self_attn.q_proj.weight"]
    packed = source.read_packed("layers.1.self_attn.q_proj.weight")
    assert isinstance(packed, Quantized)
    assert (packed.bits, packed.group) == (8, 32)
    assert (packed.dequantize() - weight).abs().max() < weight.abs().max() / 200
    assert "14 weights with QLoRA adaptors merged" in source.packed_notes[0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_fp8_feed_forward(ranks: int, tmp_path: Path) -> None:
    write_fp8_dense(tmp_path / "m", tiny.decoder(tiny.CONFIGS["llama3.1"].with_(num_layers=4)), ranks)
    source, wide = both(tmp_path / "m")
    weights = wide.model.state_dict()
    for name in ("gate_proj", "up_proj", "down_proj"):
        name = f"layers.1.feed_forward.{name}.weight"
        packed = source.read_packed(name)
        if ranks == 2 and "down" in name:
            assert isinstance(packed, Quantized)
            assert packed.bits == 8
            assert "a scale a row and rank" in source.packed_notes[0]
        else:
            assert isinstance(packed, Float8)
            assert torch.equal(packed.dequantize(), weights[name])
    assert isinstance(source.read_packed("layers.0.feed_forward.up_proj.weight"), torch.Tensor)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ["fp8", "int4"])
def test_experts(kind: str, ranks: int, tmp_path: Path) -> None:
    write_experts(tmp_path / "m", tiny.decoder(WIDE), ranks, kind)
    source, wide = both(tmp_path / "m")
    weights = wide.model.state_dict()
    for name in ("gate_up_proj", "down_proj"):
        name = f"layers.1.feed_forward.experts.{name}"
        packed = source.read_packed(name)
        assert len(packed) == 4
        if kind == "fp8" and ranks == 2 and "down" in name:
            assert all(isinstance(one, Quantized) and one.bits == 8 for one in packed)
            continue
        for one, weight in zip(packed, weights[name], strict=True):
            assert isinstance(one, Float8 if kind == "fp8" else Quantized)
            assert torch.equal(plain(one), weight.T)
        if kind == "int4":
            assert (packed[0].bits, packed[0].group) == (4, 128)
    assert isinstance(source.read_packed("layers.0.feed_forward.experts.down_proj"), torch.Tensor)


def nan(shard: dict[str, Any]) -> None:
    shard["layers.0.attention.wq.scales"][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layers.0.attention.wq.scales"), "attention.wq.weight has dtype torch.int8 and no scales"),
        (lambda s: s.update({"layers.0.attention.wq.scales": torch.ones(32, 3)}), "needs [32, 2]"),
        (nan, "attention.wq.scales holds NaN"),
        (lambda s: s["layers.0.attention.wq.weight"].fill_(9), "not of 4 bits"),
        (lambda s: s.update({"layers.0.attention.wq.weight": torch.ones(32, 32)}), "where an int8 matrix belongs"),
        (lambda s: s.update({"layers.0.attention.wq.zeros": torch.ones(3)}), "wq.zeros has shape [3]"),
        (lambda s: s.update({"layers.0.bad.scales": torch.ones(3)}), "not part of this architecture"),
    ],
)
def test_damaged(change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path) -> None:
    write_integers(tmp_path / "m", tiny.decoder("llama3.1"))
    file = tmp_path / "m" / "consolidated.00.pth"
    shard = torch.load(file)
    change(shard)
    torch.save(shard, file)
    with pytest.raises(PunaError) as caught:
        load_source(open_source(tmp_path / "m"))
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_args": {"scheme": "int2", "group_size": 16}}, "scheme is 'int2'; supported is 'int4_weight"),
        ({"quantization_args": {"scheme": "int4_weight_int8_dynamic_activation"}}, "group_size is missing"),
        ({"quantization_args": None}, "params.json has no quantization_args"),
        ({"lora_args": None}, "params.json has no lora_args"),
        ({"quantization_args": None, "lora_args": {"rank": 1, "scale": 1}}, "lora_args stand without"),
    ],
)
def test_params_that_do_not_say_enough(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_integers(tmp_path / "m", tiny.decoder("llama3.1"), rank=2)
    edit(tmp_path / "m", **({"lora_args": None} | changes))
    with pytest.raises(PunaError) as caught:
        load_source(open_source(tmp_path / "m"))
    assert message in str(caught.value)


def test_side_file_of_another_model(tmp_path: Path) -> None:
    write_experts(tmp_path / "m", tiny.decoder(WIDE), 1, "fp8")
    side = tmp_path / "m" / "fp8_scales_0.pt"
    torch.save({key: value[:, :3] for key, value in torch.load(side).items()}, side)
    with pytest.raises(PunaError, match=r"fp8_scales_0.pt, entry layers.1.*needs \[4, 256\]"):
        load_source(open_source(tmp_path / "m"))
    side.unlink()
    with pytest.raises(PunaError, match=r"dtype torch.float8_e4m3fn and no scales"):
        load_source(open_source(tmp_path / "m"))
