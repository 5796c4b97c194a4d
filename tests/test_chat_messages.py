"""OpenAI messages and tool definitions: what is accepted, and the field that each error names."""

import re

import pytest

from puna.errors import PunaError
from puna.text.messages import check_messages, check_tools
from test_chat_cases import ASKED, TOOLS, called, result, said


def call(**changes):
    function = {"name": "f", "arguments": "{}"} | changes
    made = {"id": "c1", "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [made]}


def test_normal_form():
    checked = check_messages([
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "hi", "name": "Ana", "refusal": None, "audio": None},
        call(arguments='{"x": [1, "é"]}'),
        {"role": "ipython", "content": "1", "tool_call_id": "c1"},
        {"role": "assistant", "content": "done", "tool_calls": None, "function_call": None},
        {"role": "assistant", "content": "", "tool_calls": []},
    ])  # fmt: skip
    assert checked == [
        said("system", "ab"),
        {**said("user", "hi"), "name": "Ana"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": [1, "é"]}}}]},
        {"role": "tool", "content": "1", "tool_call_id": "c1"},
        said("assistant", "done"),
        said("assistant", ""),
    ]  # fmt: skip


def test_arguments_as_text_or_object():
    assert check_messages([call(arguments={"a": (1, 2)})])[0]["tool_calls"][0]["function"]["arguments"] == {"a": [1, 2]}
    assert check_messages([call(arguments="")])[0]["tool_calls"][0]["function"]["arguments"] == {}


def test_the_caller_keeps_his_own():
    given = [ASKED, called(("c1", "f", {"a": [1]})), result("c1", "x")]
    checked = check_messages(given)
    checked[1]["tool_calls"][0]["function"]["arguments"]["a"].append(2)
    assert given[1]["tool_calls"][0]["function"]["arguments"] == {"a": [1]}
    tools = check_tools(TOOLS)
    assert tools == TOOLS
    assert tools[0] is not TOOLS[0]


def test_pictures():
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}},
                                           {"type": "text", "text": "what?"}]}  # fmt: skip
    with pytest.raises(PunaError, match=r"messages\[0\]\.content\[0\]: this model reads text only"):
        check_messages([picture])
    read = check_messages([picture], read_picture=lambda part, where: [{"type": part["type"], "where": where}])
    assert read[0]["content"] == [{"type": "image_url", "where": "messages[0].content[0]"},
                                  {"type": "text", "text": "what?"}]  # fmt: skip


@pytest.mark.parametrize(("messages", "error"), [
    ("hi", "messages: a list of messages is needed, not a str"),
    ({"role": "user"}, "messages: a list of messages is needed"),
    ([], "messages: the list is empty"),
    (["hi"], "messages[0]: an object with role and content is needed, not a str"),
    ([said("user", "a"), said("wizard", "b")], "messages[1].role: 'wizard' is not a role"),
    ([said("<|eot|>", "b")], "messages[0].role: '<|eot|>' is not a role"),
    ([said(["user"], "b")], "messages[0].role: ['user'] is not a role"),
    ([{"content": "b"}], "messages[0].role: None is not a role"),
    ([said("user", None)], "messages[0].content: missing"),
    ([said("assistant", None)], "messages[0].content: missing"),
    ([said("user", 7)], "messages[0].content: a text or a list of parts is needed, not a int"),
    ([said("user", {"a": 1})], "messages[0].content: a text or a list of parts"),
    ([said("user", ["a"])], "messages[0].content[0]: an object with a type is needed"),
    ([said("user", [{"type": "text"}])], "messages[0].content[0].text: a text is needed, not nothing"),
    ([said("user", [{"type": "audio"}])], "messages[0].content[0].type: 'audio' is not supported"),
    ([{**said("user", "a"), "name": 3}], "messages[0].name: a text is needed"),
    ([{**said("user", "a"), "tool_calls": [{}]}], "messages[0].tool_calls: only the assistant calls tools"),
    ([{**said("assistant", "a"), "tool_calls": "f"}], "messages[0].tool_calls: a list of calls is needed"),
    ([{**said("assistant", "a"), "tool_calls": ["f"]}], "messages[0].tool_calls[0]: an object"),
    ([{**said("assistant", "a"), "tool_calls": [{"type": "custom"}]}], "messages[0].tool_calls[0].type: 'custom'"),
    ([{**said("assistant", "a"), "tool_calls": [{}]}], "messages[0].tool_calls[0].function: an object"),
    ([call(name=" ")], "messages[0].tool_calls[0].function.name: must not be empty"),
    ([call(arguments="{")], "messages[0].tool_calls[0].function.arguments: not valid JSON"),
    ([call(arguments="[1]")], "messages[0].tool_calls[0].function.arguments: a JSON object is needed"),
    ([call(arguments={"a": float("nan")})], "messages[0].tool_calls[0].function.arguments: not representable in JSON"),
    ([call(arguments={"a": object()})], "messages[0].tool_calls[0].function.arguments: not representable in JSON"),
    ([call(), result("c2", "x")], "messages[1].tool_call_id: 'c2' is the id of no earlier call"),
    ([call(), {"role": "tool", "content": "x", "tool_call_id": 1}], "messages[1].tool_call_id: a text is needed"),
])  # fmt: skip
def test_errors(messages, error):
    with pytest.raises(PunaError, match=re.escape(error)):
        check_messages(messages)


@pytest.mark.parametrize(("tools", "error"), [
    ({"type": "function"}, "tools: a list of tool definitions is needed"),
    (["f"], "tools[0]: an object is needed"),
    ([{"function": {"name": "f"}}], "tools[0].type: None is not supported"),
    ([TOOLS[0], {"type": "function"}], "tools[1].function: an object with name, description and parameters is needed"),
    ([{"type": "function", "function": {}}], "tools[0].function.name: a text is needed, not nothing"),
    ([{"type": "function", "function": {"name": "f", "description": 1}}], "tools[0].function.description: a text"),
    ([{"type": "function", "function": {"name": "f", "parameters": []}}], "tools[0].function.parameters: a JSON"),
    ([{"type": "function", "function": {"name": "f", "x": {1j}}}], "tools[0]: not representable in JSON"),
])  # fmt: skip
def test_tool_errors(tools, error):
    with pytest.raises(PunaError, match=re.escape(error)):
        check_tools(tools)


def test_no_tools():
    assert check_tools(None) is None
    assert check_tools([]) is None
