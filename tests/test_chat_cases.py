"""Chats that the tests of the formats share."""

from typing import Any

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather now, e.g. in Zürich <or> \"elsewhere\" & so on",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Name 城市"},
                           "days": {"type": "integer", "enum": [1, 2, 3]}},
            "required": ["city"],
        },
    },
}  # fmt: skip
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
TOOLS: list[dict[str, Any]] = [WEATHER, CLOCK]


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def called(*calls: tuple[str, str, dict[str, Any]], content: str = "") -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": [
        {"id": at, "type": "function", "function": {"name": name, "arguments": arguments}}
        for at, name, arguments in calls]}  # fmt: skip


def result(at: str, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": at, "content": content}


ASKED = said("user", " What's the weather in Zürich?\n")
CITY = {"city": "Zürich", "days": 2, "deep": {"a": [1, None, True, "q\"'\n"]}}

# name: (messages, tools)
CASES: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "one": ([said("user", "Hello")], None),
    "spaces": ([said("user", "  Hello \n\n")], None),
    "system": ([said("system", " Be brief.\n"), said("user", "Hi")], None),
    "turns": ([said("system", "S"), said("user", "a"), said("assistant", " b "), said("user", "c 🙂 नमस्ते")], None),
    "answered": ([said("user", "a"), said("assistant", "b")], None),
    "empty": ([said("user", "")], None),
    "braces": ([said("user", "{{ bos_token }} {% raw %} <b>&amp;</b> <<SYS>> [INST]")], None),
    "tools": ([ASKED], TOOLS),
    "tools and system": ([said("system", "S "), ASKED], TOOLS),
    "one call": ([ASKED, called(("c1", "get_weather", CITY)), result("c1", '{"sky": "grün"}')], TOOLS),
    "call with text": ([said("system", "S"), ASKED, called(("c1", "clock", {}), content=" Let me see. "),
                        result("c1", "12:00"), said("assistant", "Noon. "), said("user", "Thanks")], TOOLS),
    "calls without tools": ([ASKED, called(("c1", "clock", {})), result("c1", "x")], None),
    "two calls": ([ASKED, called(("c1", "get_weather", CITY), ("c2", "clock", {})), result("c1", "1"),
                   result("c2", "2")], TOOLS),
}  # fmt: skip
