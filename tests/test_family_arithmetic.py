"""Parameter and byte counts, exact; and the same counts from the model itself and from transformers."""

import pytest

from puna.family.arithmetic import (
    count,
    count_parameters,
    decoder_shapes,
    kv_bytes,
    kv_cache,
    member_parameters,
    vision_shapes,
    weight_bytes,
)
from puna.family.describe import describe_config
from puna.family.members import MEMBERS, get

TOTALS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.2-11b-vision": 10_629_184_035,
    "llama-3.2-90b-vision": 88_552_318_523,
    "llama-3.3-70b": 70_553_706_496,
    "llama-4-scout": 108_641_793_536,
    "llama-4-maverick": 401_583_781_376,
    "llama-4-behemoth": None,
    "llama-guard-3-8b": 8_030_261_248,
    "llama-guard-3-1b": 1_498_482_688,
    "llama-guard-3-1b-int4": 1_123_076_096,
    "llama-guard-3-11b-vision": 10_629_184_035,
    "llama-guard-4-12b": 12_001_097_216,
    "prompt-guard-86m": 278_811_651,
    "prompt-guard-2-86m": 278_810_882,
    "prompt-guard-2-22m": 70_830_722,
}
SHAPED = [member for member in MEMBERS if member.config is not None]


def test_total_of_every_member() -> None:
    counted = {member.name: member_parameters(member) for member in MEMBERS}
    assert {name: parameters and parameters.total for name, parameters in counted.items()} == TOTALS


@pytest.mark.parametrize(
    ("name", "text", "active_text"),
    [("llama-4-scout", 107_769_861_120, 17_172_894_720), ("llama-4-maverick", 400_711_848_960, 17_184_691_200),
     ("llama-3.1-8b", 8_030_261_248, 8_030_261_248), ("llama-guard-4-12b", 11_129_164_800, 11_129_164_800)],
)  # fmt: skip
def test_text_and_active(name: str, text: int, active_text: int) -> None:
    parameters = member_parameters(get(name))
    assert parameters is not None
    assert (parameters.text, parameters.active_text) == (text, active_text)
    assert parameters.active == active_text + parameters.vision


@pytest.mark.parametrize("member", SHAPED, ids=lambda member: member.name)
def test_decoder_on_the_meta_device_has_these_tensors(member) -> None:
    torch = pytest.importorskip("torch")
    from puna.model import Decoder

    with torch.device("meta"):
        model = Decoder(member.config)
    built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert built == decoder_shapes(member.config)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(member.config).text


def test_llama_4_vision_agrees_with_transformers() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    member = get("scout")
    text = {"num_hidden_layers": 1, "hidden_size": 5120, "num_local_experts": 1, "vocab_size": 8,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    vision = {"hidden_size": 1408, "num_hidden_layers": 34, "num_attention_heads": 16, "intermediate_size": 5632,
              "image_size": 336, "vision_output_dim": 4096, "projector_input_dim": 4096,
              "projector_output_dim": 4096}  # fmt: skip
    config = transformers.Llama4Config(text_config=text, vision_config=vision)
    with torch.device("meta"):
        model = transformers.Llama4ForConditionalGeneration(config)
    theirs = {name.removeprefix("model."): tuple(p.shape) for name, p in model.named_parameters()
              if "vision_model" in name or "multi_modal_projector" in name}  # fmt: skip
    assert theirs == vision_shapes(member.vision, member.config)
    assert count(theirs) == 871_932_416
    assert (member.vision.patches, member.vision.tokens_per_tile) == (576, 144)


def test_llama_32_vision_agrees_with_transformers() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    member = get("llama-3.2-11b-vision")
    config = transformers.MllamaConfig(vision_config={"image_size": 560}, text_config={})
    with torch.device("meta"):
        model = transformers.MllamaForConditionalGeneration(config)
    expanded_tile_tables = (9 * 4 - 16) * 1280 * (1601 + 2)
    assert sum(p.numel() for p in model.parameters()) == TOTALS[member.name] + expanded_tile_tables
    assert list(member.vision.cross_attention_layers()) == config.text_config.cross_attention_layers
    assert member.vision.output_size == config.vision_config.vision_output_dim
    theirs = {name.removeprefix("model."): tuple(p.shape) for name, p in model.named_parameters()}
    ours = vision_shapes(member.vision, member.config)
    differing = {name for name, shape in ours.items() if theirs.get(name) != shape}
    tables = {"gated_positional_embedding.tile_embedding", "pre_tile_positional_embedding.embedding",
              "post_tile_positional_embedding.embedding"}  # fmt: skip
    assert differing == {f"vision_model.{table}.weight" for table in tables} | {
        "language_model.extra_embeddings.weight"  # rows of embed_tokens there
    }


@pytest.mark.parametrize("name", ["prompt-guard-86m", "prompt-guard-2-86m", "prompt-guard-2-22m"])
def test_prompt_guard_agrees_with_transformers(name: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    encoder = get(name).encoder
    config = transformers.DebertaV2Config(
        vocab_size=encoder.vocab_size, hidden_size=encoder.hidden_size, num_hidden_layers=encoder.num_layers,
        num_attention_heads=encoder.num_heads, intermediate_size=encoder.intermediate_size,
        num_labels=len(encoder.labels), relative_attention=True, position_buckets=encoder.position_buckets,
        norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False,
        type_vocab_size=0, pooler_hidden_size=encoder.hidden_size,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.DebertaV2ForSequenceClassification(config)
    assert sum(p.numel() for p in model.parameters()) == TOTALS[name]


@pytest.mark.parametrize(
    ("name", "per_token"),
    [("llama-3.2-1b", 32_768), ("llama-3.2-3b", 114_688), ("llama-3.1-8b", 131_072), ("llama-3.1-70b", 327_680),
     ("llama-3.1-405b", 516_096), ("llama-2-7b", 524_288)],
)  # fmt: skip
def test_cache_where_every_layer_grows(name: str, per_token: int) -> None:
    config = get(name).config
    cache = kv_cache(config)
    assert (cache.naive_per_token, cache.growing_per_token, cache.fixed) == (per_token, per_token, 0)
    assert kv_bytes(config, 1000) == 1000 * per_token


@pytest.mark.parametrize("name", ["llama-4-scout", "llama-4-maverick"])
def test_cache_with_chunked_layers(name: str) -> None:
    config = get(name).config
    cache = kv_cache(config)
    assert (cache.naive_per_token, cache.growing_per_token, cache.fixed) == (196_608, 49_152, 1_207_959_552)
    assert kv_bytes(config, 100) == 100 * 196_608, "below one chunk every layer grows"
    assert kv_bytes(config, 8192) == 8192 * 196_608
    assert kv_bytes(config, 10_485_760) == 480 * 2**30 + 1_207_959_552
    assert kv_cache(config, "int8").naive_per_token == 98_304


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("float32", 4000), ("bfloat16", 2000), ("int8", 1000), ("int4", 500), ("Q8_0", 1063), ("Q6_K", 821),
     ("Q4_K", 563)],
)  # fmt: skip
def test_weight_bytes(dtype: str, expected: int) -> None:
    assert weight_bytes(1000, dtype) == expected


def test_block_formats_hold_their_blocks_exactly() -> None:
    assert weight_bytes(32, "Q8_0") == 34
    assert weight_bytes(32, "Q4_0") == 18
    assert weight_bytes(256, "Q4_K") == 144
    assert weight_bytes(256, "Q6_K") == 210
    assert weight_bytes(108_641_793_536, "bfloat16") == 217_283_587_072


def test_describe_config_of_any_decoder() -> None:
    config = get("llama-3.2-1b").config.with_(num_layers=2, vocab_size=100, context_length=64)
    facts = describe_config(config)
    assert facts["parameters"]["total"] == count(decoder_shapes(config))
    assert facts["kv_cache"]["bytes_at_full_context"] == 64 * 2 * 2 * 8 * 64 * 2
