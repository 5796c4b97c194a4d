"""Llama 4 as data. Sources: llama-models, torchtune's and MaxText's configs, transformers' converter."""

from puna.family.config import AttentionTemperature, ModelConfig, RopeScaling
from puna.family.member import Member, Note
from puna.family.vision import LLAMA_4_VISION

TWELVE_LANGUAGES = (
    "Arabic", "English", "French", "German", "Hindi", "Indonesian", "Italian", "Portuguese", "Spanish", "Tagalog",
    "Thai", "Vietnamese",
)  # fmt: skip
_LAYERS = 48
_BASE_CONTEXT = 262_144

SCOUT = ModelConfig(
    architecture="llama4", vocab_size=202_048, hidden_size=5120, num_layers=_LAYERS, num_heads=40, num_kv_heads=8,
    head_dim=128, intermediate_size=16_384, context_length=10_485_760,
    rope_scaling=RopeScaling(16.0, 1.0, 1.0, 8192),
    num_experts=16, expert_intermediate_size=8192, moe_layers=tuple(range(_LAYERS)),
    nope_layers=tuple(range(3, _LAYERS, 4)), attention_chunk_size=8192,
    attention_temperature=AttentionTemperature(), qk_norm=True,
    bos_token_id=200_000, eos_token_ids=(200_001, 200_007, 200_008), pad_token_id=200_018,
)  # fmt: skip

MAVERICK = SCOUT.with_(
    num_experts=128, moe_layers=tuple(range(1, _LAYERS, 2)), context_length=1_048_576, rope_scaling=None, qk_norm=False
)

# Scout without its routed experts and routers: the shared expert is the feed-forward layer.
GUARD_4 = SCOUT.with_(
    num_experts=0, expert_intermediate_size=0, moe_layers=(), intermediate_size=8192, context_length=8192
)

_TEMPERATURE = Note(
    "attention_temperature", "on in the Hugging Face configs, vLLM and llama.cpp; Meta's code leaves it to "
    "params.json, which was not read", "secondary",
)  # fmt: skip

MEMBERS: tuple[Member, ...] = (
    Member(
        name="llama-4-scout", title="Llama 4 Scout", generation="4", kind="language model", licence="llama4",
        released="2025-04-05", languages=TWELVE_LANGUAGES, inputs=("text", "image"), knowledge_cutoff="2024-08",
        training_tokens="~40T", base_context=_BASE_CONTEXT, instruct_context=SCOUT.context_length, config=SCOUT,
        vision=LLAMA_4_VISION,
        hub_ids={"instruct": "meta-llama/Llama-4-Scout-17B-16E-Instruct", "base": "meta-llama/Llama-4-Scout-17B-16E"},
        notes=(_TEMPERATURE,
               Note("rope_scaling", "16/1/1/8192 since a correction on the hub; early revisions had factor 8, high 4",
                    "verified"),
               Note("intermediate_size", "16384 is only in the config: every layer is a mixture of experts",
                    "verified")),
    ),
    Member(
        name="llama-4-maverick", title="Llama 4 Maverick", generation="4", kind="language model", licence="llama4",
        released="2025-04-05", languages=TWELVE_LANGUAGES, inputs=("text", "image"), knowledge_cutoff="2024-08",
        training_tokens="~22T", base_context=_BASE_CONTEXT, instruct_context=MAVERICK.context_length, config=MAVERICK,
        vision=LLAMA_4_VISION,
        hub_ids={"instruct": "meta-llama/Llama-4-Maverick-17B-128E-Instruct",
                 "base": "meta-llama/Llama-4-Maverick-17B-128E",
                 "instruct, fp8": "meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8"},
        notes=(_TEMPERATURE,),
    ),
    Member(
        name="llama-4-behemoth", title="Llama 4 Behemoth", generation="4", kind="language model", licence=None,
        released=None, languages=None, inputs=("text", "image"),
        notes=(Note("release", "announced on 2025-04-05 as a teacher in training; no weights were released",
                    "secondary"),
               Note("shape", "layers, widths and context are not published; the layer counts on aggregator sites have "
                             "no source", "secondary"),
               Note("inputs", "announced as multimodal", "secondary")),
    ),
)  # fmt: skip
