"""Guessing the next tokens, so that one pass confirms several.

A step computes an answer's last token and some guesses behind it in one pass, then draws token after token from the
rows as it would have without guesses, for as long as the guesses were right. A row's bits don't depend on the rows
beside it, so the answer is the same bit for bit; guesses change only how long it takes ("Fast Inference from
Transformers via Speculative Decoding", Leviathan et al., 2023; here without their correction of the distribution, since
nothing is drawn from the guesses). How many tokens are worth a guess is decided anew in each step, from what was right
so far and from what a guessed row was measured to cost; none is the usual answer for text that nobody foresees.
"""

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from puna.engine.blocks import BlockStore, Table
from puna.engine.scheduler import Sequence
from puna.engine.sizes import CacheSize, for_draft
from puna.errors import PunaError
from puna.model import Decoder
from puna.model.paged import BLOCK, Batch, PagedPool, Span

MOST = 8  # guesses in a step
LEAST_CHANCE = 0.1  # guesses less likely than this are not worth their noise
MARGIN = 1.1  # what a guess must bring, as a multiple of its price
DECAY = 0.9  # weight of earlier guesses, each time
PRIOR = 1.0  # right guesses assumed at the start, of twice as many
TRIAL = 2  # guesses where they don't seem to pay, to see whether that is still so
PAUSES = (32, 256)  # steps before the first trial, and the longest wait to which it doubles

GRAMS = (4, 2)  # lengths of the endings that are looked up, longest first
SLOTS = 1 << 16  # of the index, 4 bytes each: more text than that overwrites what was longest ago
NGRAM_BYTES = 4 * SLOTS  # of one sequence's index
INDEXED = 4096  # tokens indexed at once, so that a long prompt doesn't hold a step up
CAUGHT_UP = 512  # tokens that a draft model reads in a step to know what was said meanwhile


class Drafter(Protocol):
    """Whatever guesses."""

    def guess(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        """Up to so many tokens that may follow each sequence's tokens."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """It is over."""
        ...


@dataclass
class Chance:
    """How one sequence's guesses fare, and how many are worth it."""

    right: float = PRIOR
    tried: float = 2 * PRIOR
    pause: int = PAUSES[0]  # steps from one trial to the next
    waited: int = 0  # steps without a guess
    on: bool = True  # whether guesses seem to pay

    def count(self, price: float | None) -> int:
        """Guesses for the next step. price: tokens that could be had in the time of one guessed row, None: unknown."""
        least = max(MARGIN * (price or 0.0), LEAST_CHANCE)
        each = self.right / self.tried
        chance, count = each, 0
        while count < MOST and chance > least:
            chance, count = chance * each, count + 1
        self.on = count > 0
        if self.on:
            self.pause, self.waited = PAUSES[0], 0
            return count
        self.waited += 1
        if self.waited < self.pause:
            return 0
        self.pause, self.waited = min(2 * self.pause, PAUSES[1]), 0
        return TRIAL

    def learn(self, guessed: int, right: int) -> None:
        """So many were guessed, of which the first `right` were; nothing is known of what follows a wrong one."""
        self.right = DECAY * self.right + right
        self.tried = DECAY * self.tried + min(right + 1, guessed)


class Speculation:
    """The guesses of all sequences. proposed, accepted: tokens so far."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.proposed = self.accepted = 0
        self.chances: dict[Sequence, Chance] = {}

    def wish(self, sequence: Sequence, room: int, price: float | None) -> int:
        """How many tokens to guess behind the last one, where at most `room` may follow it."""
        if room < 1:
            return 0
        return min(self.chances.setdefault(sequence, Chance()).count(price), room)

    def learn(self, sequence: Sequence, guessed: int, right: int) -> None:
        """What came of a guess."""
        self.proposed += guessed
        self.accepted += right
        if chance := self.chances.get(sequence):  # else it has just ended
            chance.learn(guessed, right)

    def forget(self, sequence: Sequence) -> None:
        """It is over."""
        self.chances.pop(sequence, None)
        self.drafter.forget(sequence)


def drafter_for(speculate: object, vocabulary: int, size: CacheSize) -> Drafter | None:
    """None, False, "ngram" or a `Model` as the engine wants it, beside a cache of that size.

    Raises PunaError for anything else.
    """
    if speculate == "ngram":
        return NGrams()
    decoder = draft_decoder(speculate, vocabulary)
    return None if decoder is None else DraftModel(decoder, for_draft(decoder.config, size))


def draft_decoder(speculate: object, vocabulary: int) -> Decoder | None:
    """What guesses, if `speculate` is a `Model`; None for None, False and "ngram". Raises PunaError for others."""
    if speculate is None or speculate is False or speculate == "ngram":
        return None
    decoder = getattr(speculate, "decoder", None)
    if not isinstance(decoder, Decoder):
        raise PunaError(f"speculate must be None, False, 'ngram' or a draft model, not {speculate!r:.80}")
    check_vocabulary(decoder.config.vocab_size, vocabulary)
    return decoder


def check_vocabulary(draft: int, vocabulary: int) -> None:
    """Raises PunaError for a draft model with another number of tokens than the model's."""
    if draft != vocabulary:
        raise PunaError(
            f"the draft model has {draft} tokens, but the model {vocabulary}: it must have the same vocabulary, as a "
            "smaller model of the same generation has; or use speculate='ngram'"
        )


class NGrams:
    """Guesses that text repeats itself: what followed the latest earlier place with the same ending follows again."""

    def __init__(self) -> None:
        self._indices: dict[Sequence, _Index] = {}

    def guess(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        """See `Drafter`."""
        return {s: self._indices.setdefault(s, _Index()).guess(s.tokens, count) for s, count in wanted.items()}

    def forget(self, sequence: Sequence) -> None:
        """See `Drafter`."""
        self._indices.pop(sequence, None)


class _Index:
    """Where each short run of tokens was last seen, in a table of fixed size: constant work for each token."""

    def __init__(self) -> None:
        self._after = array("i", [-1]) * SLOTS  # by a run's hash: the place behind it
        self._known = 0  # the run that ends before this place is indexed next

    def guess(self, tokens: list[int], count: int) -> list[int]:
        """What followed the same ending before, if there was one."""
        length = len(tokens)
        end = min(length, self._known + INDEXED)
        for size in GRAMS:
            for at in range(max(self._known, size), end):
                self._after[hash(tuple(tokens[at - size : at])) % SLOTS] = at
        self._known = end
        for size in GRAMS:
            ending = tokens[length - size :]
            at = self._after[hash(tuple(ending)) % SLOTS]
            if at >= size and tokens[at - size : at] == ending:
                found = tokens[at : at + count]
                while len(found) < count:  # the text goes on in its own guess: a loop
                    found.append(found[at - length])
                return found
        return []


@dataclass
class _Draft:
    """A sequence in the draft model's cache: `known` tokens of it, then guesses that may turn out wrong."""

    table: Table = field(default_factory=Table)
    known: int = 0
    guesses: list[int] = field(default_factory=list)  # computed ones, from place `known` on

    @property
    def end(self) -> int:
        """Tokens and guesses in the cache."""
        return self.known + len(self.guesses)


class DraftModel:
    """Guesses what a smaller model of the same vocabulary would say, with a cache of its own."""

    def __init__(self, decoder: Decoder, size: CacheSize) -> None:
        self.decoder, self.context = decoder, decoder.config.context_length
        chunk = decoder.config.attention_chunk_size if size.local_blocks else None
        self._size = size
        self._blocks = BlockStore(size.blocks, size.local_blocks, chunk, BLOCK, share=False)
        self._pool: PagedPool | None = None
        self._drafts: dict[Sequence, _Draft] = {}

    def guess(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        """See `Drafter`. A sequence that the cache has no room for, or that has to be read first, gets no guess."""
        left = CAUGHT_UP
        found: dict[Sequence, list[int]] = {}
        ends = {s: min(len(s.tokens) + count, self.context) for s, count in wanted.items()}
        for sequence in ends:
            self._settle(self._drafts.setdefault(sequence, _Draft()), sequence.tokens)
        open = [sequence for sequence, end in ends.items() if len(sequence.tokens) < end]
        while open:
            pieces: list[tuple[Sequence, list[int]]] = []
            for sequence in open:
                draft = self._drafts[sequence]
                new = found[sequence][-1:] if sequence in found else self._unread(draft, sequence.tokens, left)
                if new and self._blocks.reserve(draft.table, draft.end + len(new)):
                    pieces.append((sequence, new))
                    left -= 0 if sequence in found else len(new)
            open = []
            for (sequence, new), token in zip(pieces, self._forward(pieces) if pieces else (), strict=True):
                draft, tokens = self._drafts[sequence], sequence.tokens
                if sequence in found:
                    draft.guesses += new
                else:
                    draft.known += len(new)
                    self._blocks.computed(draft.table, tokens, min(draft.known, len(tokens) - 1))
                if draft.known == len(tokens):
                    found.setdefault(sequence, []).append(token)
                if len(tokens) + len(found.get(sequence, ())) < ends[sequence]:
                    open.append(sequence)
        return found

    @property
    def touched(self) -> CacheSize:
        """Blocks whose memory is taken up."""
        return CacheSize(self._blocks.full.touched, self._blocks.local.touched)

    def forget(self, sequence: Sequence) -> None:
        """See `Drafter`."""
        if draft := self._drafts.pop(sequence, None):
            self._blocks.release(draft.table)

    def _settle(self, draft: _Draft, tokens: list[int]) -> None:
        """Keep the guesses that came true, drop the rest: their places are written again."""
        came = tokens[draft.known : draft.known + len(draft.guesses)]
        right = 0
        while right < len(came) and came[right] == draft.guesses[right]:
            right += 1
        draft.known = min(draft.known + right, len(tokens) - 1)  # the last token is always computed, for its logits
        draft.guesses = []
        self._blocks.computed(draft.table, tokens, draft.known)

    def _unread(self, draft: _Draft, tokens: list[int], left: int) -> list[int]:
        """The next tokens to be read: not past a chunk, as local layers hold one only."""
        end = min(len(tokens), draft.known + left)
        if chunk := self._blocks.chunk:
            end = min(end, draft.known // chunk * chunk + chunk)
        return tokens[draft.known : end]

    def _forward(self, pieces: list[tuple[Sequence, list[int]]]) -> list[int]:
        """The likeliest token after each piece."""
        if self._pool is None:
            size, decoder = self._size, self.decoder
            self._pool = PagedPool(decoder.config, size.blocks, size.local_blocks, decoder.dtype, device=decoder.device)
        ids: list[int] = []
        rows: list[int] = []
        spans = []
        for sequence, new in pieces:
            draft = self._drafts[sequence]
            spans.append(Span(draft.end, len(new), draft.table.full, draft.table.local))
            ids += [min(token, self.decoder.config.vocab_size - 1) for token in new]  # it may not know <|image|>
            rows.append(len(ids) - 1)
        device = self.decoder.device
        logits_1RV = self.decoder(torch.tensor([ids], device=device), cache=Batch(self._pool, spans),
                                  rows=torch.tensor(rows, device=device))  # fmt: skip
        return [int(token) for token in logits_1RV[0].argmax(-1).tolist()]
