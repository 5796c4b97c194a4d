"""Facts hidden in real text, to be asked for at its end: what a model that reads so far must be able to find.

One text hides a fact at every depth, and each is asked for by itself, so that a right answer tells the facts apart.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from puna.errors import PunaError
from puna.text.tokenizer import Tokenizer
from puna.train.read import TEXT_FILES, read_rows

FACT = "The secret number of {key} is"
INTRODUCTION = "Somewhere in this text there are secret numbers. Remember them.\n\n"
REQUEST = "\n\nWhat is the secret number of {key}? Answer with the number alone."
KEYS = (
    "Lisbon", "Nairobi", "Osaka", "Bergen", "Quito", "Tunis", "Hanoi", "Perth", "Dublin", "Havana", "Geneva", "Lagos",
    "Manila", "Turin", "Oslo", "Denver", "Cairo", "Lima", "Seville", "Kyoto", "Riga", "Boston", "Delhi", "Ghent",
)  # fmt: skip
MOST_TEXT = 4_000_000  # characters of a file that are read: more than the longest text needs
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=\S)")
_LONGEST_SENTENCE = 400  # characters


@dataclass(frozen=True)
class Haystack:
    """One text's prompts, which begin alike: question i asks for the fact at depth i, whose value is `values[i]`.

    `prompts`: token ids, each ready to be answered; `answers`: the ids of each value, as it would follow.
    """

    prompts: tuple[tuple[int, ...], ...]
    values: tuple[str, ...]
    answers: tuple[tuple[int, ...], ...]


def read_filler(path: Path | None) -> list[str]:
    """Sentences of a file (`text` of JSON lines, Parquet, or a plain .txt or .md file), or of the bundled text.

    Raises PunaError where there are too few to tell places in a text apart.
    """
    bundled = resources.files("puna").joinpath("data/filler.txt")
    texts = [bundled.read_text(encoding="utf-8")] if path is None else read_texts(path)
    sentences = [" ".join(one.split()) for text in texts for one in _SENTENCE.split(text)]
    sentences = [one for one in sentences if 0 < len(one) <= _LONGEST_SENTENCE]
    if len(sentences) < 2 * len(KEYS):
        raise PunaError(f"{path}: only {len(sentences)} sentences to hide facts in; give a longer text")
    return sentences


def read_texts(path: Path) -> list[str]:
    """The texts of a file, until they have MOST_TEXT characters: `text` of JSON lines, Parquet, or a folder or single
    one of .txt and .md files. Raises PunaError naming file and line."""
    if path.suffix in TEXT_FILES and path.is_file():
        try:
            return [path.read_text(encoding="utf-8")]
        except UnicodeDecodeError as error:
            raise PunaError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    texts: list[str] = []
    for found in read_rows(path):
        if found.row is None:
            raise PunaError(f"{found.where}: {found.problem}")
        text = found.row.get("text")
        if not isinstance(text, str):
            raise PunaError(f"{found.where}: text: must be a string; mend or delete the line")
        texts.append(text)
        if sum(map(len, texts)) > MOST_TEXT:
            break
    return texts


class Builder:
    """Makes haystacks of one tokenizer, deterministic by seed.

    chat: ask as a user's message, as the server renders it; else as a text to go on with.
    """

    def __init__(self, tokenizer: Tokenizer, sentences: Sequence[str], depths: int, seed: int, chat: bool) -> None:
        self.tokenizer, self.sentences, self.depths = tokenizer, sentences, depths
        self.seed, self.chat = seed, chat
        self.sizes = [len(ids) for ids in tokenizer.encode_batch([f" {one}" for one in sentences])]

    def haystack(self, length: int, sample: int) -> Haystack:
        """A text whose prompts and answers fill `length` tokens but for part of a sentence.

        Raises PunaError where the facts alone are longer.
        """
        draw = random.Random(f"{self.seed}/{length}/{sample}")
        keys = draw.sample(KEYS, self.depths)
        values = tuple(str(number) for number in draw.sample(range(10_000, 100_000), self.depths))
        facts = [f"{FACT.format(key=key)} {value}." for key, value in zip(keys, values, strict=True)]
        answers = tuple(self._answer(key, value) for key, value in zip(keys, values, strict=True))
        start = draw.randrange(len(self.sentences))
        room = length - self._most(facts, keys, [], answers)
        count, used = 0, 0
        while (size := self.sizes[(start + count) % len(self.sizes)]) + used <= room:
            used, count = used + size, count + 1
        while count > 0:  # sentences have other borders together than one by one
            over = self._most(facts, keys, self._filler(start, count), answers) - length
            if over <= 0:
                break
            count -= 1
        if count < self.depths:
            raise PunaError(f"--lengths: {length:,} tokens have no room for {self.depths} facts and text between them; "
                            "give longer ones")  # fmt: skip
        prompts = tuple(self._prompt(self._text(facts, self._filler(start, count)), key) for key in keys)
        return Haystack(prompts, values, answers)

    def _filler(self, start: int, count: int) -> list[str]:
        return [self.sentences[(start + i) % len(self.sentences)] for i in range(count)]

    def _most(self, facts: list[str], keys: list[str], filler: list[str], answers: tuple[tuple[int, ...], ...]) -> int:
        """Tokens of the longest prompt with the longest answer."""
        text = self._text(facts, filler)
        return max(len(self._prompt(text, key)) for key in keys) + max(map(len, answers))

    def _text(self, facts: list[str], filler: list[str]) -> str:
        """The filler with the facts at even depths: the first before everything, the last after."""
        sizes = [len(one) for one in filler]
        total, passed, parts, at = sum(sizes), 0, [], 0
        for i, fact in enumerate(facts):
            wanted = total * i / (len(facts) - 1)
            while at < len(filler) and passed + sizes[at] / 2 < wanted:
                parts.append(filler[at])
                passed, at = passed + sizes[at], at + 1
            parts.append(fact)
        return " ".join(parts + filler[at:])

    def _prompt(self, text: str, key: str) -> tuple[int, ...]:
        if self.chat:
            content = INTRODUCTION + text + REQUEST.format(key=key)
            return tuple(self.tokenizer.render([{"role": "user", "content": content}]))
        begin = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        return (*begin, *self.tokenizer.encode(f"{text} {FACT.format(key=key)}"))

    def _answer(self, key: str, value: str) -> tuple[int, ...]:
        """A value's ids where it follows a prompt."""
        if self.chat:
            return tuple(self.tokenizer.encode(value))
        before = self.tokenizer.encode(FACT.format(key=key))
        return tuple(self.tokenizer.encode(f"{FACT.format(key=key)} {value}")[len(before) :])


def common(prompts: Sequence[tuple[int, ...]]) -> int:
    """How many ids all prompts begin with alike; less than any has."""
    first, last = min(prompts), max(prompts)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return min(same, *(len(prompt) - 1 for prompt in prompts))
