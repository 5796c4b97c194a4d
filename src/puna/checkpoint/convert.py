"""From one checkpoint to another without a model between: weights go through one at a time."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.checkpoint.fewbits import quantised
from puna.checkpoint.ready import BITS, _stored_dtype
from puna.checkpoint.rehearsal import kinds
from puna.checkpoint.safetensors_write import write_weights
from puna.checkpoint.source import Source, _empty_decoder
from puna.checkpoint.validate import check_finite, check_shapes
from puna.errors import PunaError
from puna.model.quantized import Quantized, Weight


def convert_to_safetensors(
    source: Source, path: Path, dtype: torch.dtype | None = None, quantize: str | None = None
) -> tuple[str, ...]:
    """Write a checkpoint as a safetensors folder; returns what is not as it was stored, one sentence each.

    dtype: of weights in floats; alone it makes floats of those in few bits too. None takes the stored one, bfloat16
    with `quantize`. quantize: None keeps each weight's own bits, "int8" and "int4" as `quantised`. Memory peaks a shard
    and a layer's experts above nothing.
    Raises PunaError as `load_source` does, and for another word in `quantize`.
    """
    if quantize not in BITS:
        raise PunaError(f"quantize must be int8 or int4, not {quantize!r}")
    bits, floats = BITS[quantize], dtype is not None and quantize is None
    expected = {name: tuple(tensor.shape) for name, tensor in _empty_decoder(source).state_dict().items()}
    check_shapes(source, expected)
    wanted = dtype or (torch.bfloat16 if bits else _stored_dtype(source, {}))
    tied = source.config.tie_word_embeddings

    def weights() -> Iterator[tuple[str, Weight | list[Weight]]]:
        for name in expected:
            weight = source.read(name) if floats else source.read_packed(name)
            for part in weight if isinstance(weight, list) else [weight]:
                check_finite(part if isinstance(part, Tensor) else part.scales, source.where(name))
            if bits is not None:
                weight = quantised(name, weight, bits, tied)
            yield name, weight.to(wanted) if isinstance(weight, Tensor) else weight

    write_weights(weights(), source.config, source.tokenizer(), path, wanted, generation=source.generation)
    return () if floats or bits else source.packed_notes


def convert_to_gguf(
    source: Source, path: Path, type: str | None = None, metadata: Mapping[str, Any] | None = None
) -> tuple[str, ...]:
    """Write a checkpoint as a GGUF file; returns what is not as it was stored, one sentence each.

    type: as for `write_tensors`. None keeps each weight's own bits: floats as stored, integers in Q8_0 and Q4_0.
    Raises PunaError as `write_tensors` does, and where the weights don't fit the configuration.
    """
    from puna.checkpoint.gguf_names import slots
    from puna.checkpoint.gguf_write import own_types, write_tensors

    check_shapes(source, {slot.name: slot.shape for slot in slots(source.config)})
    if type is None:
        kind, types = own_types(kinds(source), _stored_dtype(source, {}))
        read: Callable[[str], Weight | list[Weight]] = source.read_packed
        notes = source.packed_notes
    else:
        few = {"Q8_0": 8, "Q4_0": 4}.get(type)
        read = source.read if few is None else partial(_read_for_gguf, source, bits=few)
        kind, types, notes = type, {}, ()
    written = write_tensors(read, source.config, source.tokenizer(), path, kind, source.generation, metadata, types)
    return (*notes, *written.notes)


def _read_for_gguf(source: Source, name: str, bits: int) -> Weight | list[Weight]:
    """A weight for a GGUF type of so many bits: its own integers where they are no wider, else its exact values."""
    packed = source.read_packed(name)
    parts = packed if isinstance(packed, list) else [packed]
    few = all(isinstance(part, Quantized) and part.bits <= bits for part in parts)
    return packed if few else source.read(name)
