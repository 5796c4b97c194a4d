"""Rewards that a rule can check: the number that an answer ends with, as GSM8K states it."""

import re

from puna.errors import PunaError

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
MARK = "####"  # before the answer, in GSM8K's solutions


def number_of(text: str) -> str | None:
    """The number after the last mark, or else the last number of a text; without separators and needless zeros."""
    marked = text.rsplit(MARK, 1)
    found = _NUMBER.findall(marked[1] if len(marked) > 1 else text)
    if not found:
        return None
    plain = (found[0] if len(marked) > 1 else found[-1]).replace(",", "")
    if "." in plain:
        plain = plain.rstrip("0").rstrip(".")
    sign, digits = ("-", plain[1:]) if plain.startswith("-") else ("", plain)
    digits = digits.lstrip("0") or "0"
    return f"{sign if digits != '0' else ''}{'0' if digits.startswith('.') else ''}{digits}"


def checked_answer(value: object) -> str:
    """The answer that a row asks for. Raises PunaError that begins with the field's name."""
    number = number_of(str(value)) if isinstance(value, str | int | float) and not isinstance(value, bool) else None
    if number is None:
        raise PunaError(f"answer: must be a number, or a text that ends with one, not {value!r:.80}")
    return number


def numeric_reward(text: str, answer: str) -> float:
    """1 where a completion ends with the wanted number, else 0."""
    return float(number_of(text) == answer)
