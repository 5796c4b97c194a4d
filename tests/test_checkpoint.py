"""Checkpoints that are wrong: each kind gives one clear error naming file and tensor. And what loading costs."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from checkpoint_writers import write_meta
from puna.checkpoint import GenerationDefaults, load_source, open_source, save
from puna.checkpoint.safetensors_read import SafetensorsFile
from puna.errors import PunaError

torch.set_num_threads(1)


def folder(path: Path, kind: str = "llama3.1", **options: Any) -> Path:
    """A good folder with several shards."""
    model = tiny.decoder(kind)
    return save(model, model.config, None, path / "model", **{"max_shard_bytes": 30_000} | options)


def fails(path: Path, *parts: str) -> None:
    """Loading raises a PunaError whose message has all parts."""
    with pytest.raises(PunaError) as caught:
        load_source(open_source(path))
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda c: c.pop("hidden_size"), ["hidden_size is missing"]),
        (lambda c: c.update(num_hidden_layers="two"), ["num_hidden_layers must be an integer"]),
        (lambda c: c.update(num_hidden_layers=0), ["num_hidden_layers must be a number of layers"]),
        (lambda c: c.update(num_hidden_layers=10**9), ["num_hidden_layers must be a number of layers"]),
        (lambda c: c.update(num_hidden_layers=90_000), ["90000 layers"]),
        (lambda c: c.update(vocab_size=2**39, hidden_size=2**39, head_dim=8), ["impossible model"]),
        (lambda c: c.update(num_key_value_heads=3), ["impossible", "num_kv_heads"]),
        (lambda c: c.update(rms_norm_eps=[]), ["rms_norm_eps must be a number"]),
        (lambda c: c.update(architectures=["MistralForCausalLM"]), ["MistralForCausalLM", "Supported"]),
        (lambda c: c.update(architectures=["MllamaForConditionalGeneration"]), ["text_config is missing"]),
        (lambda c: c.update(architectures="Llama"), ["architectures must be a list"]),
        (lambda c: c.update(quantization_config={"quant_method": "gptq"}), ["gptq", "not supported", "compressed-te"]),
        (lambda c: c.update(attention_bias=True), ["attention_bias", "biases"]),
        (lambda c: c.update(mlp_bias=True), ["mlp_bias", "biases"]),
        (lambda c: c.update(hidden_act="gelu"), ["hidden_act", "silu"]),
        (lambda c: c.update(rope_scaling={"type": "yarn", "factor": 2}), ["rope_type", "yarn"]),
        (lambda c: c["rope_scaling"].pop("factor"), ["rope_scaling.factor is missing"]),
        (lambda c: c["rope_scaling"].update(factor=0), ["must be positive"]),
        (lambda c: c.update(tie_word_embeddings="yes"), ["tie_word_embeddings must be true or false"]),
        (lambda c: c.update(intermediate_size=50), ["misshapen", "mlp.gate_proj", "[50, 32]"]),
        (lambda c: c.update(num_hidden_layers=3), ["missing layers.2."]),
        (lambda c: c.update(num_hidden_layers=1), ["not part of this architecture", "model.layers.1."]),
    ],
)
def test_wrong_config(change: Callable[[dict[str, Any]], Any], parts: list[str], tmp_path: Path) -> None:
    path = folder(tmp_path)
    edit_json(path / "config.json", change)
    fails(path, str(path), *parts)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda c: c.update(moe_layers=[9]), ["impossible", "moe_layers"]),
        (lambda c: c.update(no_rope_layers=[1, 0]), ["no_rope_layers"]),
        (lambda c: c.update(no_rope_layers=[1, 1, 1, 2]), ["no_rope_layers"]),
        (lambda c: c.update(layer_types=["full_attention", *["chunked_attention"] * 3]), ["layer_types"]),
        (lambda c: c.update(moe_layers=None, interleave_moe_layer_step=0), ["interleave_moe_layer_step"]),
        (lambda c: c.update(architectures=["Llama4ForConditionalGeneration"]), ["text_config is missing"]),
        (lambda c: c.update(num_local_experts=5), ["misshapen", "experts"]),
    ],
)
def test_wrong_llama4_config(change: Callable[[dict[str, Any]], Any], parts: list[str], tmp_path: Path) -> None:
    path = folder(tmp_path, "scout")
    edit_json(path / "config.json", change)
    fails(path, *parts)


def test_missing_and_damaged_json(tmp_path: Path) -> None:
    path = folder(tmp_path)
    (path / "config.json").write_text("{")
    fails(path, "config.json", "not valid JSON")
    (path / "config.json").write_text("[]")
    fails(path, "config.json", "object")
    (path / "config.json").unlink()
    fails(path, "config.json", "missing")


def test_index_that_leads_elsewhere(tmp_path: Path) -> None:
    path = folder(tmp_path)
    index = path / "model.safetensors.index.json"
    good = index.read_text()
    shard = sorted(path.glob("model-*"))[0]
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(shard.read_bytes())
    for name in ("../outside.safetensors", str(outside), "model/../../outside.safetensors", "link.safetensors"):
        if name.startswith("link"):
            (path / name).symlink_to(outside)
        index.write_text(good.replace(shard.name, name))
        fails(path, "model.safetensors.index.json", name, "leads out of")
    index.write_text(good.replace(f'"{shard.name}"', "7"))
    fails(path, "index.json", "7", "no file name")
    index.write_text(good)
    shard.unlink()
    fails(path, shard.name, "missing")


def test_index_that_disagrees_with_its_shards(tmp_path: Path) -> None:
    path = folder(tmp_path)
    index = path / "model.safetensors.index.json"
    good = index.read_text()
    first = json.loads(good)["weight_map"]["model.embed_tokens.weight"]
    edit_json(index, lambda i: i["weight_map"].update({"model.norm.weight": first}))
    fails(path, "model.norm.weight", "does not hold it")
    index.write_text(good)
    edit_json(index, lambda i: i["weight_map"].pop("model.norm.weight"))
    fails(path, "model.norm.weight", "does not place there")
    index.unlink()
    fails(path, "no model.safetensors.index.json")


def test_hub_cache_links_are_followed(tmp_path: Path) -> None:
    path = folder(tmp_path)
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, file in enumerate(path.iterdir()):
        file.rename(cache / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert load_source(open_source(snapshot)).config == tiny.CONFIGS["llama3.1"]
    shard = sorted(snapshot.glob("model-*"))[0]
    other = tmp_path / "models--org--other" / "blobs" / "x"
    other.parent.mkdir(parents=True)
    other.write_bytes(shard.read_bytes())
    shard.unlink()
    shard.symlink_to(other)
    fails(snapshot, shard.name, "leads out of")


def write_raw(path: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def entry(begin: int, end: int, dtype: str = "F32", count: int = 2) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [count], "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "parts"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12), ["tensor b overlaps tensor a"]),
        ({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20), ["hole of 4 bytes before tensor b"]),
        ({"a": entry(0, 8)}, bytes(4), ["truncated", "tensor a"]),
        ({"a": entry(0, 8)}, bytes(12), ["4 bytes after the last tensor"]),
        ({"a": entry(0, 12)}, bytes(12), ["tensor a", "does not fill"]),
        ({"a": entry(8, 0)}, bytes(8), ["tensor a"]),
        ({"a": {"dtype": "F32"}}, bytes(8), ["tensor a", "damaged header entry"]),
        ({"a": entry(0, 8) | {"shape": [-1, -2]}}, bytes(8), ["tensor a", "damaged header entry"]),
        (b"{nonsense", b"", ["damaged header"]),
        (b"[1]", b"", ["damaged header"]),
        (b'{"a": 1, "a": 2}', b"", ["twice"]),
    ],
)
def test_damaged_safetensors(header: Any, data: bytes, parts: list[str], tmp_path: Path) -> None:
    path = folder(tmp_path, max_shard_bytes=10**9)
    write_raw(path / "model.safetensors", header, data)
    fails(path, "model.safetensors", *parts)


def test_truncated_and_oversized_headers(tmp_path: Path) -> None:
    path = folder(tmp_path, max_shard_bytes=10**9)
    file = path / "model.safetensors"
    data = file.read_bytes()
    for content, part in (
        (data[:-1], "truncated"),
        (data[:100], "truncated"),
        (data[:5], "truncated"),
        (b"", "truncated"),
        ((1 << 50).to_bytes(8, "little") + data[8:], "header of"),
    ):
        file.write_bytes(content)
        fails(path, "model.safetensors", part)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda w: w["model.norm.weight"].fill_(float("nan")), ["model.safetensors", "model.norm.weight", "NaN"]),
        (lambda w: w["lm_head.weight"][3].fill_(float("-inf")), ["lm_head.weight", "infinite"]),
        (lambda w: w.pop("model.norm.weight"), ["missing norm.weight"]),
        (lambda w: w.pop("lm_head.weight"), ["missing lm_head.weight", "tied"]),
        (lambda w: w.update(surprise=torch.ones(2)), ["not part", "tensor surprise"]),
        (lambda w: w.update({"model.norm.weight": torch.ones(31)}), ["model.norm.weight", "[31]", "[32]"]),
        (lambda w: w.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}), ["model.norm.weight", "I8"]),
        (lambda w: w.update({"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)}), ["norm", "F8_E4M3"]),
    ],
)
def test_wrong_tensors(change: Callable[[dict[str, torch.Tensor]], Any], parts: list[str], tmp_path: Path) -> None:
    path = folder(tmp_path, max_shard_bytes=10**9)
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors")
    fails(path, *parts)


def test_split_experts_incomplete(tmp_path: Path) -> None:
    from checkpoint_writers import write_split_experts

    write_split_experts(tmp_path, tiny.decoder("maverick"))
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.feed_forward.experts.2.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    fails(tmp_path, "layers.1.feed_forward.experts.2.up_proj.weight is missing", "4 experts")


def test_old_buffers_and_a_stored_tied_head(tmp_path: Path) -> None:
    path = folder(tmp_path, "llama3.2", max_shard_bytes=10**9)
    weights = load_file(path / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, path / "model.safetensors")
    loaded = load_source(open_source(path))
    assert loaded.config.tie_word_embeddings
    assert any("lm_head" in note for note in loaded.notes)
    weights["lm_head.weight"] += 1  # transformers 5 does not tie what differs
    save_file(weights, path / "model.safetensors")
    loaded = load_source(open_source(path))
    assert not loaded.config.tie_word_embeddings
    assert torch.equal(loaded.model.head_weight, weights["lm_head.weight"])


class Evil:
    """Runs code when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("evil-was-here",)


def test_wrong_meta_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "meta"
    write_meta(path, tiny.decoder("maverick"), 2)
    first, second = path / "consolidated.00.pth", path / "consolidated.01.pth"
    good = first.read_bytes(), second.read_bytes()
    second.unlink()
    fails(path, "consolidated.00.pth, tensor layers.0.attention.wqkv.weight")
    second.write_bytes(good[1])
    first.unlink()
    fails(path, "consolidated.00.pth is missing")
    first.write_bytes(good[0][:-500])
    fails(path, "consolidated.00.pth", "truncated")
    torch.save({"norm.weight": Evil()}, first)
    fails(path, "consolidated.00.pth", "can run code")
    assert not (tmp_path / "evil-was-here").exists()
    torch.save([torch.ones(2)], first)
    fails(path, "consolidated.00.pth", "list")
    torch.save({"norm.weight": "text"}, first)
    fails(path, "norm.weight", "not a tensor")
    torch.save({"norm.weight": torch.ones(2)}, first)
    fails(path, "disagree on tensor")
    first.write_bytes(good[0])
    edit_json(path / "params.json", lambda p: p.pop("dim"))
    fails(path, "params.json", "dim is missing")
    edit_json(path / "params.json", lambda p: p.update(dim=32, quantization_args={"scheme": "int4"}))
    fails(path, "params.json", "quantization_args.scheme is 'int4'")
    (path / "params.json").unlink()
    fails(path, "params.json", "missing")


def test_meta_tensors_are_checked(tmp_path: Path) -> None:
    write_meta(tmp_path, tiny.decoder("llama2"), 1)
    file = tmp_path / "consolidated.00.pth"
    weights = torch.load(file, weights_only=True)
    torch.save(weights | {"layers.0.attention.wq.bias": torch.ones(4)}, file)
    fails(tmp_path, "consolidated.00.pth", "layers.0.attention.wq.bias")
    weights["norm.weight"][0] = float("nan")
    torch.save(weights, file)
    fails(tmp_path, "consolidated.00.pth", "norm.weight", "NaN")
    del weights["layers.1.feed_forward.w3.weight"]
    torch.save(weights, file)
    fails(tmp_path, "missing layers.1.feed_forward.up_proj.weight")


def test_nothing_recognised(tmp_path: Path) -> None:
    fails(tmp_path / "nowhere", "does not exist")
    fails(tmp_path, "holds no checkpoint")
    (tmp_path / "notes.txt").write_text("hello")
    fails(tmp_path / "notes.txt", "no known checkpoint format")
    for name in ("a.bin", "b.bin"):
        (tmp_path / name).write_bytes(bytes(64))
    fails(tmp_path, "2 checkpoints", "a.bin")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    fails(adapter, "adapter", "base model")


def test_saving_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.decoder("llama2")
    path = folder(tmp_path)
    with pytest.raises(PunaError, match="exists already"):
        save(model, model.config, None, path)
    with pytest.raises(PunaError, match="Choose safetensors or gguf"):
        save(model, model.config, None, tmp_path / "new", format="onnx")

    class Broken:
        eos_ids = ()

        def save(self, folder: Path) -> None:
            assert (folder / "model.safetensors").is_file()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(model, model.config, Broken(), tmp_path / "new")  # type: ignore[arg-type]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model"]
    with pytest.raises(PunaError, match="only in Llama 4"):
        save(model, model.config.with_(qk_norm=True), None, tmp_path / "new")


def test_generation_defaults_travel(tmp_path: Path) -> None:
    model = tiny.decoder(tiny.CONFIGS["llama2"].with_(bos_token_id=1, eos_token_ids=(2, 3)))
    save(model, model.config, None, tmp_path / "a")
    plain = load_source(open_source(tmp_path / "a"))
    assert plain.tokenizer is None
    assert plain.generation == GenerationDefaults(eos_token_ids=(2, 3))
    wanted = GenerationDefaults(temperature=0.6, top_p=0.9, top_k=40, eos_token_ids=(2,))
    save(model, model.config, None, tmp_path / "b", generation=wanted)
    assert load_source(open_source(tmp_path / "b")).generation == wanted


_MEASURE = """
import sys, torch
from puna.checkpoint import load_source, open_source
torch.set_num_threads(1)
def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
load_source(open_source(sys.argv[1]))  # everything that is imported on first use
before = status("VmRSS:")
model = load_source(open_source(sys.argv[2]), dtype=getattr(torch, sys.argv[3])).model
size = sum(p.numel() * p.element_size() for p in model.parameters())
print(size, (status("VmHWM:") - before) / size)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize(("form", "dtype"), [("safetensors", "float32"), ("meta", "bfloat16")])
def test_peak_memory(form: str, dtype: str, tmp_path: Path) -> None:
    """Loading peaks at 1.15 times the loaded model at most: a file's pages, casts and joins never pile up."""
    config = tiny.CONFIGS["scout"].with_(
        hidden_size=384, num_layers=8, num_heads=12, num_kv_heads=4, head_dim=32, num_experts=8, vocab_size=2048,
        intermediate_size=1024, expert_intermediate_size=512, moe_layers=tuple(range(8)), nope_layers=(3, 7),
    )  # fmt: skip
    with torch.device("meta"):
        model = tiny.Decoder(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
    big, small = tmp_path / "big", tmp_path / "small"
    if form == "meta":
        write_meta(big, model, 2)
        edit_json(big / "params.json", lambda p: p.update(ffn_dim_multiplier=1.0, use_scaled_rope=True))
        write_meta(small, tiny.decoder("scout"), 2)
    else:
        save(model, config, None, big, max_shard_bytes=30_000_000)
        save(tiny.decoder("scout"), tiny.CONFIGS["scout"], None, small)
    command = [sys.executable, "-c", _MEASURE, str(small), str(big), dtype]
    size, ratio = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(size) > 90_000_000 * (2 if dtype == "float32" else 1)
    assert 0.9 < float(ratio) < 1.15


@pytest.mark.parametrize("ranks", [1, 2])
def test_opening_meta_files_imports_no_compiler(ranks: int, tmp_path: Path) -> None:
    """torch imports 70 MB of modules for some operations on the meta device, which would count as load's memory."""
    write_meta(tmp_path, tiny.decoder("maverick"), ranks)
    code = "import sys; from puna.checkpoint import load; load(sys.argv[1]); print('sympy' in sys.modules)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["False"]


def test_a_tokenizer_travels_with_the_weights(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from puna.text.train import train_tokenizer

    tokenizer = train_tokenizer(["the llama grazes on the puna, the llama sleeps"] * 3, 320)
    model = tiny.decoder(tiny.CONFIGS["guard4"].with_(vocab_size=tokenizer.vocab_size))
    save(model, model.config, tokenizer, tmp_path / "model")
    loaded = load_source(open_source(tmp_path / "model"))
    text = "the llama grazes, naïvely"
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.encode(text) == tokenizer.encode(text)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)


def test_large_words_of_packed_integers_are_the_files_own_pages(tmp_path: Path) -> None:
    """Right out of the file, at any place in it; writing to them changes nothing, and a file cut short is named."""
    words = torch.arange(600_000, dtype=torch.int32).view(600, 1000)
    path = tmp_path / "words.safetensors"
    save_file({"before": torch.ones(3), "weight_packed": words}, path)
    file = SafetensorsFile(path)
    mapped = file.read_bits("weight_packed")
    assert torch.equal(mapped, words)
    assert mapped_of(path) > 0
    mapped.zero_()
    assert torch.equal(file.read_bits("weight_packed"), words)
    del mapped
    assert mapped_of(path) == 0
    with path.open("r+b") as opened:
        opened.truncate(1_000_000)
    with pytest.raises(PunaError, match=r"words.safetensors, tensor weight_packed: the file ends early"):
        file.read_bits("weight_packed")


def test_a_file_that_is_written_anew_while_it_is_read_is_named(tmp_path: Path) -> None:
    """Another model's bytes at the same places would be taken for this one's."""
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({"first": torch.ones(3), "second": torch.zeros(3)}, path)
    save_file({"first": torch.ones(3), "second": torch.full((3,), 7.0)}, other)
    os.utime(other, ns=(1, 1))
    file = SafetensorsFile(path)
    assert file.read("first").tolist() == [1, 1, 1]
    os.replace(other, path)
    for read in (file.read, file.read_bits, lambda name: file.read_rows(name, 0, 1)):
        with pytest.raises(PunaError, match=r"a.safetensors was written anew while it was read. Load it again"):
            read("second")
    path.unlink()
    with pytest.raises(PunaError, match=r"a.safetensors, tensor second: can't be read any more \(No such file"):
        file.read("second")
    file.mapped = True
    with pytest.raises(PunaError, match=r"a.safetensors: can't be read any more"):
        file.read("second")


def mapped_of(path: Path) -> int:
    """Bytes of a file that this process has mapped."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    return sum(int(end, 16) - int(start, 16) for start, end in (line[0].split("-") for line in lines))
