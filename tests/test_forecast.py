"""Memory before load: weights counted to the byte without reading them, and models fitted or refused."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from puna.checkpoint import open_source, save
from puna.checkpoint.ready import load_ready
from puna.checkpoint.rehearsal import rehearse
from puna.engine import load
from puna.engine.forecast import MOST, REQUEST, Needs, cache_bytes, work_bytes
from puna.engine.sizes import CacheSize
from puna.engine.speculation import NGRAM_BYTES
from puna.errors import PunaError
from puna.model.memory import resident
from puna.model.native import kernels
from puna.model.on_demand import expert_cache, held_bytes
from puna.model.paged import BLOCK, Batch, PagedPool
from tiny import CONFIGS, decoder


@pytest.fixture(scope="module", params=["llama2", "maverick"])
def checkpoint(request, tmp_path_factory):
    config = CONFIGS[request.param]
    path = tmp_path_factory.mktemp("forecast") / request.param
    save(decoder(config).bfloat16(), config, None, path)
    return path


@pytest.fixture
def steady(monkeypatch):
    """A process that seems to hold the same all the time."""
    monkeypatch.setattr("puna.engine.forecast.resident", lambda: 100_000_000)


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_rehearsed_weights_are_the_loaded_ones_to_the_byte(checkpoint, quantize):
    source = open_source(checkpoint)
    assert rehearse(source, None, quantize).weights == held_bytes(load_ready(source, quantize=quantize).model)


def test_rehearsal_keeps_the_dtype_and_knows_that_loading_takes_more(checkpoint):
    found = rehearse(open_source(checkpoint), torch.float32)
    assert found.dtype == torch.float32
    assert found.peak > found.weights
    assert found.weights > rehearse(open_source(checkpoint)).weights


def test_parts_of_a_forecast_add_up(checkpoint):
    needs = Needs.of(open_source(checkpoint), None, None, None)
    one, four = needs.forecast(64), needs.forecast(64, 4)
    assert four.cache == 4 * one.cache
    assert one.total == one.weights + one.cache + one.work + one.loading + one.process
    assert one.process >= resident() * 0.9
    assert needs.loading <= one.weights + one.cache + one.work + one.loading


def test_requests_at_once_take_memory_of_their_own(checkpoint):
    needs = Needs.of(open_source(checkpoint), None, None, None)
    size = CacheSize(200, 100)
    assert needs.most(size).work >= needs.used(size, None, 1, 1).work + (MOST - 1) * REQUEST
    assert needs.forecast(64, 4).work >= needs.forecast(64).work + 3 * REQUEST


def test_chunked_layers_hold_one_chunk():
    config = CONFIGS["scout"]
    full, local = PagedPool.block_bytes(config, torch.bfloat16)
    assert local > 0
    chunk = -(-config.attention_chunk_size // BLOCK) + (config.attention_chunk_size % BLOCK != 0)
    assert cache_bytes(config, torch.bfloat16, None, 100 * BLOCK) == 100 * full + chunk * local


def test_work_grows_with_tokens_and_answers():
    config = CONFIGS["llama3.2"]
    assert work_bytes(config, torch.bfloat16, 200, 1) > work_bytes(config, torch.bfloat16, 100, 1)
    assert work_bytes(config, torch.bfloat16, 1, 64) > work_bytes(config, torch.bfloat16, 1, 1)


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(checkpoint, monkeypatch):
    monkeypatch.setattr("puna.checkpoint.ready.load_ready", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(PunaError, match=r"doesn't fit into 0\.01 GB.*needs"):
        load(checkpoint, memory=10_000_000)


def test_a_context_that_does_not_fit_is_shortened_or_refused(tmp_path, steady):
    config = CONFIGS["llama3.2"].with_(context_length=1 << 20)
    save(decoder(config).bfloat16(), config, None, tmp_path / "long")
    source = open_source(tmp_path / "long")
    needs = Needs.of(source, None, None, None)
    memory = needs.most(CacheSize(2000)).total
    told = []
    model = load(tmp_path / "long", memory=memory, tell=told.append)
    assert BLOCK <= model.context_length < 1 << 20
    assert told[0].total <= memory
    with pytest.raises(PunaError, match=r"Give a context of at most [\d,]+"):
        load(tmp_path / "long", memory=memory, context=1 << 20)


def test_used_memory_counts_the_blocks_that_were_touched(checkpoint):
    model = load(checkpoint)
    model.generate(list(range(3, 3 + 40)), max_tokens=1, ignore_eos=True, temperature=0)
    forecast, peak = model.memory_used()
    assert forecast.context == 2 * BLOCK
    assert peak > forecast.weights


@pytest.mark.parametrize("memory", [0, -5, True, "2"])
def test_memory_is_a_number_of_bytes(checkpoint, memory):
    with pytest.raises(PunaError, match="memory must be"):
        load(checkpoint, memory=memory)


def test_the_line_says_what_was_asked_and_what_the_cache_holds(checkpoint):
    told = []
    load(checkpoint, context=64, tell=told.append)
    assert "(16,384 tokens, 64 for one request)" in told[0].needed
    assert "for one request" not in Needs.of(open_source(checkpoint), None, None, None).forecast(64).needed


def test_experts_read_on_demand_are_in_the_forecast(tmp_path, steady):
    config = CONFIGS["scout"].with_(hidden_size=256, head_dim=64, expert_intermediate_size=512)
    save(decoder(config).bfloat16(), config, None, tmp_path / "m")
    needs = Needs.of(open_source(tmp_path / "m"), None, None, None)
    routed = needs.routed
    size = CacheSize(4, 4)
    least = needs.on_demand().most(size)
    assert least.weights == needs.weights - routed.bytes
    assert least.experts == routed.largest + routed.making
    assert least.total < needs.most(size).total
    told = []
    memory = needs.on_demand().forecast(16_384).total + 3 * routed.largest
    model = load(tmp_path / "m", memory=memory, context=64, tell=told.append)
    assert "experts read on demand" in told[0].needed
    assert told[0].total <= memory
    cache = expert_cache(model.decoder)
    assert cache.budget == told[0].experts - routed.making
    model.generate(list(range(3, 40)), max_tokens=2, ignore_eos=True, temperature=0)
    forecast, _ = model.memory_used()
    assert forecast.experts == cache.bytes + routed.making
    stats = model.stats()
    assert (stats.expert_hits, stats.expert_misses) == (cache.hits, cache.misses)
    assert stats.expert_misses > 0
    assert any("don't fit into memory" in note for note in model.notes)


def test_a_draft_model_is_in_the_forecast(tmp_path, steady):
    small = CONFIGS["llama3.2"].with_(num_layers=1)
    for name, config in (("small", small), ("large", CONFIGS["llama3.2"])):
        save(decoder(config).bfloat16(), config, None, tmp_path / name)
    own = Needs.of(open_source(tmp_path / "small"), None, None, None)
    alone, both, loaded = [], [], []
    load(tmp_path / "large", tell=alone.append)
    model = load(tmp_path / "large", speculate=tmp_path / "small", tell=both.append)
    blocks = model.cache_size.blocks
    cache = blocks * PagedPool.block_bytes(small, torch.bfloat16)[0]
    assert both[0].draft == own.weights + cache
    assert both[0].total >= alone[0].total + cache
    assert "draft model" in both[0].needed
    load(tmp_path / "large", speculate=load(tmp_path / "small"), tell=loaded.append)
    assert loaded[0].draft == cache, "its weights are in the process already"
    memory = Needs.of(open_source(tmp_path / "large"), None, None, None).most(CacheSize(1)).total
    with pytest.raises(PunaError, match=r"doesn't fit.*That fits: no draft model needs"):
        load(tmp_path / "large", speculate=tmp_path / "small", memory=memory)
    with pytest.raises(PunaError, match="draft model has 96 tokens, but the model 8192"):
        load("cria", speculate=tmp_path / "small", tell=lambda _: pytest.fail("told"))


def test_ngrams_are_in_the_forecast(tmp_path):
    save(decoder("llama3.2").bfloat16(), CONFIGS["llama3.2"], None, tmp_path / "m")
    plain, ngrams = [], []
    load(tmp_path / "m", tell=plain.append)
    load(tmp_path / "m", speculate="ngram", tell=ngrams.append)
    assert ngrams[0].work - plain[0].work == 64 * NGRAM_BYTES


class Held(TorchDispatchMode):
    """The most bytes of new tensors that are held at once."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, torch.Tensor) and id(storage := each.untyped_storage()) not in self.seen:
                size, key = storage.nbytes(), id(storage)
                self.live += size
                self.peak = max(self.peak, self.live)
                self.seen[key] = weakref.ref(storage, lambda _, size=size, key=key: self.freed(key, size))
        return out

    def freed(self, key, size):
        self.live -= size
        del self.seen[key]


@pytest.mark.skipif(kernels() is None, reason="without the kernels a layer's activations come one by one")
@pytest.mark.parametrize("quantize", [None, "int4"])
def test_work_is_what_a_pass_holds(tmp_path, quantize):
    config = CONFIGS["llama3.2"].with_(hidden_size=256, head_dim=64, intermediate_size=768, vocab_size=512)
    save(decoder(config).bfloat16(), config, None, tmp_path / "m")
    model = load_ready(open_source(tmp_path / "m"), quantize=quantize).model
    length = 1024
    ids, cache = torch.zeros(1, length, dtype=torch.long), Batch.single(config, length, torch.bfloat16)
    rows = torch.tensor([length - 1])
    with torch.no_grad():
        model(ids, Batch.single(config, length, torch.bfloat16), rows=rows)
        with Held() as held:
            model(ids, cache, rows=rows)
    assert 0.85 < held.peak / work_bytes(config, torch.bfloat16, length, 1) < 1.02


@pytest.mark.parametrize("context", [0, -1, True, "64", 1.5, 10**9])
def test_a_wrong_context_is_refused_before_anything_is_loaded(checkpoint, context, monkeypatch):
    monkeypatch.setattr("puna.checkpoint.ready.load_ready", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(PunaError, match=r"^context "):
        load(checkpoint, context=context)
