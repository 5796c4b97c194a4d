"""The `quantization_config` of a config.json: which modules are stored in few bits, and how.

Read are compressed-tensors (llm-compressor's, and Maverick's FP8 release) and fbgemm_fp8 (Llama 3.1 405B FP8).
Source: compressed-tensors 0.20 `quantization/quant_config.py`, `quant_args.py`, `utils/match.py`.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from puna.checkpoint.validate import Fields, read_json
from puna.errors import PunaError
from puna.model.words import BITS

Strategy = Literal["tensor", "channel", "group", "block"]
_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_ELSE = "Load another release of this model, or a GGUF file of it"


@dataclass(frozen=True)
class Scheme:
    """How one group of modules stores its weights [N, K]: `strategy` says what shares a scale."""

    bits: int
    floating: bool  # float8_e4m3fn, else integers
    packed: bool  # integers in int32 words
    symmetric: bool = True
    strategy: Strategy = "channel"
    block: tuple[int, int] = (1, 0)  # rows and columns that share a scale: (1, group) for "group"


@dataclass(frozen=True)
class Quantisation:
    """Schemes with the modules they apply to, and the modules left alone."""

    path: Path
    groups: tuple[tuple[tuple[str, ...], Scheme], ...]
    ignore: tuple[str, ...]
    notes: tuple[str, ...]

    def scheme(self, module: str) -> Scheme | None:
        """The scheme of a module by its stored name: exact names first, then patterns, then the module's class."""
        if any(_matches(entry, module) for entry in self.ignore):
            return None
        targets = [(target, scheme) for group, scheme in self.groups for target in group]
        targets.sort(key=lambda item: ("re:" in item[0], item[0]))
        kind = "Embedding" if module.endswith("embed_tokens") else "Linear"
        named = (scheme for target, scheme in targets if _matches(target, module))
        return next(named, next((scheme for target, scheme in targets if target == kind), None))


def _matches(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target == module


def read_quantisation(path: Path) -> Quantisation | None:
    """The quantisation that a config.json states, or None.

    Raises PunaError, naming it, for a method, format or scheme that is not read.
    """
    top = Fields(read_json(path), path)
    section = top.section("quantization_config")
    if section is None and (text := top.section("text_config")) is not None:
        section = text.section("quantization_config")
    if section is None:
        return None
    method = section.text("quant_method") or "unknown method"
    if method == "fbgemm_fp8":
        return Quantisation(path, ((("Linear",), Scheme(8, floating=True, packed=False)),), (), _activations("fbgemm"))
    if method != "compressed-tensors":
        raise PunaError(
            f"{path}: the weights are quantised ({method}), which is not supported; puna reads compressed-tensors and "
            f"fbgemm_fp8. {_ELSE}."
        )
    return _compressed(section)


def _activations(kind: str) -> tuple[str, ...]:
    return (f"Activations are not quantised here, as {kind} would: only the weights are in few bits.",)


def _compressed(section: Fields) -> Quantisation:
    format = section.text("format") or "dense"
    for key in ("sparsity_config", "transform_config"):
        nested = section.section(key)
        if nested is not None and nested.values and nested.text("format", "") != "dense":
            raise section.error(key, f"is set, which is not supported. {_ELSE}")
    notes: list[str] = []
    if section.section("kv_cache_scheme") is not None:
        notes.append("Left out the scales of an 8-bit key/value cache: choose the cache's width when loading.")
    groups = section.section("config_groups")
    if groups is None or not groups.values:
        raise section.error("config_groups", "is missing. Fetch the file again")
    found, dynamic = [], False
    for name in groups.values:
        group = groups.section(name)
        if group is None:
            raise groups.error(name, "must be an object, not null")
        found.append((_names(group, "targets"), _scheme(group, group.text("format") or format)))
        dynamic |= group.section("input_activations") is not None
    if dynamic:
        notes.extend(_activations("the configuration"))
    ignore = _names(section, "ignore") if "ignore" in section else ()
    return Quantisation(section.path, tuple(found), ignore, tuple(notes))


def _names(fields: Fields, key: str) -> tuple[str, ...]:
    value = fields.values.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise fields.error(key, f"must be a list of names, not {value!r}. Fetch the file again")
    for item in value:
        try:
            re.compile(item.removeprefix("re:") if item.startswith("re:") else "")
        except re.error as error:
            raise fields.error(key, f"holds the pattern {item!r}, which is none: {error}. Fetch it again") from None
    return tuple(value)


def _scheme(group: Fields, format: str) -> Scheme:
    weights = group.section("weights")
    if weights is None:
        raise group.error("weights", f"is missing: only quantised weights are supported. {_ELSE}")
    if format not in _FORMATS:
        raise group.error("format", f"is {format!r}; supported are {', '.join(_FORMATS)}. {_ELSE}")
    bits, kind = weights.integer("num_bits", 8), weights.text("type", "int")
    packed = format == "pack-quantized"
    if kind not in ("int", "float") or bits not in (BITS if kind == "int" else (8,)) or (packed and kind == "float"):
        raise weights.error("num_bits", f"is {bits} of type {kind!r} in {format}, which is not supported. {_ELSE}")
    if weights.values.get("actorder") in ("group", "dynamic", True):
        raise weights.error("actorder", f"is {weights.values['actorder']!r}, which is not supported. {_ELSE}")
    strategy, block = _strategy(weights)
    if packed and strategy not in ("channel", "group"):
        raise weights.error("strategy", f"is {strategy!r} in {format}, which is not supported. {_ELSE}")
    return Scheme(bits, kind == "float", packed, weights.flag("symmetric", True), strategy, block)


def _strategy(weights: Fields) -> tuple[Strategy, tuple[int, int]]:
    size = weights.integer("group_size", None)
    implied = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = weights.text("strategy", implied)
    if strategy == "group":
        if size is None or size < 1:
            raise weights.error("group_size", f"must be positive, not {size}. Fetch the file again")
        return "group", (1, size)
    if strategy == "block":
        block = weights.integers("block_structure")
        if block is None or len(block) != 2 or min(block) < 1:
            raise weights.error("block_structure", f"must be two positive integers, not {block}. Fetch the file again")
        return "block", (block[0], block[1])
    if strategy == "tensor":
        return "tensor", (1, 0)
    if strategy == "channel":
        return "channel", (1, 0)
    raise weights.error("strategy", f"is {strategy!r}; supported are tensor, channel, group and block. {_ELSE}")
