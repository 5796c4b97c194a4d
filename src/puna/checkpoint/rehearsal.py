"""What loading will hold in memory, found by loading on the meta device: shapes and types, no bytes of weights."""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from puna.checkpoint.ready import filled
from puna.checkpoint.source import Source
from puna.model import Decoder


@dataclass(frozen=True)
class Footprint:
    """weights: bytes of the model as it will lie in memory. peak: the most that loading holds at once, these included.
    dtype: of its activations."""

    weights: int
    peak: int
    dtype: torch.dtype


def rehearse(
    source: Source, dtype: torch.dtype | None = None, quantize: str | None = None, model: Decoder | None = None
) -> Footprint:
    """Load without loading: the same steps as `load_ready` on the CPU, each tensor only counted.

    Arguments as for `load_ready`. Raises PunaError as it does, except for what only the weights themselves can show.
    """
    with torch.device("meta"), _Counter() as counter:
        decoder = filled(source, "meta", dtype, quantize, model)
    return Footprint(counter.live, counter.peak, decoder.dtype)


class _Counter(TorchDispatchMode):
    """Adds up the bytes of all tensors that operations give, for as long as somebody holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._held: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ARG002
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, Tensor):
                self._note(each.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._held:
            return
        self.live += size
        self.peak = max(self.peak, self.live)

        def freed(_: object) -> None:
            self.live -= size
            del self._held[key]

        self._held[key] = weakref.ref(storage, freed)
