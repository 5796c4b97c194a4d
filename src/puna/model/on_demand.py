"""Models larger than memory: routed experts are read and packed when a token first needs them, and the least recently
used ones are given up again.

Legend: D model width, E experts, C (token, expert) choices.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Condition

import torch
from torch import Tensor, nn

from puna.errors import PunaError
from puna.model.packed import Panels
from puna.model.quantized import Weight

Key = tuple[int, int]  # layer, expert


@dataclass(frozen=True)
class OnDemand:
    """How to read experts one by one, and how much memory they may take together."""

    read: Callable[[str, int], Weight]  # one expert's matrix [outputs, inputs] of a fused tensor, by its canonical name
    room: Callable[[], int]  # bytes, asked once when all other weights are in memory


@dataclass
class _Held:
    expert: nn.Module
    bytes: int
    users: int = 0


class ExpertCache:
    """Packed experts of all layers, never more than `budget` bytes of them. Safe to use from several threads.

    hits, misses: how often a pass found an expert here, and how often it had to be read.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.bytes = self.hits = self.misses = 0
        self._held: OrderedDict[Key, _Held] = OrderedDict()  # the least recently used first
        self._changed = Condition()

    def __len__(self) -> int:
        return len(self._held)

    @contextmanager
    def use(self, key: Key, make: Callable[[], nn.Module]) -> Iterator[nn.Module]:
        """The expert of that key, made if it isn't held; it stays while it is in use.

        One thread makes experts at a time, so memory peaks one expert above the budget, while it is read and packed.
        Raises PunaError for an expert that is larger than the budget, and whatever `make` raises.
        """
        with self._changed:
            held = self._held.get(key)
            if held is None:
                held = self._add(key, make)
            else:
                self.hits += 1
                self._held.move_to_end(key)
            held.users += 1
        try:
            yield held.expert
        finally:
            with self._changed:
                held.users -= 1
                self._changed.notify_all()

    def _add(self, key: Key, make: Callable[[], nn.Module]) -> _Held:
        self.misses += 1
        expert = make()
        size = held_bytes(expert)
        if size > self.budget:
            raise PunaError(
                f"one expert takes {size:,} bytes, but all of them together may take {self.budget:,}; "
                "give the model more memory, or load it in fewer bits"
            )
        while self.bytes + size > self.budget:
            idle = next((old for old, one in self._held.items() if not one.users), None)
            if idle is None:
                self._changed.wait()  # every expert is in another thread's use, for one product each
            else:
                self.bytes -= self._held.pop(idle).bytes
        if key in self._held:  # made by another thread, during the wait
            return self._held[key]
        self.bytes += size
        self._held[key] = held = _Held(expert, size)
        return held


class OnDemandExperts(nn.Module):
    """The routed experts of one layer, each read by `make` when it is needed and not in the cache."""

    def __init__(self, cache: ExpertCache, layer: int, count: int, make: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.cache, self.layer, self.count, self.make = cache, layer, count, make

    def forward(self, x_CD: Tensor, counts: list[int]) -> Tensor:
        """Rows sorted by expert, `counts[e]` of them for expert e -> [C, D]. Other experts are not read."""
        outputs = []
        for expert, x in enumerate(x_CD.split(counts)):
            if len(x):
                with self.cache.use((self.layer, expert), partial(self.make, expert)) as module:
                    outputs.append(module(x, [len(x)]))
        return torch.cat(outputs)


def held_bytes(module: nn.Module) -> int:
    """Bytes of the weights that a module holds in memory, packed or not."""
    plain = (*module.parameters(), *module.buffers())
    panels = (getattr(part, "packed", None) for part in module.modules())
    packed = sum(each.bytes() for each in panels if isinstance(each, Panels))
    return packed + sum(each.nbytes for each in plain if not each.is_meta)


def expert_cache(module: nn.Module) -> ExpertCache | None:
    """The cache of a model whose experts are read on demand, None where they are all in memory."""
    return next((part.cache for part in module.modules() if isinstance(part, OnDemandExperts)), None)
