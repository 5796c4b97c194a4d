"""Memory before load: weights counted to the byte without reading them, and models fitted or refused."""

import pytest
import torch

from puna.checkpoint import open_source, save
from puna.checkpoint.ready import load_ready
from puna.checkpoint.rehearsal import rehearse
from puna.engine import load
from puna.engine.forecast import Needs, cache_bytes, work_bytes
from puna.engine.sizes import CacheSize
from puna.errors import PunaError
from puna.model.memory import resident
from puna.model.paged import BLOCK, PagedPool
from tiny import CONFIGS, decoder


@pytest.fixture(scope="module", params=["llama2", "maverick"])
def checkpoint(request, tmp_path_factory):
    config = CONFIGS[request.param]
    path = tmp_path_factory.mktemp("forecast") / request.param
    save(decoder(config).bfloat16(), config, None, path)
    return path


def held(model):
    packed = sum(module.packed.bytes() for module in model.modules() if hasattr(module, "packed"))
    return packed + sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_rehearsed_weights_are_the_loaded_ones_to_the_byte(checkpoint, quantize):
    source = open_source(checkpoint)
    assert rehearse(source, None, quantize).weights == held(load_ready(source, quantize=quantize).model)


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


def test_a_context_that_does_not_fit_is_shortened_or_refused(tmp_path):
    config = CONFIGS["llama3.2"].with_(context_length=1 << 20)
    save(decoder(config).bfloat16(), config, None, tmp_path / "long")
    source = open_source(tmp_path / "long")
    needs = Needs.of(source, None, None, None)
    memory = needs.most(CacheSize(2000)).total + 20_000_000  # the process may have grown by the time of the load
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
