"""Load one rank's share of a checkpoint: of every tensor only the slices that the rank holds stay in memory."""

import math

import torch
from torch import Tensor

from puna.checkpoint.source import Loaded, Source
from puna.checkpoint.validate import check_finite, check_shapes
from puna.family.sharding import Cut, Sharding
from puna.model.parallel import local_decoder

_BLOCK = 1 << 24  # elements read at a time where only some columns of a tensor are kept


def load_shard(
    source: Source,
    sharding: Sharding,
    rank: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Loaded:
    """As `puna.checkpoint.load_source`, for one rank; its model is not yet connected with the others'.

    Sources that read rows (plain safetensors) never hold more than a block above the share; from the others each
    tensor is read whole before it is cut, so memory peaks one tensor above the share.
    Raises PunaError as `load_source` does; values are checked in the slices that are kept.
    """
    check_shapes(source, sharding.shapes)
    model = local_decoder(sharding, rank)
    weights: dict[str, Tensor] = {}
    for name in sharding.shapes:
        tensor = read_cut(source, name, sharding.shapes[name], sharding.cuts(name, rank))
        check_finite(tensor, source.where(name))
        dtype = dtype or tensor.dtype
        weights[name] = tensor.to(device=device, dtype=dtype)
    model.load_state_dict(weights, assign=True)
    return Loaded(
        model=model.eval(),
        config=sharding.config,
        tokenizer=source.tokenizer(),
        generation=source.generation,
        source_format=source.format,
        path=source.path,
        notes=source.notes,
    )


def read_cut(source: Source, name: str, shape: tuple[int, ...], cuts: tuple[Cut, ...]) -> Tensor:
    """The part of a stored tensor that the cuts describe, in memory of its own."""
    read_rows = getattr(source, "read_rows", None)
    if not cuts:
        return source.read(name)
    if read_rows is None:
        return narrowed(source.read(name), cuts).clone()
    rows = next((cut.ranges for cut in cuts if cut.axis == 0), ((0, shape[0]),))
    others = tuple(cut for cut in cuts if cut.axis)
    if not others and len(rows) == 1:
        return read_rows(name, *rows[0])
    step = max(1, _BLOCK // math.prod(shape[1:]))
    out, at = torch.empty(0), 0
    for first, last in rows:
        for start in range(first, last, step):
            block = narrowed(read_rows(name, start, min(last, start + step)), others)
            if not at:
                out = block.new_empty(sum(stop - start for start, stop in rows), *block.shape[1:])
            out[at : at + len(block)] = block
            at += len(block)
    return out


def narrowed(tensor: Tensor, cuts: tuple[Cut, ...]) -> Tensor:
    """The part of a whole tensor that the cuts describe, often a view of it."""
    for cut in cuts:
        parts = [tensor.narrow(cut.axis, start, stop - start) for start, stop in cut.ranges]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts, cut.axis)
    return tensor
