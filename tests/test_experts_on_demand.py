"""Models larger than memory: experts read when a token needs them give the bits of a model that is all in memory."""

import os
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tiny
from checkpoint_writers import write_meta, write_split_experts
from meta_bits_writers import write_experts
from puna.checkpoint import load_source, open_source, save
from puna.checkpoint.ready import load_ready
from puna.checkpoint.safetensors_read import SafetensorsFile
from puna.checkpoint.shard import ShardSource
from puna.errors import PunaError
from puna.family.sharding import Mesh, Sharding
from puna.model import Decoder
from puna.model.on_demand import ExpertCache, expert_cache, held_bytes
from puna.model.paged import Batch
from puna.model.quantized import Quantized, plain

torch.set_num_threads(1)
WIDE = tiny.CONFIGS["scout"].with_(hidden_size=64, head_dim=16, intermediate_size=96)
META = tiny.CONFIGS["scout"].with_(hidden_size=128, head_dim=32, expert_intermediate_size=256, intermediate_size=128)


def bfloat16() -> Decoder:
    return tiny.decoder(WIDE, dtype=torch.bfloat16)


def split(path: Path) -> Path:
    path.mkdir()
    write_split_experts(path, bfloat16())
    return path


def few_bits(path: Path, bits: str) -> Path:
    whole = save(bfloat16(), WIDE, None, path.with_name("wide"))
    return save(load_ready(open_source(whole), quantize=bits).model, WIDE, None, path)


def meta(path: Path, ranks: int) -> Path:
    write_meta(path, tiny.decoder("scout", dtype=torch.bfloat16), ranks)
    return path


def meta_bits(path: Path, kind: str) -> Path:
    write_experts(path, tiny.decoder(META), 2 if kind == "int4" else 1, kind)
    return path


FORMATS: dict[str, Callable[[Path], Path]] = {
    "fused": lambda path: save(bfloat16(), WIDE, None, path),
    "float32": lambda path: save(tiny.decoder("maverick"), tiny.CONFIGS["maverick"], None, path),
    "split": split,
    "int4": lambda path: few_bits(path, "int4"),
    "int8": lambda path: few_bits(path, "int8"),
    "Q8_0": lambda path: save(bfloat16(), WIDE, None, path.with_suffix(".gguf"), format="gguf", type="Q8_0"),
    "Q4_0": lambda path: save(bfloat16(), WIDE, None, path.with_suffix(".gguf"), format="gguf", type="Q4_0"),
    "BF16": lambda path: save(bfloat16(), WIDE, None, path.with_suffix(".gguf"), format="gguf", type="BF16"),
    "Meta": lambda path: meta(path, 1),
    "Meta, two shards": lambda path: meta(path, 2),
    "Meta fp8": lambda path: meta_bits(path, "fp8"),
    "Meta int4": lambda path: meta_bits(path, "int4"),
}


@torch.no_grad()
def logits(model: Decoder, length: int = tiny.TOKENS) -> Tensor:
    ids = tiny.token_ids(model.config, length)
    return model(ids, Batch.single(model.config, ids.shape[1], model.dtype))


def memory_for(model: Decoder, experts: float) -> int:
    """Bytes for everything but the routed experts, and for so many of these."""
    routed = [held_bytes(model.get_submodule(f"layers.{i}.feed_forward.experts")) for i in model.config.moe_layers]
    one = max(routed) / model.config.num_experts
    return int(held_bytes(model) - sum(routed) + experts * one)


@pytest.mark.filterwarnings("ignore:llama.cpp")
@pytest.mark.parametrize(
    ("name", "quantize"), [*((name, None) for name in FORMATS), ("fused", "int4"), ("Q8_0", "int4"), ("Meta", "int8")]
)
def test_the_bits_are_those_of_a_model_in_memory(name: str, quantize: str | None, tmp_path: Path) -> None:
    path = FORMATS[name](tmp_path / "m")
    whole = load_ready(open_source(path), quantize=quantize, memory=1 << 40)
    assert expert_cache(whole.model) is None
    expected = logits(whole.model)
    for experts in (1.0, 2.5):
        loaded = load_ready(open_source(path), quantize=quantize, memory=memory_for(whole.model, experts))
        cache = expert_cache(loaded.model)
        assert cache is not None
        assert "don't fit into memory" in loaded.notes[-1]
        assert held_bytes(loaded.model) < held_bytes(whole.model)
        assert torch.equal(logits(loaded.model), expected)
        assert 1 <= len(cache) <= experts
        assert cache.misses > len(cache)
        assert cache.bytes <= cache.budget
        assert held_bytes(loaded.model) + cache.budget <= memory_for(whole.model, experts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_widened_weights_and_weights_without_kernels_too(dtype: torch.dtype, tmp_path: Path) -> None:
    path = FORMATS["int4"](tmp_path / "m")
    whole = load_ready(open_source(path), dtype=dtype, memory=1 << 40)
    loaded = load_ready(open_source(path), dtype=dtype, memory=memory_for(whole.model, 1))
    assert expert_cache(loaded.model) is not None
    assert torch.equal(logits(loaded.model), logits(whole.model))


def test_a_second_pass_finds_what_the_first_read(tmp_path: Path) -> None:
    path = FORMATS["fused"](tmp_path / "m")
    whole = load_ready(open_source(path)).model
    model = load_ready(open_source(path), memory=memory_for(whole, 12)).model
    cache = expert_cache(model)
    assert cache is not None
    first = logits(model, 3)  # three tokens choose at most twelve experts in four layers
    read = cache.misses
    assert len(cache) == read >= 4
    assert torch.equal(logits(model, 3), first)
    assert (cache.misses, cache.hits) == (read, read)


def test_without_a_promise_the_available_memory_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = FORMATS["fused"](tmp_path / "m")
    whole = load_ready(open_source(path))
    assert expert_cache(whole.model) is None
    routed = held_bytes(whole.model) - memory_for(whole.model, 0)
    monkeypatch.setattr("puna.checkpoint.ready.available_bytes", lambda _: routed)
    cache = expert_cache(load_ready(open_source(path)).model)
    assert cache is not None
    assert routed / 2 < cache.budget < routed


def test_too_little_memory_for_one_expert_is_told_at_once(tmp_path: Path) -> None:
    path = FORMATS["fused"](tmp_path / "m")
    whole = load_ready(open_source(path)).model
    for experts in (0.9, -1.0):
        with pytest.raises(PunaError, match=r"a single expert takes 12,\d+ bytes"):
            load_ready(open_source(path), memory=memory_for(whole, experts))


def test_a_dense_model_has_nothing_to_read_on_demand(tmp_path: Path) -> None:
    config = tiny.CONFIGS["llama3.1"]
    path = save(tiny.decoder(config), config, None, tmp_path / "m")
    assert load_ready(open_source(path), memory=1).notes == ()


@pytest.mark.parametrize("name", ["fused", "split"])
def test_only_the_chosen_experts_bytes_are_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = FORMATS[name](tmp_path / "m")
    whole = load_ready(open_source(path)).model
    model = load_ready(open_source(path), memory=memory_for(whole, 4)).model
    taken = 0
    read = SafetensorsFile._read

    def counted(*args: object) -> Tensor:
        nonlocal taken
        tensor = read(*args)  # type: ignore[arg-type]
        taken += tensor.nbytes
        return tensor

    monkeypatch.setattr(SafetensorsFile, "_read", counted)
    with torch.no_grad():
        model(tiny.token_ids(model.config, 1), Batch.single(model.config, 1, model.dtype))
    cache = expert_cache(model)
    assert cache is not None
    assert cache.misses == len(WIDE.moe_layers)
    assert taken == cache.misses * 3 * WIDE.hidden_size * WIDE.expert_intermediate_size * 2


def test_a_damaged_expert_is_named_when_it_is_read(tmp_path: Path) -> None:
    path = FORMATS["fused"](tmp_path / "m")
    model = load_ready(open_source(path), memory=memory_for(load_ready(open_source(path)).model, 1)).model
    file = path / "model.safetensors"
    entries, before = SafetensorsFile(file).entries, file.stat()
    (damaged,) = (entry for name, entry in entries.items() if "layers.2.feed_forward.experts.down_proj" in name)
    with file.open("r+b") as opened:
        opened.seek(damaged.begin)
        opened.write(b"\xff" * (damaged.end - damaged.begin))
    with pytest.raises(PunaError, match=r"model\.safetensors was written anew while it was read"):
        logits(model)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # a fault of the disk leaves no trace
    with pytest.raises(PunaError, match=r"layers\.2\.feed_forward\.experts\.down_proj holds NaN"):
        logits(model)


def test_it_is_saved_as_a_whole(tmp_path: Path) -> None:
    for name in ("fused", "int4"):
        path = FORMATS[name](tmp_path / name)
        whole = load_ready(open_source(path)).model
        model = load_ready(open_source(path), memory=memory_for(whole, 1)).model
        save(model, model.config, None, tmp_path / f"{name} again")
        again = load_source(open_source(tmp_path / f"{name} again")).model.state_dict()
        for key, weight in load_source(open_source(path)).model.state_dict().items():
            assert torch.equal(again[key], weight), key


@pytest.mark.filterwarnings("ignore:llama.cpp")
@pytest.mark.parametrize("mesh", [Mesh(2), Mesh(1, 2), Mesh(2, 4)])
@pytest.mark.parametrize("name", ["fused", "split", "int4", "Q8_0", "Meta int4"])
def test_a_rank_reads_its_part_of_one_expert(name: str, mesh: Mesh, tmp_path: Path) -> None:
    source = open_source(FORMATS[name](tmp_path / "m"))
    sharding = Sharding(source.config, mesh)
    for rank in range(mesh.ranks):
        share = ShardSource(source, sharding, rank)
        for part in ("gate_up", "down"):
            tensor = f"layers.1.feed_forward.experts.{part}_proj"
            packed, wide = share.read_packed(tensor), share.read(tensor)
            each = packed if isinstance(packed, list) else list(plain(packed).mT)
            for expert in range(len(wide)):
                one = share.read_expert(tensor, expert, packed=True)
                assert torch.equal(plain(one), plain(each[expert]))
                assert isinstance(one, Quantized) == isinstance(packed, list)
                assert torch.equal(plain(share.read_expert(tensor, expert, packed=False)), wide[expert].T)


def module(size: int) -> nn.Module:
    return nn.ParameterList([nn.Parameter(torch.empty(size, dtype=torch.uint8), requires_grad=False)])


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    budget=st.integers(9, 30),
    asked=st.lists(st.integers(0, 7), max_size=60),
)
def test_the_least_recently_used_go_and_the_budget_holds(sizes: list[int], budget: int, asked: list[int]) -> None:
    cache = ExpertCache(budget)
    held: OrderedDict[int, int] = OrderedDict()
    hits = 0
    for expert in (each % len(sizes) for each in asked):
        if expert in held:
            hits += 1
            held.move_to_end(expert)
        else:
            while sum(held.values()) + sizes[expert] > budget:
                held.popitem(last=False)
            held[expert] = sizes[expert]
        with cache.use((0, expert), partial(module, sizes[expert])) as found:
            assert held_bytes(found) == sizes[expert]
        assert cache.bytes == sum(held.values()) <= budget
        assert len(cache) == len(held)
    assert (cache.hits, cache.misses) == (hits, len(asked) - hits)


def test_a_failed_read_leaves_the_cache_as_it_was() -> None:
    cache = ExpertCache(10)

    def fails() -> nn.Module:
        raise PunaError("damaged")

    with cache.use((0, 0), lambda: module(6)):
        pass
    with pytest.raises(PunaError, match="damaged"), cache.use((0, 1), fails):
        pass
    with pytest.raises(PunaError, match="one expert takes 11 bytes"), cache.use((0, 2), lambda: module(11)):
        pass
    assert (cache.bytes, len(cache)) == (6, 1)


def test_threads_share_it_and_what_is_in_use_stays() -> None:
    cache = ExpertCache(10)
    in_use: dict[int, int] = dict.fromkeys(range(6), 0)
    lock, failures = threading.Lock(), []

    def work(seed: int) -> None:
        chosen = random.Random(seed)
        for _ in range(150):
            expert = chosen.randrange(6)
            with cache.use((0, expert), partial(module, 2 + expert % 3)) as found:
                with lock:
                    in_use[expert] += 1
                    total = sum(2 + each % 3 for each, users in in_use.items() if users)
                    if held_bytes(found) != 2 + expert % 3 or not total <= cache.bytes <= 10:
                        failures.append((expert, total, cache.bytes))
                time.sleep(chosen.random() * 1e-4)
                with lock:
                    in_use[expert] -= 1

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert not failures
    assert cache.hits + cache.misses == 8 * 150
