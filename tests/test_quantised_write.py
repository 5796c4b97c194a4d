"""Weights in few bits are written as others read them: the compressed-tensors package and transformers are asked."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import tiny
from checkpoint_writers import split_experts
from compressed_writers import write_raw
from puna.checkpoint import load_source, open_source, save
from puna.checkpoint.fewbits import quantised
from puna.checkpoint.named import named_weights
from puna.checkpoint.ready import load_ready
from puna.checkpoint.safetensors_write import write_weights
from puna.cli.main import app
from puna.errors import PunaError
from puna.model.native import kernels
from puna.model.quantized import Float8, Quantized, Weight, plain, stored_bits

torch.set_num_threads(1)
KINDS = ["llama3.1", "llama3.2", "scout", "maverick"]


def few(kind: str, bits: int) -> dict[str, Weight | list[Weight]]:
    """A tiny model's weights; 64 wide, so that rows are whole groups."""
    config = tiny.CONFIGS[kind].with_(hidden_size=64, head_dim=16, intermediate_size=96)
    state = tiny.decoder(config, dtype=torch.bfloat16).state_dict()
    return {name: quantised(name, tensor, bits, config.tie_word_embeddings) for name, tensor in state.items()}


def written(
    path: Path,
    kind: str,
    weights: dict[str, Weight | list[Weight]],
    stated: torch.dtype = torch.bfloat16,
    **options: int,
) -> Path:
    config = tiny.CONFIGS[kind].with_(hidden_size=64, head_dim=16, intermediate_size=96)
    return write_weights(weights.items(), config, None, path / "m", stated, **options)


def equal(one: Weight | list[Weight], other: Weight | list[Weight]) -> bool:
    if isinstance(one, list):
        return isinstance(other, list) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, Quantized):
        assert isinstance(other, Quantized)
        return (one.bits, one.group, one.scales.dtype) == (other.bits, other.group, other.scales.dtype) and bool(
            torch.equal(one.values, other.values) and torch.equal(one.scales, other.scales)
        )
    if isinstance(one, Float8):
        assert isinstance(other, Float8)
        return torch.equal(one.dequantize(), other.dequantize())
    assert isinstance(other, torch.Tensor)
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_bits_come_back(bits: int, kind: str, tmp_path: Path) -> None:
    weights = few(kind, bits)
    source = open_source(written(tmp_path, kind, weights, max_shard_bytes=20_000))
    assert len(list((tmp_path / "m").glob("model-*-of-*.safetensors"))) > 2
    assert source.packed_notes == ()
    for name, weight in weights.items():
        assert equal(source.read_packed(name), weight), name
    for name in ("layers.0.input_layernorm.weight", "layers.1.feed_forward.router.weight"):
        assert isinstance(weights.get(name, torch.empty(0)), torch.Tensor)


def test_8_bit_floats_and_integers_side_by_side(tmp_path: Path) -> None:
    weights = few("llama3.1", 4)
    for name in ("layers.0.feed_forward.up_proj.weight", "layers.0.self_attn.k_proj.weight"):
        shape = weights[name].shape
        weights[name] = Float8(torch.randn(shape).to(torch.float8_e4m3fn), torch.rand(shape[0], 1) + 0.5)
    source = open_source(written(tmp_path, "llama3.1", weights))
    for name, weight in weights.items():
        assert equal(source.read_packed(name), weight), name
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "mixed-precision"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_reads_every_module(bits: int, kind: str, tmp_path: Path) -> None:
    """The package's own configuration class, its matching of names and its decompressor, module by module."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_targets

    path = written(tmp_path, kind, few(kind, bits))
    stored = load_file(path / "model.safetensors")
    config = QuantizationConfig.model_validate(json.loads((path / "config.json").read_text())["quantization_config"])
    schemes = {target: scheme for scheme in config.config_groups.values() for target in scheme.targets}
    model = load_source(open_source(path), dtype=torch.float32).model
    expected = split_experts(model) | {"lm_head.weight": model.head_weight.detach()}
    found = 0
    for name, weight in expected.items():
        module = name.removesuffix(".weight")
        parts = {key.rpartition(".")[2]: value for key, value in stored.items() if key.rpartition(".")[0] == module}
        if "weight_scale" not in parts:
            assert name in stored or name == "model.embed_tokens.weight"
            continue
        linear = torch.nn.Linear(1, 1)
        assert module not in config.ignore
        scheme = schemes[match_targets(module, linear, schemes)[0]]
        compressor = BaseCompressor.get_value_from_registry(scheme.format or config.format)
        parts["weight_scale"] = parts["weight_scale"].float()
        assert torch.equal(compressor.decompress(parts, scheme)["weight"], weight.float()), name
        found += 1
    assert found > 14


def test_a_tied_head_is_found_again_but_no_other(tmp_path: Path) -> None:
    path = written(tmp_path, "llama3.2", few("llama3.2", 4))
    assert json.loads((path / "config.json").read_text())["tie_word_embeddings"] is False
    assert open_source(path).config.tie_word_embeddings
    file = path / "model.safetensors"
    stored = {name: tensor.clone() for name, tensor in load_file(file).items()}
    stored["model.embed_tokens.weight"][-1, -1] += 0.5
    write_raw(file, stored)  # as any other writer does, without the words that puna puts into the header
    changed = open_source(path)
    assert not changed.config.tie_word_embeddings
    assert torch.equal(changed.read("embed_tokens.weight"), stored["model.embed_tokens.weight"])


@pytest.mark.parametrize("kind", ["llama3.1", "llama3.2"])
@pytest.mark.parametrize("bits", [4, 8])
def test_transformers_computes_the_same(bits: int, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    path = written(tmp_path, kind, few(kind, bits), torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ours = load_source(open_source(path), dtype=torch.float32).model
    ids = tiny.token_ids(ours.config)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantize", [None, "int4", "int8"])
def test_a_packed_model_is_saved_with_the_bits_it_has(quantize: str | None, kind: str, tmp_path: Path) -> None:
    """Saved and loaded again it holds the same weights, bit for bit, and computes the same."""
    config = tiny.CONFIGS[kind].with_(hidden_size=64, head_dim=16, intermediate_size=96)
    plain_folder = save(tiny.decoder(config, dtype=torch.bfloat16), config, None, tmp_path / "plain")
    first = load_ready(open_source(plain_folder), quantize=quantize)
    again = load_ready(open_source(save(first.model, first.config, None, tmp_path / "again")))
    ids = tiny.token_ids(config)
    with torch.no_grad():
        assert torch.equal(first.model(ids), again.model(ids))
    before, after = dict(named_weights(first.model)), dict(named_weights(again.model))
    assert before.keys() == after.keys() == dict(named_weights(tiny.decoder(config))).keys()
    for name, weight in before.items():
        if name == "embed_tokens.weight" and not config.tie_word_embeddings:
            continue  # other readers know no embedding in few bits
        assert equal(weight, after[name]), name


@pytest.mark.parametrize("kernels", [True, False])
def test_weights_are_named_however_they_are_held(
    kernels: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        monkeypatch.setattr("puna.model.packed.kernels", lambda: None)
    weights = few("scout", 4)
    shape = weights["layers.0.self_attn.o_proj.weight"].shape
    weights["layers.0.self_attn.o_proj.weight"] = Float8(
        torch.randn(shape).to(torch.float8_e4m3fn), torch.rand(shape[0], 1)
    )
    source = open_source(written(tmp_path, "scout", weights))
    for name, weight in named_weights(load_ready(source).model):
        assert equal(weight, source.read_packed(name)), name


def exported(path: Path, out: str, *options: str) -> str:
    result = CliRunner().invoke(app, ["export", str(path), "--out", str(path.parent / out), *options])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("kind", ["llama3.2", "scout"])
def test_export_quantises_and_keeps_bits(kind: str, tmp_path: Path) -> None:
    """The same weights as a model that is quantised on load; exported again they stay, and --type makes floats."""
    config = tiny.CONFIGS[kind].with_(hidden_size=64, head_dim=16, intermediate_size=96)
    folder = save(tiny.decoder(config, dtype=torch.bfloat16), config, None, tmp_path / "plain")
    exported(folder, "few", "--quantize", "int4")
    weights = dict(named_weights(load_ready(open_source(folder), quantize="int4").model))
    few_source = open_source(tmp_path / "few")
    for name, weight in weights.items():
        if name != "embed_tokens.weight" or config.tie_word_embeddings:
            found = few_source.read_packed(name)
            if kernels() is None and name == "embed_tokens.weight":  # PyTorch looks rows up in floats only
                found = plain(found).to(torch.bfloat16)  # type: ignore[arg-type]
            assert equal(weight, found), name
    exported(tmp_path / "few", "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "few" / "model.safetensors"
    ).read_bytes()
    exported(tmp_path / "few", "floats", "--type", "F32")
    assert "quantization_config" not in json.loads((tmp_path / "floats" / "config.json").read_text())
    floats = open_source(tmp_path / "floats")
    for name in weights:
        assert torch.equal(floats.read(name), few_source.read(name).float()), name


@pytest.mark.filterwarnings("ignore:llama.cpp")
def test_export_to_gguf_and_back_keeps_integers(tmp_path: Path) -> None:
    config = tiny.CONFIGS["llama3.2"].with_(hidden_size=64, head_dim=16, intermediate_size=96)
    folder = save(tiny.decoder(config, dtype=torch.bfloat16), config, None, tmp_path / "plain")
    exported(folder, "few", "--quantize", "int8")
    exported(tmp_path / "few", "few.gguf", "--format", "gguf", "--type", "Q8_0")
    few_source, gguf = open_source(tmp_path / "few"), open_source(tmp_path / "few.gguf")
    for name in few_source.shapes():
        one, other = few_source.read_packed(name), gguf.read_packed(name)
        if isinstance(one, Quantized):
            assert isinstance(other, Quantized)
            assert torch.equal(one.values, other.values), name
    result = CliRunner().invoke(app, ["export", str(folder), "--out", "x", "--format", "gguf", "--quantize", "int4"])
    assert isinstance(result.exception, PunaError)
    assert "--type Q4_0" in str(result.exception)


@pytest.mark.filterwarnings("ignore:llama.cpp")
@pytest.mark.parametrize("kind", ["llama3.1", "llama3.2", "scout"])
def test_export_to_gguf_keeps_the_files_own_bits(kind: str, tmp_path: Path) -> None:
    """Without --type: 4 bits in Q4_0, the head's 6 in Q8_0, floats as they are; llama.cpp's float32 for the vectors."""
    config = tiny.CONFIGS[kind].with_(hidden_size=64, head_dim=16, intermediate_size=96)
    folder = save(tiny.decoder(config, dtype=torch.bfloat16), config, None, tmp_path / "plain")
    exported(folder, "few", "--quantize", "int4")
    said = exported(tmp_path / "few", "few.gguf", "--format", "gguf")
    assert "rounded anew" not in said
    few_source, gguf = open_source(tmp_path / "few"), open_source(tmp_path / "few.gguf")
    for name in few_source.shapes():
        weight, found = few_source.read_packed(name), gguf.read_packed(name)
        for one, other in zip(*(w if isinstance(w, list) else [w] for w in (weight, found)), strict=True):
            if isinstance(one, Quantized):
                assert isinstance(other, Quantized)
                assert stored_bits(one.bits) == other.bits
                assert torch.equal(one.values, other.values), name
                assert torch.equal(one.dequantize(), other.dequantize()), name
            else:
                assert isinstance(one, torch.Tensor)
                assert isinstance(other, torch.Tensor)
                assert torch.equal(one.float(), other.float()), name


@pytest.mark.filterwarnings("ignore:llama.cpp")
def test_export_to_gguf_says_what_it_rounds(tmp_path: Path) -> None:
    weights = few("llama3.1", 8)
    name = "layers.1.feed_forward.up_proj.weight"
    shape = weights[name].shape  # type: ignore[union-attr]
    scales = torch.full((shape[0], 1), 0.1)  # no float16
    weights[name] = Quantized(8, torch.randint(-127, 128, shape, dtype=torch.int8), scales, shape[1])
    path = written(tmp_path, "llama3.1", weights)
    said = exported(path, "m.gguf", "--format", "gguf")
    assert "1 weights in few bits were rounded anew to Q8_0, which can't hold" in said
    assert name in said
    floats = Float8(torch.randn(shape).to(torch.float8_e4m3fn), torch.rand(shape[0], 1) + 0.5)
    path = written(tmp_path / "8", "llama3.1", weights | {name: floats})
    assert "rounded anew to BF16" in exported(path, "m.gguf", "--format", "gguf")
    exact = open_source(path).read(name)
    assert torch.equal(open_source(path.parent / "m.gguf").read(name), exact.bfloat16().float())


@pytest.mark.parametrize("kind", ["llama3.1", "llama3.2"])  # a head of its own, and one tied to the embedding
def test_a_head_of_six_bits_is_stored_in_eight_and_held_in_six(kind: str, tmp_path: Path) -> None:
    weights = few(kind, 4)
    name = "lm_head.weight" if "lm_head.weight" in weights else "embed_tokens.weight"
    head = weights[name]
    assert isinstance(head, Quantized)
    assert head.bits == 6
    read = open_source(written(tmp_path / "six", kind, weights)).read_packed(name)
    assert isinstance(read, Quantized)
    assert (read.bits, read.group) == (6, head.group)
    assert torch.equal(read.values, head.values)
    wide = head.values.clone()
    wide[3, 5] = 32  # somebody else's head under our metadata
    weights[name] = Quantized(6, wide, head.scales, head.group)
    kept = open_source(written(tmp_path / "eight", kind, weights)).read_packed(name)
    assert isinstance(kept, Quantized)
    assert kept.bits == 8
    assert torch.equal(kept.values, wide)
