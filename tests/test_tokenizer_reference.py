"""Ids equal those of the reference tokenizers: Meta's, sentencepiece, transformers."""

import importlib
import json
import lzma
from pathlib import Path

import pytest
import sentencepiece

from puna.text import load_tokenizer
from tokenizer_cases import HARD_TEXTS, corpus, llama2, own, sentencepiece_bytes, tiktoken_folder

DATA = Path(__file__).parents[2] / "shared" / "data" / "text"
LONG = ["x" * 100_000, " " * 100_000, "\n" * 60_000, "x" * 24_999 + " " * 25_000 + "y" * 25_001, "1" * 50_001,
        "ab " * 140_000, "é" * 30_000]


def multilingual(per_language: int, characters: int) -> list[str]:
    """The beginnings of some texts of each of 405 languages; nothing where the data is missing."""
    file = DATA / "multilingual.jsonl.xz"
    if not file.exists():
        return []
    seen: dict[str, int] = {}
    texts = []
    with lzma.open(file, "rt") as lines:
        for line in lines:
            row = json.loads(line)
            seen[row["lang"]] = seen.get(row["lang"], 0) + 1
            if seen[row["lang"]] <= per_language:
                texts.append(row["text"][:characters])
    return texts


@pytest.mark.parametrize("generation", ["llama3", "llama4"])
def test_ids_equal_metas_reference(generation):
    module = pytest.importorskip(f"llama_models.{generation}.tokenizer", reason="llama-models is not installed")
    reference = module.Tokenizer.get_instance()
    file = Path(importlib.import_module("llama_models").__file__).parent / generation / "tokenizer.model"
    tokenizer = load_tokenizer(file)
    assert dict(tokenizer.control) == reference.special_tokens
    assert tokenizer.vocab_size == reference.n_words
    assert set(tokenizer.eos_ids) == set(reference.stop_tokens)
    assert (tokenizer.bos_id, tokenizer.pad_id) == (reference.bos_id, reference.pad_id)
    for text in [*HARD_TEXTS, *LONG, *list(tokenizer.control)[:100], *multilingual(2, 600)]:
        ids = reference.encode(text, bos=False, eos=False)
        assert tokenizer.encode(text) == ids, text[:60]
        assert tokenizer.decode(ids) == reference.decode(ids)


def test_sentencepiece_ids_equal_the_librarys():
    reference = sentencepiece.SentencePieceProcessor()
    reference.LoadFromSerializedProto(sentencepiece_bytes())
    tokenizer = llama2()
    assert tokenizer.control == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, (2,), reference.vocab_size())
    for text in [t for t in HARD_TEXTS if t.isascii() or t.encode("utf-8", "ignore").decode() == t] + list(corpus()):
        ids = reference.EncodeAsIds(text)
        assert tokenizer.encode(text) == ids, text[:60]
        assert tokenizer.decode(ids) == reference.DecodeIds(ids)


@pytest.mark.parametrize("kind", ["own", "llama2", "llama3", "llama4"])
def test_transformers_loads_what_is_saved_with_equal_ids(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    if kind in ("own", "llama2"):
        tokenizer = {"own": own, "llama2": llama2}[kind]()
    else:
        tokenizer = load_tokenizer(tiktoken_folder(tmp_path, 256 if kind == "llama3" else 2048))
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert len(theirs) == tokenizer.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.control[tokenizer.eos_token])
    assert theirs.pad_token_id == tokenizer.pad_id
    assert theirs.chat_template == tokenizer.chat_template
    names = [n for n in tokenizer.control if "reserved" not in n]
    assert theirs.convert_tokens_to_ids(names) == [tokenizer.control[n] for n in names]
    assert theirs("hi").input_ids == [tokenizer.bos_id, *tokenizer.encode("hi")]
    for text in [*(t for t in HARD_TEXTS if "<" not in t and "\ud800" not in t and "\udc00" not in t), *corpus()[:50]]:
        if any("\ud800" <= c <= "\udfff" for c in text):
            continue
        assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text), text[:60]
    tokenizer.chat_template = None
