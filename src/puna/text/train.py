"""Training a vocabulary of our own: byte-level BPE with Llama 4's split pattern and control names."""

from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from puna.errors import PunaError
from puna.family.vocabulary import LLAMA4_SPLIT, OWN_CONTROL
from puna.text.tokenizer import Tokenizer, tokenizer_from_json


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE vocabulary of at most `vocab_size` ids: 256 bytes, merges, then 48 control tokens.

    It has fewer ids where `texts` don't hold enough pairs that occur twice. Raises PunaError below 304 ids.
    """
    least = 256 + len(OWN_CONTROL)
    if vocab_size < least:
        raise PunaError(
            f"vocab_size {vocab_size} is too small; 256 bytes and {len(OWN_CONTROL)} control tokens need {least}"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(LLAMA4_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(OWN_CONTROL), min_frequency=2, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in OWN_CONTROL])
    begin = OWN_CONTROL[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin}:1 $B:1", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    return tokenizer_from_json(tokenizer.to_str(), "the trained tokenizer")
