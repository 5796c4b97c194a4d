"""Tokenizers survive a round trip through every format."""

import numpy as np
import pytest

from puna.errors import PunaError
from puna.text import load_tokenizer, tokenizer_from_gguf
from puna.text.sentencepiece_ import CONTROL, USER_DEFINED, Model, Piece, parse_model
from puna.text.tokenizer import Tokenizer, tokenizer_from_model
from tokenizer_cases import HARD_TEXTS, corpus, llama2, own, sentencepiece_bytes, tiktoken_folder

TEXTS = [*HARD_TEXTS, *corpus()[:30]]


def same(a: Tokenizer, b: Tokenizer) -> None:
    for field in ("control", "vocab_size", "bos_id", "pad_id", "eos_ids", "bos_token", "eos_token", "chat_template",
                  "generation"):
        assert getattr(a, field) == getattr(b, field), field
    assert [a.token_bytes(i) for i in range(a.vocab_size)] == [b.token_bytes(i) for i in range(a.vocab_size)]
    for text in TEXTS:
        assert a.encode(text) == b.encode(text), text[:60]
        assert a.decode(a.encode(text)) == b.decode(b.encode(text))


@pytest.fixture(params=["own", "llama2", "llama3", "llama4"])
def tokenizer(request, tmp_path) -> Tokenizer:
    if request.param in ("own", "llama2"):
        return {"own": own, "llama2": llama2}[request.param]()
    return load_tokenizer(tiktoken_folder(tmp_path, 256 if request.param == "llama3" else 2048))


def test_through_a_folder(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "a")
    first = load_tokenizer(tmp_path / "a")
    if tokenizer.backend.byte_level:
        same(tokenizer, first)
    else:  # the unknown piece is shown differently, by nobody's wish
        assert [tokenizer.encode(t) for t in TEXTS] == [first.encode(t) for t in TEXTS]
        assert (tmp_path / "a" / "tokenizer.model").exists()
    first.save(tmp_path / "b")
    same(first, load_tokenizer(tmp_path / "b"))


def test_through_gguf(tokenizer):
    tokenizer.chat_template = "{{ messages }}"
    fields = tokenizer.gguf_fields()
    same(tokenizer, tokenizer_from_gguf(fields))
    arrays = {k: np.array(v) if isinstance(v, list) and not isinstance(v[0], str) else v for k, v in fields.items()}
    same(tokenizer, tokenizer_from_gguf(arrays))
    tokenizer.chat_template = None


def test_gguf_fills_up_to_the_models_rows(tokenizer):
    size = tokenizer.vocab_size + 9
    fields = tokenizer.gguf_fields(size)
    assert len(fields["tokenizer.ggml.tokens"]) == len(fields["tokenizer.ggml.token_type"]) == size
    assert len(set(fields["tokenizer.ggml.tokens"])) == size
    again = tokenizer_from_gguf(fields)
    assert [again.encode(t) for t in TEXTS] == [tokenizer.encode(t) for t in TEXTS]
    assert again.control == tokenizer.control
    with pytest.raises(PunaError, match="ids"):
        tokenizer.gguf_fields(tokenizer.vocab_size - 1)


def test_gguf_names_what_llama_cpp_knows(tmp_path):
    fields = load_tokenizer(tiktoken_folder(tmp_path)).gguf_fields()
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "llama-bpe")
    assert own().gguf_fields()["tokenizer.ggml.pre"] == "llama4"
    assert llama2().gguf_fields()["tokenizer.ggml.model"] == "llama"
    kinds = own().gguf_fields()["tokenizer.ggml.token_type"]
    assert [i for i, k in enumerate(kinds) if k == 3] == sorted(own().control_ids)


def test_gguf_keeps_a_pattern_that_llama_cpp_does_not_know(tmp_path):
    own().save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace(r"\\p{N}{1,3}", r"\\p{N}"))
    tokenizer = load_tokenizer(tmp_path)
    fields = tokenizer.gguf_fields()
    assert fields["tokenizer.ggml.pre"] == "default"
    assert r"|\p{N}|" in fields["puna.tokenizer.split_regex"]
    same(tokenizer, tokenizer_from_gguf(fields))
    del fields["puna.tokenizer.split_regex"]
    with pytest.raises(PunaError, match=r"tokenizer\.ggml\.pre"):
        tokenizer_from_gguf(fields)


def test_gguf_with_damage_or_without_tokenizer():
    assert tokenizer_from_gguf({}) is None
    fields = own().gguf_fields()
    with pytest.raises(PunaError, match="t5"):
        tokenizer_from_gguf({**fields, "tokenizer.ggml.model": "t5"})
    with pytest.raises(PunaError, match="token_type"):
        tokenizer_from_gguf({**fields, "tokenizer.ggml.token_type": [1]})
    with pytest.raises(PunaError, match=r"merges\[0\]"):
        tokenizer_from_gguf({**fields, "tokenizer.ggml.merges": ["abc"]})


def test_sentencepiece_scores_are_recovered_from_merges(tmp_path):
    llama2().save(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    from_json = load_tokenizer(tmp_path)
    again = tokenizer_from_gguf(from_json.gguf_fields())
    for text in TEXTS:
        assert llama2().encode(text) == from_json.encode(text) == again.encode(text), text[:60]


def test_user_defined_pieces_that_look_like_control_are_kept_from_text():
    model = parse_model(sentencepiece_bytes(), "stand-in")
    more = (Piece("<|im_start|>", 0.0, USER_DEFINED), Piece("llama", 0.0, USER_DEFINED))
    tokenizer = tokenizer_from_model(Model((*model.pieces, *more)).serialize(), "edited")
    size = len(model.pieces)
    assert tokenizer.control["<|im_start|>"] == size
    assert tokenizer.backend.model.pieces[size].kind == CONTROL
    assert size not in tokenizer.encode("<|im_start|>")
    assert size + 1 in tokenizer.encode("the llama")


def test_a_normalising_sentencepiece_model_keeps_only_its_own_file(tmp_path):
    model = parse_model(sentencepiece_bytes(), "stand-in")
    trimming = tokenizer_from_model(Model(model.pieces, trim_spaces=True).serialize(), "trimming")
    trimming.save(tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
    assert load_tokenizer(tmp_path).encode("the   grass ") == trimming.encode("the grass")


def test_a_cut_sentencepiece_file_is_named(tmp_path):
    for cut in (10, 1000, len(sentencepiece_bytes()) // 2 + 1):
        (tmp_path / "tokenizer.model").write_bytes(sentencepiece_bytes()[:cut])
        with pytest.raises(PunaError, match=r"tokenizer\.model"):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(Model(parse_model(sentencepiece_bytes(), "").pieces, False).serialize())
    with pytest.raises(PunaError, match="unigram"):
        load_tokenizer(tmp_path)


def test_ranks_of_unknown_number_need_a_model_size(tmp_path):
    tiktoken_folder(tmp_path)
    (tmp_path / "params.json").unlink()
    with pytest.raises(PunaError, match="vocab_size"):
        load_tokenizer(tmp_path)
