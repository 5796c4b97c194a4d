"""What every tokenizer must do: text comes back, text never becomes a control token, settings are honoured."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.errors import PunaError
from puna.text import load_tokenizer
from puna.text.fast import well_formed
from puna.text.tiktoken_ import split_runs
from puna.text.tokenizer import Tokenizer, tokenizer_from_json
from puna.text.train import train_tokenizer
from tokenizer_cases import CONTROL_LOOKALIKES, HARD_TEXTS, corpus, llama2, own, tiktoken_folder


@pytest.fixture(scope="module", params=["own", "llama2", "llama2 json", "llama3", "llama4", "llama4 json"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    if request.param in ("own", "llama2"):
        return {"own": own, "llama2": llama2}[request.param]()
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "llama2 json":
        llama2().save(folder)
        (folder / "tokenizer.model").unlink()
        return load_tokenizer(folder)
    made = load_tokenizer(tiktoken_folder(folder, 256 if request.param == "llama3" else 2048))
    if "json" in request.param:
        made.save(folder / "saved")
        made = load_tokenizer(folder / "saved")
    return made


def test_text_comes_back(tokenizer):
    for text in [*HARD_TEXTS, *corpus()[:20]]:
        ids = tokenizer.encode(text)
        expected = well_formed(text)
        if not tokenizer.backend.byte_level:
            expected = expected.replace("▁", " ")  # sentencepiece's own sign for a space
        assert tokenizer.decode(ids) == expected, text[:40]


def test_text_never_becomes_a_control_token(tokenizer):
    names = list(tokenizer.control)
    for text in [*HARD_TEXTS, *names[:300], "".join(names[:300]), " ".join(names[-300:])]:
        ids = tokenizer.encode(text)
        assert not tokenizer.control_ids & set(ids), text[:60]
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


@settings(max_examples=150, deadline=None)
@given(parts=st.lists(st.one_of(st.text(max_size=5), st.sampled_from(CONTROL_LOOKALIKES)), max_size=8))
def test_no_mixture_of_lookalikes_becomes_a_control_token(tokenizer, parts):
    assert not tokenizer.control_ids & set(tokenizer.encode("".join(parts)))


def test_batches_equal_single_texts(tokenizer):
    texts = [*HARD_TEXTS, *corpus()[:5]]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(t) for t in texts]
    assert tokenizer.encode_batch([]) == []


def test_token_bytes_join_to_the_text(tokenizer):
    data = b"".join(map(tokenizer.token_bytes, tokenizer.encode("漢字 naïve 🦙")))
    assert data.decode().removeprefix(" ") == "漢字 naïve 🦙"
    name, token_id = next(iter(tokenizer.control.items()))
    assert tokenizer.token(token_id) == name
    assert tokenizer.token_bytes(tokenizer.vocab_size + 5) == b""
    assert tokenizer.token_bytes(-1) == b""


@pytest.mark.parametrize("unit", ["x", " ", "\n", "é", "🦙", "1", " \t", "<s>", "ab "])
def test_runs_of_100k_characters_are_quick(tokenizer, unit):
    text = unit * (100_000 // len(unit))
    start = time.perf_counter()
    ids = tokenizer.encode(text)
    assert time.perf_counter() - start < 5  # a quadratic algorithm takes minutes
    assert tokenizer.decode(ids) == text


def test_runs_are_cut_where_the_reference_cuts_them():
    assert list(split_runs("")) == []
    assert [len(p) for p in split_runs("x" * 60_000)] == [25_000, 25_000, 10_000]
    assert [len(p) for p in split_runs("x" * 25_000 + " " * 25_000)] == [50_000]
    assert [len(p) for p in split_runs("ab " * 150_000)] == [400_000, 50_000]


def test_control_tokens_of_llama_3_and_4_have_their_places(tmp_path):
    for slots, places in ((256, {"<|begin_of_text|>": 0, "<|finetune_right_pad_id|>": 4, "<|eom_id|>": 8,
                                 "<|eot_id|>": 9, "<|python_tag|>": 10, "<|image|>": 11,
                                 "<|reserved_special_token_2|>": 12, "<|reserved_special_token_245|>": 255}),
                          (2048, {"<|begin_of_text|>": 0, "<|header_start|>": 5, "<|eom|>": 7, "<|eot|>": 8,
                                  "<|python_start|>": 16, "<|finetune_right_pad|>": 18, "<|image_start|>": 80,
                                  "<|tile_x_separator|>": 84, "<|image|>": 90, "<|patch|>": 92,
                                  "<|reasoning_thinking_start|>": 1142, "<|reserved_special_token_0|>": 1144,
                                  "<|reserved_special_token_903|>": 2047})):
        tokenizer = load_tokenizer(tiktoken_folder(tmp_path, slots))
        base = tokenizer.vocab_size - slots
        assert len(tokenizer.control) == len(tokenizer.control_ids) == slots
        assert {name: tokenizer.control[name] - base for name in places} == places
        stops = (1, 8, 9) if slots == 256 else (1, 7, 8)
        assert tokenizer.eos_ids == tuple(base + i for i in stops)
        assert tokenizer.generation == ("llama3" if slots == 256 else "llama4")
        assert (tokenizer.bos_id, tokenizer.pad_id) == (base, base + (4 if slots == 256 else 18))


def test_training_puts_48_control_tokens_at_the_end():
    tokenizer = own()
    assert tokenizer.vocab_size == 460
    assert sorted(tokenizer.control.values()) == list(range(412, 460))
    assert list(tokenizer.control)[:9] == ["<|begin_of_text|>", "<|end_of_text|>", "<|fim_prefix|>", "<|fim_middle|>",
                                           "<|fim_suffix|>", "<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>"]
    assert tokenizer.eos_ids == tuple(sorted(tokenizer.control[n] for n in ("<|end_of_text|>", "<|eom|>", "<|eot|>")))
    assert len(tokenizer.encode("the llamas graze")) < len("the llamas graze")
    with pytest.raises(PunaError, match="304"):
        train_tokenizer(["a"], 303)


def test_configs_beside_the_tokenizer_are_honoured(tmp_path):
    own().save(tmp_path)
    assert load_tokenizer(tmp_path / "tokenizer.json").control == own().control
    config = {"bos_token": {"content": "<|end_of_text|>"}, "eos_token": "<|eom|>", "pad_token": "<|missing|>",
              "chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template) == ("<|end_of_text|>", "<|eom|>", "D")
    assert tokenizer.pad_token == "<|finetune_right_pad|>"  # what the config names does not exist
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": 7}}))
    assert load_tokenizer(tmp_path).eos_ids == (7, *own().eos_ids)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 3]}))
    (tmp_path / "chat_template.jinja").write_text("file")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_ids == (5, 3)
    assert tokenizer.chat_template == "file"
    assert load_tokenizer(tmp_path / "nothing") is None


def test_position_scaling_tells_3_1_from_3_2(tmp_path):
    tiktoken_folder(tmp_path)
    size = json.loads((tmp_path / "params.json").read_text())["vocab_size"]
    for scaling, generation in (({"rope_type": "llama3", "factor": 8.0}, "llama3.1"),
                                ({"rope_type": "llama3", "factor": 32.0}, "llama3.2"), (None, "llama3")):
        (tmp_path / "config.json").write_text(json.dumps({"vocab_size": size, "rope_scaling": scaling}))
        assert load_tokenizer(tmp_path).generation == generation
    (tmp_path / "config.json").unlink()
    (tmp_path / "params.json").write_text(json.dumps({"vocab_size": size, "use_scaled_rope": True, "dim": 4096}))
    assert load_tokenizer(tmp_path).generation == "llama3.1"


def test_control_tokens_are_kept_from_text_whatever_their_flags():
    spec = own().backend.tokenizer_json()
    for token in spec["added_tokens"]:
        token["special"] = False
    extra = {"id": 460, "content": "<think>", "special": False, "normalized": False, "single_word": False,
             "lstrip": False, "rstrip": False}
    spec["added_tokens"].append(extra)
    tokenizer = tokenizer_from_json(json.dumps(spec), "edited")
    assert not tokenizer.control_ids & set(tokenizer.encode("<|eot|>"))
    assert tokenizer.encode("<think>") == [460]  # an added word is a word
    assert tokenizer.decode([460]) == "<think>"


BAD_FILES = {
    "no base64": ("tokenizer.model", b"IQ== 0\nnot!base64 1\n", "tokenizer.model, line 2"),
    "three fields": ("tokenizer.model", b"IQ== 0 0\n", "line 1"),
    "rank twice": ("tokenizer.model", b"IQ== 0\nIg== 0\n", "line 2"),
    "cut off": ("tokenizer.model", b"IQ== 0\nIg== 2\n", "rank 1 is missing"),
    "no bytes": ("tokenizer.model", b"IQ== 0\nIg== 1\n", "byte 0x00"),
    "empty": ("tokenizer.model", b"", "empty"),
    "noise": ("tokenizer.model", bytes(range(256)) * 9, "neither a sentencepiece model"),
    "json line": ("tokenizer.json", b'{"model":\n {"vocab": }}', "tokenizer.json, line 2"),
    "json list": ("tokenizer.json", b"[]", "JSON object"),
    "not utf-8": ("tokenizer.json", b'{\n"a": "\xff"}', "line 2"),
    "word piece": ("tokenizer.json", b'{"model": {"type": "WordPiece"}}', "BPE"),
    "no merges": ("tokenizer.json", b'{"model": {"vocab": {}}}', "merges"),
    "same id": ("tokenizer.json", b'{"model": {"vocab": {"a": 0, "b": 0}, "merges": []}}', "'b'"),
    "bad merge": ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a c"]}}', "not a"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_damaged_files_are_named(tmp_path, case):
    name, data, message = BAD_FILES[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PunaError) as error:
        load_tokenizer(tmp_path)
    assert message in str(error.value)
    assert name in str(error.value)
