"""The tokenizer inside a GGUF file: `tokenizer.*` values out and in, as plain Python values.

Source: llama.cpp `llama-vocab.cpp` and `convert_hf_to_gguf.py`. llama.cpp knows split patterns by name only; a
tokenizer with another one is written as "default" with its pattern in `puna.tokenizer.split_regex`, which is read back.
"""

from collections.abc import Mapping
from typing import Any

from puna.errors import PunaError
from puna.family import vocabulary
from puna.text import fast
from puna.text.sentencepiece_ import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Model,
    Piece,
    SentencePieceBackend,
    control_of,
)
from puna.text.tokenizer import Tokenizer

_PATTERNS = {
    "llama-bpe": vocabulary.LLAMA3_SPLIT, "llama3": vocabulary.LLAMA3_SPLIT, "llama-v3": vocabulary.LLAMA3_SPLIT,
    "llama4": vocabulary.LLAMA4_SPLIT, "gpt-4o": vocabulary.LLAMA4_SPLIT,
}  # fmt: skip
_PREFIX = "tokenizer.ggml."
_OWN = "puna.tokenizer."
_ROLES = {"eot_token_id": ("<|eot|>", "<|eot_id|>"), "eom_token_id": ("<|eom|>", "<|eom_id|>")}


def gguf_fields(tokenizer: Tokenizer, vocab_size: int | None = None) -> dict[str, Any]:
    """GGUF key -> str, int, bool, or list, of a tokenizer; unused entries fill up to the model's `vocab_size`.

    Raises PunaError where `vocab_size` is smaller than the vocabulary or the pattern can't be expressed.
    """
    size = tokenizer.vocab_size if vocab_size is None else vocab_size
    if size < tokenizer.vocab_size:
        raise PunaError(f"the tokenizer has {tokenizer.vocab_size} ids, the model only {size}; "
                        "use the model's own tokenizer")
    fields = _byte_level_fields(tokenizer) if tokenizer.backend.byte_level else _sentencepiece_fields(tokenizer)
    tokens, kinds = fields[_PREFIX + "tokens"], fields[_PREFIX + "token_type"]
    tokens += [f"[PAD{i}]" for i in range(len(tokens), size)]
    kinds += [UNUSED] * (size - len(kinds))
    if _PREFIX + "scores" in fields:
        fields[_PREFIX + "scores"] += [-1e4] * (size - len(fields[_PREFIX + "scores"]))
    ids = {"bos_token_id": tokenizer.bos_id, "padding_token_id": tokenizer.pad_id,
           "eos_token_id": tokenizer.control.get(tokenizer.eos_token or "")}
    ids |= {key: next((tokenizer.control[n] for n in names if n in tokenizer.control), None)
            for key, names in _ROLES.items()}
    fields |= {_PREFIX + key: value for key, value in ids.items() if value is not None}
    fields[_PREFIX + "add_bos_token"] = tokenizer.bos_id is not None
    if tokenizer.chat_template is not None:
        fields["tokenizer.chat_template"] = tokenizer.chat_template
    fields[_OWN + "eos_token_ids"] = list(tokenizer.eos_ids)
    if tokenizer.generation is not None:
        fields[_OWN + "generation"] = tokenizer.generation
    return fields


def tokenizer_from_gguf(fields: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer that GGUF values describe, or None where they describe none.

    Lists may be any sequences. Raises PunaError for tokenizer kinds that no Llama uses and for lists that don't fit.
    """
    kind = fields.get(_PREFIX + "model")
    if kind is None or _PREFIX + "tokens" not in fields:
        return None
    pieces = _pieces(fields)
    backend: fast.FastBackend | SentencePieceBackend
    if kind == "gpt2":
        control = {p.text: i for i, p in enumerate(pieces) if _is_control(p)}
        backend = fast.FastBackend(_spec(fields, pieces, control), control, "GGUF field tokenizer.ggml.tokens")
    elif kind == "llama":
        trim = bool(fields.get(_PREFIX + "remove_extra_whitespaces", False))
        prefix = bool(fields.get(_PREFIX + "add_space_prefix", True))
        charsmap = bytes(fields.get(_PREFIX + "precompiled_charsmap", b""))
        model = Model(_unique(pieces), True, charsmap, prefix, trim)
        control = control_of(model)
        backend = SentencePieceBackend(model, "GGUF field tokenizer.ggml.tokens", control)
    else:
        raise PunaError(f"GGUF field tokenizer.ggml.model is {kind!r}; Llama's tokenizers are 'llama' and 'gpt2'")
    names = {i: name for name, i in control.items()}
    ids = {key: int(fields[_PREFIX + key]) for key in ("bos_token_id", "eos_token_id", "padding_token_id", *_ROLES)
           if fields.get(_PREFIX + key) is not None}
    own = fields.get(_OWN + "eos_token_ids")
    return Tokenizer(
        backend, control, bos_token=names.get(ids.get("bos_token_id", -1)),
        eos_token=names.get(ids.get("eos_token_id", -1)), pad_token=names.get(ids.get("padding_token_id", -1)),
        eos_ids=None if own is None else tuple(map(int, own)),
        more_eos_ids=[ids[key] for key in ("eos_token_id", *_ROLES) if key in ids],
        chat_template=fields.get("tokenizer.chat_template"), generation=fields.get(_OWN + "generation"),
    )  # fmt: skip


def _byte_level_fields(tokenizer: Tokenizer) -> dict[str, Any]:
    spec = tokenizer.backend.tokenizer_json() or {}
    pattern = fast.split_of(spec)
    if pattern is None:
        raise PunaError("GGUF can't hold this tokenizer: its pre_tokenizer is not one Split pattern; "
                        "save as safetensors")
    tokens = [f"[PAD{i}]" for i in range(tokenizer.vocab_size)]
    kinds = [UNUSED] * tokenizer.vocab_size
    for piece, i in spec["model"]["vocab"].items():
        tokens[i], kinds[i] = piece, NORMAL
    for token in spec["added_tokens"]:
        tokens[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token["id"] in tokenizer.control_ids else USER_DEFINED
    merges = [" ".join(pair) for pair in fast.merge_pairs(spec["model"]["merges"])]
    name = next((name for name, known in _PATTERNS.items() if known == pattern), "default")
    fields = {_PREFIX + "model": "gpt2", _PREFIX + "pre": name, _PREFIX + "tokens": tokens,
              _PREFIX + "token_type": kinds, _PREFIX + "merges": merges,
              _OWN + "ignore_merges": bool(spec["model"].get("ignore_merges"))}
    return fields | ({_OWN + "split_regex": pattern} if name == "default" else {})


def _sentencepiece_fields(tokenizer: Tokenizer) -> dict[str, Any]:
    backend = tokenizer.backend
    if isinstance(backend, SentencePieceBackend):
        model = backend.model
    else:
        model = _model_of(tokenizer.backend.tokenizer_json() or {}, tokenizer)
    pieces = list(model.pieces)
    named = {i: name for name, i in tokenizer.control.items()}
    pieces += [Piece(named.get(i, f"[PAD{i}]"), 0.0, CONTROL if i in named else UNUSED)
               for i in range(len(pieces), tokenizer.vocab_size)]
    fields: dict[str, Any] = {
        _PREFIX + "model": "llama", _PREFIX + "pre": "default", _PREFIX + "tokens": [p.text for p in pieces],
        _PREFIX + "scores": [p.score for p in pieces], _PREFIX + "token_type": [p.kind for p in pieces],
        _PREFIX + "add_space_prefix": model.add_dummy_prefix,
        _PREFIX + "remove_extra_whitespaces": model.trim_spaces,
    }  # fmt: skip
    if model.charsmap:
        fields[_PREFIX + "precompiled_charsmap"] = list(model.charsmap)
    unknown = next((i for i, p in enumerate(pieces) if p.kind == UNKNOWN), None)
    return fields | ({} if unknown is None else {_PREFIX + "unknown_token_id": unknown})


def _model_of(spec: Mapping[str, Any], tokenizer: Tokenizer) -> Model:
    """A sentencepiece model from a tokenizer.json of that kind: a piece's score is minus the place of its merge."""
    place: dict[str, int] = {}
    for i, pair in enumerate(fast.merge_pairs(spec["model"]["merges"])):
        place.setdefault("".join(pair), i)
    unknown = spec["model"].get("unk_token")
    texts = {i: piece for piece, i in spec["model"]["vocab"].items()}
    texts |= {token["id"]: token["content"] for token in spec["added_tokens"]}
    plain = {t["id"] for t in spec["added_tokens"]} - tokenizer.control_ids
    pieces = []
    for i in range(tokenizer.vocab_size):
        text = texts.get(i, f"[PAD{i}]")
        if text == unknown:
            kind = UNKNOWN
        elif i in tokenizer.control_ids:
            kind = CONTROL
        elif fast.is_byte_piece(text):
            kind = BYTE
        else:
            kind = USER_DEFINED if i in plain else NORMAL if i in texts else UNUSED
        pieces.append(Piece(text, -float(place.get(text, len(place))) if kind == NORMAL else 0.0, kind))
    return Model(tuple(pieces), add_dummy_prefix=tokenizer.backend.strips_leading_space)


def _pieces(fields: Mapping[str, Any]) -> list[Piece]:
    texts = [str(t) for t in fields[_PREFIX + "tokens"]]
    columns = {}
    for key, default in (("token_type", NORMAL), ("scores", 0.0)):
        values = fields.get(_PREFIX + key)
        columns[key] = [default] * len(texts) if values is None else list(values)
        if len(columns[key]) != len(texts):
            raise PunaError(f"GGUF field {_PREFIX}{key} has {len(columns[key])} entries for {len(texts)} tokens; "
                            "the file is damaged, fetch it again")
    rows = zip(texts, columns["scores"], columns["token_type"], strict=True)
    return [Piece(text, float(score), int(kind)) for text, score, kind in rows]


def _is_control(piece: Piece) -> bool:
    return piece.kind in (CONTROL, UNKNOWN) or (piece.kind == USER_DEFINED and fast.looks_like_control(piece.text))


def _unique(pieces: list[Piece]) -> tuple[Piece, ...]:
    """`pieces` with the names of filling entries made different, as the sentencepiece library demands."""
    seen: set[str] = set()
    out = []
    for i, piece in enumerate(pieces):
        text = f"[PAD{i}]" if piece.kind == UNUSED and piece.text in seen else piece.text
        seen.add(text)
        out.append(Piece(text, piece.score, piece.kind))
    return tuple(out)


def _spec(fields: Mapping[str, Any], pieces: list[Piece], control: Mapping[str, int]) -> dict[str, Any]:
    """The tokenizer.json of byte-level GGUF values."""
    pre = fields.get(_PREFIX + "pre")
    pattern = fields.get(_OWN + "split_regex") or _PATTERNS.get(str(pre))
    if pattern is None:
        raise PunaError(f"GGUF field tokenizer.ggml.pre is {pre!r}; known are {', '.join(_PATTERNS)}. "
                        "Use the checkpoint's safetensors release, or load without its tokenizer")
    vocab = {p.text: i for i, p in enumerate(pieces) if p.kind == NORMAL}
    added = [fast.added_token(name, i) for name, i in control.items()]
    added += [fast.added_token(p.text, i, special=False) for i, p in enumerate(pieces)
              if p.kind == USER_DEFINED and p.text not in control]
    merges = []
    for i, merge in enumerate(fields.get(_PREFIX + "merges", ())):
        pair = str(merge).split(" ")
        if len(pair) != 2:
            raise PunaError(f"GGUF field tokenizer.ggml.merges[{i}] is {merge!r}, not two pieces with a space between")
        merges.append(pair)
    ignore = bool(fields.get(_OWN + "ignore_merges", True))  # as the published Llama 3 and 4 vocabularies do
    spec = fast.byte_level_spec(vocab, merges, pattern, ignore_merges=ignore, added=added)
    begin = next((name for name in vocabulary.BEGIN_TOKENS if name in control), "")
    return fast.begin_with(spec, begin, control.get(begin))
