"""Tool calls as a model writes them: encoding, and a streaming parser that takes them out of an answer's text."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import uuid4

from puna.errors import PunaError
from puna.text.toolcalls_grammar import BUILTIN_TOOLS, Candidate, NotACall

Style = Literal["pythonic", "json", "function_tag"]

# How each generation writes calls: first what its chat template asks for, then what Meta's prompt formats also use.
# Source: the templates on the hub; llama-models 0.3.0, llama3_1/prompt_format.md and llama3_2/text_prompt_format.md.
CALL_STYLES: Mapping[str, tuple[Style, ...]] = {
    "llama2": ("json",), "llama3": ("json",), "llama3.1": ("json", "function_tag"), "llama3.2": ("json", "pythonic"),
    "llama3.3": ("json", "pythonic"), "llama4": ("json", "pythonic"),
}  # fmt: skip

MARKERS = ("<|python_tag|>", "<|python_start|>", "<|python_end|>")
_TAG = "<function="
_FENCE = "```"
_BITE = 256  # characters looked at in one go: each step copies what is left of them
_PYTHON_NAME = re.compile(r"[\w.\-]+")
_KEYWORD = re.compile(r"[^\W\d]\w*")


def _new_id() -> str:
    return f"call_{uuid4().hex[:24]}"


@dataclass(frozen=True)
class ToolCall:
    """One call: the function's name, its arguments as JSON values, and an id for its result to refer to."""

    name: str
    arguments: dict[str, Any]
    id: str = field(default_factory=_new_id)


Event = str | ToolCall


def encode_calls(calls: Sequence[ToolCall], style: Style) -> str:
    """The calls as a model writes them; `ToolCallParser` reads every style back. No calls give "".

    Raises PunaError for arguments that JSON can't represent, and for a name that `style` can't spell.
    """
    for call in calls:
        try:
            json.dumps(call.arguments, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise PunaError(f"the arguments of {call.name!r} are not representable in JSON ({error})") from error
    if not calls:
        return ""
    if style == "json":
        return "; ".join(_dumps({"name": call.name, "parameters": call.arguments}) for call in calls)
    if style == "function_tag":
        return "".join(f"<function={_spelled(call, style)}>{_dumps(call.arguments)}</function>" for call in calls)
    if style == "pythonic":
        return f"[{', '.join(_pythonic(call) for call in calls)}]"
    raise PunaError(f"{style!r} is no style of tool calls; use pythonic, json or function_tag")


def _pythonic(call: ToolCall) -> str:
    arguments = json.loads(json.dumps(call.arguments))
    # isidentifier: the first letter of a word may be a digit such as "²", which no keyword begins with
    keywords = [f"{key}={value!r}" if _KEYWORD.fullmatch(key) and key.isidentifier() else f"**{({key: value})!r}"
                for key, value in arguments.items()]  # fmt: skip
    return f"{_spelled(call, 'pythonic')}({', '.join(keywords)})"


def _spelled(call: ToolCall, style: str) -> str:
    if not _PYTHON_NAME.fullmatch(call.name):
        raise PunaError(f"the tool name {call.name!r} can't be written in the {style} style; "
                        "use letters, digits, '_', '-' and '.', or the json style")
    return call.name


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


class ToolCallParser:
    """Takes the calls out of an answer that arrives piece by piece.

    Reads the pythonic list, JSON objects (one, a list, or several separated by `;`, `,`, white space or nothing),
    `<function=name>{...}</function>` and `name.call(key="...")`, with or without the python markers around. A call
    begins at the start of a line, after a marker or after another call; a function tag, and a JSON object where
    `tools` are given, anywhere outside code fences. What turns out not to be a call comes out as text, unchanged; with
    `tools` (OpenAI's definitions or names) so does a call of any other name. White space, separators and markers
    beside a call go with it. Nothing is ever evaluated.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any] | str] | None = None) -> None:
        self._names = None if tools is None else frozenset(
            tool if isinstance(tool, str) else tool["function"]["name"] for tool in tools)  # fmt: skip
        self._dotted = tuple(f"{name}.call(" for name in (BUILTIN_TOOLS if self._names is None else self._names))
        self._buffer = ""
        self._held = ""  # white space, separators and markers that a call would take with it
        self._open = True  # a call may begin here
        self._after_call = False
        self._fenced = False
        self._candidate: Candidate | None = None
        self._events: list[Event] = []

    def push(self, text: str) -> list[Event]:
        """What is certain after `text`: text to show, and completed calls, in order."""
        for start in range(0, len(text), _BITE):
            self._buffer += text[start : start + _BITE]
            while self._step(final=False):
                pass
        return self._taken()

    def finish(self) -> list[Event]:
        """What was still held back."""
        while self._step(final=True):
            pass
        return self._taken()

    def _taken(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _step(self, final: bool) -> bool:
        """One move forward; False where more text is needed."""
        if self._candidate:
            return self._try_candidate(final)
        if not self._buffer:
            if final:
                self._let_go()
            return False
        return self._at_opening(final) if self._open else self._in_text(final)

    def _try_candidate(self, final: bool) -> bool:
        candidate = self._candidate
        assert candidate is not None
        try:
            found = candidate.push(self._buffer, final)
        except NotACall:
            text, self._candidate, self._open = candidate.text, None, False
            # At the end of the answer nothing can follow; else a call may still begin further on.
            self._emit(self._held + (text if final else text[0]))
            self._held, self._buffer = "", "" if final else text[1:]
            return True
        self._buffer = ""
        if found is None:
            return False
        self._events += [ToolCall(name, arguments) for name, arguments in found]
        self._buffer, self._candidate, self._held = candidate.rest, None, ""
        self._open = self._after_call = True
        return True

    def _at_opening(self, final: bool) -> bool:
        """Where a call may begin: collect what a call would take with it, then see what comes."""
        marker, partial = _prefix(self._buffer, (*MARKERS, _TAG, *self._dotted))
        if marker in MARKERS:
            self._held += marker
            self._buffer = self._buffer[len(marker):]
        elif self._buffer[0].isspace() or (self._after_call and self._buffer[0] in ";,"):
            self._held += self._buffer[0]
            self._buffer = self._buffer[1:]
        elif marker or self._buffer[0] in "[{":
            self._candidate = Candidate(self._names)
        elif partial and not final:
            return False
        else:
            self._let_go()
            self._open = self._after_call = False
        return True

    def _in_text(self, final: bool) -> bool:
        """Ordinary text: show it up to what may begin a call."""
        stop = re.search(r"[\n<`{]", self._buffer)
        if stop is None or stop.start():
            self._show(stop.start() if stop else len(self._buffer))
            return True
        whole, partial = _prefix(self._buffer, (*MARKERS, _TAG, _FENCE))
        if partial and not whole and not final:
            return False
        if whole == _FENCE:
            self._fenced = not self._fenced
            self._show(len(_FENCE))
        elif self._fenced or (self._buffer[0] in "<`" and not whole):
            self._show(1)
        elif self._buffer[0] == "\n" or whole in MARKERS:
            self._open = True
        elif whole == _TAG or self._names is not None:
            self._candidate = Candidate(self._names)
        else:
            self._show(1)
        return True

    def _show(self, length: int) -> None:
        self._emit(self._buffer[:length])
        self._buffer = self._buffer[length:]

    def _let_go(self) -> None:
        """No call takes the held text with it. After a call, white space and separators alone are its tail."""
        if not (self._after_call and not self._buffer and not self._held.strip("".join((*MARKERS, " \t\r\n;,")))):
            self._emit(self._held)
        self._held = ""

    def _emit(self, text: str) -> None:
        if text and self._events and isinstance(self._events[-1], str):
            self._events[-1] += text
        elif text:
            self._events.append(text)


def _prefix(text: str, words: Sequence[str]) -> tuple[str, bool]:
    """The word that `text` begins with ("" if none), and whether `text` may yet become one."""
    for word in words:
        if text.startswith(word):
            return word, False
    return "", any(word.startswith(text) for word in words)
