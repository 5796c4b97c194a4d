"""Our own definition of each generation's chat format, for checkpoints that bring no template.

Each format takes checked messages and tools and gives control tokens and plain texts. They say the same as the
templates that Meta's checkpoints carry on the hub (docs/chat-formats.md lists where Meta's own encoder differs).
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

from puna.errors import PunaError
from puna.text import template
from puna.text.messages import Message
from puna.text.pictures import joined, written
from puna.text.template import Control, Part
from puna.text.toolcalls import ToolCall, encode_calls

Tools = list[dict[str, Any]] | None
Format = Callable[[list[Message], Tools, bool], list[Part]]

CUTOFF = "Cutting Knowledge Date: December 2023\nToday Date: "
FIXED_DATE = "26 Jul 2024"  # Llama 3.1 and 3.3 templates: a constant, not today
TOOLS_INTRODUCTION = (
    "Given the following functions, please respond with a JSON for a function call "
    "with its proper arguments that best answers the given prompt.\n\n"
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)


def llama2(messages: list[Message], tools: Tools, add_generation_prompt: bool) -> list[Part]:  # noqa: ARG001
    """`<s>[INST] user [/INST] answer </s>`; the system message goes into the first turn.

    [/INST] is all the generation prompt there is, so `add_generation_prompt` changes nothing.
    """
    messages = _folded(messages, tools, "user")
    system, turns = _split_system(messages)
    parts: list[Part] = []
    for at, message in enumerate(turns):
        if message["role"] != ("user", "assistant")[at % 2]:
            raise PunaError(f"messages[{at + len(messages) - len(turns)}].role: Llama 2 needs user and assistant in "
                            f"turn, beginning with the user; this one is {message['role']!r}")
        text = message["content"]
        if at == 0 and system is not None:
            text = f"<<SYS>>\n{system}\n<</SYS>>\n\n{text}"
        if message["role"] == "user":
            parts += [Control("<s>"), f"[INST] {text.strip()} [/INST]"]
        else:
            parts += [f" {text.strip()} ", Control("</s>")]
    return parts


def llama3(messages: list[Message], tools: Tools, add_generation_prompt: bool) -> list[Part]:
    """Headers and <|eot_id|>. Llama 3 has no tool format: definitions go into the first message of the user."""
    parts: list[Part] = [Control("<|begin_of_text|>")]
    for message in _folded(messages, tools, "ipython"):
        parts += [*_header3(message["role"]), *written(message["content"], strip=True), Control("<|eot_id|>")]
    return parts + (_header3("assistant") if add_generation_prompt else [])


def llama31(messages: list[Message], tools: Tools, add_generation_prompt: bool) -> list[Part]:
    """Llama 3.1 and 3.3: always a system message, with the knowledge cutoff and a fixed date; tools as JSON."""
    return _dated(messages, tools, add_generation_prompt, FIXED_DATE)


def llama32(messages: list[Message], tools: Tools, add_generation_prompt: bool) -> list[Part]:
    """Llama 3.2: as 3.1, with today's date."""
    return _dated(messages, tools, add_generation_prompt, template.strftime_now("%d %b %Y"))


def _dated(messages: list[Message], tools: Tools, add_generation_prompt: bool, date: str) -> list[Part]:
    system, turns = _split_system(messages)
    parts: list[Part] = [Control("<|begin_of_text|>")]
    if system is not None or all(isinstance(message["content"], str) for message in turns):
        text = ("Environment: ipython\n" if tools else "") + f"{CUTOFF}{date}\n\n{(system or '').strip()}"
        parts += [*_header3("system"), text, Control("<|eot_id|>")]
    if tools:
        turns = _tools_in_first(turns, tools, len(messages) - len(turns))
    for at, message in enumerate(turns, len(messages) - len(turns)):
        role, text = message["role"], message["content"]
        if calls := message.get("tool_calls"):
            if len(calls) != 1:
                raise PunaError(f"messages[{at}].tool_calls: {len(calls)} calls in one message; this model supports "
                                "one call at a time, so give each call and its result in messages of their own")
            text = _call_json(calls[0])
        elif role == "tool":
            role, text = "ipython", _json(text)
        parts += [*_header3(role), *written(text, strip=not calls and role != "ipython"), Control("<|eot_id|>")]
    return parts + (_header3("assistant") if add_generation_prompt else [])


def llama4(messages: list[Message], tools: Tools, add_generation_prompt: bool) -> list[Part]:
    """Llama 4: no system message but the user's; several calls in one message; every message ends with <|eot|>."""
    system, turns = _split_system(messages)
    end = Control("<|eot|>")
    parts: list[Part] = [Control("<|begin_of_text|>")]
    if system is not None:
        parts += [*_header4("system"), ("Environment: ipython\n" if tools else "") + system.strip(), end]
    if tools:
        turns = _tools_in_first(turns, tools, len(messages) - len(turns))
    for message in turns:
        role, text = message["role"], message["content"]
        if calls := message.get("tool_calls"):
            parts += [*_header4(role), Control("<|python_start|>"), text, Control("<|python_end|>"),
                      "".join(map(_call_json, calls)), end]  # fmt: skip
        elif role == "tool":
            parts += [*_header4("ipython"), _json(text), end]
        else:
            parts += [*_header4(role), *written(text), end]
    return parts + (_header4("assistant") if add_generation_prompt else [])


FORMATS: dict[str, Format] = {
    "llama2": llama2, "llama3": llama3, "llama3.1": llama31, "llama3.2": llama32, "llama3.3": llama31, "llama4": llama4,
}  # fmt: skip


def fold_tools(messages: list[Message], tools: Sequence[dict[str, Any]]) -> list[Message]:
    """The definitions written into the first message of the user, for formats that have no other place for them."""
    at = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if at is None:
        raise PunaError("tools: their definitions go into the first message of the user, and there is none")
    return [*messages[:at], *_tools_in_first(messages[at:], list(tools), at)]


def fold_calls(messages: list[Message], result_role: str) -> list[Message]:
    """Calls and results written as ordinary text, for formats that know neither.

    With `result_role` "user", results join the neighbouring messages of the user: such formats need strict turns.
    """
    folded: list[Message] = []
    for message in messages:
        role, text, is_result = message["role"], message["content"], message["role"] == "tool"
        if calls := message.get("tool_calls"):
            made = [ToolCall(call["function"]["name"], call["function"]["arguments"]) for call in calls]
            text = "\n".join(filter(None, (text, encode_calls(made, "json"))))
        elif is_result:
            role, text = result_role, _json(text)
        before = folded[-1] if folded else None
        if before and before["role"] == role == result_role == "user" and (is_result or before["is_result"]):
            before["content"] = joined(before["content"], "\n\n", text)
        else:
            folded.append({"role": role, "content": text, "is_result": is_result})
    return [{"role": message["role"], "content": message["content"]} for message in folded]


def _folded(messages: list[Message], tools: Tools, result_role: str) -> list[Message]:
    messages = fold_calls(messages, result_role)
    return fold_tools(messages, tools) if tools else messages


def _tools_in_first(turns: list[Message], tools: list[dict[str, Any]], at: int) -> list[Message]:
    if not turns or turns[0]["role"] != "user":
        raise PunaError(f"messages[{at}]: tool definitions go into the first message of the user, "
                        "which must come first or follow the system message")
    described = "".join(json.dumps(tool, ensure_ascii=False, indent=4) + "\n\n" for tool in tools)
    asked = turns[0]["content"]
    content = joined(TOOLS_INTRODUCTION + described, asked.strip() if isinstance(asked, str) else asked)
    return [{"role": "user", "content": content}, *turns[1:]]


def _split_system(messages: list[Message]) -> tuple[str | None, list[Message]]:
    if messages[0]["role"] == "system":
        return messages[0]["content"], messages[1:]
    return None, messages


def _header3(role: str) -> list[Part]:
    return [Control("<|start_header_id|>"), role, Control("<|end_header_id|>"), "\n\n"]


def _header4(role: str) -> list[Part]:
    return [Control("<|header_start|>"), role, Control("<|header_end|>"), "\n\n"]


def _call_json(call: dict[str, Any]) -> str:
    function = call["function"]
    return f'{{"name": "{function["name"]}", "parameters": {_json(function["arguments"])}}}'


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
