"""Tool calls out of an answer: every form, alone and in text, and what only looks like one."""

import pytest

from puna.errors import PunaError
from puna.text.toolcalls import ToolCall, ToolCallParser, encode_calls


def parsed(text, tools=None, chunk=None):
    """(shown text, [(name, arguments)]) of an answer that arrives in pieces of `chunk` characters."""
    parser = ToolCallParser(tools)
    chunk = chunk or max(len(text), 1)
    events = [e for i in range(0, len(text), chunk) for e in parser.push(text[i : i + chunk])] + parser.finish()
    assert parser.finish() == []
    return ("".join(e for e in events if isinstance(e, str)),
            [(e.name, e.arguments) for e in events if isinstance(e, ToolCall)])  # fmt: skip


F1, G0 = ("f", {"a": 1}), ("g", {})
CALLS = {
    "[f(a=1)]": [F1],
    "[f(a=1), g()]": [F1, G0],
    "[ f( a = 1 , ) ,\n g( ) , ]": [F1, G0],
    "[f(a='x', b=[1, {\"k\": None}])]": [("f", {"a": "x", "b": [1, {"k": None}]})],
    "[f(t=True, u=true, v=False, w=false, x=None, y=null)]": [
        ("f", {"t": True, "u": True, "v": False, "w": False, "x": None, "y": None})],
    "[f(a=-1, b=+2, c=1.5e-3, d=-.5, e=1_000, f=2.)]": [
        ("f", {"a": -1, "b": 2, "c": 0.0015, "d": -0.5, "e": 1000, "f": 2.0})],
    r"""[f(a='it\'s', b="say \"hi\"", c='\n\t\\', d="\u00e9\x41\101", e='\q')]""": [
        ("f", {"a": "it's", "b": 'say "hi"', "c": "\n\t\\", "d": "éAA", "e": "\\q"})],
    '[f(a="""two\n"quoted" lines""", b=\'\'\'x\'\'\', c="")]': [("f", {"a": 'two\n"quoted" lines', "b": "x", "c": ""})],
    "[f(a='raw\nnewline')]": [("f", {"a": "raw\nnewline"})],
    "[f(a=(1, 2), b=())]": [("f", {"a": [1, 2], "b": []})],
    "[f(**{'my-key': 1, 'class': 2}, from='x')]": [("f", {"my-key": 1, "class": 2, "from": "x"})],
    "[mod.sub.f(a={1: 2, True: 3})]": [("mod.sub.f", {"a": {"1": 2, "true": 3}})],
    "[get-it(città='城 🙂')]": [("get-it", {"città": "城 🙂"})],
    '{"name": "f", "parameters": {"a": 1}}': [F1],
    '{"type": "function", "name": "f", "arguments": {"a": 1}}': [F1],
    '{"parameters": {"a": 1}, "name": "f", "id": "x"}': [F1],
    '{"type": "function", "function": {"name": "f", "arguments": "{\\"a\\": 1}"}}': [F1],
    '{"function": "f", "parameters": {"a": 1}}': [F1],
    '{"name": "g", "parameters": null}': [G0],
    "{'name': 'f', 'parameters': {'a': 1,},}": [F1],
    '{\n  "name": "f",\n  "parameters": {\n    "a": 1\n  }\n}': [F1],
    '{"name": "f", "parameters": {"a": "\\ud83d\\ude42\\/\\u00e9"}}': [("f", {"a": "🙂/é"})],
    '[{"name": "f", "parameters": {"a": 1}}, {"name": "g", "arguments": {}}]': [F1, G0],
    '{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}': [F1, G0],
    '{"name": "f", "parameters": {"a": 1}}\n{"name": "g", "parameters": {}}\n': [F1, G0],
    '{"name": "f", "parameters": {"a": 1}}{"name": "g", "parameters": {}}': [F1, G0],
    '<function=f>{"a": 1}</function>': [F1],
    '<function=f> {"a": 1} </function>\n<function=g>{}</function>': [F1, G0],
    '<function=f>{"a": 1}': [F1],
    "[f(a=1)]\n[g()]": [F1, G0],
    'brave_search.call(query="who \\"is\\" it?")': [("brave_search", {"query": 'who "is" it?'})],
}  # fmt: skip


@pytest.mark.parametrize("around", ["{}", "<|python_tag|>{}", "<|python_start|>{}<|python_end|>",
                                    "<|python_start|><|python_end|>{}", "\n\n {}\n"])  # fmt: skip
@pytest.mark.parametrize("text", CALLS)
def test_forms(text, around):
    for chunk in (None, 1, 3):
        assert parsed(around.format("\0").replace("\0", text), chunk=chunk) == ("", CALLS[text])


@pytest.mark.parametrize(("text", "shown"), [
    ("Let me look.\n\n[f(a=1)]", "Let me look."),
    ("Let me look.<|python_tag|>[f(a=1)]", "Let me look."),
    ("Let me look.<|python_end|>[f(a=1)]\n\nDone.", "Let me look.\n\nDone."),
    ('Sure <function=f>{"a": 1}</function> and so on', "Sure and so on"),
    ('{"name": "f", "parameters": {"a": 1}} is what I call', "is what I call"),
    ('See [1]\n{"name": "f", "parameters": {"a": 1}};', "See [1]"),
    ("[note]\n{a}\n<b>\n[f(a=1)]", "[note]\n{a}\n<b>"),
])  # fmt: skip
def test_beside_text(text, shown):
    for chunk in (None, 1):
        seen, calls = parsed(text, chunk=chunk)
        assert calls == [F1]
        assert seen.replace(" ", "") == shown.replace(" ", "")


NOT_CALLS = [
    "", " ", "\n", "Hello [f(a=1)] there", "[1] A reference", "[]", "[ ]", "[x]", "[link](http://x.org)",
    "[f(1)]", "[f(x)]", "[f(a=b)]", "[f(a=g())]", "[f(a=1+1)]", "[f(a=1) for a in b]", "[f(a=__import__('os'))]",
    "[f(a=1, a=2)]", "[f(a=1) g()]", "[f(a=1)", "[f(a='x", "[f(a=1)] is how you call it", "[f(a=1)](http://x.org)",
    "[f(*a)]", "[f(**a)]", "[f(a=f'{x}')]", "[f(a={1, 2})]", "[f(a=1e999)]", "[f(a=0x10)]", "[f(a=nan)]", "[f (a=1)]",
    "[f(a=" + "[" * 100 + "]" * 100 + ")]", "[f(a=" + "9" * 5000 + ")]", "[f(1a=2)]", "f(a=1)", "f.call(a=1)",
    "{", "{}", "{a}", '{"a": 1}', '{"name": "f"}', '{"name": "f", "parameters": 3}', '{"name": 3, "parameters": {}}',
    '{"name": "f", "parameters": {}, "note": 1}', '{"type": "object", "name": "f", "parameters": {}}',
    '{"name": "f", "parameters": {}', '{"name": "f", "parameters": {"a": NaN}}', '[{"name": "f", "parameters": {}}, 1]',
    '{"name": "f", "parameters": "x"}', '{"name": "", "parameters": {}}', '[{"name": "f"}]', "[{}]",
    "<function=f>{", "<function=f>x</function>", "<function=f>{}</func>", "<function", "<function=f", "<b>{}</b>",
    "<function=>{}</function>", "<|python_tag|>print(1)", "<|python_tag|>", "<|python_", "a <| b |> c", "<|python_tag|",
    "```\n[f(a=1)]\n```", '```json\n{"name": "f", "parameters": {}}\n```\nand `{`', "`", "``",
    "``` <function=f>{}</function>",
    "I use {\"name\": \"f\", \"parameters\": {}} here",
]  # fmt: skip


@pytest.mark.parametrize("text", NOT_CALLS)
def test_what_only_looks_like_a_call_comes_out_unchanged(text):
    for chunk in (None, 1, 2, 7):
        assert parsed(text, chunk=chunk) == (text, [])
        assert parsed(f"\n{text}", chunk=chunk) == (f"\n{text}", [])


TOOLS = [{"type": "function", "function": {"name": "f"}}, "brave_search"]


@pytest.mark.parametrize("text", ["[g(a=1)]", "[fun(a=1)]", '{"name": "g", "parameters": {}}', "[f(a=1), g()]",
                                  "<function=g>{}</function>", 'wolfram_alpha.call(query="1")', "[f.x()]"])  # fmt: skip
def test_unknown_names_are_text(text):
    for chunk in (None, 1):
        assert parsed(text, TOOLS, chunk) == (text, [])


def test_known_names_are_calls():
    for chunk in (None, 1):
        assert parsed("[f(a=1)]", TOOLS, chunk) == ("", [F1])
        assert parsed('brave_search.call(query="x")', TOOLS, chunk) == ("", [("brave_search", {"query": "x"})])
        assert parsed('f.call(a=1)', TOOLS, chunk) == ("", [F1])
        # Where controls were dropped, nothing is left between Llama 4's text and its call.
        assert parsed('Let me see.{"name": "f", "parameters": {"a": 1}}', TOOLS, chunk) == ("Let me see.", [F1])


def test_text_streams_at_once():
    parser = ToolCallParser()
    assert parser.push("Hello") == ["Hello"]
    assert parser.push(" wor") == [" wor"]
    assert parser.push("ld\n") == ["ld"]
    assert parser.push("x < y") == ["\nx < y"]
    assert parser.push("\n[") == []
    assert parser.push("1]") == ["\n[1]"]
    assert parser.push('\n{"no') == []
    assert parser.push('de"') == ['\n{"node"']
    assert parser.push("\n[f(x") == []
    assert parser.push(")") == ["\n[f(x)"]


def test_calls_stream_as_they_end():
    parser = ToolCallParser()
    assert parser.push('{"name": "f", "parameters": {"a": 1}') == []
    (event,) = parser.push("}")
    assert (event.name, event.arguments) == F1
    assert parser.push("; ") == []
    assert parser.push("and text") == ["; and text"]
    early = ToolCallParser(TOOLS)
    assert early.push('{"name": "other", ') == ['{"name": "other", ']  # given up at the name
    assert ToolCallParser(TOOLS).push("[fo") == ["[fo"]


def test_long_arguments_take_linear_time():
    body = "x = [1]\\n" * 30_000
    for text in (f"[f(code='{body}')]", '{"name": "f", "parameters": {"code": "' + body + '"}}'):
        _, calls = parsed(text, chunk=16)
        assert len(calls[0][1]["code"]) == 8 * 30_000


def test_ids_differ():
    one, two = (e for e in ToolCallParser().push('{"name": "f", "parameters": {}}' * 2))
    assert one.id.startswith("call_")
    assert one.id != two.id


def test_encoded_forms():
    calls = [ToolCall("f", {"a": "it's", "my-key": None}), ToolCall("g", {})]
    assert encode_calls(calls, "pythonic") == """[f(a="it's", **{'my-key': None}), g()]"""
    assert encode_calls(calls, "json") == (
        '{"name": "f", "parameters": {"a": "it\'s", "my-key": null}}; {"name": "g", "parameters": {}}')  # fmt: skip
    assert encode_calls(calls, "function_tag") == (
        '<function=f>{"a": "it\'s", "my-key": null}</function><function=g>{}</function>')  # fmt: skip
    assert [encode_calls([], style) for style in ("pythonic", "json", "function_tag")] == [""] * 3


@pytest.mark.parametrize(("call", "style", "error"), [
    (ToolCall("f", {"a": float("inf")}), "json", "not representable in JSON"),
    (ToolCall("f", {"a": {1}}), "pythonic", "not representable in JSON"),
    (ToolCall("f g", {}), "pythonic", "the tool name 'f g' can't be written in the pythonic style"),
    (ToolCall("f>", {}), "function_tag", "can't be written in the function_tag style"),
    (ToolCall("f", {}), "xml", "'xml' is no style of tool calls"),
])  # fmt: skip
def test_encoding_errors(call, style, error):
    with pytest.raises(PunaError, match=error):
        encode_calls([call], style)
