"""Incremental decoding: never half a character, and the pieces join to the whole."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.text.incremental import StreamDecoder
from tokenizer_cases import HARD_TEXTS, llama2, own

TOKENIZERS = {"byte-level": own, "sentencepiece": llama2}


def pieces(tokenizer, ids, skip_control=True):
    stream = tokenizer.stream(skip_control)
    return [stream.push(i) for i in ids] + [stream.finish()]


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_pieces_join_to_decode_for_any_ids(kind, data):
    tokenizer = TOKENIZERS[kind]()
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=30))
    for skip in (True, False):
        assert "".join(pieces(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_valid_text_never_shows_a_replacement_character(kind, text):
    tokenizer = TOKENIZERS[kind]()
    text = text.replace("\ufffd", "").replace("▁", "")
    shown = pieces(tokenizer, tokenizer.encode(text))
    assert "".join(shown) == text
    assert shown[-1] == ""
    assert not any("\ufffd" in piece for piece in shown)


def test_a_character_of_four_bytes_appears_with_its_last_byte():
    tokenizer = own()
    ids = [tokenizer.encode("a")[0], *(next(i for i in range(256) if tokenizer.token_bytes(i) == bytes([b]))
                                       for b in "🦙".encode())]
    assert pieces(tokenizer, ids) == ["a", "", "", "", "🦙", ""]


def test_broken_bytes_finally_become_replacement_characters():
    stream = StreamDecoder(lambda i: bytes([i]))
    assert [stream.push(b) for b in (0xF0, 0x9F, 0x41)] == ["", "", "\ufffdA"]
    assert stream.push(0xE6) == ""
    assert stream.finish() == "\ufffd"


def test_broken_bytes_of_sentencepiece_count_one_by_one():
    tokenizer = llama2()
    byte = {tokenizer.token_bytes(i): i for i in range(3, 259)}
    ids = [byte[b"\xf0"], byte[b"\x9f"], byte[b"A"]]
    assert tokenizer.decode(ids) == "\ufffd\ufffdA"


def test_only_the_very_first_space_of_sentencepiece_is_dropped():
    tokenizer = llama2()
    ids = tokenizer.encode("the grass  the")
    shown = pieces(tokenizer, [tokenizer.bos_id, *ids])
    assert "".join(shown) == "the grass  the"
    assert shown[1].startswith("the")


def test_control_tokens_are_silent_unless_asked_for():
    tokenizer = own()
    ids = [*tokenizer.encode("hi"), tokenizer.control["<|eot|>"]]
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, skip_control=False) == "hi<|eot|>"
    assert "".join(pieces(tokenizer, ids, skip_control=False)) == "hi<|eot|>"


def test_hard_texts_come_back_piece_by_piece():
    chance = random.Random(3)
    for text in HARD_TEXTS:
        for tokenizer in (own(), llama2()):
            ids = tokenizer.encode(text)
            shown = "".join(pieces(tokenizer, ids))
            assert shown == tokenizer.decode(ids)
            cut = chance.randrange(len(ids) + 1)
            stream = tokenizer.stream()
            before = "".join(stream.push(i) for i in ids[:cut])
            assert shown.startswith(before)
