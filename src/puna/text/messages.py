"""Checks OpenAI chat messages and tool definitions, and brings them to one plain form.

What comes out holds only JSON types that belong to us (no caller's objects reach a template), and only the fields that
a chat format may read. Errors name the field as OpenAI does: `messages[2].tool_calls[0].function.arguments`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from puna.errors import PunaError
from puna.text.pictures import IMAGE_PARTS, VIDEO_PARTS, PictureReader

Message = dict[str, Any]

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool",
         "ipython": "tool"}  # fmt: skip

def check_messages(messages: Sequence[Mapping[str, Any]], read_picture: PictureReader | None = None) -> list[Message]:
    """The messages as plain dicts: role, content, and where given tool_calls, tool_call_id, name.

    `content` becomes one text (text parts are joined as they stand), except where picture parts are read: then it is a
    list of parts. Without `read_picture` the model reads text only. `developer` is `system`, `ipython` is `tool`;
    arguments of calls become dicts. Raises PunaError.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise PunaError(f"messages: a list of messages is needed, not {_kind(messages)}; "
                        'give [{"role": "user", "content": "..."}]')  # fmt: skip
    if not messages:
        raise PunaError("messages: the list is empty; give at least one message of the user")
    checked: list[Message] = []
    call_ids: set[str] = set()
    for at, message in enumerate(messages):
        checked.append(_message(message, f"messages[{at}]", call_ids, read_picture))
    return checked


def check_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """OpenAI's tool definitions as plain JSON, None where there are none. Raises PunaError."""
    if tools is None:
        return None
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise PunaError(f"tools: a list of tool definitions is needed, not {_kind(tools)}")
    return [_tool(tool, f"tools[{at}]") for at, tool in enumerate(tools)] or None


def _tool(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise PunaError(f"{where}: an object is needed, not {_kind(tool)}")
    if tool.get("type") != "function":
        raise PunaError(f"{where}.type: {tool.get('type')!r} is not supported; only \"function\" is")
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise PunaError(f"{where}.function: an object with name, description and parameters is needed, "
                        f"not {_kind(function)}")  # fmt: skip
    _text(function.get("name"), f"{where}.function.name", filled=True)
    if function.get("description") is not None:
        _text(function["description"], f"{where}.function.description")
    if not isinstance(function.get("parameters", {}), Mapping):
        raise PunaError(f"{where}.function.parameters: a JSON schema (an object) is needed, "
                        f"not {_kind(function['parameters'])}")  # fmt: skip
    return _plain(tool, where)


def _message(message: Any, where: str, call_ids: set[str], read_picture: PictureReader | None) -> Message:
    if not isinstance(message, Mapping):
        raise PunaError(f"{where}: an object with role and content is needed, not {_kind(message)}")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise PunaError(f"{where}.role: {role!r} is not a role; use system, user, assistant or tool")
    checked: Message = {"role": ROLES[role]}
    calls = _calls(message.get("tool_calls"), where, checked["role"], call_ids)
    checked["content"] = _content(message.get("content"), where, checked["role"], bool(calls), read_picture)
    if calls:
        checked["tool_calls"] = calls
    if message.get("name") is not None:
        checked["name"] = _text(message["name"], f"{where}.name")
    if checked["role"] == "tool" and message.get("tool_call_id") is not None:
        answered = _text(message["tool_call_id"], f"{where}.tool_call_id")
        if call_ids and answered not in call_ids:
            raise PunaError(f"{where}.tool_call_id: {answered!r} is the id of no earlier call of the assistant")
        checked["tool_call_id"] = answered
    return checked


def _content(content: Any, where: str, role: str, has_calls: bool, read_picture: PictureReader | None) -> Any:
    where = f"{where}.content"
    if isinstance(content, str):
        return _text(content, where)
    if content is None:
        if has_calls:
            return ""
        raise PunaError(f"{where}: missing; only an assistant's message with tool_calls may go without")
    if role == "tool" and isinstance(content, Mapping):
        return _plain(content, where)
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise PunaError(f"{where}: a text or a list of parts is needed, not {_kind(content)}")
    parts = [plain for at, part in enumerate(content) for plain in _part(part, f"{where}[{at}]", role, read_picture)]
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def _part(part: Any, where: str, role: str, read_picture: PictureReader | None) -> list[dict[str, Any]]:
    if not isinstance(part, Mapping):
        raise PunaError(f"{where}: an object with a type is needed, not {_kind(part)}")
    kind = part.get("type")
    if kind == "text":
        return [{"type": "text", "text": _text(part.get("text"), f"{where}.text")}]
    if kind in IMAGE_PARTS + VIDEO_PARTS:
        if read_picture is None:
            raise PunaError(f"{where}: this model reads text only; leave the picture out or load a model with vision")
        if role != "user":
            raise PunaError(f"{where}: only messages of the user show pictures; this one is of the {role}")
        return read_picture(part, where)
    raise PunaError(f"{where}.type: {kind!r} is not supported; use \"text\"")


def _calls(calls: Any, where: str, role: str, call_ids: set[str]) -> list[dict[str, Any]]:
    where = f"{where}.tool_calls"
    if calls is None:
        return []
    if not isinstance(calls, Sequence) or isinstance(calls, str | bytes):
        raise PunaError(f"{where}: a list of calls is needed, not {_kind(calls)}")
    if calls and role != "assistant":
        raise PunaError(f"{where}: only the assistant calls tools; this message is of the {role}")
    return [_call(call, f"{where}[{at}]", call_ids) for at, call in enumerate(calls)]


def _call(call: Any, where: str, call_ids: set[str]) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise PunaError(f"{where}: an object with id, type and function is needed, not {_kind(call)}")
    if call.get("type", "function") != "function":
        raise PunaError(f"{where}.type: {call['type']!r} is not supported; only \"function\" is")
    function = call.get("function")
    if not isinstance(function, Mapping):
        raise PunaError(f"{where}.function: an object with name and arguments is needed, not {_kind(function)}")
    name = _text(function.get("name"), f"{where}.function.name", filled=True)
    arguments = _arguments(function.get("arguments"), where)
    checked: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if call.get("id") is not None:
        checked["id"] = _text(call["id"], f"{where}.id")
        call_ids.add(checked["id"])
    return checked


def _arguments(given: Any, where: str) -> dict[str, Any]:
    where = f"{where}.function.arguments"
    if isinstance(given, str):
        try:
            given = json.loads(given) if given.strip() else {}
        except (ValueError, RecursionError) as error:
            raise PunaError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(given, Mapping):
        raise PunaError(f"{where}: a JSON object is needed, as text or as it is, not {_kind(given)}")
    return _plain(given, where)


def _plain(value: Any, where: str) -> Any:
    """A copy made of JSON types alone, so that a template from the network never holds a caller's object."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise PunaError(f"{where}: not representable in JSON ({error})") from error


def _text(value: Any, where: str, filled: bool = False) -> str:
    if not isinstance(value, str):
        raise PunaError(f"{where}: a text is needed, not {_kind(value)}")
    if filled and not value.strip():
        raise PunaError(f"{where}: must not be empty")
    return str.__str__(value)


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
