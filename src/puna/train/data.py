"""Files to rows of token ids, in an order that depends on nothing but the seed and the step."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from puna.errors import PunaError
from puna.text.tokenizer import Tokenizer
from puna.train.config import Source, Stage

Tokens = np.ndarray[Any, np.dtype[np.uint32]]
Counted = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass
class Rows:
    """Rows of equal length: token ids [R, T] and which of them, as targets, carry loss [R, T]."""

    tokens: Tokens
    counted: Counted
    left_out: int  # tokens of documents longer than a row

    def __len__(self) -> int:
        return len(self.tokens)


def documents(path: Path, tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[bool]]]:
    """Each line's token ids, begun with BOS, and which carry loss. Raises PunaError naming file, line and field."""
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # a JSON string may hold U+2028
    except OSError as error:
        raise PunaError(f"{path}: can't read the data: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise PunaError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    texts: list[str] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise PunaError(f"{path}:{number}: not JSON: {error.msg}, column {error.colno}; mend the line") from None
        except (RecursionError, ValueError) as error:
            raise PunaError(f"{path}:{number}: JSON that can't be read: {error}; mend the line") from None
        if not isinstance(row, dict) or ("text" in row) == ("messages" in row):
            raise PunaError(f"{path}:{number}: a row is an object with either `text` or `messages`; mend the line")
        if "messages" in row:
            yield _chat(row["messages"], row.get("tools"), tokenizer, f"{path}:{number}")
        elif isinstance(row["text"], str) and row["text"]:
            texts.append(row["text"])
        else:
            raise PunaError(f"{path}:{number}: text: must be a string that is not empty; mend or delete the line")
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for ids in tokenizer.encode_batch(texts):
        yield [*begin, *ids], [True] * (len(begin) + len(ids))


def _chat(messages: Any, tools: Any, tokenizer: Tokenizer, where: str) -> tuple[list[int], list[bool]]:
    """A chat by the server's own rendering; loss on what the assistant says, up to and with its end of turn."""
    if not isinstance(messages, list) or not messages:
        raise PunaError(f"{where}: messages: must be a list that is not empty")
    ids: list[int] = []
    counted: list[bool] = []
    try:
        for end, message in enumerate(messages, 1):
            if message.get("role") != "assistant":
                continue
            if end == 1:
                raise PunaError("messages[0].role: a chat to learn from begins with the user or the system")
            prompt = tokenizer.render(messages[: end - 1], tools)
            whole = tokenizer.render(messages[:end], tools, add_generation_prompt=False)
            if whole[: len(prompt)] != prompt or prompt[: len(ids)] != ids:
                raise PunaError("the chat template does not only append; such a chat can't be trained on")
            counted += [False] * (len(prompt) - len(ids)) + [True] * (len(whole) - len(prompt))
            ids = whole
    except PunaError as error:
        raise PunaError(f"{where}: {error}") from None
    except (AttributeError, KeyError, TypeError):
        raise PunaError(f"{where}: messages: each is an object with `role` and `content`") from None
    if not any(counted):
        raise PunaError(f"{where}: messages: no assistant message to learn from; add one, or delete the line")
    return ids, counted


def make_rows(source: Source, length: int, folder: Path, tokenizer: Tokenizer) -> Rows:
    """Tokenise a file into rows of `length` + 1 ids, so that each has `length` predictions.

    With `source.documents` a row starts where a document does and is filled with the beginnings of the next ones;
    otherwise documents follow each other without a gap, across rows.
    """
    path = folder / source.file
    pack = _pack_beginnings if source.documents else _pack_stream
    rows = pack(documents(path, tokenizer), length + 1, tokenizer.pad_id or 0)
    if not len(rows):
        raise PunaError(f"{path}: no text to learn from")
    return rows


def _pack_stream(texts: Iterator[tuple[list[int], list[bool]]], width: int, pad: int) -> Rows:
    """Documents follow each other without a gap, across rows; the last part of a row is left out.

    Text that is shorter than one row becomes one, filled up.
    """
    pieces = [(np.array(ids, np.uint32), np.array([False, *counted[1:]])) for ids, counted in texts]
    total = sum(len(ids) for ids, _ in pieces)
    if 1 < total < width:
        pieces.append((np.full(width - total, pad, np.uint32), np.zeros(width - total, np.bool_)))
        total = width
    count = total // width
    used = count * width
    tokens = np.concatenate([ids for ids, _ in pieces] or [np.zeros(0, np.uint32)])[:used]
    counted = np.concatenate([marks for _, marks in pieces] or [np.zeros(0, np.bool_)])[:used]
    return Rows(tokens.reshape(count, width), counted.reshape(count, width), total - used)


def _pack_beginnings(texts: Iterator[tuple[list[int], list[bool]]], width: int, pad: int) -> Rows:
    """A row starts where a document does; what the row has room for of the next ones follows."""
    tokens: list[Tokens] = []
    flags: list[Counted] = []
    used, left_out = width, 0
    for ids, counted in texts:
        if used + min(len(ids), width // 4) > width:
            tokens.append(np.full(width, pad, np.uint32))
            flags.append(np.zeros(width, np.bool_))
            used = 0
        taken = min(len(ids), width - used)
        tokens[-1][used : used + taken] = ids[:taken]
        flags[-1][used : used + taken] = counted[:taken]
        flags[-1][used] = False  # nothing tells a document's first token
        used += taken
        left_out += len(ids) - taken
    if not tokens:
        return Rows(np.zeros((0, width), np.uint32), np.zeros((0, width), np.bool_), 0)
    return Rows(np.stack(tokens), np.stack(flags), left_out)


class StageData:
    """One stage's rows in their order: each source in whole shuffled epochs, the sources mixed by weight."""

    def __init__(self, stage: Stage, needed: int, folder: Path, tokenizer: Tokenizer, seed: int) -> None:
        self.sources = [make_rows(source, stage.length, folder, tokenizer) for source in stage.sources]
        weights = np.array([source.weight for source in stage.sources])
        counts = np.ceil(weights / weights.sum() * needed).astype(int)
        random = np.random.default_rng(seed)
        picks = []
        for index, (rows, count) in enumerate(zip(self.sources, counts, strict=True)):
            epochs = [random.permutation(len(rows)) for _ in range(max(1, -(-count // len(rows))))]
            chosen = np.concatenate(epochs)[:count]
            picks.append(np.stack((np.full(count, index), chosen), 1))
        self.order = random.permutation(np.concatenate(picks))[:needed]

    def batch(self, start: int, count: int) -> tuple[Tokens, Counted]:
        """Rows start..start+count of the stage: ids and loss marks, both [count, T + 1]."""
        chosen = self.order[start : start + count]
        tokens = np.stack([self.sources[s].tokens[r] for s, r in chosen])
        return tokens, np.stack([self.sources[s].counted[r] for s, r in chosen])
