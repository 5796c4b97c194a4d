"""Who holds what of a sharded model: by hand-computed numbers, by property, on the meta device, and from files."""

import json
import re
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner

import puna
from puna.checkpoint import open_source, save
from puna.checkpoint import shard as shard_module
from puna.checkpoint.ready import load_ready
from puna.checkpoint.safetensors_read import SafetensorsFile
from puna.checkpoint.shard import ShardSource
from puna.checkpoint.source import GenerationDefaults
from puna.cli.main import app
from puna.errors import PunaError
from puna.family.arithmetic import decoder_shapes
from puna.family.config import ModelConfig
from puna.family.members import get
from puna.family.shard_bytes import formats, kv_bytes_per_rank, weight_bytes_per_rank
from puna.family.sharding import Mesh, Sharding, fitting, mesh_for
from puna.model import Decoder
from puna.model.parallel import local_decoder
from puna.model.quantized import Float8, Weight, plain, quantize
from tiny import CONFIGS, decoder


def shape_of(name: str) -> ModelConfig:
    config = get(name).config
    assert config is not None
    return config


# 405B by hand: D 16384, F 53248, H 128, G 8, K 128, V 128256, 126 layers. Whole norms: (2 * 126 + 1) * 16384.
# A layer at 8 ranks: q and o 2 * 2048 * 16384, k and v 2 * 128 * 16384, gate, up, down 3 * 6656 * 16384.
NORMS_405B = 253 * 16_384
RANK_405B_8 = 126 * (2 * 2_048 + 2 * 128 + 3 * 6_656) * 16_384 + 2 * 16_032 * 16_384 + NORMS_405B
# at 16 ranks each key/value head is held twice: 2 * 128 rows again
RANK_405B_16 = 126 * (2 * 1_024 + 2 * 128 + 3 * 3_328) * 16_384 + 2 * 8_016 * 16_384 + NORMS_405B


@pytest.mark.parametrize(
    ("name", "mesh", "format", "expected"),
    [
        ("llama-3.1-405b", Mesh(8), "bf16", 2 * RANK_405B_8),
        ("llama-3.1-405b", Mesh(16), "bf16", 2 * RANK_405B_16),
        # 124 layers' feed-forward at one byte; float32 scales: 2 * 6656 rows of gate and up, 16384 of down
        ("llama-3.1-405b", Mesh(8), "fp8",
         2 * RANK_405B_8 - 124 * 3 * 6_656 * 16_384 + 124 * 4 * (2 * 6_656 + 16_384)),
        # linear layers at 4 bits and a float16 scale for 32 inputs, which is 4.5 bits; the vocabulary at 6 and 128
        ("llama-3.1-405b", Mesh(8), "int4",
         126 * (2 * 2_048 + 2 * 128 + 3 * 6_656) * 16_384 * 9 // 16 + 2 * 16_032 * 16_384 * 49 // 64 + 2 * NORMS_405B),
        # Maverick at 8: D 5120, H 40, G 8, K 128; 24 layers of 128 experts 8192 wide and one shared; 24 of 16384
        ("llama-4-maverick", Mesh(8, 8), "bf16", 2 * (
            48 * (2 * 640 + 2 * 128) * 5_120 + 24 * 3 * 2_048 * 5_120 + 24 * (16 * 3 * 8_192 + 3 * 1_024 + 128) * 5_120
            + 2 * 25_256 * 5_120 + 97 * 5_120)),
        # its experts dealt to 16 ranks, the rest still split over 8
        ("llama-4-maverick", Mesh(8, 16), "bf16", 2 * (
            48 * (2 * 640 + 2 * 128) * 5_120 + 24 * 3 * 2_048 * 5_120 + 24 * (8 * 3 * 8_192 + 3 * 1_024 + 128) * 5_120
            + 2 * 25_256 * 5_120 + 97 * 5_120)),
        # Scout at 4: 48 layers of 16 experts, all of them split in width
        ("llama-4-scout", Mesh(4), "bf16", 2 * (
            48 * (2 * 1_280 + 2 * 256) * 5_120 + 48 * (16 * 3 * 2_048 + 3 * 2_048 + 16) * 5_120
            + 2 * 50_512 * 5_120 + 97 * 5_120)),
    ],
)  # fmt: skip
def test_bytes_by_hand(name: str, mesh: Mesh, format: str, expected: int) -> None:
    config = shape_of(name)
    assert weight_bytes_per_rank(Sharding(config, mesh), formats(config)[format]) == expected


def test_fp8_maverick_is_as_large_as_its_release() -> None:
    """416.6 GB with the vision part's 1.74 GB: routed experts at one byte, all else at two."""
    config = shape_of("llama-4-maverick")
    experts = 24 * 128 * 3 * 5_120 * 8_192
    scales = 24 * 128 * 4 * (2 * 8_192 + 5_120)
    assert weight_bytes_per_rank(Sharding(config, Mesh()), formats(config)["fp8"]) == (
        experts + 2 * (400_711_848_960 - experts) + scales
    )


def test_cache_by_hand() -> None:
    # 2 (keys and values) * 126 layers * 128 wide * 2 bytes * heads
    config = shape_of("llama-3.1-405b")
    assert [kv_bytes_per_rank(Sharding(config, Mesh(n)), 1000) for n in (1, 4, 8, 16)] == [
        64_512_000 * heads for heads in (8, 2, 1, 1)
    ]
    # Scout: 12 layers see all 20,000 tokens, 36 a chunk of 8,192
    scout = Sharding(shape_of("llama-4-scout"), Mesh(4))
    assert kv_bytes_per_rank(scout, 20_000) == 2 * 2 * 128 * 2 * (12 * 20_000 + 36 * 8_192)


@pytest.mark.parametrize("bits", [4, 8])
def test_formats_are_those_of_the_quantiser(bits: int) -> None:
    weight = quantize(torch.randn(16, 512), bits)
    format = formats(CONFIGS["llama3.1"])[f"int{bits}"]
    assert (format.parts["attention"], format.scale_bits) == ((bits, weight.group), 8 * weight.scales.element_size())
    assert format.tensor_bytes("attention", (16, 512), False) == 16 * 512 * bits // 8 + weight.scales.nbytes


@st.composite
def shardings(draw: st.DrawFn) -> Sharding:
    """Any small shape with a mesh that fits it."""
    tensor, expert = draw(st.sampled_from([(1, 1), (2, 1), (4, 1), (2, 2), (4, 2), (4, 4), (2, 4), (1, 3), (3, 1)]))
    kv_heads = draw(st.sampled_from([tensor, 2 * tensor, *([tensor // 2] if tensor % 2 == 0 else [])]))
    moe = expert > 1 or draw(st.booleans())
    config = ModelConfig(
        architecture="llama4" if moe else "llama", vocab_size=draw(st.integers(8, 40)), hidden_size=8, num_layers=2,
        num_heads=max(kv_heads, tensor) * draw(st.integers(1, 3)), num_kv_heads=kv_heads, head_dim=4,
        intermediate_size=tensor * draw(st.integers(1, 5)), context_length=64,
        tie_word_embeddings=draw(st.booleans()), num_experts=expert * draw(st.integers(1, 3)) if moe else 0,
        expert_intermediate_size=tensor * draw(st.integers(1, 4)) if moe else 0,
        moe_layers=draw(st.sampled_from([(1,), (0, 1)])) if moe else (),
    )  # fmt: skip
    return Sharding(config, Mesh(tensor, expert))


@settings(max_examples=150, deadline=None)
@given(shardings())
def test_ranks_together_hold_everything_equally_often(sharding: Sharding) -> None:
    """Every element of every tensor is held by the same number of ranks: one, or as many as there are copies."""
    for name, shape in sharding.shapes.items():
        numbers = torch.arange(prod(shape)).view(shape)
        held: Counter[int] = Counter()
        for rank in range(sharding.mesh.ranks):
            part = shard_module.narrowed(numbers, sharding.cuts(name, rank))
            assert tuple(part.shape) == sharding.shape(name, rank)
            held.update(part.flatten().tolist())
        kind = sharding.rule(name).kind
        copies = {"whole": sharding.mesh.ranks, "experts": 1, "kv_heads": sharding.mesh.replicas * sharding.kv_copies}
        assert held == dict.fromkeys(range(prod(shape)), copies.get(kind, sharding.mesh.replicas)), name


@settings(max_examples=30, deadline=None)
@given(shardings())
def test_a_local_decoder_has_these_shapes(sharding: Sharding) -> None:
    for rank in range(sharding.mesh.ranks):
        local = local_decoder(sharding, rank)
        built = {name: tuple(parameter.shape) for name, parameter in local.named_parameters()}
        assert built == {name: sharding.shape(name, rank) for name in sharding.shapes}
        assert all(parameter.is_meta for parameter in local.parameters())


@pytest.mark.parametrize("name", ["llama-3.1-405b", "llama-4-maverick"])
def test_the_meta_device_counts_the_same_bytes(name: str) -> None:
    config = shape_of(name)
    sharding = Sharding(config, Mesh(8))
    with torch.device("meta"):
        held = sum(parameter.numel() for parameter in local_decoder(sharding, 7).parameters())
    assert 2 * held == weight_bytes_per_rank(sharding, formats(config)["bf16"])


def test_what_cannot_be_split_is_refused_with_what_fits() -> None:
    maverick, tiny = shape_of("llama-4-maverick"), CONFIGS["llama3.1"]
    for config, mesh, words in (
        (maverick, Mesh(16), ["40 query heads", "16 ranks", "1, 2, 4, 8.", "32, 64, 128"]),
        (maverick, Mesh(8, 12), ["one must be a multiple of the other"]),
        (maverick, Mesh(1, 3), ["128 experts can't be split over 3 ranks"]),
        (tiny, Mesh(2, 2), ["no experts"]),
        (tiny, Mesh(0), ["start at 1"]),
        (tiny.with_(num_heads=12, num_kv_heads=4), Mesh(6), ["4 key/value heads can neither"]),
        (tiny.with_(intermediate_size=47), Mesh(2), ["Feed-forward width 47"]),
        (CONFIGS["maverick"].with_(expert_intermediate_size=31), Mesh(2), ["Expert width 31"]),
        (tiny.with_(vocab_size=3), Mesh(4), ["vocabulary of 3"]),
    ):
        with pytest.raises(PunaError) as error:
            Sharding(config, mesh)
        assert all(word in str(error.value) for word in words), str(error.value)
    assert fitting(shape_of("llama-3.1-405b")) == (1, 2, 4, 8, 16, 32, 64, 128)
    assert fitting(shape_of("llama-4-scout")) == (1, 2, 4, 8)


def test_the_mesh_chosen_for_a_number_of_processes() -> None:
    maverick = shape_of("llama-4-maverick")
    assert [mesh_for(maverick, n) for n in (1, 8, 16, 32)] == [Mesh(), Mesh(8), Mesh(8, 16), Mesh(8, 32)]
    assert [mesh_for(maverick, 8, n) for n in (1, 2, 8)] == [Mesh(8), Mesh(8, 2), Mesh(8, 8)]
    assert mesh_for(shape_of("llama-3.1-405b"), 16) == Mesh(16)
    with pytest.raises(PunaError, match="128 query heads can't be split over 3"):
        mesh_for(shape_of("llama-3.1-405b"), 3)
    with pytest.raises(PunaError, match="must be a multiple"):
        mesh_for(maverick, 8, 3)


@pytest.mark.parametrize(("kind", "mesh"), [("llama3.1", Mesh(2)), ("scout", Mesh(4, 2)), ("llama3.2", Mesh(4))])
@pytest.mark.parametrize("format", ["safetensors", "gguf"])
def test_a_rank_loads_its_slices(kind: str, mesh: Mesh, format: str, tmp_path: Path) -> None:
    whole = decoder(kind)
    source = open_source(save(whole, whole.config, None, tmp_path / f"model.{format}", format=format))
    sharding = Sharding(source.config, mesh)
    for rank in range(mesh.ranks):
        share = ShardSource(source, sharding, rank)
        for name, weight in whole.state_dict().items():
            expected = shard_module.narrowed(weight, sharding.cuts(name, rank))
            assert share.shapes()[name] == tuple(expected.shape)
            read, packed = share.read(name), share.read_packed(name)
            assert read.untyped_storage().nbytes() == read.nbytes, "a view would keep the whole tensor"
            assert torch.equal(read, expected), (name, rank)
            assert torch.equal(torch.stack([plain(one).T for one in packed]) if isinstance(packed, list)
                               else plain(packed), expected), (name, rank)


def few_bits(weight: Tensor, bits: int) -> Weight:
    """A matrix in 4 or 8 bits, or for 0 in 8-bit floats."""
    if bits:
        return quantize(weight, bits)
    scales = weight.abs().amax(1, keepdim=True) / 448
    return Float8((weight / scales).to(torch.float8_e4m3fn), scales)


class FewBits:
    """A source whose matrices are in few bits: experts one by one."""

    def __init__(self, model: Decoder, bits: int) -> None:
        self.config, self.path, self.format = model.config, Path("memory"), "test"
        self.generation, self.notes, self.packed_notes = GenerationDefaults(), (), ()
        self.weights: dict[str, Any] = {}
        for name, weight in model.state_dict().items():
            if weight.ndim == 3:
                self.weights[name] = [few_bits(expert.T, bits) for expert in weight]
            else:
                self.weights[name] = few_bits(weight, bits) if weight.ndim == 2 else weight

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return decoder_shapes(self.config)

    def where(self, name: str) -> str:
        return name

    def tokenizer(self) -> None:
        return None

    def read_packed(self, name: str) -> Any:
        return self.weights[name]

    def read(self, name: str) -> Tensor:
        weight = self.weights[name]
        return torch.stack([plain(one).T for one in weight]) if isinstance(weight, list) else plain(weight)


@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize(("kind", "mesh"), [("wide", Mesh(2)), ("llama3.1", Mesh(4)), ("scout", Mesh(4, 2))])
def test_few_bits_are_cut_without_a_change_of_value(kind: str, mesh: Mesh, bits: int) -> None:
    """Also where a cut goes through a group of inputs that share a scale: its halves then have a scale each."""
    wide = CONFIGS["llama3.1"].with_(hidden_size=64, head_dim=16, intermediate_size=128)
    source = FewBits(decoder(wide if kind == "wide" else kind), bits)
    sharding = Sharding(source.config, mesh)
    for rank in range(mesh.ranks):
        share = ShardSource(source, sharding, rank)
        for name in sharding.shapes:
            expected, packed = share.read(name), share.read_packed(name)
            if isinstance(packed, list):
                assert all(type(one) is type(source.weights[name][0]) for one in packed)
                value = torch.stack([plain(one).T for one in packed])
            else:
                value = plain(packed)
            # a cut finer than our kernels' groups of 16 inputs is quantised again, in 8 bits
            exact = kind == "wide" or not bits or not any(cut.axis for cut in sharding.cuts(name, rank))
            torch.testing.assert_close(value, expected, rtol=0, atol=0 if exact else 0.02)


def test_safetensors_are_read_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of other ranks are not read, and no more than a block of the columns of others is ever held."""
    whole = decoder("llama3.1")
    source = open_source(save(whole, whole.config, None, tmp_path / "model"))
    sharding = Sharding(source.config, Mesh(2))
    monkeypatch.setattr(shard_module, "_BLOCK", 256)
    reads: list[tuple[str, int]] = []
    original = SafetensorsFile._read

    def spy(self: SafetensorsFile, name: str, shape: tuple[int, ...], *rest: Any) -> Tensor:
        reads.append((name, prod(shape)))
        return original(self, name, shape, *rest)

    monkeypatch.setattr(SafetensorsFile, "_read", spy)
    share = ShardSource(source, sharding, 1)
    for name in sharding.shapes:
        share.read_packed(name)
    read: Counter[str] = Counter()
    for name, elements in reads:
        read[name] += elements
    sizes = {f"model.{name}".replace("feed_forward", "mlp"): prod(shape) for name, shape in sharding.shapes.items()}
    sizes["lm_head.weight"] = sizes.pop("model.lm_head.weight")
    for name, size in sizes.items():
        by_columns = name.endswith(("o_proj.weight", "down_proj.weight"))
        assert read[name] == (size if by_columns or "norm" in name else size // 2), name
        assert not by_columns or max(elements for each, elements in reads if each == name) <= 256


def test_a_damaged_slice_is_reported(tmp_path: Path) -> None:
    whole = decoder("llama3.1")
    with torch.no_grad():
        whole.layers[1].self_attn.q_proj.weight[20, 3] = float("nan")
    source = open_source(save(whole, whole.config, None, tmp_path / "model"))
    sharding = Sharding(source.config, Mesh(2))
    with pytest.raises(PunaError, match=r"layers\.1\.self_attn\.q_proj"):
        load_ready(ShardSource(source, sharding, 1), model=local_decoder(sharding, 1))


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_plan_prints_the_table() -> None:
    text = run("llama-3.1-405b", "--context", "131072")
    # 811.7 / 8 = 101.5 GB; 2 * 126 * 128 * 2 * 131072 = 8.5 GB of one head's cache
    assert "101.5 GB" in text
    assert "8.5 GB" in text
    assert "40 query heads can't be split over 16" in run("maverick")


def test_plan_as_json(tmp_path: Path) -> None:
    facts = json.loads(run("maverick", "--tensor-parallel", "8", "--expert-parallel", "16", "--bits", "int4", "--json"))
    (mesh,) = facts["meshes"]
    assert (mesh["ranks"], list(mesh["weight_bytes_per_rank"])) == (16, ["int4"])
    assert sum(split["bytes_per_rank"]["int4"] for split in facts["splits"]) == mesh["weight_bytes_per_rank"]["int4"]
    experts = next(split for split in facts["splits"] if split["tensor"].endswith("experts.down_proj"))
    assert (experts["shape"], experts["rank_shape"]) == ([128, 8192, 5120], [8, 8192, 5120])
    whole = decoder("scout")
    folder = save(whole, whole.config, None, tmp_path / "model")
    for path in (folder, folder / "config.json"):
        meshes = json.loads(run(str(path), "--context", "64", "--json"))["meshes"]
        assert meshes[0]["weight_bytes_per_rank"]["bf16"] == sum(2 * weight.numel() for weight in whole.parameters())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["maverick", "--tensor-parallel", "16"], "that fit: 1, 2, 4, 8"),
        (["no-such-model"], "no member"),
        (["behemoth"], "not published|no member whose shape"),
        (["llama-3-8b", "--context", "9000"], "8,192"),
        (["llama-3-8b", "--bits", "int3"], "bf16, fp8, int8, int4"),
    ],
)
def test_plan_refuses(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert isinstance(result.exception, PunaError)
    assert re.search(words, str(result.exception)), str(result.exception)


@pytest.mark.parametrize("command", ["chat", "serve"])
def test_what_runs_in_one_process_is_refused_under_torchrun(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(app, [command])
    assert isinstance(result.exception, PunaError)
    assert "without torchrun" in str(result.exception)


def test_several_processes_take_no_prompt_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(app, ["generate"], input="hello")
    assert "give --prompt" in str(result.exception)


def test_experts_are_dealt_out_only_among_several() -> None:
    with pytest.raises(PunaError, match="start them with torchrun"):
        puna.load("cria", expert_parallel=2)
