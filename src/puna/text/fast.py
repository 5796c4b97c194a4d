"""Tokenizers kept as Hugging Face `tokenizer.json`: byte-level (Llama 3, 4, our own) or sentencepiece BPE (Llama 2)."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers

from puna.errors import PunaError
from puna.text.incremental import EACH_BYTE

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_CONTROL_LIKE = re.compile(r"<\|[^<>|\s]+\|>")
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
        check_spec(spec, where)
        model = spec["model"]
        self.spec = spec
        self.control = dict(control)
        types = _component_types(spec.get("decoder")) | _component_types(spec.get("pre_tokenizer"))
        self.byte_level = "ByteLevel" in types
        self.byte_errors = "replace" if self.byte_level else EACH_BYTE
        self.strips_leading_space = not self.byte_level and bool({"Strip", "Metaspace"} & types)
        added = [(t["content"], t["id"]) for t in spec.get("added_tokens") or ()]
        self._plain_added = {i for content, i in added if content not in self.control}
        self._pieces = {i: piece for piece, i in model["vocab"].items()} | {i: content for content, i in added}
        self.vocab_size = 1 + max([*self._pieces, *self.control.values()], default=-1)
        if self.byte_level:
            _check_byte_level(model["vocab"], {c for c, _ in added} | self.control.keys(), where)
        self._encoder = _without_control(spec, self.control, where)

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
        return bytes(BYTE_OF[c] for c in piece) if self.byte_level else sentencepiece_bytes(piece)

    def tokenizer_json(self) -> dict[str, Any]:
        """The tokenizer.json that this was made from, with every control token listed as special."""
        added = {t["id"]: t for t in self.spec.get("added_tokens") or ()}
        added |= {i: {**added.get(i, added_token(name, i)), "special": True} for name, i in self.control.items()}
        return {**self.spec, "added_tokens": [added[i] for i in sorted(added)]}


def check_spec(spec: Mapping[str, Any], where: str) -> None:
    """Raise PunaError where a parsed tokenizer.json is not a BPE model with the parts that are used here."""
    model = spec.get("model")
    if not isinstance(model, Mapping) or model.get("type", "BPE") != "BPE":
        raise PunaError(f"{where}: field model must be of type BPE, as in every Llama tokenizer")
    if not isinstance(model.get("vocab"), Mapping) or not isinstance(model.get("merges"), list):
        raise PunaError(f"{where}: field model lacks vocab or merges; fetch the file again")
    for i, token in enumerate(spec.get("added_tokens") or ()):
        if not isinstance(token, Mapping) or not {"content", "id"} <= token.keys():
            raise PunaError(f"{where}: added_tokens[{i}] lacks content or id; fetch the file again")
    seen: dict[int, str] = {}
    for piece, token_id in model["vocab"].items():
        if not isinstance(token_id, int) or token_id < 0 or token_id in seen:
            other = f", which {seen[token_id]!r} has too" if token_id in seen else ""
            raise PunaError(f"{where}: vocab gives {piece!r} the id {token_id!r}{other}; fetch the file again")
        seen[token_id] = piece


def _check_byte_level(vocab: Mapping[str, int], exempt: set[str], where: str) -> None:
    for piece in vocab:
        if not BYTE_OF.keys() >= set(piece) and piece not in exempt:
            raise PunaError(f"{where}: vocab entry {piece!r} is not spelled in the byte alphabet; fetch the file again")
    missing = next((b for c, b in BYTE_OF.items() if c not in vocab), None)
    if missing is not None:
        raise PunaError(f"{where}: vocab has no entry for the byte 0x{missing:02x}; fetch the file again")


def _without_control(spec: Mapping[str, Any], control: Mapping[str, int], where: str) -> tokenizers.Tokenizer:
    """The library's tokenizer without control tokens: neither as added tokens nor as products of merges."""
    model = dict(spec["model"])
    unknown = model.get("unk_token")
    if unknown in control:
        model["unk_token"] = None
    out_of_reach = control.keys() | {unknown}
    added = [t for t in spec.get("added_tokens") or () if t["content"] not in out_of_reach]
    # The library numbers added tokens anew, unless the vocabulary has them.
    vocab = model["vocab"] | {t["content"]: t["id"] for t in added}
    model["vocab"] = {piece: i for piece, i in vocab.items() if piece not in control}
    model["merges"] = [pair for pair in merge_pairs(model["merges"]) if "".join(pair) not in out_of_reach]
    bare = {**spec, "model": model, "added_tokens": added, "post_processor": None, "truncation": None, "padding": None}
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(bare))
    except Exception as error:  # the library raises plain Exception
        raise PunaError(f"{where}: not a usable tokenizer: {error}") from error


def merge_pairs(merges: Sequence[str | Sequence[str]]) -> list[Sequence[str]]:
    """The merges of a tokenizer.json, in either spelling ("a b" or ["a", "b"]), as pairs."""
    return [m.split(" ") if isinstance(m, str) else m for m in merges]


def split_of(spec: Mapping[str, Any]) -> str | None:
    """The pattern that cuts text before merging, where the tokenizer.json has exactly one; else None."""
    part = spec.get("pre_tokenizer") or {}
    patterns = [p["pattern"].get("Regex") for p in part.get("pretokenizers", [part]) if p.get("type") == "Split"]
    return patterns[0] if len(patterns) == 1 else None


def looks_like_control(name: str) -> bool:
    """Whether a name is written as control tokens are, `<|...|>`; text never yields these, whatever their flags."""
    return bool(_CONTROL_LIKE.fullmatch(name))


def control_of(spec: Mapping[str, Any], names: Iterable[str] = ()) -> dict[str, int]:
    """The control tokens of a tokenizer.json: the special ones, `names`, and those that look like one.

    An unknown-token counts only where bytes stand in for unknown characters, because otherwise text does yield it.
    """
    wanted = set(names)
    model = spec["model"]
    control = {
        t["content"]: t["id"]
        for t in spec.get("added_tokens") or ()
        if t.get("special") or t["content"] in wanted or looks_like_control(t["content"])
    }
    control |= {name: model["vocab"][name] for name in wanted if name in model["vocab"]}
    types = _component_types(spec.get("decoder")) | _component_types(spec.get("pre_tokenizer"))
    if not model.get("byte_fallback") and "ByteLevel" not in types:
        control.pop(model.get("unk_token"), None)
    return control


def added_token(name: str, token_id: int, special: bool = True) -> dict[str, Any]:
    """An entry of tokenizer.json's `added_tokens`."""
    return {"id": token_id, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": special}


def begin_with(spec: dict[str, Any], name: str, token_id: int | None) -> dict[str, Any]:
    """`spec` with BOS put in front by default, as the published tokenizers do; unchanged where there is no BOS."""
    if token_id is None:
        return spec
    begin, first, second = ({"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                            {"Sequence": {"id": "B", "type_id": 1}})
    pair = [begin, first, {"SpecialToken": {"id": name, "type_id": 1}}, second]
    tokens = {name: {"id": name, "ids": [token_id], "tokens": [name]}}
    return {**spec, "post_processor": {"type": "TemplateProcessing", "single": [begin, first], "pair": pair,
                                       "special_tokens": tokens}}


def byte_level_spec(vocab: Mapping[str, int], merges: Sequence[Sequence[str]], pattern: str, *, ignore_merges: bool,
                    added: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A tokenizer.json of byte-level BPE; `vocab` and `merges` are spelled in the byte alphabet."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": list(added), "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, byte_level]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": ignore_merges, "vocab": dict(vocab), "merges": [list(m) for m in merges]},
    }  # fmt: skip


def is_byte_piece(piece: str) -> bool:
    """Whether a sentencepiece piece stands for one byte, like `<0x0A>`."""
    return bool(_BYTE_PIECE.fullmatch(piece))


def sentencepiece_bytes(piece: str) -> bytes:
    """The bytes that a sentencepiece piece stands for."""
    byte = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()
