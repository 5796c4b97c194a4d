"""GGUF read and written: exact round trips, an independent reader and writer, scalings, and damaged files."""

import struct
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from puna.checkpoint import GenerationDefaults, gguf_rope, load, save
from puna.checkpoint.gguf_config import differences
from puna.checkpoint.gguf_format import pack_header
from puna.checkpoint.gguf_read import GGUFSource
from puna.checkpoint.gguf_write import write_gguf, write_tensors
from puna.checkpoint.rotary import to_adjacent, to_halves
from puna.errors import PunaError
from puna.family.config import AttentionTemperature, ModelConfig, RopeScaling
from puna.model import Decoder

torch.set_num_threads(1)
LLAMA4 = {"architecture": "llama4", "expert_intermediate_size": 32, "nope_layers": (3,), "attention_chunk_size": 8192,
          "attention_temperature": AttentionTemperature(0.1, 8192), "rope_theta": 500_000.0}  # fmt: skip


def tiny(**changes) -> ModelConfig:
    base = {"architecture": "llama", "vocab_size": 96, "hidden_size": 64, "num_layers": 4, "num_heads": 4,
            "num_kv_heads": 2, "head_dim": 16, "intermediate_size": 96, "context_length": 256,
            "rope_theta": 10_000.0}  # fmt: skip
    return ModelConfig(**{**base, **changes})


CONFIGS = {
    "llama2": tiny(num_kv_heads=4, bos_token_id=1, eos_token_ids=(2,)),
    "llama3.1": tiny(rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192), rope_theta=500_000.0, eos_token_ids=(7, 8, 9)),
    "llama3.2": tiny(rope_scaling=RopeScaling(32.0, 1.0, 4.0, 64), rope_theta=500_000.0, tie_word_embeddings=True),
    "scout": tiny(**LLAMA4, num_experts=16, moe_layers=(0, 1, 2, 3), qk_norm=True,
                  rope_scaling=RopeScaling(16.0, 1.0, 1.0, 8192)),
    "maverick": tiny(**LLAMA4, num_experts=128, moe_layers=(1, 3)),
    "two experts a token": tiny(**LLAMA4, num_experts=4, num_experts_per_token=2, moe_layers=(1, 3), qk_norm=True),
    "own constants": tiny(**{**LLAMA4, "nope_layers": (1, 2), "attention_chunk_size": 16,
                             "attention_temperature": AttentionTemperature(0.25, 32)},
                          num_experts=4, moe_layers=(0, 3), pad_token_id=5),
    "dense llama4": tiny(**{**LLAMA4, "expert_intermediate_size": 0, "attention_chunk_size": None,
                            "attention_temperature": None, "nope_layers": ()}),
}  # fmt: skip


def random_model(config: ModelConfig) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.uniform_(0.5, 1.5) if weight.ndim == 1 else weight.normal_(0, 0.15)
    return model


def write(config: ModelConfig, path: Path, type: str = "F32", **options) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return write_gguf(random_model(config), config, None, path, type, **options)


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_exact(name, tmp_path):
    config, path = CONFIGS[name], tmp_path / "m.gguf"
    write(config, path, generation=GenerationDefaults(0.6, 0.9, 40))
    loaded = load(path)
    assert loaded.config == config
    assert loaded.source_format == "gguf"
    assert (loaded.generation.temperature, loaded.generation.top_p, loaded.generation.top_k) == (0.6, 0.9, 40)
    assert loaded.tokenizer is None
    theirs = random_model(config).state_dict()
    assert all(torch.equal(weight, theirs[key]) for key, weight in loaded.model.state_dict().items())
    assert not list(tmp_path.glob("*.part"))


def test_types(tmp_path):
    """Each type's error against the original stays within its step; vectors and the router stay float32."""
    config, originals = CONFIGS["scout"], random_model(CONFIGS["scout"]).state_dict()
    for type, bound in (("F16", 1e-3), ("BF16", 8e-3), ("Q8_0", 1 / 127), ("Q4_0", 1 / 7)):
        source = GGUFSource(write(config, tmp_path / type, type))
        for name, original in originals.items():
            error = (source.read(name).float() - original).abs().max() / original.abs().max()
            exact = original.ndim == 1 or "router" in name
            assert error == 0 if exact else 0 < error < bound, (type, name)
    assert GGUFSource(tmp_path / "F16").read("lm_head.weight").dtype == torch.float16
    assert GGUFSource(tmp_path / "BF16").read("lm_head.weight").dtype == torch.bfloat16
    assert (tmp_path / "Q8_0").stat().st_size < 0.4 * write(config, tmp_path / "F32").stat().st_size


def test_the_gguf_package_reads_what_we_write(tmp_path):
    config = CONFIGS["llama3.1"]
    reader = gguf.GGUFReader(write(config, tmp_path / "m.gguf", "Q8_0"))
    weights, tensors = random_model(config).state_dict(), {t.name: t for t in reader.tensors}
    assert reader.get_field("general.architecture").contents() == "llama"
    assert reader.get_field("llama.rope.freq_base").contents() == 500_000.0
    assert reader.get_field("general.file_type").contents() == gguf.LlamaFileType.MOSTLY_Q8_0
    assert tensors["token_embd.weight"].shape.tolist() == [64, 96]
    stored = gguf.dequantize(tensors["blk.2.attn_q.weight"].data, tensors["blk.2.attn_q.weight"].tensor_type)
    # Meta's order: row 2j + half of a head is Hugging Face's row half * K/2 + j
    head = weights["layers.2.self_attn.q_proj.weight"][16:32].numpy()
    assert np.abs(stored[16:32] - head[[j + 8 * half for j in range(8) for half in (0, 1)]]).max() < 0.01


def test_we_read_what_the_gguf_package_writes(tmp_path):
    """A file as llama.cpp's converter lays it out, without any of our keys."""
    config = CONFIGS["scout"]
    weights = {name: w.numpy() for name, w in random_model(config).state_dict().items()}
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama4")
    for add, value in ((writer.add_block_count, 4), (writer.add_context_length, 256), (writer.add_embedding_length, 64),
                       (writer.add_feed_forward_length, 96), (writer.add_head_count, 4), (writer.add_head_count_kv, 2),
                       (writer.add_key_length, 16), (writer.add_value_length, 16), (writer.add_rope_freq_base, 5e5),
                       (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_expert_count, 16),
                       (writer.add_expert_used_count, 1), (writer.add_expert_feed_forward_length, 32),
                       (writer.add_interleave_moe_layer_step, 1)):  # fmt: skip
        add(value)
    writer.add_tensor("rope_freqs.weight", gguf_rope.divisors(config.rope_scaling, 5e5, 16))
    for name, weight in weights.items():
        name = name.replace("embed_tokens", "token_embd").replace("lm_head", "output").replace("layers.", "blk.")
        for ours, theirs in (("self_attn.", "attn_"), ("attn_o_proj", "attn_output"), ("_proj.weight", ".weight"),
                             ("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"),
                             ("feed_forward.router", "ffn_gate_inp")):  # fmt: skip
            name = name.replace(ours, theirs)
        if ".shared_expert." in name:
            name = name.replace("feed_forward.shared_expert.", "ffn_").replace(".weight", "_shexp.weight")
        if name == "norm.weight":
            name = "output_norm.weight"
        if name.endswith("gate_up_proj"):
            block = name.split(".feed")[0]
            gate, up = np.split(weight.transpose(0, 2, 1), 2, axis=1)
            writer.add_tensor(f"{block}.ffn_gate_exps.weight", np.ascontiguousarray(gate))
            writer.add_tensor(f"{block}.ffn_up_exps.weight", np.ascontiguousarray(up))
        elif name.endswith("down_proj"):
            block = name.split(".feed")[0]
            writer.add_tensor(f"{block}.ffn_down_exps.weight", np.ascontiguousarray(weight.transpose(0, 2, 1)))
        else:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = load(tmp_path / "m.gguf")
    assert loaded.config == config
    assert all(np.array_equal(w.numpy(), weights[name]) for name, w in loaded.model.state_dict().items())


def _q4_k(block: bytes) -> list[float]:
    """One block of 256, in plain Python from ggml-quants.c `dequantize_row_q4_K`."""
    d, dmin = struct.unpack("<2e", block[:4])
    s, q, out = block[4:16], block[16:], []
    for j in range(8):
        scale, least = (s[j] & 63, s[j + 4] & 63) if j < 4 else (
            (s[j + 4] & 15) | (s[j - 4] >> 6) << 4, (s[j + 4] >> 4) | (s[j] >> 6) << 4)  # fmt: skip
        codes = q[j // 2 * 32 : j // 2 * 32 + 32]
        out += [d * scale * (c >> 4 if j % 2 else c & 15) - dmin * least for c in codes]
    return out


def _q6_k(block: bytes) -> list[float]:
    """One block of 256, in plain Python from ggml-quants.c `dequantize_row_q6_K`."""
    low, high, scales = block[:128], block[128:192], struct.unpack("<16b", block[192:208])
    (d,) = struct.unpack("<e", block[208:])
    out = []
    for i in range(256):
        n, r, l = i // 128, i % 128 // 32, i % 32  # noqa: E741 - ggml's name
        nibble = low[64 * n + l + 32 * (r % 2)] >> (4 if r > 1 else 0) & 15
        code = (nibble | (high[32 * n + l] >> 2 * r & 3) << 4) - 32
        out.append(d * scales[8 * n + l // 16 + 2 * r] * code)
    return out


@pytest.mark.parametrize(("type", "size", "reference"), [("Q4_K", 144, _q4_k), ("Q6_K", 210, _q6_k)])
def test_k_quants_equal_ggml(type, size, reference, tmp_path):
    kind, rng = gguf.GGMLQuantizationType[type], np.random.default_rng(0)
    raw = rng.integers(0, 256, (96, size), dtype=np.uint8)
    scale = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    raw[:, slice(208, 210) if type == "Q6_K" else slice(0, 2)] = scale
    raw[:, 2:4] = raw[:, 2:4] if type == "Q6_K" else scale
    config = tiny(hidden_size=256, num_layers=1, tie_word_embeddings=True)
    path = write(config, tmp_path / "m.gguf")
    source, weights = GGUFSource(path), random_model(config).state_dict()
    tensors = [(t.name, t.shape, kind if t.name == "token_embd.weight" else t.type) for t in source._tensors.values()]
    body = path.read_bytes()
    with path.open("wb") as file:
        file.write(pack_header(source.fields, tensors))
        for info in source._tensors.values():
            data = raw.tobytes() if info.name == "token_embd.weight" else body[info.offset : info.offset + info.nbytes]
            file.write(data + b"\0" * (-len(data) % 32))
    expected = torch.tensor([reference(row.tobytes()) for row in raw])
    assert torch.allclose(GGUFSource(path).read("embed_tokens.weight"), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(load(path).model.state_dict()["norm.weight"], weights["norm.weight"])


def test_unknown_quantisation_names_tensor_and_type(tmp_path):
    config = tiny(hidden_size=256, num_layers=1)
    source = GGUFSource(write(config, tmp_path / "m.gguf"))
    wanted = gguf.GGMLQuantizationType.IQ4_XS
    tensors = [(t.name, t.shape, wanted if "attn_v" in t.name else t.type) for t in source._tensors.values()]
    path = tmp_path / "n.gguf"
    path.write_bytes(pack_header(source.fields, tensors) + bytes(source.path.stat().st_size))
    with pytest.raises(PunaError, match=r"n\.gguf: tensor 'blk\.0\.attn_v\.weight' is stored as IQ4_XS"):
        load(path)


def test_permutations_are_inverse():
    weight = torch.arange(24.0).reshape(12, 2)
    assert to_halves(weight, 2)[:6, 0].tolist() == [0, 4, 8, 2, 6, 10]
    assert torch.equal(to_adjacent(to_halves(weight, 2), 2), weight)


@pytest.mark.parametrize(("scaling", "head_dim"), [
    (RopeScaling(8.0, 1.0, 4.0, 8192), 128), (RopeScaling(32.0, 1.0, 4.0, 8192), 64),
    (RopeScaling(16.0, 1.0, 1.0, 8192), 128), (RopeScaling(10.0, 0.5, 7.0, 8192), 128),
    (RopeScaling(8.0, 1.0, 4.0, 16384), 128), (RopeScaling(5.0, 3.0, 3.0, 8192), 128),
])  # fmt: skip
def test_scaling_from_divisors(scaling, head_dim):
    """What is inferred turns every frequency as the original does, though its context may be another."""
    stored = gguf_rope.divisors(scaling, 500_000.0, head_dim)
    found = gguf_rope.infer_scaling(stored, 500_000.0, head_dim)
    assert np.allclose(gguf_rope.divisors(found, 500_000.0, head_dim), stored, rtol=1e-5)
    if scaling.original_context == 8192 and scaling.low_freq_factor == 1:
        assert found == scaling


def test_divisors_that_are_no_llama_scaling():
    assert gguf_rope.infer_scaling(np.ones(8, np.float32), 1e4, 16) is None
    for stored in (np.linspace(1, 8, 8), np.full(8, 4.0), np.array([1, 1, np.nan, 1, 1, 1, 1, 8]), np.full(8, 0.5)):
        with pytest.raises(ValueError):
            gguf_rope.infer_scaling(stored.astype(np.float32), 1e4, 16)


def test_what_llama_cpp_would_do_otherwise(tmp_path):
    for name in ("llama2", "llama3.1", "scout", "maverick", "two experts a token"):
        assert differences(CONFIGS[name]) == []
        assert not [k for k in GGUFSource(write(CONFIGS[name], tmp_path / name)).fields
                    if k.startswith("puna.") and "rope" not in k and "token" not in k]  # fmt: skip
    model = random_model(CONFIGS["own constants"])
    with pytest.warns(UserWarning, match="llama.cpp") as caught:
        save(model, model.config, None, tmp_path / "m.gguf", format="gguf")
    said = " ".join(str(w.message) for w in caught)
    for part in ("chunks of 8192, this model in chunks of 16: answers differ past 16 tokens",
                 "fixed interval of layers, not in layers [0, 3]", "in layers [3], this model in layers [1, 2]",
                 "scale 0.1, floor 8192, this model by scale 0.25, floor 32: answers differ from position 31 on",
                 "normalises queries and keys at 4 experts, this model does not normalise them"):  # fmt: skip
        assert part in said
    assert "refuses a llama4 model without experts" in differences(CONFIGS["dense llama4"])[0]


def test_rows_that_are_no_whole_blocks_stay_f16(tmp_path):
    config = tiny(hidden_size=48, num_heads=3, num_kv_heads=3)
    model = random_model(config)
    written = write_tensors(model.state_dict().__getitem__, config, None, tmp_path / "m.gguf", "Q8_0")
    assert "26 tensors stay F16" in written.notes[0]
    source = GGUFSource(written.path)
    assert source.read("layers.0.self_attn.q_proj.weight").dtype == torch.float16
    assert source.read("layers.0.feed_forward.down_proj.weight").dtype == torch.float32  # rows of 96: quantised


@pytest.mark.parametrize(("change", "message"), [
    (lambda w: w.update({"norm.weight": torch.full((64,), torch.nan)}), "'norm.weight'.*not finite"),
    (lambda w: w.update({"lm_head.weight": torch.full((96, 64), 1e5)}), "'lm_head.weight'.*F16.*choose BF16 or F32"),
    (lambda w: w.update({"norm.weight": torch.ones(63)}), r"'norm.weight' has shape \(63,\)"),
])  # fmt: skip
def test_weights_that_cannot_be_written(change, message, tmp_path):
    config = CONFIGS["llama2"]
    weights = dict(random_model(config).state_dict())
    change(weights)
    with pytest.raises(PunaError, match=message):
        write_tensors(weights.__getitem__, config, None, tmp_path / "m.gguf", "F16")
    assert not list(tmp_path.iterdir())


def test_targets_and_types_that_are_refused(tmp_path):
    (tmp_path / "m.gguf").touch()
    with pytest.raises(PunaError, match="exists already"):
        write(CONFIGS["llama2"], tmp_path / "m.gguf")
    with pytest.raises(PunaError, match=r"'Q5_1' is not one that can be written\. Choose F32, F16, BF16, Q8_0, Q4_0"):
        write(CONFIGS["llama2"], tmp_path / "n.gguf", "Q5_1")


@pytest.fixture(scope="module")
def header(tmp_path_factory) -> tuple[bytes, GGUFSource]:
    path = write(tiny(num_layers=1, vocab_size=32, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192)),
                 tmp_path_factory.mktemp("g") / "m.gguf", "Q8_0")  # fmt: skip
    return path.read_bytes(), GGUFSource(path)


def _rewritten(header, path, fields=None, tensors=None, drop=()):
    body, source = header
    kept = {k: v for k, v in {**source.fields, **(fields or {})}.items() if v is not None}
    table = [(t.name, (tensors or {}).get(t.name, t.shape), t.type) for t in source._tensors.values()]
    table.insert(0, ("rope_freqs.weight", (8,), gguf.GGMLQuantizationType.F32))
    start = min(t.offset for t in source._tensors.values()) - 32  # rope_freqs comes first
    path.write_bytes(pack_header(kept, [row for row in table if row[0] not in drop]) + body[start:] + bytes(1 << 16))
    return path


@pytest.mark.parametrize(("fields", "message"), [
    ({"general.architecture": "qwen3"}, "architecture 'qwen3' is not a Llama"),
    ({"llama.block_count": 3}, "block_count is 3, but the file has tensors of 1 layers"),
    ({"llama.block_count": None}, "block_count is missing"),
    ({"llama.embedding_length": "wide"}, "embedding_length must be an integer, not 'wide'"),
    ({"llama.attention.head_count": 3}, "num_heads 3 is not a multiple"),
    ({"llama.attention.head_count_kv": [2, 4]}, "head_count_kv differs between layers"),
    ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "epsilon must be a number"),
    ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type is 'yarn'"),
    ({"llama.rope.freq_base": 0.0}, "rope.freq_base is 0.0"),
    ({"llama.expert_count": 8}, "Mixtral-like"),
    ({"puna.rope.scaling.factor": 4.0}, "contradict each other"),
    ({"puna.eos_token_ids": [99]}, "leaves the vocabulary of 32"),
    ({"tokenizer.ggml.bos_token_id": 99}, "bos_token_id is 99, outside the vocabulary of 32"),
    ({"split.count": 3}, "one of 3 parts; join them first"),
    ({"general.alignment": 48}, "not a power of two"),
])  # fmt: skip
def test_metadata_errors(header, fields, message, tmp_path):
    path = _rewritten(header, tmp_path / "bad.gguf", fields)
    with pytest.raises(PunaError, match=message) as caught:
        load(path)
    assert "bad.gguf" in str(caught.value)


def test_tensor_errors(header, tmp_path):
    path = tmp_path / "bad.gguf"
    with pytest.raises(PunaError, match=r"missing layers\.0\.self_attn\.v_proj\.weight"):
        load(_rewritten(header, path, drop=("blk.0.attn_v.weight",)))
    with pytest.raises(PunaError, match=r"'token_embd\.weight' is missing"):
        load(_rewritten(header, path, drop=("token_embd.weight",)))
    with pytest.raises(PunaError, match=r"'blk\.0\.attn_k\.weight' has shape \[16, 64\], needs \[32, 64\]"):
        load(_rewritten(header, path, tensors={"blk.0.attn_k.weight": (16, 64)}))
    with pytest.raises(PunaError, match="rows of 65 are not whole Q8_0 blocks"):
        load(_rewritten(header, path, tensors={"blk.0.attn_k.weight": (32, 65)}))
    body, source = header
    info = source._tensors["blk.0.attn_v.weight"]
    broken = bytearray(body)
    broken[info.offset : info.offset + 2] = np.float16(np.nan).tobytes()
    path.write_bytes(broken)
    with pytest.raises(PunaError, match=r"bad\.gguf: tensor 'blk\.0\.attn_v\.weight' holds NaN"):
        load(path)


def test_damaged_containers(header, tmp_path):
    body, source = header
    path = tmp_path / "bad.gguf"
    names = list(source._tensors)
    at = body.index(names[1].encode()) + len(names[1]) + 4 + 8 + 4  # offset field of the second tensor, which is 1-D
    cases = {
        b"": "too few", body[:20]: "too few", b"GGML" + body[4:]: "starts with b'GGML'",
        body[:4] + struct.pack("<I", 1) + body[8:]: "version 1",
        body[:4] + struct.pack(">I", 3) + body[8:]: "big-endian",
        body[:8] + struct.pack("<Q", 1 << 60) + body[16:]: "claims 1152921504606846976 tensors",
        body[:-64]: "ends at byte", body[:200]: "damaged|ends",
        body[:at] + struct.pack("<Q", 0) + body[at + 8 :]: "overlaps",
        body[:at] + struct.pack("<Q", 1 << 40) + body[at + 8 :]: "ends at byte",
        body[:at] + struct.pack("<Q", 33) + body[at + 8 :]: "not a multiple of 32",
    }  # fmt: skip
    for raw, message in cases.items():
        path.write_bytes(raw)
        with pytest.raises(PunaError, match=message) as caught:
            load(path)
        assert "bad.gguf" in str(caught.value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_is_one_clear_error(header, tmp_path, data):
    """Cut anywhere, or bytes changed in the header: a PunaError, or a model that still makes sense; never a crash."""
    body = bytearray(header[0])
    start = min(t.offset for t in header[1]._tensors.values())
    if data.draw(st.booleans(), "cut"):
        body = body[: data.draw(st.integers(0, len(body) - 1), "length")]
    for _ in range(data.draw(st.integers(0, 3), "changes")):
        position = data.draw(st.integers(0, start - 1), "position")
        if position < len(body):
            body[position] = data.draw(st.integers(0, 255), "byte")
    path = tmp_path / "fuzz.gguf"
    path.write_bytes(body)
    try:
        told, width = "", load(path).config.hidden_size
    except PunaError as error:
        told, width = str(error), 0
    assert "fuzz.gguf" in told or width == 64


def test_export_command(tmp_path):
    from puna.cli.main import app

    write(CONFIGS["own constants"], tmp_path / "m.gguf", "BF16")
    run = CliRunner().invoke(app, ["export", str(tmp_path / "m.gguf"), "--out", str(tmp_path / "n.gguf"),
                                   "--format", "gguf", "--type", "q8_0"])  # fmt: skip
    assert run.exit_code == 0, run.output
    assert "Note: llama.cpp attends in chunks of 8192" in run.stderr
    assert load(tmp_path / "n.gguf").config == CONFIGS["own constants"]
    again = CliRunner().invoke(app, ["export", str(tmp_path / "m.gguf"), "--out", str(tmp_path / "o.gguf"),
                                     "--format", "gguf"])  # fmt: skip
    assert again.exit_code == 0
    assert GGUFSource(tmp_path / "o.gguf").read("lm_head.weight").dtype == torch.bfloat16
    wrong = CliRunner().invoke(app, ["export", str(tmp_path / "m.gguf"), "--out", str(tmp_path / "p"),
                                     "--type", "Q8_0"])  # fmt: skip
    assert isinstance(wrong.exception, PunaError)
    assert "--type Q8_0 is not one of safetensors" in str(wrong.exception)


def test_memory_and_time_of_a_large_file(tmp_path):
    """24 MB of Q8_0, the size of the bundled model, read within a second of CPU time."""
    import time

    config = tiny(vocab_size=8192, hidden_size=512, num_heads=8, num_kv_heads=8, head_dim=64, intermediate_size=1536,
                  num_layers=5, tie_word_embeddings=True)  # fmt: skip
    path = write(config, tmp_path / "m.gguf", "Q8_0")
    assert 20e6 < path.stat().st_size < 28e6
    start = time.process_time()
    load(path)
    assert time.process_time() - start < 1.5
