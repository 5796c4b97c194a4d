"""Tokenizers kept as tiktoken ranks, Meta's `tokenizer.model` of Llama 3 and 4: lines of `base64 rank`."""

import base64
import binascii
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import tiktoken

from puna.errors import PunaError
from puna.family.vocabulary import MAX_ENCODE_CHARACTERS, MAX_RUN_CHARACTERS
from puna.text.fast import added_token, begin_with, byte_level_spec, piece_of

_RUN = re.compile(r"\S+|\s+")


def parse_ranks(data: bytes, where: str) -> list[bytes]:
    """The pieces of a tiktoken file, by rank. Raises PunaError naming the file and its first bad line."""
    ranks: dict[int, bytes] = {}
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            encoded, digits = line.split()
            piece, rank = base64.b64decode(encoded, validate=True), int(digits)
        except (ValueError, binascii.Error) as error:
            raise PunaError(f"{where}, line {number}: must be 'base64 rank', is {line[:60]!r}; "
                            "fetch the file again") from error
        if rank in ranks:
            raise PunaError(f"{where}, line {number}: rank {rank} was already given; fetch the file again")
        ranks[rank] = piece
    missing = next((r for r in range(len(ranks)) if r not in ranks), None)
    if missing is not None or not ranks:
        raise PunaError(f"{where}: rank {missing or 0} is missing; the file is cut off or damaged, fetch it again")
    pieces = [ranks[rank] for rank in range(len(ranks))]
    known = set(pieces)
    if len(known) < len(pieces):
        raise PunaError(f"{where}: the same piece has two ranks; fetch the file again")
    for byte in range(256):
        if bytes([byte]) not in known:
            raise PunaError(f"{where}: no rank for the byte 0x{byte:02x}; the file is damaged, fetch it again")
    return pieces


def split_runs(text: str) -> Iterator[str]:
    """Cut `text` as the reference does: every 400,000 characters, and after 25,000 (non-)spaces in a row.

    Source: llama-models `Tokenizer.encode`. The cuts change ids, so they are part of the vocabulary's definition.
    """
    for start in range(0, len(text), MAX_ENCODE_CHARACTERS):
        part = text[start : start + MAX_ENCODE_CHARACTERS]
        done = 0
        if len(part) > MAX_RUN_CHARACTERS:
            for run in _RUN.finditer(part):
                for cut in range(run.start() + MAX_RUN_CHARACTERS, run.end(), MAX_RUN_CHARACTERS):
                    yield part[done:cut]
                    done = cut
        yield part[done:]


class TiktokenBackend:
    """Encoding by the `tiktoken` library, which is not told of any control token."""

    strips_leading_space = False
    byte_errors = "replace"
    byte_level = True

    def __init__(self, pieces: Sequence[bytes], control: Mapping[str, int], pattern: str) -> None:
        self._pieces = pieces
        self._control = dict(control)
        self._pattern = pattern
        self._encoding = tiktoken.Encoding(
            "puna", pat_str=pattern, mergeable_ranks={p: i for i, p in enumerate(pieces)}, special_tokens={}
        )
        self.vocab_size = max([len(pieces) - 1, *self._control.values()]) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone."""
        ids: list[int] = []
        for part in split_runs(text):
            ids += self._encoding.encode_ordinary(part)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on all cores (the library lets go of the interpreter's lock)."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(self.encode, texts))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; b"" for ids outside the ranks."""
        return self._pieces[token_id] if 0 <= token_id < len(self._pieces) else b""

    def tokenizer_json(self) -> dict[str, Any]:
        """The same vocabulary as a Hugging Face tokenizer.json."""
        added = [added_token(name, i) for name, i in sorted(self._control.items(), key=lambda item: item[1])]
        vocab = {piece_of(piece): rank for rank, piece in enumerate(self._pieces)}
        spec = byte_level_spec(vocab, merges_of(self._pieces), self._pattern, ignore_merges=True, added=added)
        return begin_with(spec, "<|begin_of_text|>", self._control.get("<|begin_of_text|>"))


def merges_of(pieces: Sequence[bytes]) -> list[list[str]]:
    """The merges that ranks stand for: every pair of pieces that joins to a piece, in order of the joined rank.

    Source: transformers `TikTokenConverter.extract_vocab_merges_from_model`.
    """
    rank_of = {piece: rank for rank, piece in enumerate(pieces)}
    merges: list[list[str]] = []
    for piece in pieces:
        pairs = [
            (rank_of[piece[:cut]], rank_of[piece[cut:]])
            for cut in range(1, len(piece))
            if piece[:cut] in rank_of and piece[cut:] in rank_of
        ]
        merges += ([piece_of(pieces[left]), piece_of(pieces[right])] for left, right in sorted(pairs))
    return merges
