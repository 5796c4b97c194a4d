"""Llama Guard and Prompt Guard as data. Source: PurpleLlama's model cards; llama-models' sku_list for shapes."""

from puna.family.llama4 import GUARD_4
from puna.family.llama23 import EIGHT_LANGUAGES, ENGLISH, LLAMA_31_8B, LLAMA_32_1B, LONG, VISION_11B
from puna.family.member import Encoder, Member, Note
from puna.family.vision import LLAMA_4_VISION

GUARD_3_1B = LLAMA_32_1B.with_(tie_word_embeddings=False)
GUARD_3_1B_INT4 = GUARD_3_1B.with_(num_layers=12, intermediate_size=6400)

_BINARY = ("benign", "malicious")
MDEBERTA_V3_BASE = Encoder(251_000, 768, 12, 12, 3072, 512, 256, _BINARY)
DEBERTA_V3_XSMALL = Encoder(128_100, 384, 12, 6, 1536, 512, 256, _BINARY)
PROMPT_GUARD_LANGUAGES = (*EIGHT_LANGUAGES, "Vietnamese", "Indonesian", "Japanese", "Korean", "Arabic", "Chinese",
                          "Marathi", "Tagalog")  # fmt: skip

_DATE_3_1 = Note("released", "the date of the Llama 3.1 release that it came with", "secondary")
_DATE_3_2 = Note("released", "the date of the Llama 3.2 release that it came with", "secondary")
_DATE_4 = Note("released", "from reports of the announcement", "secondary")
_ROPE_1B = Note(
    "rope_scaling", "taken from Llama 3.2 1B; a public copy of the checkpoint's config has factor 8: go by the "
    "checkpoint's own config", "unverified",
)  # fmt: skip
_ENCODER = Note(
    "encoder", "dimensions of the DeBERTa base model; the checkpoint's own config was not read", "unverified"
)
_LICENCE_3 = Note("licence", "PurpleLlama ships the Llama 3.2 licence in its Llama Guard 3 folders", "verified")

MEMBERS: tuple[Member, ...] = (
    Member(
        name="llama-guard-3-8b", title="Llama Guard 3 8B", generation="3.1", kind="safety model", licence="llama3.2",
        released="2024-07-23", languages=EIGHT_LANGUAGES, instruct_context=LONG, config=LLAMA_31_8B,
        hub_ids={"instruct": "meta-llama/Llama-Guard-3-8B", "int8": "meta-llama/Llama-Guard-3-8B-INT8"},
        notes=(_DATE_3_1, _LICENCE_3,
               Note("rope_scaling", "taken from Llama 3.1 8B, its base; llama-models' sku_list says unscaled: go by "
                                    "the checkpoint's own config", "unverified")),
    ),
    Member(
        name="llama-guard-3-1b", title="Llama Guard 3 1B", generation="3.2", kind="safety model", licence="llama3.2",
        released="2024-09-25", languages=EIGHT_LANGUAGES, instruct_context=LONG, config=GUARD_3_1B,
        hub_ids={"instruct": "meta-llama/Llama-Guard-3-1B"},
        notes=(_DATE_3_2, _LICENCE_3, _ROPE_1B,
               Note("parameters", "with an output head of its own, unlike Llama 3.2 1B", "secondary")),
    ),
    Member(
        name="llama-guard-3-1b-int4", title="Llama Guard 3 1B INT4", generation="3.2", kind="safety model",
        licence="llama3.2", released="2024-09-25", languages=EIGHT_LANGUAGES, instruct_context=LONG,
        config=GUARD_3_1B_INT4, hub_ids={"int4": "meta-llama/Llama-Guard-3-1B-INT4"},
        notes=(_DATE_3_2, _LICENCE_3, _ROPE_1B,
               Note("parameters", "before the output layer is pruned to 20 tokens; shipped as an ExecuTorch program, "
                                  "not as a checkpoint", "verified")),
    ),
    Member(
        name="llama-guard-3-11b-vision", title="Llama Guard 3 11B Vision", generation="3.2", kind="safety model",
        licence="llama3.2", released="2024-09-25", languages=ENGLISH, inputs=("text", "image"), instruct_context=LONG,
        config=LLAMA_31_8B, vision=VISION_11B, hub_ids={"instruct": "meta-llama/Llama-Guard-3-11B-Vision"},
        notes=(_DATE_3_2, _LICENCE_3, Note("inputs", "one image, scaled into four tiles of 560 pixels", "verified")),
    ),
    Member(
        name="llama-guard-4-12b", title="Llama Guard 4 12B", generation="4", kind="safety model", licence="llama4",
        released="2025-04-29", languages=EIGHT_LANGUAGES, inputs=("text", "image"),
        instruct_context=GUARD_4.context_length, config=GUARD_4, vision=LLAMA_4_VISION,
        hub_ids={"instruct": "meta-llama/Llama-Guard-4-12B"},
        notes=(_DATE_4,
               Note("attention", "rope scaling, NoPE layers, chunks and qk-norm are Scout's, from which it was pruned; "
                                 "the checkpoint's own config was not read", "unverified"),
               Note("context", "8,192 by the rule of transformers' converter; hosts advertise more", "secondary")),
    ),
    Member(
        name="prompt-guard-86m", title="Prompt Guard 86M", generation="3.1", kind="prompt classifier",
        licence="llama3.1", released="2024-07-23", languages=PROMPT_GUARD_LANGUAGES,
        encoder=Encoder(251_000, 768, 12, 12, 3072, 512, 256, ("benign", "injection", "jailbreak")),
        hub_ids={"classifier": "meta-llama/Prompt-Guard-86M"},
        notes=(_DATE_3_1, _ENCODER, Note("licence", "the version that it was released with", "unverified")),
    ),
    Member(
        name="prompt-guard-2-86m", title="Prompt Guard 2 86M", generation="4", kind="prompt classifier",
        licence="llama4", released="2025-04-29", languages=EIGHT_LANGUAGES,
        encoder=MDEBERTA_V3_BASE, hub_ids={"classifier": "meta-llama/Llama-Prompt-Guard-2-86M"},
        notes=(_DATE_4, _ENCODER),
    ),
    Member(
        name="prompt-guard-2-22m", title="Prompt Guard 2 22M", generation="4", kind="prompt classifier",
        licence="llama4", released="2025-04-29", languages=EIGHT_LANGUAGES,
        encoder=DEBERTA_V3_XSMALL, hub_ids={"classifier": "meta-llama/Llama-Prompt-Guard-2-22M"},
        notes=(_DATE_4, _ENCODER,
               Note("languages", "evaluated in eight languages, but its base model is English", "verified")),
    ),
)  # fmt: skip
