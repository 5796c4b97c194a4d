"""The tokenizer: characters to ids and back, with control tokens that no text can spell."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from puna.errors import PunaError
from puna.family import vocabulary
from puna.family.vision import Llama4Vision, Llama32Vision
from puna.text import fast
from puna.text.incremental import StreamDecoder
from puna.text.sentencepiece_ import SentencePieceBackend, parse_model
from puna.text.sentencepiece_ import control_of as sentencepiece_control
from puna.text.settings import Settings, parse_json, read_settings, read_text
from puna.text.tiktoken_ import TiktokenBackend, parse_ranks

_TEXT = re.compile(rb"[\t\n\r -~]*")


class Backend(Protocol):
    """What one kind of tokenizer file must offer. Ids of control tokens never come out of `encode`."""

    vocab_size: int
    byte_level: bool  # pieces are bytes, not sentencepiece's text
    strips_leading_space: bool  # decoding drops the space that encoding put in front
    byte_errors: str  # codec error handler for broken UTF-8

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def tokenizer_json(self) -> dict[str, Any] | None: ...


class Tokenizer:
    """One vocabulary with its control tokens and the checkpoint's own chat template.

    `control` maps names to ids; `eos_ids` is the stop set; `generation` is the best guess among "llama2", "llama3",
    "llama3.1", "llama3.2" and "llama4", or None. Without `eos_ids` it is the generation's own, and `more_eos_ids`.
    """

    def __init__(self, backend: Backend, control: Mapping[str, int], *, bos_token: str | None = None,
                 eos_token: str | None = None, pad_token: str | None = None, eos_ids: Iterable[int] | None = None,
                 more_eos_ids: Iterable[int] = (), chat_template: str | None = None,
                 generation: str | None = None) -> None:
        self.backend = backend
        self.control: Mapping[str, int] = dict(control)
        self.control_ids = frozenset(self.control.values())
        self._names = {i: name for name, i in self.control.items()}
        self.bos_token = self._known(bos_token, *vocabulary.BEGIN_TOKENS)
        self.eos_token = self._known(eos_token, *vocabulary.END_TOKENS)
        self.pad_token = self._known(pad_token, *vocabulary.PAD_TOKENS)
        self.bos_id = self.control.get(self.bos_token) if self.bos_token else None
        self.pad_id = self.control.get(self.pad_token) if self.pad_token else None
        if eos_ids is None:
            own = {self.control[self.eos_token]} if self.eos_token else set()
            eos_ids = sorted({*vocabulary.stop_ids(self.control), *own, *more_eos_ids})
        self.eos_ids = tuple(eos_ids)
        self.chat_template = chat_template
        self.generation = generation or vocabulary.generation_of(self.control)

    def _known(self, *names: str | None) -> str | None:
        """The first of these names that is a control token."""
        return next((name for name in names if name in self.control), None)

    @property
    def vocab_size(self) -> int:
        """Number of ids, control tokens included: one more than the highest id."""
        return self.backend.vocab_size

    def encode(self, text: str) -> list[int]:
        """Ids of `text`: no BOS, and never a control id, whatever the text says.

        Surrogate pairs are joined, lone surrogates become U+FFFD.
        """
        return self.backend.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        return self.backend.encode_batch(texts)

    def decode(self, ids: Iterable[int], skip_control: bool = True) -> str:
        """The text of `ids`; broken UTF-8 becomes U+FFFD, ids outside the vocabulary nothing.

        Control tokens are left out unless `skip_control` is False.
        """
        stream = self.stream(skip_control)
        data = b"".join(map(self._shown_bytes(skip_control), ids))
        return stream.push_bytes(data) + stream.finish()

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for (a control token: its name)."""
        name = self._names.get(token_id)
        return name.encode() if name is not None else self.backend.token_bytes(token_id)

    def token(self, token_id: int) -> str:
        """One token as text, for display; parts of a character appear as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def stream(self, skip_control: bool = True) -> StreamDecoder:
        """An incremental decoder: `push(id)` and `finish()` give pieces that join to `decode`."""
        return StreamDecoder(self._shown_bytes(skip_control), self.backend.byte_errors,
                             self.backend.strips_leading_space)

    def _shown_bytes(self, skip_control: bool) -> Callable[[int], bytes]:
        if not skip_control:
            return self.token_bytes
        return lambda i: b"" if i in self._names else self.backend.token_bytes(i)

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None,
               add_generation_prompt: bool = True, grids: Sequence[tuple[int, int]] | None = None,
               vision: Llama4Vision | Llama32Vision | None = None) -> list[int]:
        """One chat as token ids, BOS once; see `puna.text.chat`."""
        from puna.text.chat import render

        return render(self, messages, tools, add_generation_prompt, grids, vision)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, which transformers loads with equal ids.

        A sentencepiece vocabulary also keeps its tokenizer.model; where its text normalisation can't be said in
        tokenizer.json, only that.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                                  "model_input_names": ["input_ids", "attention_mask"]}
        for key in ("bos_token", "eos_token", "pad_token"):
            if getattr(self, key) is not None:
                config[key] = getattr(self, key)
        spec = self.backend.tokenizer_json()
        if spec is None:
            config["tokenizer_class"] = "LlamaTokenizer"
        else:
            _write(target / "tokenizer.json", json.dumps(spec, ensure_ascii=False))
        if isinstance(self.backend, SentencePieceBackend):
            (target / "tokenizer.model").write_bytes(self.backend.model.serialize())
        _write(target / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        if self.chat_template is not None:
            _write(target / "chat_template.jinja", self.chat_template)

    def gguf_fields(self, vocab_size: int | None = None) -> dict[str, Any]:
        """The `tokenizer.*` values of a GGUF file, with unused entries up to `vocab_size`; see `puna.text.gguf_`."""
        from puna.text.gguf_ import gguf_fields

        return gguf_fields(self, vocab_size)


def tokenizer_from_json(text: str, where: str, settings: Settings | None = None) -> Tokenizer:
    """A tokenizer from the text of a tokenizer.json; `where` names it in errors.

    Raises PunaError for broken JSON (with its line) and for kinds that no Llama uses.
    """
    given = settings or Settings()
    spec = parse_json(text, where)
    fast.check_spec(spec, where)
    control = {**given.extra_control, **fast.control_of(spec, given.control_names)}
    return _with_settings(fast.FastBackend(spec, control, where), control, given)


def tokenizer_from_model(data: bytes, where: str, settings: Settings | None = None) -> Tokenizer:
    """A tokenizer from the content of a `tokenizer.model`: tiktoken ranks (text) or a sentencepiece model (protobuf).

    Raises PunaError naming the file, and its line or byte, where it is neither.
    """
    given = settings or Settings()
    if not data.strip():
        raise PunaError(f"{where}: the file is empty; fetch it again")
    if _TEXT.fullmatch(data[:4096]):
        pieces = parse_ranks(data, where)
        control = vocabulary.control_tokens(len(pieces), given.vocab_size)
        if control is None:
            raise PunaError(f"{where}: {len(pieces)} ranks fit neither Llama 3 (128000) nor Llama 4 (200000), and no "
                            "config.json or params.json beside it gives a vocab_size with 256 or 2048 more")
        ids = {name: len(pieces) + i for i, name in enumerate(control)}
        return _with_settings(TiktokenBackend(pieces, ids, vocabulary.split_pattern(control)), ids, given)
    model = parse_model(data, where)
    names = {**given.extra_control, **sentencepiece_control(model, given.control_names)}
    return _with_settings(SentencePieceBackend(model, where, names), names, given)


def load_tokenizer(path: str | Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint folder (tokenizer.json, else tokenizer.model), or None where it has none.

    `path` may also be one of these files. What the configs beside it say about special tokens is taken into account.
    Raises PunaError for damaged files.
    """
    given = Path(path)
    folder = given.parent if given.is_file() else given
    files = [given] if given.is_file() else [given / "tokenizer.json", given / "tokenizer.model"]
    source = next((f for f in files if f.is_file()), None)
    if source is None:
        return None
    settings = read_settings(folder)
    if source.suffix == ".json":
        return tokenizer_from_json(read_text(source), str(source), settings)
    return tokenizer_from_model(source.read_bytes(), str(source), settings)


def _with_settings(backend: Backend, control: Mapping[str, int], settings: Settings) -> Tokenizer:
    base = vocabulary.generation_of(control)
    return Tokenizer(
        backend, control, bos_token=settings.bos_token, eos_token=settings.eos_token, pad_token=settings.pad_token,
        eos_ids=settings.eos_ids, more_eos_ids=settings.more_eos_ids, chat_template=settings.chat_template,
        generation=settings.rope if base == "llama3" and settings.rope else base,
    )  # fmt: skip


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
