"""compressed-tensors and fbgemm_fp8 folders: every scheme gives the bits and the weights that stand in the file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import tiny
from checkpoint_writers import split_experts
from compressed_writers import Scheme, pack, write_compressed, write_raw
from puna.checkpoint import load_source, open_source
from puna.errors import PunaError
from puna.model.packed import Panels
from puna.model.quantized import Float8, Quantized, Words, by_rows, stacked
from puna.model.words import pack_int32, unpack_int32

torch.set_num_threads(1)

SCHEMES = {
    "int4 group 16": Scheme("pack-quantized", 4, strategy="group", group=16),
    "int4 group 32, float16 scales": Scheme("pack-quantized", 4, strategy="group", group=32, scales=torch.float16),
    "int4 channel": Scheme("pack-quantized", 4),
    "int4 group with zeros": Scheme("pack-quantized", 4, strategy="group", group=16, symmetric=False),
    "int8 group": Scheme("pack-quantized", 8, strategy="group", group=32),
    "int8 plain": Scheme("int-quantized", scales=torch.float32),
    "int8 tensor": Scheme("naive-quantized", strategy="tensor"),
    "int4 in bytes with zeros": Scheme("naive-quantized", 4, symmetric=False),
    "fp8 channel": Scheme("float-quantized", type="float"),
    "fp8 tensor": Scheme("naive-quantized", type="float", strategy="tensor", scales=torch.float32),
}
REPACKED = {
    "int4 group 8": Scheme("pack-quantized", 4, strategy="group", group=8),
    "int8 with zeros": Scheme("int-quantized", symmetric=False),
    "fp8 blocks": Scheme("float-quantized", type="float", strategy="block", block=(16, 16)),
}


@given(st.integers(1, 4), st.integers(1, 75), st.sampled_from([4, 8]), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_packing_is_bit_after_bit(rows: int, columns: int, bits: int, random: Any) -> None:
    low = -(1 << bits - 1)
    values = torch.tensor([[random.randrange(low, -low) for _ in range(columns)] for _ in range(rows)]).to(torch.int8)
    packed = pack_int32(values, bits)
    assert torch.equal(packed, pack(values.numpy(), bits))
    assert torch.equal(unpack_int32(packed, bits, columns), values)


def test_unpacking_in_several_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puna.model.words._CHUNK", 64)
    values = torch.randint(-8, 8, (7, 40), dtype=torch.int8)
    assert torch.equal(unpack_int32(pack_int32(values, 4), 4, 40), values)


@pytest.mark.parametrize("kind", ["llama3.1", "maverick"])
@pytest.mark.parametrize("scheme", [*SCHEMES, *REPACKED])
def test_weights_are_those_in_the_file(scheme: str, kind: str, tmp_path: Path) -> None:
    expected = write_compressed(tmp_path, tiny.decoder(kind), (SCHEMES | REPACKED)[scheme])
    loaded = split_experts(load_source(open_source(tmp_path)).model)
    assert loaded.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(loaded[name], weight), name


@pytest.mark.parametrize("kind", ["llama3.1", "scout"])
@pytest.mark.parametrize("name", SCHEMES)
def test_bits_stay_packed(name: str, kind: str, tmp_path: Path) -> None:
    scheme = SCHEMES[name]
    write_compressed(tmp_path, tiny.decoder(kind), scheme)
    source = open_source(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    found = source.read_packed("layers.0.self_attn.q_proj.weight")
    at = "model.layers.0.self_attn.q_proj"
    scales = stored[f"{at}.weight_scale"]
    if scheme.type == "float":
        assert isinstance(found, Float8)
        assert torch.equal(found.values.view(torch.uint8), stored[f"{at}.weight"].view(torch.uint8))
        assert torch.equal(found.scales, scales.float().expand(32, 1))
        return
    assert isinstance(found, Quantized)
    assert found.bits == (scheme.bits if scheme.symmetric else 8)
    assert found.group == (scheme.group or 32)
    assert torch.equal(found.scales, scales.expand(32, -1))
    assert found.scales.dtype == scheme.scales
    assert torch.equal(found.dequantize(), source.read("layers.0.self_attn.q_proj.weight"))
    if scheme.symmetric and scheme.format == "pack-quantized":
        assert torch.equal(pack(found.values.numpy(), scheme.bits), stored[f"{at}.weight_packed"])


def test_experts_come_one_by_one_with_outputs_as_rows(tmp_path: Path) -> None:
    model = tiny.decoder("scout")
    write_compressed(tmp_path, model, SCHEMES["int4 group 16"])
    source = open_source(tmp_path)
    for name in ("gate_up_proj", "down_proj"):
        packed = source.read_packed(f"layers.1.feed_forward.experts.{name}")
        plain = source.read(f"layers.1.feed_forward.experts.{name}")
        assert len(packed) == len(plain) == 4
        for one, weight in zip(packed, plain, strict=True):
            assert isinstance(one, Quantized)
            assert one.bits == 4
            assert torch.equal(one.dequantize(), weight.T)


@pytest.mark.parametrize("name", REPACKED)
def test_what_our_classes_cannot_say_becomes_int8(name: str, tmp_path: Path) -> None:
    write_compressed(tmp_path, tiny.decoder("llama3.1"), REPACKED[name])
    source = open_source(tmp_path)
    exact = source.read("layers.0.feed_forward.down_proj.weight")
    packed = source.read_packed("layers.0.feed_forward.down_proj.weight")
    assert isinstance(packed, Quantized)
    assert (packed.bits, packed.group) == (8, 32)
    assert (packed.dequantize() - exact).abs().max() <= exact.abs().max() / 127
    assert source.packed_notes


def test_notes_say_what_was_left_out_or_changed(tmp_path: Path) -> None:
    write_compressed(tmp_path, tiny.decoder("llama3.1"), REPACKED["int8 with zeros"])
    change(tmp_path, lambda s: s | {"model.layers.0.self_attn.k_proj.input_scale": torch.ones(1)})
    source = open_source(tmp_path)
    assert source.packed_notes == ("14 weights with zero points: packed as int8, exactly where value - zero fits.",)
    for part, note in zip(("Activations are not quantised", "Left out 1 scales"), source.notes, strict=True):
        assert note.startswith(part)


def test_fbgemm(tmp_path: Path) -> None:
    """Rows with a scale each in the feed-forward of inner layers, the bound of the activations beside it."""
    ignore = r".*(lm_head|norm|embed|self_attn|layers\.0)"
    expected = write_compressed(tmp_path, tiny.decoder("llama3.1"), SCHEMES["fp8 channel"], ignore)
    edit(tmp_path, lambda c: c.update(quantization_config={"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0,
                                                           "modules_to_not_convert": ["model.layers.0"]}))  # fmt: skip
    change(tmp_path, lambda s: s | {"model.layers.1.mlp.down_proj.input_scale_ub": torch.full((1,), 1200.0)})
    source = open_source(tmp_path)
    assert isinstance(source.read_packed("layers.1.feed_forward.down_proj.weight"), Float8)
    loaded = split_experts(load_source(source).model)
    for name, weight in expected.items():
        assert torch.equal(loaded[name], weight), name


def edit(folder: Path, how: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    how(config)
    (folder / "config.json").write_text(json.dumps(config))


def change(folder: Path, how: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    write_raw(folder / "model.safetensors", how(load_file(folder / "model.safetensors")))


AT = "model.layers.1.mlp.up_proj"


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda s: {key: value for key, value in s.items() if key != name}


def nan(tensor: Tensor) -> Tensor:
    tensor.view(-1)[1] = float("nan")
    return tensor


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (without(f"{AT}.weight_scale"), f"{AT}.weight_scale is missing"),
        (without(f"{AT}.weight_packed"), f"{AT}.weight_packed is missing"),
        (without(f"{AT}.weight_shape"), f"{AT}.weight_shape is missing"),
        (lambda s: s | {f"{AT}.weight_scale": s[f"{AT}.weight_scale"][:, :1]}, "has shape [48, 1], needs [48, 2]"),
        (lambda s: s | {f"{AT}.weight_scale": s[f"{AT}.weight_scale"][:3]}, "has shape [3, 2], needs [48, 2]"),
        (lambda s: s | {f"{AT}.weight_shape": torch.tensor([48, 40])}, "which does not hold [48, 40]"),
        (lambda s: s | {f"{AT}.weight_shape": torch.tensor([48])}, "weight_shape must hold two integers"),
        (lambda s: s | {f"{AT}.weight_packed": s[f"{AT}.weight_packed"].to(torch.int8)}, "has dtype I8, needs I32"),
        (lambda s: s | {f"{AT}.weight_scale": s[f"{AT}.weight_scale"].int()}, "has dtype I32, needs F64 or F32"),
        (lambda s: s | {f"{AT}.weight_scale": nan(s[f"{AT}.weight_scale"])}, f"{AT}.weight_scale holds NaN"),
        (lambda s: s | {"lm_head.weight": s["lm_head.weight"].to(torch.int8)}, "lm_head.weight: "),
    ],
)
def test_damaged_tensors(how: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str, tmp_path: Path) -> None:
    write_compressed(tmp_path, tiny.decoder("llama3.1"), SCHEMES["int4 group 16"])
    change(tmp_path, how)
    with pytest.raises(PunaError) as caught:
        load_source(open_source(tmp_path))
    assert message in str(caught.value)
    assert "model.safetensors" in str(caught.value)


def test_nan_in_fp8(tmp_path: Path) -> None:
    write_compressed(tmp_path, tiny.decoder("llama3.1"), SCHEMES["fp8 channel"])
    change(tmp_path, lambda s: s | {f"{AT}.weight": nan(s[f"{AT}.weight"].float()).to(torch.float8_e4m3fn)})
    with pytest.raises(PunaError, match=f"{AT}.weight holds NaN"):
        load_source(open_source(tmp_path))


def weights(config: dict[str, Any]) -> dict[str, Any]:
    return config["quantization_config"]["config_groups"]["group_0"]["weights"]


@pytest.mark.parametrize(
    ("how", "parts"),
    [
        (lambda c: weights(c).update(num_bits=3), ["num_bits is 3 of type 'int'", "not supported"]),
        (lambda c: weights(c).update(type="float", num_bits=4), ["num_bits is 4 of type 'float'"]),
        (lambda c: weights(c).update(actorder="group"), ["actorder is 'group'"]),
        (lambda c: weights(c).update(strategy="tensor_group"), ["'tensor_group'"]),
        (lambda c: weights(c).update(group_size=0), ["group_size must be positive"]),
        (lambda c: weights(c).update(group_size=12), ["weight_scale has shape"]),
        (lambda c: c["quantization_config"].update(format="nvfp4-pack-quantized"), ["nvfp4-pack-quantized"]),
        (lambda c: c["quantization_config"].update(config_groups={}), ["config_groups is missing"]),
        (lambda c: c["quantization_config"].update(quant_method="awq"), ["awq", "compressed-tensors"]),
        (lambda c: c["quantization_config"].update(ignore=["re:.*up_proj"]), ["up_proj", "no scheme, or ignores"]),
        (lambda c: c["quantization_config"].update(ignore=["re:("]), ["re:(", "pattern"]),
        (lambda c: c["quantization_config"].update(transform_config={"config_groups": {}}), ["transform_config"]),
        (lambda c: c["quantization_config"].update(sparsity_config={"format": "sparse-24"}), ["sparsity_config"]),
        (lambda c: c.pop("quantization_config"), ["weight_packed", "not part of this architecture"]),
    ],
)
def test_unknown_schemes_are_refused_by_name(how: Callable[[dict[str, Any]], Any], parts: list[str], tmp_path: Path
                                             ) -> None:  # fmt: skip
    write_compressed(tmp_path, tiny.decoder("llama3.1"), SCHEMES["int4 group 16"])
    edit(tmp_path, how)
    with pytest.raises(PunaError) as caught:
        load_source(open_source(tmp_path))
    for part in parts:
        assert part in str(caught.value)


def test_groups_of_modules_have_their_own_schemes(tmp_path: Path) -> None:
    """Names win over patterns, patterns over classes, whatever their order."""
    write_compressed(tmp_path, tiny.decoder("llama3.1"), SCHEMES["int8 group"])
    other = Scheme("pack-quantized", 8, strategy="channel").config([])["config_groups"]["group_0"]
    by_name = {"group_1": other | {"targets": ["re:.*q_proj"]}}
    edit(tmp_path, lambda c: c["quantization_config"]["config_groups"].update(by_name))
    edit(tmp_path, lambda c: weights(c).update(group_size=16))
    with pytest.raises(PunaError, match=r"layers\.0\.self_attn\.k_proj\.weight_scale has shape \[16, 1\], needs"):
        open_source(tmp_path)  # q_proj comes before it, and fits its own scheme
    edit(tmp_path, lambda c: weights(c).update(group_size=32))
    assert open_source(tmp_path).read_packed("layers.0.self_attn.q_proj.weight").group == 32


@pytest.mark.parametrize("bits", [4, 8])
def test_words_go_into_panels_without_being_unpacked(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The very bytes that unpacked values give; several pieces at a time."""
    values = torch.randint(-(1 << bits - 1), 1 << bits - 1, (48, 96), dtype=torch.int8)
    scales = torch.rand(48, 3).half()
    words = Words(bits, pack_int32(values, bits), 96, scales, 32)
    assert torch.equal(words.values, values)
    monkeypatch.setattr("puna.model.words._CHUNK", 256)
    monkeypatch.setattr("puna.model.quantized.unpack_int32", None)
    fresh = Words(bits, pack_int32(values, bits), 96, scales, 32)
    joined = by_rows(stacked([fresh, fresh]), lambda t: t[48:])
    assert torch.equal(Panels(joined).panels, Panels(Quantized(bits, values, scales, 32)).panels)
