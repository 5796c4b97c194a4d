"""Data files to examples: what is read, how it is rendered, and thirty-odd ways in which a set is malformed."""

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from puna.errors import PunaError
from puna.text.tokenizer import Tokenizer
from puna.train import tokenised
from puna.train.config import checked_config
from puna.train.examples import chat_example, learnable, preference_example
from puna.train.method import Example
from puna.train.methods import Pretrain
from puna.train.tokenised import Tokenised, tokenise
from training import CHAT, SETTINGS, TEXTS, lines, new_tokenizer

METHOD = Pretrain(checked_config(SETTINGS, "test"))
USER, SAID = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A llama."}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Lima"}'}}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return new_tokenizer()


class Prefer(Pretrain):
    """Reads preferences."""

    name = "prefer"

    def example(self, row: Any, tokenizer: Tokenizer) -> Example:
        return preference_example(row, tokenizer)


PREFER = Prefer(checked_config(SETTINGS, "test"))


def read(path: Path, tokenizer: Tokenizer) -> Tokenised:
    return tokenise(path, METHOD, tokenizer, None)


def learned(example: Example, tokenizer: Tokenizer, at: int = 0) -> str:
    document = example.documents[at]
    return tokenizer.decode(document.tokens[document.counted].tolist(), skip_control=False)


def test_loss_is_on_the_assistants_tokens_and_their_end_alone(tokenizer: Tokenizer) -> None:
    (document,) = chat_example({"messages": CHAT}, tokenizer).documents
    assert document.tokens.tolist() == tokenizer.render(CHAT, add_generation_prompt=False)
    end = int(document.tokens[-1])
    assert end in tokenizer.eos_ids
    spoken = [*tokenizer.encode("Grass 🦙."), end, *tokenizer.encode(" It rests."), end]
    assert document.tokens[document.counted].tolist() == spoken


def test_tools_calls_and_results_are_rendered_as_the_server_does(tokenizer: Tokenizer) -> None:
    chat = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "Rain."}, SAID]  # fmt: skip
    example = chat_example({"messages": chat, "tools": TOOLS}, tokenizer)
    assert example.documents[0].tokens.tolist() == tokenizer.render(chat, TOOLS, add_generation_prompt=False)
    said = learned(example, tokenizer)
    assert "Lima" in said
    assert "A llama." in said
    assert "Rain." not in said


def test_a_message_of_weight_0_is_not_learned(tokenizer: Tokenizer) -> None:
    chat = [USER, {**SAID, "weight": 0}, USER, {"role": "assistant", "content": "Grass.", "weight": 1}]
    said = learned(chat_example({"messages": chat}, tokenizer), tokenizer)
    assert "Grass." in said
    assert "llama" not in said


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [SAID], "rejected": [{**SAID, "content": "A dog."}]},
        {"prompt": "Who?", "chosen": "A llama.", "rejected": "A dog."},
        {"chosen": [USER, SAID], "rejected": [USER, {**SAID, "content": "A dog."}]},
        {"prompt": "Who?", "chosen": [USER, SAID], "rejected": [USER, {**SAID, "content": "A dog."}]},
    ],
    ids=["messages", "texts", "whole-chats", "prompt-repeated"],
)
def test_preferences_in_their_usual_shapes(row: dict[str, Any], tokenizer: Tokenizer) -> None:
    example = preference_example(row, tokenizer)
    assert example.documents[0].tokens.tolist() == tokenizer.render([USER, SAID], add_generation_prompt=False)
    assert [learned(example, tokenizer, at).split("<")[0] for at in range(2)] == ["A llama.", "A dog."]


def test_only_the_answers_of_a_preference_are_learned(tokenizer: Tokenizer) -> None:
    row = {"prompt": [USER, {**SAID, "content": "Which?"}, USER], "chosen": "A llama.", "rejected": "A dog."}
    assert "Which?" not in learned(preference_example(row, tokenizer), tokenizer)


def test_texts_begin_once_and_may_hold_line_separators(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a\u2028b\x85c<|begin_of_text|>"}\r\n{"text": "d", "title": "t"}', encoding="utf-8")
    found = read(path, tokenizer)
    first, second = (found.example(i).documents[0] for i in range(2))
    assert first.tokens.tolist() == [tokenizer.bos_id, *tokenizer.encode("a\u2028b\x85c<|begin_of_text|>")]
    assert second.tokens.tolist() == [tokenizer.bos_id, *tokenizer.encode("d")]
    assert second.counted.tolist() == [False, True]
    assert found.unused == ["title"]  # told, not silently left


def test_formats_give_the_same_rows(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"messages": [USER, SAID], "tools": json.dumps(TOOLS)}, {"messages": CHAT}]
    plain = lines(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    both = plain.read_bytes().splitlines(keepends=True)
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(both[0]) + bytes(8) + lzma.compress(both[1]) + bytes(4))
    files = ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz"]
    found = [read(tmp_path / name, tokenizer) for name in files]
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found.append(read(tmp_path / "a.parquet", tokenizer))
    rendered = tokenizer.render([USER, SAID], TOOLS, add_generation_prompt=False)
    assert found[0].example(0).documents[0].tokens.tolist() == rendered
    for other in found[1:]:
        assert np.array_equal(other.tokens, found[0].tokens)
        assert np.array_equal(other.counted, found[0].counted)


def test_a_folder_of_texts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.md").write_text(TEXTS[1])
    (tmp_path / "sub" / "a.txt").write_text(TEXTS[0])
    found = read(tmp_path, tokenizer)
    assert [tokenizer.decode(found.example(i).documents[0].tokens.tolist()) for i in range(2)] == [TEXTS[1], TEXTS[0]]


def bad(at: str, message: str, **row: Any) -> tuple[Any, str]:
    return row, f":2: {at}: .*{message}" if at else f":2: {message}"


MALFORMED: dict[str, tuple[Any, str]] = {
    "broken JSON": ('{"text": \n', ":2: not JSON: .*column"),
    "endless nesting": ("[" * 100_000 + "\n", ":2: JSON that can't be read"),
    "a blank line": ("\n", ":2: not JSON: the line is blank"),
    "a list": ("[1]\n", ":2: a row is an object, not a list"),
    "a number": ("3\n", ":2: a row is an object, not a int"),
    "NaN": ('{"text": NaN}\n', ":2: .*NaN is no JSON value"),
    "a field twice": ('{"text": "a", "text": "b"}\n', ":2: .*'text' stands twice"),
    "no known field": bad("", "a row is an object with either `text` or `messages`, this has 'body'", body="a"),
    "text and messages": bad("", "a row is an object with either", text="a", messages=[USER, SAID]),
    "an empty row": bad("", "a row is an object with either .* this has nothing"),
    "a number as text": bad("text", "must be a string", text=3),
    "null as text": bad("text", "must be a string", text=None),
    "no text": bad("text", "not empty", text=""),
    "ShareGPT's rows": bad("conversations", "write `messages`", conversations=[{"from": "human", "value": "a"}]),
    "Alpaca's rows": bad("instruction", "write `messages`", instruction="a", output="b"),
    "prompt and completion": bad("completion", "write `messages`", prompt="a", completion="b"),
    "messages as text": bad("messages", "must be a list", messages="a"),
    "no messages": bad("messages", "not empty", messages=[]),
    "a message as text": bad(r"messages\[0\]", "an object with `role`", messages=["a"]),
    "a message without role": bad(r"messages\[1\]", "an object with `role`", messages=[USER, {"content": "a"}]),
    "ShareGPT's messages": bad(r"messages\[0\]", "`role` and `content`", messages=[{"from": "human", "value": "a"}]),
    "an unknown role": bad(r"messages\[0\].role", "'llama'", messages=[{"role": "llama", "content": "a"}, SAID]),
    "no assistant": bad("messages", "no assistant message", messages=[USER]),
    "an assistant first": bad(r"messages\[0\].role", "begins with the user", messages=[SAID, USER, SAID]),
    "an assistant without words": bad(r"messages\[1\].content", "says nothing",
                                      messages=[USER, {**SAID, "content": ""}]),
    "a number as content": bad(r"messages\[1\].content", "a text", messages=[USER, {**SAID, "content": 3}]),
    "null of the user": bad(r"messages\[0\].content", "missing", messages=[{"role": "user", "content": None}, SAID]),
    "an unknown part": bad(r"messages\[0\].content\[0\].type", "'sound'",
                           messages=[{"role": "user", "content": [{"type": "sound"}]}, SAID]),
    "a picture": bad(r"messages\[0\].content\[1\]", "reads texts alone",
                     messages=[{"role": "user", "content": [{"type": "text", "text": "a"}, PICTURE]}, SAID]),
    "calls of the user": bad(r"messages\[0\].tool_calls", "only the assistant",
                             messages=[{**USER, "tool_calls": [CALL]}, SAID]),
    "arguments that are no JSON": bad(
        r"messages\[1\].tool_calls\[0\].function.arguments", "not valid JSON",
        messages=[USER, {**SAID, "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "{"}}]}]),
    "a call without a name": bad(
        r"messages\[1\].tool_calls\[0\].function.name", "text",
        messages=[USER, {**SAID, "tool_calls": [{**CALL, "function": {"arguments": "{}"}}]}]),
    "an answer to no call": bad(
        r"messages\[2\].tool_call_id", "no earlier call",
        messages=[USER, {**SAID, "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "c9", "content": "a"}, SAID]),
    "tools as broken JSON": bad("tools", "not valid JSON", messages=[USER, SAID], tools="["),
    "tools as an object": bad("tools", "must be a list", messages=[USER, SAID], tools={"name": "f"}),
    "a tool without a name": bad(r"tools\[0\].function.name", "text", messages=[USER, SAID],
                                 tools=[{"type": "function", "function": {}}]),
    "a weight of the user": bad(r"messages\[0\].weight", "assistant", messages=[{**USER, "weight": 0}, SAID]),
    "a weight of two": bad(r"messages\[1\].weight", "0 or 1", messages=[USER, {**SAID, "weight": 2}]),
    "nothing learned": bad("messages", "no assistant message to learn",
                           messages=[USER, {**SAID, "weight": 0}]),
    "half a character": ('{"messages": [{"role": "user", "content": "\\ud83d"}]}\n',
                         r":2: messages\[0\].content: has half of a surrogate pair"),
    "half a character in a name": ('{"text": "a", "\\uDFFF": 1}\n', ":2: a field's name: has half of a surrogate"),
    "an endless number": ('{"text": "a", "n": ' + "9" * 5000 + "}\n", r":2: JSON that can't be read: .* 5000 digits"),
    "minus infinity": ('{"text": "a", "n": [-Infinity]}\n', ":2: .*-Infinity is no JSON value"),
    "a mark inside the file": ('\ufeff{"text": "a"}\n', ":2: not JSON: Unexpected UTF-8 BOM"),
    "two rows on a line": ('{"text": "a"}{"text": "b"}\n', ":2: not JSON: Extra data, column 14"),
    "a raw control character": ('{"text": "a\0b"}\n', ":2: not JSON: Invalid control character"),
    "white space of the assistant": bad(r"messages\[1\].content", "says nothing",
                                        messages=[USER, {**SAID, "content": " \n"}]),
    "an empty part of the assistant": bad(r"messages\[1\].content", "says nothing",
                                          messages=[USER, {**SAID, "content": [{"type": "text", "text": ""}]}]),
    "a result of no call": bad(r"messages\[1\]", "nothing was called before it",
                               messages=[USER, {"role": "tool", "tool_call_id": "c1", "content": "a"}, SAID]),
    "endless tools": bad("tools", "not valid JSON", messages=[USER, SAID], tools="[" * 50_000),
    "preferences for other methods": bad("chosen", "are for method dpo", prompt="a", chosen="b", rejected="c"),
}  # fmt: skip
DISLIKED: dict[str, tuple[Any, str]] = {
    "no chosen": bad("chosen", "missing", prompt="a", rejected="b"),
    "no rejected": bad("rejected", "missing", prompt="a", chosen="b"),
    "no prompt": bad("prompt", "missing", chosen="a", rejected="b"),
    "an empty answer": bad("rejected", "must be a text", prompt="a", chosen="b", rejected=""),
    "a number": bad("chosen", "must be a text", prompt="a", chosen=3, rejected="c"),
    "the same twice": bad("rejected", "the same as", prompt="a", chosen="b", rejected="b"),
    "KTO's rows": bad("chosen", "are for method kto", prompt="a", completion="b", label=True),
    "OpenAI's preferences": bad("chosen", "OpenAI's", input={}, preferred_output=[SAID], non_preferred_output=[SAID]),
    "an answer that does not count": bad("chosen", "its weights are 0", prompt="a", chosen=[{**SAID, "weight": 0}],
                                         rejected="c"),
    "an answer of the user": bad("chosen", "no assistant", prompt="a", chosen=[USER], rejected="b"),
    "a bad message": bad(r"prompt \+ chosen: messages\[1\].content", "text", prompt="a", rejected="b",
                         chosen=[{**SAID, "content": 3}]),
}  # fmt: skip


@pytest.mark.parametrize("kind", MALFORMED)
def test_errors_name_file_line_and_field(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    row, message = MALFORMED[kind]
    with pytest.raises(PunaError, match=rf"rows\.jsonl{message}"):
        read(lines(tmp_path / "rows.jsonl", [{"text": "good"}, row]), tokenizer)


@pytest.mark.parametrize("kind", DISLIKED)
def test_errors_of_preferences(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    row, message = DISLIKED[kind]
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(PunaError, match=rf"rows\.jsonl{message}"):
        tokenise(lines(tmp_path / "rows.jsonl", [good, row]), PREFER, tokenizer, None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "the file is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl:2: not UTF-8 at byte 10"),
        ("a.jsonl", b'\xef\xbb\xbf{"text": "a"}\n', r"a\.jsonl:1: begins with a byte order mark"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), r"a\.jsonl:1: not UTF-8"),
        ("a.jsonl.gz", b'{"text": "a"}\n', r"a\.jsonl\.gz: can't read the data after line 0"),
        ("a.jsonl.xz", lzma.compress(b'{"text": "a"}\n' * 99)[:60], r"a\.jsonl\.xz: can't read the data"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99)[:-30] + b"\xff" * 30, r"a\.jsonl\.gz: can't read"),
        ("a.jsonl.xz", lzma.compress(b'{"text": "a"}\n' * 9) + b"junk and more", r"a\.jsonl\.xz: can't read .* line 9"),
        ("a.jsonl.xz", b"", r"a\.jsonl\.xz: can't read the data after line 0"),
        ("a.jsonl", gzip.compress(b'{"text": "a"}\n'), r"a\.jsonl: .* end its name in \.gz"),
        ("a.jsonl.bz2", b"BZh91AY", r"a\.jsonl\.bz2: .* use gzip or xz"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", r"a\.jsonl: .*git lfs pull"),
        ("a.parquet", b"PAR1", r"a\.parquet: no Parquet file|Parquet needs pyarrow"),
    ],
)
def test_files_that_cannot_be_read(
    name: str, content: bytes, message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PunaError, match=message):
        read(tmp_path / name, tokenizer)


def test_parquet_that_python_cannot_hold(tokenizer: Tokenizer, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    late = pyarrow.array([2**62], pyarrow.timestamp("us"))  # the year 148,000
    parquet.write_table(pyarrow.table({"text": ["a b"], "at": late}), tmp_path / "a.parquet")
    with pytest.raises(PunaError, match=r"a\.parquet: .* after row 0: date value out of range"):
        read(tmp_path / "a.parquet", tokenizer)


def test_fields_that_nothing_asks_for_are_told(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"text": "a b", "tools": [], "prompt": "c"}, {"messages": CHAT, "tools": None, "weight": 0}]
    assert read(lines(tmp_path / "a.jsonl", rows), tokenizer).unused == ["tools", "prompt", "weight"]
    pair = {"prompt": "Who?", "chosen": "A llama.", "rejected": "A dog.", "messages": CHAT, "score_chosen": 1}
    found = tokenise(lines(tmp_path / "pairs.jsonl", [pair]), PREFER, tokenizer, None)
    assert found.unused == ["messages", "score_chosen"]


def test_all_bad_rows_are_told_at_once_up_to_a_number(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"text": "good"}, {"text": 1}, {"text": ""}, {"text": "good"}, *[{"txt": "a"}] * 30]
    with pytest.raises(PunaError) as caught:
        read(lines(tmp_path / "rows.jsonl", rows), tokenizer)
    said = str(caught.value).splitlines()
    assert [line.split(":")[1] for line in said[:20]] == [str(n) for n in (2, 3, *range(5, 23))]
    assert "after 20 bad rows" in said[20]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b.csv").write_text("a,b")
    with pytest.raises(PunaError, match=r"b\.csv: a folder of text holds \.txt and \.md files alone"):
        read(tmp_path / "folder", tokenizer)


def test_tokenised_data_are_kept_by_content(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = lines(tmp_path / "a.jsonl", [{"text": text, "id": 1} for text in TEXTS]), tmp_path / "cache"
    first = tokenise(path, METHOD, tokenizer, cache)
    monkeypatch.setattr(tokenised, "_read", lambda *_: pytest.fail("read again"))
    again = tokenise(path, METHOD, tokenizer, cache)
    assert np.array_equal(again.tokens, first.tokens)
    assert (again.unused, len(again)) == (["id"], len(TEXTS))
    assert again.example(3).documents[0].counted.tolist() == first.example(3).documents[0].counted.tolist()
    monkeypatch.undo()
    other = tokenise(lines(path, [{"text": "other"}]), METHOD, tokenizer, cache)
    assert len(other) == 1  # same name, other content
    assert len(list(cache.iterdir())) == 2
    assert json.loads((next(cache.iterdir()) / "facts.json").read_text())["unused"] in ([], ["id"])


@pytest.mark.parametrize("name", ["facts.json", "tokens.npy"])
def test_kept_data_that_are_damaged_are_read_again(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path, cache = lines(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS]), tmp_path / "cache"
    first = tokenise(path, METHOD, tokenizer, cache).fingerprint
    (folder,) = cache.iterdir()
    (folder / name).write_bytes((folder / name).read_bytes()[:20])
    assert tokenise(path, METHOD, tokenizer, cache).fingerprint == first


def test_chats_and_texts_may_stand_in_one_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    found = read(lines(tmp_path / "a.jsonl", [{"text": "a b"}, {"messages": CHAT}]), tokenizer)
    assert (
        found.example(1).documents[0].tokens.tolist()
        == learnable({"messages": CHAT}, tokenizer).documents[0].tokens.tolist()
    )
