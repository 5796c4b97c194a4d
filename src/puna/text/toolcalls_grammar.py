"""The grammar of tool calls, read character by character from a text that is still arriving.

Each rule is a generator that yields where it needs more text; so a call is read once, in linear time, and given up at
the first character that can't belong to one. Values may be JSON's or Python's (True, None, single and triple quotes,
tuples); they are read, never evaluated.
"""

import json
import re
from collections.abc import Collection, Generator
from typing import Any

MAX_DEPTH = 64  # nesting of values
BUILTIN_TOOLS = ("brave_search", "wolfram_alpha", "photogen")  # Llama 3.1, llama3_1/prompt_format.md

Found = tuple[str, dict[str, Any]]
Rule = Generator[None, None, Any]

_SPACE = " \t\r\n"
_NUMBER = re.compile(r"[+-]?(?:\d+(?:_\d+)*(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")
_WORDS = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}
_CALL_KEYS = {"type", "id", "name", "function", "parameters", "arguments"}
_ESCAPE = re.compile(
    r"\\(?:u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})|[uxU]([0-9a-fA-F]+)|([0-7]{1,3})|(\r\n|.))",
    re.DOTALL,
)
_SIMPLE = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "\\": "\\", "'": "'", '"': '"',
           "\n": "", "\r\n": ""}  # fmt: skip
_HEX_LENGTH = {"x": 2, "u": 4, "U": 8}


class NotACall(Exception):
    """The text is no tool call."""


class Candidate:
    """One attempt to read calls from the start of a text. `names`: the known tools, None for any."""

    def __init__(self, names: Collection[str] | None) -> None:
        self.text = ""
        self._at = 0
        self._closed = False
        self._names = names
        self._rule = self._calls()

    @property
    def rest(self) -> str:
        """What follows the calls, once found."""
        return self.text[self._at :]

    def push(self, text: str, final: bool) -> list[Found] | None:
        """The calls (name, arguments) once they are complete, None where more text is needed. Raises NotACall."""
        self.text += text
        self._closed = final
        try:
            next(self._rule)
        except StopIteration as done:
            return list(done.value)
        return None

    # Reading

    def _peek(self) -> Rule:
        """The next character, "" at the end of the answer."""
        while self._at >= len(self.text):
            if self._closed:
                return ""
            yield
        return self.text[self._at]

    def _skip(self) -> Rule:
        """The next character that is no white space, not yet taken."""
        while (char := (yield from self._peek())) and char in _SPACE:
            self._at += 1
        return char

    def _take(self, wanted: str) -> Rule:
        for char in wanted:
            if (yield from self._peek()) != char:
                raise NotACall
            self._at += 1

    def _run_of(self, belongs: re.Pattern[str]) -> Rule:
        start = self._at
        while (char := (yield from self._peek())) and belongs.match(char):
            self._at += 1
        return self.text[start : self._at]

    # Calls

    def _calls(self) -> Rule:
        first = yield from self._peek()
        if first == "{":
            return [(yield from self._json_call())]
        if first == "<":
            return [(yield from self._tagged_call())]
        if first != "[":
            return [(yield from self._python_call(".call"))]
        self._at += 1
        if (yield from self._skip()) == "{":
            return (yield from self._listed(self._json_call))
        found = yield from self._listed(self._python_call)
        # Prose may quote a call in brackets: only a list that ends its line, or that more calls follow, is one.
        while (char := (yield from self._peek())) and char in " \t":
            self._at += 1
        if char not in ("", "\r", "\n", ";", ",", "[", "{", "<"):
            raise NotACall
        return found

    def _listed(self, rule: Any) -> Rule:
        found: list[Found] = []
        while (char := (yield from self._skip())) != "]" or not found:
            found.append((yield from rule()))
            char = yield from self._skip()
            if char not in (",", "]"):
                raise NotACall
            self._at += char == ","
        self._at += 1
        return found

    def _python_call(self, suffix: str = "") -> Rule:
        start = self._at
        while (char := (yield from self._peek())) and (char.isalnum() or char in "_.-"):
            self._at += 1
            self._check_start(self.text[start : self._at], suffix)
        name = self._checked(self.text[start : self._at].removesuffix(suffix))
        yield from self._take("(")
        arguments: dict[str, Any] = {}
        while (yield from self._skip()) != ")":
            given = yield from self._keyword()
            if arguments.keys() & given.keys():
                raise NotACall
            arguments |= given
            if (char := (yield from self._skip())) not in (",", ")"):
                raise NotACall
            self._at += char == ","
        self._at += 1
        return name, arguments

    def _keyword(self) -> Rule:
        if (yield from self._peek()) == "*":
            yield from self._take("**")
            if (yield from self._skip()) != "{":
                raise NotACall
            return (yield from self._value(1))
        key = yield from self._run_of(re.compile(r"\w"))
        if not key or key[0].isdigit() or (yield from self._skip()) != "=":
            raise NotACall
        self._at += 1
        yield from self._skip()
        return {key: (yield from self._value(1))}

    def _json_call(self) -> Rule:
        if (yield from self._peek()) != "{":
            raise NotACall
        fields: dict[str, Any] = {}
        yield from self._members(fields, 0, self._check_field)
        return self._call_of(fields)

    def _check_field(self, key: str, fields: dict[str, Any]) -> None:
        if key not in _CALL_KEYS:
            raise NotACall
        if fields.get("type", "function") != "function" or not isinstance(fields.get("name", ""), str):
            raise NotACall
        if "name" in fields:
            self._checked(fields["name"])

    def _call_of(self, fields: dict[str, Any]) -> Found:
        nested = fields.get("function")
        if isinstance(nested, dict):
            fields = nested
        elif isinstance(nested, str):
            fields = {"name": nested, **fields}
        arguments = fields["parameters"] if "parameters" in fields else fields.get("arguments", NotACall)
        if isinstance(arguments, str):  # OpenAI's own form: JSON in a text
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                raise NotACall from None
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, dict) or not isinstance(fields.get("name"), str):
            raise NotACall
        return self._checked(fields["name"]), arguments

    def _tagged_call(self) -> Rule:
        yield from self._take("<function=")
        start = self._at
        while (char := (yield from self._peek())) != ">":
            if not char or char in "<\n":
                raise NotACall
            self._at += 1
            self._check_start(self.text[start : self._at])
        name = self._checked(self.text[start : self._at])
        self._at += 1
        if (yield from self._skip()) != "{":
            raise NotACall
        arguments = yield from self._value(1)
        if not (yield from self._skip()):
            return name, arguments  # the end of the answer ends the call too
        yield from self._take("<")
        if (yield from self._peek()) == "|":  # and so does a marker
            self._at -= 1
        else:
            yield from self._take("/function>")
        return name, arguments

    def _check_start(self, start: str, suffix: str = "") -> None:
        if self._names is not None and not any(f"{name}{suffix}".startswith(start) for name in self._names):
            raise NotACall

    def _checked(self, name: str) -> str:
        if not name or (self._names is not None and name not in self._names):
            raise NotACall
        return name

    # Values

    def _value(self, depth: int) -> Rule:
        if depth > MAX_DEPTH:
            raise NotACall
        char = yield from self._peek()
        if char in ('"', "'"):
            return (yield from self._string())
        if char == "{":
            members: dict[str, Any] = {}
            yield from self._members(members, depth)
            return members
        if char in ("[", "("):
            return (yield from self._sequence(depth))
        if char and char in "+-.0123456789":
            return self._number((yield from self._run_of(re.compile(r"[-+.\w]"))))
        word = yield from self._run_of(re.compile(r"[A-Za-z]"))
        if word not in _WORDS:
            raise NotACall
        return _WORDS[word]

    def _members(self, members: dict[str, Any], depth: int, check: Any = None) -> Rule:
        """The pairs of an object, from brace to brace; `check(key, members)` is asked before and after each value."""
        self._at += 1
        while (yield from self._skip()) != "}":
            key = yield from self._value(MAX_DEPTH)  # a plain value: nothing nests in a key
            if isinstance(key, list | dict) or (check and not isinstance(key, str)):
                raise NotACall
            key = key if isinstance(key, str) else json.dumps(key)
            if check:
                check(key, {})
            if (yield from self._skip()) != ":":
                raise NotACall
            self._at += 1
            yield from self._skip()
            members[key] = yield from self._value(depth + 1)
            if check:
                check(key, members)
            if (char := (yield from self._skip())) not in (",", "}"):
                raise NotACall
            self._at += char == ","
        self._at += 1

    def _sequence(self, depth: int) -> Rule:
        end = "]" if self.text[self._at] == "[" else ")"
        self._at += 1
        items: list[Any] = []
        while (yield from self._skip()) != end:
            items.append((yield from self._value(depth + 1)))
            if (char := (yield from self._skip())) not in (",", end):
                raise NotACall
            self._at += char == ","
        self._at += 1
        return items

    def _number(self, text: str) -> int | float:
        if not _NUMBER.fullmatch(text):
            raise NotACall
        try:
            number = int(text) if re.fullmatch(r"[+-]?[\d_]+", text) else float(text)
        except ValueError:  # more digits than Python converts
            raise NotACall from None
        if number in (float("inf"), float("-inf")):
            raise NotACall
        return number

    def _string(self) -> Rule:
        quote = yield from self._peek()
        self._at += 1
        if (yield from self._peek()) == quote:
            self._at += 1
            if (yield from self._peek()) != quote:
                return ""
            self._at += 1
            quote *= 3
        start = scan = self._at
        ends = re.compile(rf"\\|{quote}")
        while True:
            stop = ends.search(self.text, scan)
            if stop and stop.group() == quote:
                self._at = stop.end()
                return unescape(self.text[start : stop.start()])
            if stop and stop.end() < len(self.text):
                scan = stop.end() + 1
                continue
            if self._closed:
                raise NotACall
            # A closing quote may be split between two pieces of text.
            scan = stop.start() if stop else max(start, len(self.text) - len(quote) + 1, scan)
            yield


def unescape(raw: str) -> str:
    """The text that a JSON or Python literal stands for, given what is between its quotes.

    An unknown escape stays as it is. Two \\u escapes that make a surrogate pair are one character, as in JSON.
    """
    return _ESCAPE.sub(_unescaped, raw) if "\\" in raw else raw


def _unescaped(match: re.Match[str]) -> str:
    high, low, digits, octal, other = match.groups()
    if high:
        return chr(0x10000 + ((int(high, 16) - 0xD800) << 10) + (int(low, 16) - 0xDC00))
    if digits:
        length = _HEX_LENGTH[match.group()[1]]
        code = int(digits[:length], 16)
        return chr(code) + digits[length:] if len(digits) >= length and code <= 0x10FFFF else match.group()
    if octal:
        return chr(int(octal, 8))
    return "/" if other == "/" else _SIMPLE.get(other, match.group())
