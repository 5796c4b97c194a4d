"""Tokenizers kept as sentencepiece models: Llama 2's `tokenizer.model`, a protobuf message.

Field numbers: sentencepiece `sentencepiece_model.proto`. Only the few fields used here are read and written.
"""

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sentencepiece

from puna.errors import PunaError
from puna.text.fast import added_token, begin_with, looks_like_control, sentencepiece_bytes, well_formed
from puna.text.incremental import EACH_BYTE

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # piece types, the same numbers in GGUF
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of ModelProto
_MODEL_TYPE, _BYTE_FALLBACK, _UNK_ID = 3, 35, 40  # of TrainerSpec
_CHARSMAP, _DUMMY_PREFIX, _TRIM = 2, 3, 4  # of NormalizerSpec
_BPE = 2


@dataclass(frozen=True)
class Piece:
    """One entry of a sentencepiece vocabulary."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class Model:
    """What a sentencepiece model file says, as far as Llama needs it."""

    pieces: tuple[Piece, ...]
    is_bpe: bool = True
    charsmap: bytes = b""  # text normalisation; Llama has none
    add_dummy_prefix: bool = True
    trim_spaces: bool = False  # sentencepiece's remove_extra_whitespaces

    def serialize(self) -> bytes:
        """The model as a protobuf message."""
        kinds = [p.kind for p in self.pieces]
        unknown = kinds.index(UNKNOWN) if UNKNOWN in kinds else 0
        trainer = _varint_field(_MODEL_TYPE, _BPE if self.is_bpe else 1)
        trainer += _varint_field(_BYTE_FALLBACK, BYTE in kinds) + _varint_field(_UNK_ID, unknown)
        normalizer = _bytes_field(_CHARSMAP, self.charsmap) + _varint_field(_DUMMY_PREFIX, self.add_dummy_prefix)
        normalizer += _varint_field(_TRIM, self.trim_spaces)
        pieces = (_bytes_field(1, p.text.encode()) + b"\x15" + struct.pack("<f", p.score) + _varint_field(3, p.kind)
                  for p in self.pieces)
        return (b"".join(_bytes_field(_PIECES, p) for p in pieces)
                + _bytes_field(_TRAINER, trainer) + _bytes_field(_NORMALIZER, normalizer))


def parse_model(data: bytes, where: str) -> Model:
    """Read a sentencepiece model. Raises PunaError naming the file and the byte where it stops making sense."""
    try:
        pieces: list[Piece] = []
        trainer: dict[int, Any] = {}
        normalizer: dict[int, Any] = {}
        for number, value in _fields(data):
            if number == _PIECES:
                entry = dict(_fields(value))
                pieces.append(Piece(entry[1].decode(), entry.get(2, 0.0), entry.get(3, NORMAL)))
            elif number == _TRAINER:
                trainer = dict(_fields(value))
            elif number == _NORMALIZER:
                normalizer = dict(_fields(value))
        if not pieces:
            raise ValueError("it has no pieces")
        return Model(tuple(pieces), trainer.get(_MODEL_TYPE, 1) == _BPE, normalizer.get(_CHARSMAP, b""),
                     bool(normalizer.get(_DUMMY_PREFIX, 1)), bool(normalizer.get(_TRIM, 1)))
    except (ValueError, KeyError, IndexError, AttributeError, TypeError, struct.error) as error:
        raise PunaError(f"{where}: neither a sentencepiece model ({error}) nor lines of 'base64 rank'; "
                        "fetch the file again") from error


class SentencePieceBackend:
    """Encoding by the `sentencepiece` library; control pieces are never matched in text."""

    byte_errors = EACH_BYTE
    byte_level = False

    def __init__(self, model: Model, where: str, control: Mapping[str, int] | None = None) -> None:
        """`control` are the control tokens' names and ids; ids past the model are tokens added beside it.

        Raises PunaError for models that are not BPE or that the library refuses.
        """
        if not model.is_bpe:
            raise PunaError(f"{where}: a unigram model; Llama's sentencepiece models are BPE")
        self.control = dict(control if control is not None else control_of(model))
        marked = set(self.control.values())
        self.model = replace(model, pieces=tuple(
            replace(p, kind=CONTROL) if i in marked and p.kind in (NORMAL, USER_DEFINED) else p
            for i, p in enumerate(model.pieces)
        ))
        self.strips_leading_space = model.add_dummy_prefix
        self.vocab_size = max([len(model.pieces) - 1, *marked]) + 1
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(self.model.serialize())
        except RuntimeError as error:
            raise PunaError(f"{where}: sentencepiece refuses this model: {error}") from error

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone."""
        ids: list[int] = self._processor.EncodeAsIds(well_formed(text))
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on all cores."""
        return list(self._processor.Encode([well_formed(t) for t in texts], out_type=int))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; b"" for ids outside the vocabulary."""
        if not 0 <= token_id < len(self.model.pieces):
            return b""
        piece = self.model.pieces[token_id]
        if piece.kind == UNKNOWN:
            return " ⁇ ".encode()  # as the library shows it
        return sentencepiece_bytes(piece.text) if piece.kind == BYTE else piece.text.replace("▁", " ").encode()

    def pieces(self) -> tuple[Piece, ...]:
        """The vocabulary with scores and types, in order of id."""
        return self.model.pieces

    def model_file(self) -> bytes:
        """The content of a `tokenizer.model`."""
        return self.model.serialize()

    def tokenizer_json(self) -> dict[str, Any] | None:
        """The same vocabulary as a Hugging Face tokenizer.json; None where normalisation can't be expressed there."""
        if self.model.charsmap or self.model.trim_spaces:
            return None
        pieces = self.model.pieces
        added = [added_token(name, i) for name, i in sorted(self.control.items(), key=lambda item: item[1])]
        added += [added_token(p.text, i, special=False) for i, p in enumerate(pieces) if p.kind == USER_DEFINED]
        unknown = next((p.text for p in pieces if p.kind == UNKNOWN), None)
        prefix = [{"type": "Prepend", "prepend": "▁"}] if self.model.add_dummy_prefix else []
        strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if self.model.add_dummy_prefix else []
        space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        spec = {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": {"type": "Sequence", "normalizers": [*prefix, space]},
            "pre_tokenizer": None, "post_processor": None,
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
            "model": {"type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": True, "ignore_merges": False,
                      "byte_fallback": any(p.kind == BYTE for p in pieces),
                      "vocab": {p.text: i for i, p in enumerate(pieces)}, "merges": _merges(pieces)},
        }  # fmt: skip
        return begin_with(spec, "<s>", self.control.get("<s>"))


def control_of(model: Model, names: Iterable[str] = ()) -> dict[str, int]:
    """The control tokens of a model: control pieces, `names`, and pieces that look like one.

    The unknown piece counts only where bytes stand in for unknown characters, because otherwise text does yield it.
    """
    wanted = set(names)
    has_bytes = any(p.kind == BYTE for p in model.pieces)
    return {
        p.text: i
        for i, p in enumerate(model.pieces)
        if p.kind == CONTROL or (p.kind == UNKNOWN and has_bytes)
        or (p.kind in (NORMAL, USER_DEFINED) and (p.text in wanted or looks_like_control(p.text)))
    }  # fmt: skip


def _merges(pieces: Sequence[Piece]) -> list[list[str]]:
    """The merges that scores stand for: every pair of pieces that joins to a piece, best score first.

    Source: transformers `convert_slow_tokenizer.generate_merges`.
    """
    id_of = {p.text: i for i, p in enumerate(pieces) if p.kind == NORMAL}
    merges: list[list[str]] = []
    for piece in sorted((p for p in pieces if p.kind == NORMAL), key=lambda p: -p.score):
        text = piece.text
        pairs = [(text[:c], text[c:]) for c in range(1, len(text)) if text[:c] in id_of and text[c:] in id_of]
        merges += ([left, right] for left, right in sorted(pairs, key=lambda pair: (id_of[pair[0]], id_of[pair[1]])))
    return merges


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protobuf message; raises ValueError where it is cut off."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        value: Any
        if wire == 0:
            value, at = _varint(data, at)
        elif wire == 2:
            size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            value, at = struct.unpack_from("<d" if wire == 1 else "<f", data, at)[0], at + size
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at > len(data):
            raise ValueError(f"cut off at byte {len(data)}")
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError(f"cut off or damaged at byte {at}")
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _varint_field(number: int, value: int) -> bytes:
    return _encode_varint(number << 3) + _encode_varint(int(value))


def _bytes_field(number: int, value: bytes) -> bytes:
    return _encode_varint(number << 3 | 2) + _encode_varint(len(value)) + value
