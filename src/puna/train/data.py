"""Tokenised documents to rows, and rows in an order that depends on nothing but the seed and where a row stands in it.

Legend: R rows, P pieces.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from puna.errors import PunaError
from puna.text.pictures import Vision
from puna.text.tokenizer import Tokenizer
from puna.train.config import Source, Stage
from puna.train.method import Document, Example, Method, Packing
from puna.train.tokenised import MOST_ERRORS, Tokenised, tokenise

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """A source's rows, each of `width` tokens at most, as pieces (document, from, to); or, where examples stay whole,
    as (example, 0, its tokens)."""

    source: Tokenised
    pieces: Ints  # [P, 3]
    starts: Ints  # [R + 1], into pieces
    whole: bool
    separate: bool
    left_out: int  # tokens that no row holds
    split: int  # documents that go on in another row

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def spans(self) -> Ints:
        """Predictions of every document as passes see it."""
        if self.whole:
            return np.maximum(self.source.lengths - 1, 0)
        sizes = self.pieces[:, 2] - self.pieces[:, 1]
        return np.maximum((sizes if self.separate else np.add.reduceat(sizes, self.starts[:-1])) - 1, 0)

    def examples(self, row: int) -> list[Example]:
        """A row's, in order: each piece by itself, or all as one document where documents see each other."""
        pieces = self.pieces[self.starts[row] : self.starts[row + 1]].tolist()
        if self.whole:
            return [self.source.example(at) for at, _, _ in pieces]
        parts = [self.source.part(*piece) for piece in pieces]
        if self.separate:
            return [Example((part,)) for part in parts]
        tokens, counted = (np.concatenate([getattr(p, name) for p in parts]) for name in ("tokens", "counted"))
        return [Example((Document(tokens, counted),))]


def make_rows(source: Source, length: int, separate: bool, read: Tokenised, method: Method, seed: int) -> Rows:
    """Lay a source's documents in rows of `length` + 1 tokens, so that each has at most `length` predictions.

    "stream": documents follow each other without a gap, across rows. "starts": a
    row starts where a document does and is filled with the beginnings of the next. "whole": a row holds whole examples
    alone, in an order of the seed; one longer than a row is split, or refused by file and line.
    """
    packing: Packing = source.packing or method.packing
    overlong = source.overlong or ("refuse" if method.packing == "whole" else "split")
    if packing != "whole" and any(np.diff(read.examples) != 1):
        raise PunaError(f"{read.where}: packing: {method.name} trains on examples of several documents: use whole")
    if len(read.low) and (packing != "whole" or overlong == "split"):
        wrong = "packing" if packing != "whole" else "overlong"
        cure = "whole" if packing != "whole" else "refuse"
        raise PunaError(f"{read.where}: {wrong}: documents with pictures stay whole: use {cure}")
    if packing == "stream":
        rows = _stream(read.lengths, length + 1)
    elif packing == "starts":
        rows = _starts(read.lengths, length + 1)
    else:
        rows = _whole(read, length, overlong, seed)
    pieces, starts, left_out, split = rows
    if len(starts) < 2:
        raise PunaError(f"{read.where}: no text to learn from")
    whole = packing == "whole" and not split
    return Rows(read, pieces, starts, whole, separate, left_out, split)


Laid = tuple[Ints, Ints, int, int]  # pieces, starts, tokens left out, documents split


def _stream(lengths: Ints, width: int) -> Laid:
    """Cut the stream of documents every `width` tokens; the last row is shorter."""
    ends = lengths.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    bounds = np.append(np.arange(0, total, width), total)
    cuts = np.union1d(ends - lengths, bounds)
    begin, end = cuts[:-1], cuts[1:]
    owner = np.searchsorted(ends, begin, side="right")
    offset = begin - (ends - lengths)[owner]
    pieces = np.stack((owner, offset, offset + end - begin), 1)
    return pieces, np.searchsorted(begin, bounds), 0, len(np.unique(owner[offset > 0]))


def _starts(lengths: Ints, width: int) -> Laid:
    pieces: list[tuple[int, int, int]] = []
    starts: list[int] = []
    used, left_out = width, 0
    for at, length in enumerate(lengths.tolist()):
        if used + min(length, width // 4) > width:
            starts.append(len(pieces))
            used = 0
        taken = min(length, width - used)
        pieces.append((at, 0, taken))
        used += taken
        left_out += length - taken
    return np.array(pieces, np.int64).reshape(-1, 3), np.array([*starts, len(pieces)]), left_out, 0


def _whole(read: Tokenised, length: int, overlong: Literal["split", "refuse"], seed: int) -> Laid:
    predictions = np.maximum(read.lengths - 1, 0)
    sizes = np.add.reduceat(predictions, read.examples[:-1]) if len(read) else predictions
    long = np.flatnonzero(sizes > length)
    alone = len(read) == len(predictions)
    if len(long) and (overlong == "refuse" or not alone):
        told = "\n".join(f"{read.where}:{at + 1}: {sizes[at]:,} tokens to predict, a row holds {length:,}"
                         for at in long[:MOST_ERRORS])  # fmt: skip
        cure = "a longer `length`, or `overlong: split`" if alone else "a longer `length`"
        raise PunaError(f"{told}\n{read.where}: {len(long):,} of {len(read):,} are too long: give {cure}")
    pieces: list[tuple[int, int, int]] = []
    starts: list[int] = []
    used = length
    for at in np.random.default_rng([seed, 7]).permutation(len(read)).tolist():
        left, begin = int(sizes[at]), 0
        while left > 0:
            if used + min(left, length) > length:
                starts.append(len(pieces))
                used = 0
            taken = min(left, length)
            pieces.append((at, begin, begin + taken + 1))
            begin, left, used = begin + taken, left - taken, used + taken
    return np.array(pieces, np.int64).reshape(-1, 3), np.array([*starts, len(pieces)]), 0, len(long)


class StageData:
    """One stage's rows in their order: each source in shuffled epochs, the sources interleaved by weight.

    Which row stands at a place is a function of the seed and the place alone, not of how many are needed.
    """

    def __init__(
        self, stage: Stage, needed: int, folder: Path, tokenizer: Tokenizer, method: Method, seed: int,
        separate: bool = True, cache: Path | None = None, vision: Vision | None = None,
    ) -> None:  # fmt: skip
        self.stage = stage
        self.sources = []
        for each in stage.sources:
            read = tokenise(folder / each.file, method, tokenizer, cache, vision)
            self.sources.append(make_rows(each, stage.length, separate, read, method, seed))
        weights = np.array([each.weight for each in stage.sources])
        picks, times = [], []
        for index, (rows, weight) in enumerate(zip(self.sources, weights / weights.sum(), strict=True)):
            count = int(np.ceil(weight * needed)) + 1
            epochs = -(-count // len(rows))
            orders = [np.random.default_rng([seed, index, epoch]).permutation(len(rows)) for epoch in range(epochs)]
            picks.append(np.stack((np.full(count, index), np.concatenate(orders)[:count]), 1))
            times.append((np.arange(count) + 0.5) / weight)
        self.order: Ints = np.concatenate(picks)[np.concatenate(times).argsort(kind="stable")[:needed]]

    def examples(self, start: int, count: int) -> list[Example]:
        """Of the stage's rows start..start + count."""
        return [e for source, row in self.order[start : start + count].tolist()
                for e in self.sources[source].examples(row)]  # fmt: skip

    def notes(self) -> list[str]:
        """What became of each source, one sentence each: nothing is left out unsaid."""
        said = []
        for source, rows in zip(self.stage.sources, self.sources, strict=True):
            counts = f"{len(rows.source):,} examples in {len(rows):,} rows of {self.stage.length}"
            fates = [f"{rows.left_out:,} tokens left out, which no row holds"] if rows.left_out else []
            fates += [f"{rows.split:,} documents split over rows"] if rows.split else []
            fates += [f"{len(rows.source.low):,} pictures"] if len(rows.source.low) else []
            fates += [f"fields not used: {', '.join(rows.source.unused)}"] if rows.source.unused else []
            said.append("; ".join((f"{source.file}: {counts}", *fates)))
        return said
