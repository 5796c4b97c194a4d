"""Llama 2 to 3.3 as data. Sources: llama-models model cards and sku_list, torchtune's model builders."""

from puna.family.config import ModelConfig, RopeScaling
from puna.family.member import Member, Note
from puna.family.vision import Llama32Vision

ENGLISH = ("English",)
EIGHT_LANGUAGES = ("English", "German", "French", "Italian", "Portuguese", "Hindi", "Spanish", "Thai")
LONG = 131_072


def _llama2(layers: int, width: int, heads: int, kv_heads: int, ffn: int) -> ModelConfig:
    return ModelConfig(
        architecture="llama", vocab_size=32_000, hidden_size=width, num_layers=layers, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=128, intermediate_size=ffn, context_length=4096, rope_theta=10_000.0,
        bos_token_id=1, eos_token_ids=(2,),
    )  # fmt: skip


def _llama3(layers: int, width: int, heads: int, ffn: int, head_dim: int = 128) -> ModelConfig:
    return ModelConfig(
        architecture="llama", vocab_size=128_256, hidden_size=width, num_layers=layers, num_heads=heads,
        num_kv_heads=8, head_dim=head_dim, intermediate_size=ffn, context_length=8192,
        bos_token_id=128_000, eos_token_ids=(128_001, 128_009),
    )  # fmt: skip


def _long(config: ModelConfig, factor: float = 8.0) -> ModelConfig:
    """Llama 3.1's long context: scaled rotary positions, and the end-of-message token among the stops."""
    return config.with_(
        context_length=LONG, rope_scaling=RopeScaling(factor, 1.0, 4.0, 8192),
        eos_token_ids=(128_001, 128_008, 128_009), pad_token_id=128_004,
    )  # fmt: skip


LLAMA_3_8B = _llama3(32, 4096, 32, 14_336)
LLAMA_3_70B = _llama3(80, 8192, 64, 28_672)
LLAMA_31_8B = _long(LLAMA_3_8B)
LLAMA_31_70B = _long(LLAMA_3_70B)
LLAMA_31_405B = _long(_llama3(126, 16_384, 128, 53_248))
# Meta's own inference code hard-codes factor 8; torchtune and the published configs have 32 for 1B and 3B.
LLAMA_32_1B = _long(_llama3(16, 2048, 32, 8192, head_dim=64), factor=32.0).with_(tie_word_embeddings=True)
LLAMA_32_3B = _long(_llama3(28, 3072, 24, 8192), factor=32.0).with_(tie_word_embeddings=True)

VISION_11B = Llama32Vision(cross_attention_before=tuple(range(3, 32, 4)))
VISION_90B = Llama32Vision(cross_attention_before=tuple(range(3, 80, 4)))

_FACTOR_32 = Note("rope_scaling", "factor 32 is torchtune's; the hub's own config was not read", "secondary")
_IMAGE_ENGLISH = Note("languages", "with images only English; the eight languages are for text alone", "verified")
_TILE_TABLES = Note(
    "parameters", "counted with Meta's tile tables (one row for each tile of a 4 x 4 grid); Hugging Face stores them "
    "expanded to one row for each of 9 aspect ratios, which adds 41,036,800", "verified",
)  # fmt: skip


def _llama2_member(size: str, config: ModelConfig) -> Member:
    hub = size.lower()
    return Member(
        name=f"llama-2-{hub}", title=f"Llama 2 {size}", generation="2", kind="language model", licence="llama2",
        released="2023-07-18", languages=ENGLISH, knowledge_cutoff="2022-09", training_tokens="2.0T",
        base_context=4096, instruct_context=4096, config=config,
        hub_ids={"instruct": f"meta-llama/Llama-2-{hub}-chat-hf", "base": f"meta-llama/Llama-2-{hub}-hf",
                 "instruct, Meta's format": f"meta-llama/Llama-2-{hub}-chat",
                 "base, Meta's format": f"meta-llama/Llama-2-{hub}"},
        notes=(Note("knowledge_cutoff", "of the pre-training data; some tuning data reaches July 2023", "verified"),
               Note("shape", "llama-models' sku_list gives other values (8 key/value heads, theta 500,000) that fit "
                             "none of the checkpoints; the shape here is torchtune's and the card's", "verified")),
    )  # fmt: skip


def _llama3_member(size: str, config: ModelConfig, cutoff: str) -> Member:
    return Member(
        name=f"llama-3-{size.lower()}", title=f"Llama 3 {size}", generation="3", kind="language model",
        licence="llama3", released="2024-04-18", languages=ENGLISH, knowledge_cutoff=cutoff, training_tokens="15T+",
        base_context=8192, instruct_context=8192, config=config,
        hub_ids={"instruct": f"meta-llama/Meta-Llama-3-{size}-Instruct", "base": f"meta-llama/Meta-Llama-3-{size}"},
    )  # fmt: skip


def _llama31_member(size: str, config: ModelConfig, extra: dict[str, str] | None = None) -> Member:
    return Member(
        name=f"llama-3.1-{size.lower()}", title=f"Llama 3.1 {size}", generation="3.1", kind="language model",
        licence="llama3.1", released="2024-07-23", languages=EIGHT_LANGUAGES, knowledge_cutoff="2023-12",
        training_tokens="15T+", base_context=LONG, instruct_context=LONG, config=config,
        hub_ids={"instruct": f"meta-llama/Llama-3.1-{size}-Instruct", "base": f"meta-llama/Llama-3.1-{size}",
                 **(extra or {})},
    )  # fmt: skip


def _llama32_member(size: str, config: ModelConfig) -> Member:
    instruct = f"meta-llama/Llama-3.2-{size}-Instruct"
    return Member(
        name=f"llama-3.2-{size.lower()}", title=f"Llama 3.2 {size}", generation="3.2", kind="language model",
        licence="llama3.2", released="2024-09-25", languages=EIGHT_LANGUAGES, knowledge_cutoff="2023-12",
        training_tokens="up to 9T", base_context=LONG, instruct_context=LONG, config=config,
        hub_ids={"instruct": instruct, "base": f"meta-llama/Llama-3.2-{size}",
                 "int4, SpinQuant": f"{instruct}-SpinQuant_INT4_EO8", "int4, QLoRA": f"{instruct}-QLORA_INT4_EO8"},
        notes=(_FACTOR_32, Note("context", "8,192 for the int4 releases", "verified")),
    )  # fmt: skip


def _vision_member(size: str, config: ModelConfig, vision: Llama32Vision, notes: tuple[Note, ...]) -> Member:
    return Member(
        name=f"llama-3.2-{size.lower()}-vision", title=f"Llama 3.2 {size} Vision", generation="3.2",
        kind="language model", licence="llama3.2", released="2024-09-25", languages=EIGHT_LANGUAGES,
        inputs=("text", "image"), knowledge_cutoff="2023-12", training_tokens="6B image-text pairs",
        base_context=LONG, instruct_context=LONG, config=config, vision=vision,
        hub_ids={"instruct": f"meta-llama/Llama-3.2-{size}-Vision-Instruct",
                 "base": f"meta-llama/Llama-3.2-{size}-Vision"},
        notes=(_IMAGE_ENGLISH, _TILE_TABLES, *notes),
    )  # fmt: skip


MEMBERS: tuple[Member, ...] = (
    _llama2_member("7B", _llama2(32, 4096, 32, 32, 11_008)),
    _llama2_member("13B", _llama2(40, 5120, 40, 40, 13_824)),
    _llama2_member("70B", _llama2(80, 8192, 64, 8, 28_672)),
    _llama3_member("8B", LLAMA_3_8B, "2023-03"),
    _llama3_member("70B", LLAMA_3_70B, "2023-12"),
    _llama31_member("8B", LLAMA_31_8B),
    _llama31_member("70B", LLAMA_31_70B),
    _llama31_member("405B", LLAMA_31_405B, {
        "instruct, fp8": "meta-llama/Llama-3.1-405B-Instruct-FP8", "base, fp8": "meta-llama/Llama-3.1-405B-FP8"}),
    _llama32_member("1B", LLAMA_32_1B),
    _llama32_member("3B", LLAMA_32_3B),
    _vision_member("11B", LLAMA_31_8B, VISION_11B, (
        Note("tile_side", "560 pixels for the instruct model, 448 for the base model", "verified"),)),
    _vision_member("90B", LLAMA_31_70B, VISION_90B, (
        Note("tile_side", "560 pixels for the instruct model; for the base model sources differ (llama-models 560, "
                          "torchtune 448)", "unverified"),
        Note("parameters", "the card says 88.8B, 0.25B more than the shapes give", "unverified"))),
    Member(
        name="llama-3.3-70b", title="Llama 3.3 70B", generation="3.3", kind="language model", licence="llama3.3",
        released="2024-12-06", languages=EIGHT_LANGUAGES, knowledge_cutoff="2023-12", training_tokens="~15T",
        instruct_context=LONG, config=LLAMA_31_70B, hub_ids={"instruct": "meta-llama/Llama-3.3-70B-Instruct"},
        notes=(Note("base", "a new post-training of the Llama 3.1 70B shape; no base model was released", "verified"),),
    ),
)  # fmt: skip
