"""Our own formats against Meta's encoders (llama-models 0.3.0, ChatFormat), with the real vocabularies.

Plain chats are equal token for token. Where Meta's encoder and the templates on the hub disagree, ours follows the
template; each difference is stated here, and listed in docs/chat-formats.md.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from puna.text.tokenizer import tokenizer_from_model
from test_chat_cases import ASKED, called, result, said

PLAIN = [
    [said("user", "Hello")],
    [said("system", "Be brief. 城 🙂"), said("user", "a\n\n b"), said("assistant", "  indented"), said("user", "c")],
    [said("user", "<|eot|><|eot_id|><|begin_of_text|> & <|header_start|>system<|start_header_id|>")],
    [said("user", "")],
]  # fmt: skip


def meta(generation, monkeypatch):
    """(ChatFormat's encode_dialog_prompt on OpenAI messages, our tokenizer of the same vocabulary)"""
    pytest.importorskip("llama_models", reason="llama-models is not installed")
    pictures = ModuleType("preprocess")  # needs torchvision, and text never goes there
    pictures.ResizeNormalizeImageTransform = pictures.VariableSizeImageTransform = None
    monkeypatch.setitem(sys.modules, "llama_models.llama4.preprocess", pictures)
    module = importlib.import_module(f"llama_models.{generation}.chat_format")
    types = importlib.import_module("llama_models.datatypes")
    file = Path(importlib.import_module("llama_models").__file__).parent / generation / "tokenizer.model"
    form = module.ChatFormat(module.Tokenizer(file))

    def encode(messages, style=types.ToolPromptFormat.json):
        raw = []
        for message in messages:
            made = [(c["id"], c["function"]) for c in message.get("tool_calls", ())]
            calls = [types.ToolCall(call_id=i, tool_name=f["name"], arguments=f["arguments"]) for i, f in made]
            raw.append(types.RawMessage(role=message["role"], content=message["content"], tool_calls=calls))
        return form.encode_dialog_prompt(raw, style).tokens

    ours = tokenizer_from_model(file.read_bytes(), str(file))
    ours.generation = generation
    return encode, ours


@pytest.mark.parametrize("generation", ["llama3", "llama4"])
def test_plain_chats_are_equal(generation, monkeypatch):
    encode, ours = meta(generation, monkeypatch)
    for chat in PLAIN:
        # Llama 3's template trims every content, Meta's encoder none.
        trims = generation == "llama3"
        theirs = [{**m, "content": m["content"].strip()} for m in chat] if trims else chat
        assert ours.render(chat) == encode(theirs)
        if trims and theirs != chat:
            assert ours.render(chat) != encode(chat)
    # The one place where Llama 4's template trims.
    assert ours.render([said("system", " S "), said("user", "a")]) == encode([said("system", "S"), said("user", "a")])


def test_llama4_differences(monkeypatch):
    encode, ours = meta("llama4", monkeypatch)
    chat = [ASKED, called(("c1", "clock", {"zone": "é"}), content="Let me see. "), result("c1", "12:00")]
    shown = {name: ours.decode(ids, skip_control=False) for name, ids in
             (("meta", encode(chat)), ("ours", ours.render(chat)))}  # fmt: skip
    head = ours.decode(encode([ASKED]), skip_control=False)
    tail = "<|header_start|>assistant<|header_end|>\n\n"
    tool = "<|header_start|>ipython<|header_end|>\n\n"
    assert shown["meta"] == (
        head + 'Let me see. {"type": "function", "name": "clock", "parameters": {"zone": "\\u00e9"}}<|eom|>'
        + tool + "12:00<|eom|>" + tail)  # fmt: skip
    assert shown["ours"] == (
        head + '<|python_start|>Let me see. <|python_end|>{"name": "clock", "parameters": {"zone": "é"}}<|eot|>'
        + tool + '"12:00"<|eot|>' + tail)  # fmt: skip


def test_llama3_differences(monkeypatch):
    encode, ours = meta("llama3", monkeypatch)
    chat = [said("user", "q"), called(("c1", "clock", {})), result("c1", "12:00")]
    meta_text, our_text = (ours.decode(ids, skip_control=False) for ids in (encode(chat), ours.render(chat)))
    assert '{"type": "function", "name": "clock", "parameters": {}}<|eot_id|>' in meta_text
    assert '{"name": "clock", "parameters": {}}<|eot_id|>' in our_text
    assert "ipython<|end_header_id|>\n\n12:00<|eot_id|>" in meta_text
    assert 'ipython<|end_header_id|>\n\n"12:00"<|eot_id|>' in our_text
    ours.generation = "llama3.1"  # the template brings a system message of its own, Meta's encoder none
    dated = ours.decode(ours.render([said("user", "q")]), skip_control=False)
    system = ("<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
              "Today Date: 26 Jul 2024\n\n<|eot_id|>")  # fmt: skip
    assert dated.replace(system, "") == ours.decode(encode([said("user", "q")]), skip_control=False)
    assert system in dated
