"""What a text must hold for a regular expression to be found in it: looking for a few literals takes microseconds,
where the expression itself may take milliseconds to find nothing."""

import re
from functools import cache

SHORTEST = 3  # characters of a literal that is worth looking for
MOST = 40  # literals of one expression
_FLAGS = re.compile(r"\(\?([aimsu]+)\)")
_QUANTIFIER = re.compile(r"([*+?]|\{(\d*)(,\d*)?\})[?+]?")
_GROUP = re.compile(r"\((?:\?(?:[aimsu]*(?:-[ims]+)?:|P<\w+>))?(?!\?)")
_NUMBER = re.compile(r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|\d+)")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)

_WITHOUT_ENDS = re.compile(r"\[\^(?:\\.|[^\]\\])*?\\n(?:\\.|[^\]\\])*\]")  # [^...\n...]: anything in the line
_SPANS = re.compile(r"\n|\\[nsDWAZxuU\d]|\[\^|\$")  # what a line's end could be a part of

Literals = tuple[str, ...]


@cache
def needed(expression: str) -> Literals:
    """Literals in small letters, one of which is in every text (in small letters) in which the expression is found.
    () where none are known."""
    if re.match(r"\(\?\w*x", expression):  # white space in it means nothing
        return ()
    flags = _FLAGS.match(expression)
    found = _Reader(expression, flags.end() if flags else 0).alternatives()
    return tuple(sorted(set(found))) if found and len(found) <= MOST else ()


@cache
def in_one_line(pattern: re.Pattern[str] | re.Pattern[bytes]) -> bool:
    """Whether all that the expression looks at lies in one line, so that it finds the same line by line."""
    text = pattern.pattern if isinstance(pattern.pattern, str) else pattern.pattern.decode()
    return not pattern.flags & (re.DOTALL | re.VERBOSE) and not _SPANS.search(_WITHOUT_ENDS.sub("", text))


class _Reader:
    """Reads an expression from left to right. What it doesn't understand stands for any text."""

    def __init__(self, text: str, at: int) -> None:
        self.text = text
        self.at = at

    def alternatives(self) -> Literals:
        """Of `a|b|c` up to the end or a closing bracket: of each the best."""
        found = self.sequence()
        known = bool(found)
        while self.at < len(self.text) and self.text[self.at] == "|":
            self.at += 1
            more = self.sequence()
            known = known and bool(more)
            found += more
        return found if known else ()

    def sequence(self) -> Literals:
        """Of atoms one after the other: the longest literal, or the group with the longest shortest one."""
        best: Literals = ()
        run = ""
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            atom = self.atom()
            least = self.least()
            if isinstance(atom, str) and atom:
                if least is None or least > 0:
                    run += atom
                if least is None:
                    continue
            best = _better(best, (run,))
            run = ""
            if isinstance(atom, tuple) and (least is None or least > 0):
                best = _better(best, atom)
        return _better(best, (run,))

    def least(self) -> int | None:
        """How often the atom before stands there at least; None without a quantifier."""
        found = _QUANTIFIER.match(self.text, self.at)
        if found is None:
            return None
        self.at = found.end()
        if found[1][0] in "*?":
            return 0
        return 1 if found[1] == "+" else int(found[2] or 0)

    def atom(self) -> str | Literals:
        """A character in small letters; the literals of a group; "" or () for what may be anything."""
        here = self.text[self.at]
        if here == "\\":
            number = _NUMBER.match(self.text, self.at)
            self.at = number.end() if number else self.at + 2
            escaped = self.text[self.at - 1 : self.at]
            return "" if number or escaped.isalnum() else escaped
        if here == "[":
            found = _CLASS.match(self.text, self.at)
            self.at = found.end() if found else len(self.text)
            return ""
        if here == "(":
            return self.group()
        self.at += 1
        return "" if here in ".^$" else here.lower()

    def group(self) -> Literals:
        opened = _GROUP.match(self.text, self.at)
        self.at = opened.end() if opened else self.at + 2  # what looks ahead or behind is read, and not counted
        inside = self.alternatives()
        self.at += 1
        return inside if opened else ()


def _better(one: Literals, other: Literals) -> Literals:
    """Of two groups of literals of which the text has one each, the one that is rarer in it."""
    least = min(map(len, other), default=0)
    return other if least >= SHORTEST and least > min(map(len, one), default=0) else one
