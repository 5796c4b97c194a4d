"""Write GGUF files that llama.cpp loads.

Legend: D model width, F feed-forward width, E experts.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

import torch
from gguf.constants import GGML_QUANT_SIZES, LlamaFileType
from gguf.constants import GGMLQuantizationType as Q
from gguf.quants import quantize
from torch import Tensor

from puna.checkpoint import gguf_rope
from puna.checkpoint.gguf_blocks import BLOCK, encoded, own_type
from puna.checkpoint.gguf_config import config_fields, differences
from puna.checkpoint.gguf_format import pack_header, padded
from puna.checkpoint.gguf_names import Slot, slots
from puna.checkpoint.named import named_weights
from puna.checkpoint.rotary import to_adjacent
from puna.checkpoint.source import GenerationDefaults
from puna.errors import PunaError
from puna.family.config import ModelConfig
from puna.model import Decoder
from puna.model.quantized import Float8, Quantized, Weight, by_rows, plain
from puna.text.tokenizer import Tokenizer

TYPES = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
}
_BY_DTYPE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_FLOATS = {Q.F32: torch.float32, Q.F16: torch.float16, Q.BF16: torch.bfloat16}
# largest magnitude that fits: float16 itself, or a float16 scale times the largest code of a block
_LARGEST = {Q.F16: 65504.0, Q.Q8_0: 65504.0 * 127, Q.Q4_0: 65504.0 * 8}
_CHUNK = 1 << 22  # elements encoded at a time


@dataclass(frozen=True)
class Written:
    """One finished file. `notes`: what llama.cpp would do otherwise, and tensors kept at a wider type."""

    path: Path
    bytes: int
    notes: tuple[str, ...]


def type_of(dtype: torch.dtype) -> str:
    """The type that keeps `dtype` as it is; F32 where there is none."""
    return _BY_DTYPE.get(dtype, "F32")


def write_gguf(model: Decoder, config: ModelConfig, tokenizer: Tokenizer | None, path: Path,
               type: str | None = None, generation: GenerationDefaults | None = None,
               metadata: Mapping[str, Any] | None = None) -> Path:  # fmt: skip
    """Write a model in memory; `type` is a key of TYPES, None keeps the weights' dtype, and integers where Q8_0 and
    Q4_0 can hold them. Notes become warnings.

    Raises PunaError as `write_tensors` does.
    """
    weights = dict(named_weights(model))
    if config.vision is not None:  # llama.cpp has towers in files of their own
        config, embedding = config.with_(vision=None), weights["embed_tokens.weight"]
        assert isinstance(embedding, Tensor | Quantized | Float8)
        weights["embed_tokens.weight"] = by_rows(embedding, itemgetter(slice(config.vocab_size)))
        warnings.warn("Left out the tower and what else is for pictures: the GGUF file holds the text model alone.",
                      stacklevel=3)  # fmt: skip
    kind, own = (type, {}) if type is not None else own_types(weights.items(), model.dtype)
    written = write_tensors(weights.__getitem__, config, tokenizer, path, kind, generation, metadata, own)
    for note in written.notes:
        warnings.warn(note, stacklevel=3)
    return written.path


def own_types(weights: Iterable[tuple[str, Weight | list[Weight]]], floats: torch.dtype) -> tuple[str, dict[str, Q]]:
    """The types that keep weights in few bits as they are, and floats in that dtype; and the key of TYPES for the
    whole."""
    found = {name: own_type(weight) or Q[type_of(floats)] for name, weight in weights}
    few = (few.name for few in (Q.Q4_0, Q.Q8_0) if few in found.values())
    return next(few, type_of(floats)), found


def write_tensors(read: Callable[[str], Weight | list[Weight]], config: ModelConfig, tokenizer: Tokenizer | None,
                  path: Path, type: str, generation: GenerationDefaults | None = None,
                  metadata: Mapping[str, Any] | None = None, types: Mapping[str, Q] | None = None
                  ) -> Written:  # fmt: skip
    """Write tensors one at a time as `read` gives them by our names; integers keep their bits where the type can.

    Vectors and routers stay float32, matrices become `type` (or what `types` says of them), or F16 where their rows are
    not whole blocks. `metadata` is added as it is (`general.name`, `general.license`, ...).

    Raises:
        PunaError: an unknown type, a target that exists, a tokenizer larger than the vocabulary, a tensor that is not
            finite or does not fit the type.
    """
    if type not in TYPES:
        raise PunaError(f"GGUF type {type!r} is not one that can be written. Choose {', '.join(TYPES)}.")
    if path.exists():
        raise PunaError(f"{path} exists already. Choose another name, or delete it first.")
    order = list(slots(config))
    types = {slot.name: _stored_type(slot, (types or {}).get(slot.name, Q[type])) for slot in order}
    fields = _fields(config, tokenizer, path, type, generation, metadata or {})
    table = [(name, slot.stored_shape, types[slot.name]) for slot in order for name in slot.tensors]
    scaling = config.rope_scaling
    if scaling is not None:
        table.insert(0, (gguf_rope.TENSOR, (config.head_dim // 2,), Q.F32))
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(pack_header(fields, table))
            if scaling is not None:
                _put(file, torch.from_numpy(gguf_rope.divisors(scaling, config.rope_theta, config.head_dim)), Q.F32)
                _pad(file)
            anew = [slot for slot in order if not _write_slot(file, slot, read(slot.name), types[slot.name], config)]
        os.replace(part, path)
    except OSError as error:
        raise PunaError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
    notes = (*differences(config), *_tokenizer_notes(fields), *_fallbacks(order, types), *_rounded(anew, types))
    return Written(path, path.stat().st_size, notes)


def _stored_type(slot: Slot, wanted: Q) -> Q:
    if slot.kind in ("vector", "router"):
        return Q.F32
    return wanted if slot.stored_shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0 else Q.F16


def _fallbacks(order: list[Slot], types: Mapping[str, Q]) -> list[str]:
    wide = [n for s in order for n in s.tensors if types[s.name] == Q.F16 and s.stored_shape[-1] % BLOCK]
    if not wide or set(types.values()) <= set(_FLOATS):
        return []
    return [f"{len(wide)} tensors stay F16, since their rows are not multiples of {BLOCK}: {', '.join(wide[:3])}"
            + (", ..." if len(wide) > 3 else ".")]  # fmt: skip


def _rounded(anew: list[Slot], types: Mapping[str, Q]) -> list[str]:
    kinds = sorted({types[slot.name].name for slot in anew})
    if not kinds:
        return []
    return [f"{len(anew)} weights in few bits were rounded anew to {' and '.join(kinds)}, which can't hold their "
            f"values or scales as they are: {anew[0].name}" + (", ..." if anew[1:] else ".")]  # fmt: skip


def _tokenizer_notes(fields: Mapping[str, Any]) -> list[str]:
    if "puna.tokenizer.split_regex" not in fields:
        return []
    return [
        "llama.cpp does not know the pattern by which this tokenizer splits text and takes its default one: it may "
        "make other token ids from a text than puna does."
    ]


def _write_slot(file: BinaryIO, slot: Slot, weight: Weight | list[Weight], type: Q, config: ModelConfig) -> bool:
    """False: a weight in few bits was not written as it is."""
    kept = True
    shape = (len(weight), *tuple(weight[0].shape)[::-1]) if isinstance(weight, list) else tuple(weight.shape)
    if shape != slot.shape:
        raise PunaError(f"tensor {slot.name!r} has shape {shape}, the configuration wants {slot.shape}")
    if slot.kind == "rotary" and config.architecture == "llama" and not isinstance(weight, list):
        weight = by_rows(weight, partial(to_adjacent, heads=slot.heads))
    for part, name in enumerate(slot.tensors):
        for piece in _pieces(slot, weight, part):
            try:
                kept &= _put(file, piece, type)
            except ValueError as error:
                raise PunaError(f"tensor {slot.name!r} cannot be written to {name!r} as {type.name}: {error}") from None
        _pad(file)
    return kept


def _pieces(slot: Slot, weight: Weight | list[Weight], part: int) -> Iterator[Weight]:
    """What one GGUF tensor holds, an expert after the other. Gate and up are the two halves of one fused weight."""
    if slot.kind not in ("gate_up", "down_experts") and not isinstance(weight, list):
        yield weight
        return
    assert not isinstance(weight, Quantized | Float8), "experts in few bits come one by one"
    for expert in weight:
        rows = expert.T if isinstance(weight, Tensor) and isinstance(expert, Tensor) else expert
        share = rows.shape[0] // len(slot.tensors)
        yield by_rows(rows, itemgetter(slice(part * share, (part + 1) * share)))


def _put(file: BinaryIO, weight: Weight, type: Q) -> bool:
    """Append one tensor, a few rows at a time. False: it was in few bits, and was rounded to others."""
    blocks = encoded(weight, type)
    if blocks is not None:
        file.write(blocks.contiguous().numpy().data)
        return True
    tensor = plain(weight)
    rows = tensor.detach().reshape(-1, tensor.shape[-1])
    for chunk in rows.split(max(1, _CHUNK // rows.shape[-1])):
        values = chunk.float().cpu().contiguous()
        largest = float(values.abs().amax())
        if not math.isfinite(largest):
            raise ValueError("it holds values that are not finite")
        if largest > _LARGEST.get(type, math.inf):
            raise ValueError(f"it holds {largest:.6g}; choose BF16 or F32")
        if type in _FLOATS:
            file.write(values.to(_FLOATS[type]).view(torch.uint8).numpy().data)
        else:
            file.write(quantize(values.numpy(), type).data)
    return isinstance(weight, Tensor) or type == Q.F32


def _pad(file: BinaryIO) -> None:
    file.write(b"\0" * (padded(file.tell()) - file.tell()))


def _fields(config: ModelConfig, tokenizer: Tokenizer | None, path: Path, type: str,
            generation: GenerationDefaults | None, metadata: Mapping[str, Any]) -> dict[str, Any]:  # fmt: skip
    fields: dict[str, Any] = {
        "general.architecture": config.architecture,
        "general.type": "model",
        "general.name": path.stem,
        "general.file_type": int(TYPES[type]),
        "general.quantization_version": 2,
    }
    if generation is not None:
        sampling = {"temp": generation.temperature, "top_p": generation.top_p, "top_k": generation.top_k}
        fields |= {f"general.sampling.{key}": value for key, value in sampling.items() if value is not None}
    fields |= metadata
    fields |= config_fields(config)
    # llama.cpp's word for a model that is run on token ids alone; a list of tokens must be as long as the embedding
    return fields | (tokenizer.gguf_fields(config.vocab_size) if tokenizer else {"tokenizer.ggml.model": "none"})
