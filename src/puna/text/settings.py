"""What the small files beside a tokenizer say about it: special names, stop ids, chat template, generation."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from puna.errors import PunaError


@dataclass(frozen=True)
class Settings:
    """What tokenizer_config.json, generation_config.json, config.json, params.json and template files say."""

    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    eos_ids: tuple[int, ...] | None = None  # the whole stop set, where generation_config.json gives it
    more_eos_ids: tuple[int, ...] = ()  # stop ids of config.json, in addition to the generation's own
    control_names: frozenset[str] = frozenset()  # names that are control tokens whatever tokenizer.json says
    extra_control: Mapping[str, int] = field(default_factory=dict)  # control tokens that only the config lists
    chat_template: str | None = None
    vocab_size: int | None = None
    rope: str | None = None  # None | "llama3.1" | "llama3.2": whose position scaling the model has


def parse_json(text: str, where: str) -> dict[str, Any]:
    """A JSON object; raises PunaError naming file and line."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise PunaError(f"{where}, line {error.lineno}: not valid JSON ({error.msg}); fetch the file again") from error
    if not isinstance(value, dict):
        raise PunaError(f"{where}: must hold a JSON object, not a {type(value).__name__}")
    return value


def read_text(path: Path) -> str:
    """A UTF-8 file; raises PunaError naming file and line."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PunaError(f"{path}, line {line}: not UTF-8 text; fetch the file again") from error


def read_settings(folder: Path) -> Settings:
    """The settings of a checkpoint folder; missing files say nothing. Raises PunaError for files that can't be read."""
    tokenizer, generation, config, params = (
        _read(folder / f"{name}.json") for name in ("tokenizer_config", "generation_config", "config", "params")
    )
    config = {**config, **(config.get("text_config") or {})}
    names = {key: _name(tokenizer.get(key)) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    listed = [_name(t) for t in tokenizer.get("additional_special_tokens") or ()]
    decoder = tokenizer.get("added_tokens_decoder") or {}
    extra = {t["content"]: int(i) for i, t in decoder.items() if isinstance(t, dict) and t.get("special")}
    eos = _ids(generation.get("eos_token_id"))
    return Settings(
        bos_token=names["bos_token"], eos_token=names["eos_token"], pad_token=names["pad_token"],
        eos_ids=eos or None, more_eos_ids=_ids(config.get("eos_token_id")),
        control_names=frozenset(n for n in (*names.values(), *listed, *extra) if n), extra_control=extra,
        chat_template=_template(folder, tokenizer), vocab_size=_size(config) or _size(params),
        rope=_rope(config, params),
    )  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    return parse_json(read_text(path), str(path)) if path.is_file() else {}


def _name(token: Any) -> str | None:
    """A token's name, written as a string or as an object with `content`."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if isinstance(v, int) and v >= 0)


def _size(config: Mapping[str, Any]) -> int | None:
    size = config.get("vocab_size")
    return size if isinstance(size, int) and size > 0 else None


def _template(folder: Path, tokenizer: Mapping[str, Any]) -> str | None:
    """The chat template: its own file, else the tokenizer's, else the processor's (pictures)."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return read_text(file)
    given = tokenizer.get("chat_template") or _read(folder / "chat_template.json").get("chat_template")
    if isinstance(given, list):  # several named templates
        named = {t["name"]: t["template"] for t in given if isinstance(t, Mapping) and {"name", "template"} <= t.keys()}
        given = named.get("default") or next(iter(named.values()), None)
    return given if isinstance(given, str) else None


def _rope(config: Mapping[str, Any], params: Mapping[str, Any]) -> str | None:
    """Llama 3.1 scales positions by 8, Llama 3.2 by 32; Meta's params.json leaves the factor to the model's width."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if scaling.get("rope_type", scaling.get("type")) == "llama3":
        return "llama3.2" if scaling.get("factor") == 32 else "llama3.1"
    if params.get("use_scaled_rope"):
        return "llama3.2" if params.get("dim", 0) <= 3072 else "llama3.1"
    return None
