"""One of Meta's .pth files: pickle, read weights-only and mapped."""

import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from puna.errors import PunaError

# What Meta's own loaders drop: buffers and training statistics.
_DROPPED = re.compile(r"(rope\.freqs|_extra_state|global_gate_stats_3E|running_gate_stats_3E|expert_activation_DE)$")
_RESIDENT = 32  # a shard is mapped anew after each 1/32 of it was read: pages of a mapping stay resident until it goes


class Shard:
    """One mapped .pth file. Raises PunaError if it is damaged or holds anything but tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._touched, self._limit = 0, path.stat().st_size // _RESIDENT
        self._tensors = self._map()

    def _map(self) -> dict[str, Tensor]:
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError:
            raise PunaError(
                f"{self.path} holds more than weights, or is damaged. It was not opened: such files can run code. "
                "Fetch it again from where you trust it, or use a safetensors release."
            ) from None
        except Exception as error:  # a damaged pickle fails in any way
            reason = (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0]
            raise PunaError(f"{self.path} is truncated or no torch file ({reason}). Download it again.") from None
        if not isinstance(state, dict):
            raise PunaError(f"{self.path} holds a {type(state).__name__} where a dict of tensors is expected.")
        kept = {name: value for name, value in state.items() if not _DROPPED.search(str(name))}
        for name, value in kept.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                raise PunaError(f"{self.path}: entry {name!r} is a {type(value).__name__}, not a tensor.")
        return kept

    @property
    def names(self) -> set[str]:
        """Names of all tensors that count."""
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """A stored tensor's shape."""
        return tuple(self._tensors[name].shape)

    def tensor(self, name: str, rows: slice = slice(None)) -> Tensor:
        """A mapped tensor or some rows of it, to be copied at once; on the meta device where that is the default."""
        if torch.get_default_device().type == "meta":
            return self._tensors[name][rows].to("meta")
        if self._touched > self._limit:
            self._tensors, self._touched = self._map(), 0
        tensor = self._tensors[name][rows]
        self._touched += tensor.numel() * tensor.element_size()
        return tensor
