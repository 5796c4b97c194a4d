"""Words that statements about scenes are made of."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pictures import Scene

Statement = tuple[str, Callable[[Scene], bool]]  # a text, and the scenes of which it is true
WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
EXACT, LOOSE = ("", "", "exactly ", "only "), ("at least ", "at least ", "at most ", "more than ")


@dataclass(frozen=True)
class Count:
    """A number in words or digits, perhaps with "exactly" or "at least" before it, and which numbers fit it."""

    text: str
    test: Callable[[int], bool]
    one: bool

    @classmethod
    def draw(cls, chance: random.Random, most: int, kinds: Sequence[str] = (*EXACT, *LOOSE)) -> "Count":
        """One of `kinds` before a number from 1 to `most`."""
        n, kind = min(chance.randint(1, most), chance.randint(1, most)), chance.choice(kinds)
        if n == 1 and kind == "at most ":
            kind = ""
        tests: dict[str, Callable[[int], bool]] = {
            "at least ": lambda m: m >= n, "at most ": lambda m: m <= n, "more than ": lambda m: m > n,
        }
        return cls(kind + chance.choice((WORDS[n], str(n))), tests.get(kind, lambda m: m == n), n == 1)

    def of(self, noun: str) -> str:
        """With its noun."""
        return f"{self.text} {noun if self.one else plural(noun)}"

    def there(self, noun: str, rest: str = "") -> str:
        """There are so many."""
        return f"There {'is' if self.one else 'are'} {self.of(noun)}{rest}"


def plural(noun: str) -> str:
    """Of a box, a block, ... ."""
    return noun + ("es" if noun.endswith("x") else "s")


def a(noun: str) -> str:
    """With its article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def listed(words: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join((", ".join(words[:-1]), words[-1])) if len(words) > 1 else words[0]


def upper(text: str) -> str:
    """With a capital."""
    return text[0].upper() + text[1:]
