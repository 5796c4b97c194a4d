"""The tokenizer: characters to ids and back, with control tokens that no text can spell."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from puna.errors import PunaError
from puna.family import vocabulary
from puna.text.fast import FastBackend
from puna.text.incremental import StreamDecoder


class Backend(Protocol):
    """What one kind of tokenizer file must offer. Ids of control tokens never come out of `encode`."""

    vocab_size: int
    strips_leading_space: bool  # decoding drops the space that encoding put in front
    byte_errors: str  # codec error handler for broken UTF-8

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def tokenizer_json(self) -> dict[str, Any]: ...


class Tokenizer:
    """One vocabulary with its control tokens and the checkpoint's own chat template.

    `control` maps names to ids; `eos_ids` is the stop set; `generation` is the best guess among "llama2", "llama3",
    "llama3.1", "llama3.2" and "llama4", or None.
    """

    def __init__(self, backend: Backend, control: Mapping[str, int], *, bos_token: str | None = None,
                 eos_token: str | None = None, pad_token: str | None = None, eos_ids: Iterable[int] | None = None,
                 chat_template: str | None = None, generation: str | None = None) -> None:
        self.backend = backend
        self.control: Mapping[str, int] = dict(control)
        self.control_ids = frozenset(self.control.values())
        self._names = {i: name for name, i in self.control.items()}
        self.bos_token = bos_token or _first(vocabulary.BEGIN_TOKENS, self.control)
        self.eos_token = eos_token or _first(vocabulary.END_TOKENS, self.control)
        self.pad_token = pad_token or _first(vocabulary.PAD_TOKENS, self.control)
        self.bos_id = self.control.get(self.bos_token) if self.bos_token else None
        self.pad_id = self.control.get(self.pad_token) if self.pad_token else None
        table = {*vocabulary.stop_ids(self.control), *(self.control[t] for t in (self.eos_token,) if t in self.control)}
        self.eos_ids = tuple(eos_ids) if eos_ids is not None else tuple(sorted(table))
        self.chat_template = chat_template
        self.generation = generation or vocabulary.generation_of(self.control)

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

    def _shown_bytes(self, skip_control: bool) -> Any:
        if not skip_control:
            return self.token_bytes
        return lambda i: b"" if i in self._names else self.backend.token_bytes(i)

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None,
               add_generation_prompt: bool = True) -> list[int]:
        """One chat as token ids, BOS once; see `puna.text.chat`."""
        from puna.text import chat

        return chat.render(self, messages, tools, add_generation_prompt)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, which transformers loads."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                                  "model_input_names": ["input_ids", "attention_mask"]}
        for key in ("bos_token", "eos_token", "pad_token"):
            if getattr(self, key) is not None:
                config[key] = getattr(self, key)
        _write(target / "tokenizer.json", json.dumps(self.backend.tokenizer_json(), ensure_ascii=False))
        _write(target / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        if self.chat_template is not None:
            _write(target / "chat_template.jinja", self.chat_template)


def tokenizer_from_json(text: str, where: str, config: Mapping[str, Any] | None = None) -> Tokenizer:
    """A tokenizer from the text of a tokenizer.json; `where` names it in errors, `config` is tokenizer_config.json."""
    try:
        spec = json.loads(text)
    except json.JSONDecodeError as error:
        raise PunaError(f"{where}, line {error.lineno}: not valid JSON ({error.msg}); fetch the file again") from error
    settings = config or {}
    control = {t["content"]: t["id"] for t in spec.get("added_tokens") or () if t.get("special")}
    return Tokenizer(FastBackend(spec, control, where), control, bos_token=settings.get("bos_token"),
                     eos_token=settings.get("eos_token"), pad_token=settings.get("pad_token"))


def load_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint folder, or None where it has none."""
    source = Path(folder) / "tokenizer.json"
    if not source.is_file():
        return None
    return tokenizer_from_json(source.read_text(encoding="utf-8"), str(source))


def _first(names: Sequence[str], control: Mapping[str, int]) -> str | None:
    return next((name for name in names if name in control), None)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
