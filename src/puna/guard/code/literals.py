"""What literals mean: escapes, numbers, quotes."""

import re

LONGEST = 60  # characters of a number that is read
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", "a": "\a", "b": "\b", "f": "\f", "v": "\v", "e": "\x1b"}
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|u\{[0-9a-fA-F]{1,6}\}|.)", re.DOTALL)


def unescape(text: str) -> str:
    """The usual backslash escapes, resolved; an unknown one keeps its letter."""
    if "\\" not in text:
        return text

    def one(match: re.Match[str]) -> str:
        code = match[1]
        if len(code) > 1:
            point = int(code[1:].strip("{}"), 16)
            return chr(point) if point < 0x110000 else ""
        return _ESCAPES.get(code, code)

    return _ESCAPE.sub(one, text)


def number_value(text: str) -> int | float | None:
    """A literal's value: suffixes and digit separators dropped; None if it can't be read."""
    if len(text) > LONGEST:
        return None
    cleaned = text.replace("_", "").replace("'", "").lower()
    if cleaned.startswith(("-", "+")):
        value = number_value(cleaned[1:])
        return -value if value is not None and cleaned[0] == "-" else value
    for base, prefix in ((16, "0x"), (2, "0b"), (8, "0o")):
        if cleaned.startswith(prefix):
            digits = re.match(r"[0-9a-f]+" if base == 16 else r"[0-7]+", cleaned[2:])
            try:
                return int(digits[0], base) if digits else None
            except ValueError:
                return None
    found = re.match(r"(\d+)(\.\d*)?(e[+-]?\d+)?", cleaned)
    if not found:
        return None
    if found[2] is None and found[3] is None:
        digits_only = found[1]
        octal = len(digits_only) > 1 and digits_only[0] == "0" and set(digits_only) <= set("01234567")
        return int(digits_only, 8) if octal else int(digits_only)
    return float(found[0])


def strip_quotes(text: str) -> str:
    """A literal's text without the quotes around it."""
    for quote in ('"""', "'''", '"', "'", "`"):
        if len(text) >= 2 * len(quote) and text.startswith(quote) and text.endswith(quote):
            return text[len(quote) : -len(quote)]
    return text
