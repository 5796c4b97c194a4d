"""Tokenizers kept as Hugging Face `tokenizer.json`: byte-level (Llama 3, 4, our own) or sentencepiece BPE (Llama 2)."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import tokenizers

from puna.errors import PunaError
from puna.text.incremental import EACH_BYTE

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_SURROGATE = re.compile("[\ud800-\udfff]")


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-in of each byte in byte-level vocabularies -> the byte (GPT-2's `bytes_to_unicode`)."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(own)]
    return {chr(b): b for b in own} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF = _byte_alphabet()
CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}


def piece_of(token: bytes) -> str:
    """A byte-level piece as vocabularies spell it."""
    return "".join(CHARACTER_OF[b] for b in token)


def well_formed(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates replaced by U+FFFD, as tiktoken does it."""
    if not _SURROGATE.search(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _component_types(part: Any) -> set[str]:
    """The types of a tokenizer.json component and of those nested in it."""
    if not isinstance(part, Mapping):
        return set()
    nested = [*part.get("normalizers", ()), *part.get("pretokenizers", ()), *part.get("decoders", ())]
    return {str(part.get("type"))}.union(*(_component_types(p) for p in nested))


class FastBackend:
    """Encoding by the `tokenizers` library, with every control token taken out of its reach."""

    def __init__(self, spec: dict[str, Any], control: Mapping[str, int], where: str) -> None:
        """`spec` is a parsed tokenizer.json; `where` names it in errors. Raises PunaError for unsupported kinds."""
        model = spec.get("model")
        if not isinstance(model, Mapping) or model.get("type", "BPE") != "BPE" or "merges" not in model:
            raise PunaError(f"{where}: the model must be BPE with vocab and merges, as in every Llama tokenizer")
        self.spec = spec
        self.where = where
        self.control = dict(control)
        types = _component_types(spec.get("decoder")) | _component_types(spec.get("pre_tokenizer"))
        self.byte_level = "ByteLevel" in types
        self.byte_errors = "replace" if self.byte_level else EACH_BYTE
        self.strips_leading_space = not self.byte_level and bool({"Strip", "Metaspace"} & types)
        added = [(t["content"], t["id"]) for t in spec.get("added_tokens") or ()]
        self._plain_added = {i: content for content, i in added if content not in self.control}
        self._pieces = {i: piece for piece, i in model["vocab"].items()} | {i: content for content, i in added}
        self.vocab_size = 1 + max(max(self._pieces, default=-1), max(self.control.values(), default=-1))

    @cached_property
    def _encoder(self) -> tokenizers.Tokenizer:
        """The library's tokenizer without control tokens: neither as added tokens nor as products of merges."""
        model = dict(self.spec["model"])
        vocab = {piece: i for piece, i in model["vocab"].items() if piece not in self.control}
        model["merges"] = [m for m in model["merges"] if "".join(_pair(m)) not in self.control]
        unknown = model.get("unk_token")
        if unknown in self.control:
            model["unk_token"] = f"\0{unknown}"  # a name that no text can spell by merging
            vocab[model["unk_token"]] = self.control[unknown]
        model["vocab"] = vocab
        added = [t for t in self.spec.get("added_tokens") or () if t["content"] not in self.control]
        spec = {**self.spec, "model": model, "added_tokens": added, "post_processor": None, "truncation": None,
                "padding": None}
        try:
            return tokenizers.Tokenizer.from_str(json.dumps(spec))
        except Exception as error:  # the library raises plain Exception
            raise PunaError(f"{self.where}: not a usable tokenizer: {error}") from error

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on all cores."""
        batch = self._encoder.encode_batch_fast([well_formed(t) for t in texts], add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; b"" for ids outside the vocabulary."""
        piece = self._pieces.get(token_id)
        if piece is None:
            return b""
        if token_id in self._plain_added:
            return piece.encode()
        if self.byte_level:
            return bytes(BYTE_OF[c] for c in piece)
        return sentencepiece_bytes(piece)

    def tokenizer_json(self) -> dict[str, Any]:
        """The tokenizer.json that this was made from."""
        return self.spec


def sentencepiece_bytes(piece: str) -> bytes:
    """The bytes that a sentencepiece piece stands for."""
    byte = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()


def _pair(merge: str | Sequence[str]) -> Sequence[str]:
    """A merge, in either of its spellings ("a b" or ["a", "b"])."""
    return merge.split(" ") if isinstance(merge, str) else merge
