"""Loading for use: weights packed as the engine's kernels read them, few bits staying few. Training takes `load`."""

from collections.abc import Sequence

import torch

from puna.checkpoint.source import Loaded, Source, _empty_decoder
from puna.checkpoint.validate import check_finite, check_shapes
from puna.model import Decoder
from puna.model.packing import Packer
from puna.model.quantized import Float8, Quantized, Weight, plain

BITS = {None: None, "int8": 8, "int4": 4}


def load_ready(
    source: Source,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    model: Decoder | None = None,
) -> Loaded:
    """A model for the engine, from an opened checkpoint. Memory peaks a few tensors above the packed model.

    dtype: of activations and of weights stored as floats. None takes the stored one (the embedding's; where that is in
    few bits, the final norm's), and bfloat16 with `quantize`. quantize: None keeps each weight's own bits; "int8" and
    "int4" quantise the linear layers that have more. model: what to fill, made on the meta device (default: by the
    source's configuration).
    Raises PunaError as `load` does.
    """
    model = filled(source, device, dtype, quantize, model)
    kept = () if quantize or dtype is not None else source.packed_notes
    return Loaded(
        model=model.eval(),
        config=source.config,
        tokenizer=source.tokenizer(),
        generation=source.generation,
        source_format=source.format,
        path=source.path,
        notes=(*source.notes, *kept),
    )


def filled(
    source: Source,
    device: str | torch.device,
    dtype: torch.dtype | None,
    quantize: str | None,
    model: Decoder | None = None,
) -> Decoder:
    """The model alone; see `load_ready`. On the meta device it takes no memory, and nothing is read."""
    model = model or _empty_decoder(source)
    check_shapes(source, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    bits = BITS[quantize]
    early: dict[str, Weight | list[Weight]] = {}
    whole = dtype is not None and bits is None
    if dtype is None:
        dtype = torch.bfloat16 if bits else _stored_dtype(source, early)

    def read(name: str) -> Weight | Sequence[Weight]:
        stored = early.pop(name, None)
        if stored is None:
            stored = source.read(name) if whole else source.read_packed(name)
        for part in stored if isinstance(stored, list) else [stored]:
            check_finite(part.scales if isinstance(part, Quantized | Float8) else part, source.where(name))
        return stored

    Packer(model, read, bits, dtype, device).fill()
    return model


def _stored_dtype(source: Source, early: dict[str, Weight | list[Weight]]) -> torch.dtype:
    """What is read for it goes into `early`, since an embedding takes time to read."""
    embedding = source.read_packed("embed_tokens.weight")
    if isinstance(embedding, torch.Tensor):
        if embedding.dtype in (torch.float32, torch.bfloat16):
            early["embed_tokens.weight"] = embedding
        return embedding.dtype
    early["embed_tokens.weight"] = embedding
    norm = source.read_packed("norm.weight")
    assert not isinstance(norm, list)
    return plain(norm).dtype
