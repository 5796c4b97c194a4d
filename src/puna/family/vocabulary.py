"""Vocabularies of the Llama generations: split patterns, control tokens with their places, stop sets.

Sources: llama-models 0.3.0, `llama3/tokenizer.py` and `llama4/tokenizer.py`; Llama 2's sentencepiece model.
"""

from collections.abc import Iterable, Mapping

# How text is cut before byte pairs are merged.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA4_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

LLAMA3_RANKS = 128_000
LLAMA3_CONTROL_SLOTS = 256
LLAMA4_RANKS = 200_000
LLAMA4_CONTROL_SLOTS = 2048

# The reference encodes at most this many characters at once, and cuts runs of (non-)space of this length.
MAX_ENCODE_CHARACTERS = 400_000
MAX_RUN_CHARACTERS = 25_000

BEGIN_TOKENS = ("<|begin_of_text|>", "<s>")
END_TOKENS = ("<|eot|>", "<|eot_id|>", "<|end_of_text|>", "</s>")  # the first present is the template's eos_token
STOP_TOKENS = frozenset({"<|end_of_text|>", "<|eom|>", "<|eot|>", "<|eom_id|>", "<|eot_id|>", "</s>"})
PAD_TOKENS = ("<|finetune_right_pad|>", "<|finetune_right_pad_id|>", "<pad>")


def _reserved(name: str, start: int, stop: int) -> list[str]:
    """Reserved names of one kind, numbered start..stop-1."""
    return [f"<|{name}reserved_special_token_{i}|>" for i in range(start, stop)]


LLAMA3_CONTROL: tuple[str, ...] = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
    "<|python_tag|>", "<|image|>", *_reserved("", 2, LLAMA3_CONTROL_SLOTS - 10),
)  # fmt: skip

LLAMA4_CONTROL: tuple[str, ...] = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
    "<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>", "<|step|>", *_reserved("text_post_train_", 0, 6),
    "<|python_start|>", "<|python_end|>", "<|finetune_right_pad|>", *_reserved("text_post_train_", 8, 69),
    "<|image_start|>", "<|image_end|>", *_reserved("vision_", 0, 2), "<|tile_x_separator|>", "<|tile_y_separator|>",
    *_reserved("vision_", 2, 6), "<|image|>", *_reserved("vision_", 6, 7), "<|patch|>", *_reserved("vision_", 7, 1048),
    *_reserved("reasoning_", 0, 8), "<|reasoning_thinking_start|>", "<|reasoning_thinking_end|>",
    *_reserved("", 0, LLAMA4_CONTROL_SLOTS - 1144),
)  # fmt: skip

# The control tokens of vocabularies that this package trains: Llama 4's names in 48 slots.
OWN_CONTROL: tuple[str, ...] = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
    "<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>", "<|step|>", "<|python_start|>", "<|python_end|>",
    "<|finetune_right_pad|>", "<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>",
    "<|image|>", "<|patch|>", *_reserved("", 0, 48 - 19),
)  # fmt: skip


def control_tokens(ranks: int, vocab_size: int | None = None) -> tuple[str, ...] | None:
    """The control tokens that follow a tiktoken file of `ranks` ranks, in order of id.

    A model's `vocab_size` tells the generation where the number of ranks is not Llama 3's or 4's. None where
    neither does.
    """
    if ranks in (LLAMA3_RANKS, LLAMA4_RANKS):
        return LLAMA3_CONTROL if ranks == LLAMA3_RANKS else LLAMA4_CONTROL
    return {LLAMA3_CONTROL_SLOTS: LLAMA3_CONTROL, LLAMA4_CONTROL_SLOTS: LLAMA4_CONTROL}.get((vocab_size or 0) - ranks)


def split_pattern(control: Iterable[str]) -> str:
    """The split pattern of the generation that these control tokens belong to."""
    return LLAMA4_SPLIT if "<|header_start|>" in set(control) else LLAMA3_SPLIT


def generation_of(control: Iterable[str]) -> str | None:
    """The generation whose control tokens these are: "llama2", "llama3" or "llama4"; None where unknown."""
    names = set(control)
    for name, generation in (("<|header_start|>", "llama4"), ("<|start_header_id|>", "llama3"), ("<s>", "llama2")):
        if name in names:
            return generation
    return None


def stop_ids(control: Mapping[str, int]) -> tuple[int, ...]:
    """The ids that end an answer or a message, in ascending order."""
    return tuple(sorted(i for name, i in control.items() if name in STOP_TOKENS))
