"""Our decoder against transformers' on tiny random models, directly and after a round trip through every format."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny
from checkpoint_writers import write_llama2c, write_meta, write_split_experts
from puna.checkpoint import Loaded, load_source, open_source, save
from puna.model import Decoder

torch.set_num_threads(1)
LLAMA4 = ["scout", "maverick", "guard4"]


def read(path: Path) -> Loaded:
    return load_source(open_source(path))


def logits(model: Decoder) -> Tensor:
    with torch.no_grad():
        return model(tiny.token_ids(model.config))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    """Within tolerance, and neither constant nor tiny: logits are of order 1."""
    return bool((a - b).abs().max() < tolerance and 0.5 < b.std() < 2)


@pytest.fixture(scope="module", params=list(tiny.CONFIGS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """transformers' model, its folder, and ours read from it."""
    theirs = tiny.transformers_model(request.param)
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return request.param, theirs, folder, read(folder)


def test_logits_and_config_equal(pair) -> None:
    kind, theirs, _, ours = pair
    assert ours.config == tiny.CONFIGS[kind]
    assert ours.source_format == "safetensors"
    assert not ours.model.training
    ids = tiny.token_ids(ours.config, batch=2)
    with torch.no_grad():
        assert close(ours.model(ids), theirs(ids).logits)


def test_gradients_equal(pair) -> None:
    _, theirs, _, ours = pair
    ids = tiny.token_ids(ours.config)
    grads = []
    for model, out in ((theirs, theirs(ids).logits), (ours.model, ours.model(ids))):
        model.zero_grad()
        torch.nn.functional.cross_entropy(out[0, :-1], ids[0, 1:]).backward()
        names = {n.removeprefix("model.").replace(".mlp.", ".feed_forward."): p for n, p in model.named_parameters()}
        grads.append({name: parameter.grad for name, parameter in names.items()})
    assert grads[0].keys() == grads[1].keys()
    for name, theirs_grad in grads[0].items():
        if theirs_grad is None or not theirs_grad.any():
            assert grads[1][name] is None or not grads[1][name].any(), name
        else:
            assert (grads[1][name] - theirs_grad).norm() < 1e-3 * theirs_grad.norm(), name


def test_token_by_token_equals_full_pass(pair) -> None:
    model = pair[3].model
    ids, cache = tiny.token_ids(model.config), model.new_cache()
    with torch.no_grad():
        steps = [model(ids[:, :5], cache), *(model(ids[:, i : i + 1], cache) for i in range(5, tiny.TOKENS))]
        assert close(torch.cat(steps, 1), model(ids))


def test_written_folder_is_read_by_both(pair, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    _, theirs, _, ours = pair
    save(ours.model, ours.config, None, tmp_path / "out", max_shard_bytes=30_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    again = read(tmp_path / "out")
    assert again.config == ours.config
    assert torch.equal(logits(again.model), logits(ours.model))
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.dtype == torch.float32
    ids = tiny.token_ids(ours.config)
    with torch.no_grad():
        assert close(loaded.eval()(ids).logits, theirs(ids).logits)


def test_gguf_round_trip(pair, tmp_path: Path) -> None:
    kind, theirs, _, ours = pair
    with pytest.warns() if kind in LLAMA4 else nullcontext():
        save(ours.model, ours.config, None, tmp_path / "out.gguf", format="gguf")
    ids = tiny.token_ids(ours.config)
    with torch.no_grad():
        assert close(read(tmp_path / "out.gguf").model(ids), theirs(ids).logits)


@pytest.mark.parametrize("kind", ["scout", "maverick"])
def test_split_experts(kind: str, tmp_path: Path) -> None:
    model = tiny.decoder(kind)
    write_split_experts(tmp_path, model)
    assert torch.equal(logits(read(tmp_path).model), logits(model))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("kind", list(tiny.CONFIGS))
def test_meta_shards(kind: str, ranks: int, tmp_path: Path) -> None:
    config = tiny.CONFIGS[kind].with_(num_kv_heads=4)
    if config.rope_scaling:  # params.json has no key for it
        config = config.with_(rope_scaling=replace(config.rope_scaling, original_context=8192))
    model = tiny.decoder(config)
    write_meta(tmp_path, model, ranks, nested=ranks == 2)
    loaded = read(tmp_path)
    assert loaded.source_format == "meta"
    assert loaded.config == config
    assert torch.equal(logits(loaded.model), logits(model))
    if config.tie_word_embeddings:
        assert any("output.weight" in note for note in loaded.notes)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("kind", ["llama2", "scout"])
def test_meta_ranks_that_share_a_key_value_head(kind: str, kv_heads: int, tmp_path: Path) -> None:
    model = tiny.decoder(tiny.CONFIGS[kind].with_(num_kv_heads=kv_heads, rope_scaling=None))
    write_meta(tmp_path, model, ranks=4)
    loaded = read(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(logits(loaded.model), logits(model))


@pytest.mark.parametrize("tied", [True, False])
def test_llama2c(tied: bool, tmp_path: Path) -> None:
    model = tiny.decoder(tiny.CONFIGS["llama2"].with_(tie_word_embeddings=tied, num_kv_heads=2))
    write_llama2c(tmp_path / "model.bin", model)
    loaded = read(tmp_path)
    assert loaded.source_format == "llama2.c"
    assert loaded.config.with_(bos_token_id=None, eos_token_ids=()) == model.config
    assert torch.equal(logits(loaded.model), logits(model))


def test_text_of_a_multimodal_model(tmp_path: Path) -> None:
    from transformers import Llama4Config, Llama4ForConditionalGeneration, Llama4VisionConfig

    vision = Llama4VisionConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        vision_output_dim=16,
        image_size=28,
        patch_size=14,
        projector_input_dim=16,
        projector_output_dim=16,
    )
    config = Llama4Config(vision_config=vision, text_config=tiny.transformers_config("scout"))
    theirs = Llama4ForConditionalGeneration(config)
    tiny.randomise(theirs)
    theirs.eval().save_pretrained(tmp_path)
    ours = load_source(open_source(tmp_path, text_only=True))
    assert ours.config == tiny.CONFIGS["scout"]
    assert any("vision" in note for note in ours.notes)
    ids = tiny.token_ids(ours.config)
    with torch.no_grad():
        assert close(ours.model(ids), theirs.language_model(ids).logits)


@pytest.mark.parametrize("kind", ["llama3.1", "scout"])
def test_bfloat16_survives_exactly(kind: str, tmp_path: Path) -> None:
    model = tiny.decoder(kind, dtype=torch.bfloat16)
    save(model, model.config, None, tmp_path / "out")
    loaded = read(tmp_path / "out")
    assert loaded.model.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), model.parameters(), strict=True))
    wide = load_source(open_source(tmp_path / "out"), dtype=torch.float32)
    assert wide.model.dtype == torch.float32
