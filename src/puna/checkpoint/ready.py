"""Loading for use: weights packed as the engine's kernels read them, few bits staying few. Training takes `load`."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from puna.checkpoint.source import Loaded, Source, _empty_decoder
from puna.checkpoint.validate import check_finite, check_shapes
from puna.model import Decoder
from puna.model.memory import available_bytes, returned_at_once
from puna.model.on_demand import ExpertCache, OnDemand, expert_cache, held_bytes
from puna.model.packing import Packer
from puna.model.quantized import Float8, Quantized, Weight, plain
from puna.text.tokenizer import Tokenizer

SHARE = 0.7  # of the available memory, for routed experts: the cache for keys and values takes a quarter
BITS = {None: None, "int8": 8, "int4": 4}


def load_ready(
    source: Source,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    model: Decoder | None = None,
    memory: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> Loaded:
    """A model for the engine, from an opened checkpoint. Memory peaks a few tensors above the packed model.

    dtype: of activations and of weights stored as floats. None takes the stored one (the embedding's; where that is in
    few bits, the final norm's), and bfloat16 with `quantize`. quantize: None keeps each weight's own bits; "int8" and
    "int4" quantise the linear layers that have more. model: what to fill, made on the meta device (default: by the
    source's configuration). memory: bytes that the weights may take (default: SHARE of what is available). Routed
    experts that don't fit stay in their files and are read when a token needs them, as a note says then. tokenizer: the
    source's, where it was read already.
    Raises PunaError as `load` does, and where all but the experts is more than `memory`.
    """
    packer = packer_for(source, device, dtype, quantize, model, memory)
    with returned_at_once():
        packer.fill()
    model = packer.decoder
    kept = () if quantize or dtype is not None else source.packed_notes
    cache = expert_cache(model)
    if cache is not None:
        kept = (*kept, _on_demand_note(cache))
    return Loaded(
        model=model.eval(),
        config=source.config,
        tokenizer=tokenizer or source.tokenizer(),
        generation=source.generation,
        source_format=source.format,
        path=source.path,
        notes=(*source.notes, *kept),
    )


def packer_for(
    source: Source,
    device: str | torch.device,
    dtype: torch.dtype | None,
    quantize: str | None,
    model: Decoder | None = None,
    room: int | Callable[[], int] | None = None,
) -> Packer:
    """What fills the model; see `load_ready`. room: its `memory`, or what tells the routed experts' when all else is
    there. On the meta device nothing takes memory, and nothing is read."""
    decoder = model or _empty_decoder(source)
    check_shapes(source, {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()})
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
            _check(part, source, name)
        return stored

    def read_expert(name: str, expert: int) -> Weight:
        weight = source.read_expert(name, expert, packed=not whole)
        _check(weight, source, name)
        if torch.device(device).type != "meta":
            drop_pages(source.path)
        return weight

    def left() -> int:
        if callable(room):
            return room()
        if room is not None:
            return room - held_bytes(decoder)
        return int(SHARE * available_bytes(torch.device(device)))

    return Packer(decoder, read, bits, dtype, device, OnDemand(read_expert, left))


def _check(weight: Weight, source: Source, name: str) -> None:
    check_finite(weight.scales if isinstance(weight, Quantized | Float8) else weight, source.where(name))


def drop_pages(path: Path) -> None:
    """Let go of the file cache's copy of a checkpoint: what was read from it is in memory in another form."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file() and hasattr(os, "posix_fadvise"):
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _on_demand_note(cache: ExpertCache) -> str:
    return (
        f"Routed experts don't fit into memory: they stay in their files and are read when a token needs them; "
        f"up to {cache.budget / 1e9:.2f} GB of them are kept. Answers are the same, only slower."
    )


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
