"""A checkpoint with an adapter's updates added to its weights, one tensor at a time, as any other source."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from puna.checkpoint.peft import Adapter, base_of, check_adapter, read_adapter
from puna.checkpoint.source import GenerationDefaults, Source
from puna.errors import PunaError
from puna.family.config import ModelConfig
from puna.model.lora import Update
from puna.model.quantized import Weight, plain
from puna.text.tokenizer import Tokenizer

HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"


class MergedSource:
    """`base` with `adapter` merged (see `Source`): changed weights in float32, the others as they are stored.

    An updated output layer that was the embedding becomes a matrix of its own.
    """

    def __init__(self, base: Source, adapter: Adapter) -> None:
        self.base, self.adapter = base, adapter
        self.path, self.format = adapter.path, base.format
        self.generation: GenerationDefaults = base.generation
        self.packed_notes = base.packed_notes
        untied = base.config.tie_word_embeddings and HEAD in adapter.updates
        self.config: ModelConfig = adapter.config.with_(tie_word_embeddings=False) if untied else adapter.config
        self._untied = untied
        self.notes = (*base.notes, *([f"{HEAD} is no longer the embedding: the adapter changes it."] if untied else ()))

    def bare(self) -> Source:
        """The base without the updates, in the context that these were trained for."""
        if self.adapter.config == self.base.config:
            return self.base
        return MergedSource(self.base, replace(self.adapter, path=self.base.path, updates={}))

    def tokenizer(self) -> Tokenizer | None:
        """See `Source.tokenizer`."""
        return self.base.tokenizer()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Source.shapes`."""
        shapes = self.base.shapes()
        return shapes | {HEAD: shapes[EMBEDDING]} if self._untied else shapes

    def where(self, name: str) -> str:
        """See `Source.where`."""
        return self.base.where(self._stored(name))

    def read(self, name: str) -> Tensor:
        """See `Source.read`."""
        weight = self.base.read(self._stored(name))
        update = self.adapter.updates.get(name)
        return weight if update is None else update.merged(weight)

    def read_packed(self, name: str) -> Weight | list[Weight]:
        """See `Source.read_packed`."""
        return self.read(name) if name in self.adapter.updates else self.base.read_packed(self._stored(name))

    def read_expert(self, name: str, expert: int, packed: bool) -> Weight:
        """See `Source.read_expert`."""
        update = self.adapter.updates.get(name)
        weight = self.base.read_expert(name, expert, packed and update is None)
        if update is None:
            return weight
        return Update(update.a[expert], update.b[expert], update.scale).merged(plain(weight))

    def _stored(self, name: str) -> str:
        return EMBEDDING if self._untied and name == HEAD else name


def open_merged(folder: Path, base: str | Path | None = None, text_only: bool = False) -> MergedSource:
    """An adapter's folder with its base, which its configuration names unless `base` does. text_only: as `open_source`.

    Raises PunaError where the base is nowhere, is itself an adapter, or is not the one that was adapted.
    """
    from puna.checkpoint.hub import resolve
    from puna.checkpoint.source import open_source

    check_adapter(folder)
    named = base or base_of(folder)
    if named is None:
        raise PunaError(f"{folder} holds an adapter that doesn't say of which model. Give the base too.")
    try:
        place = resolve(str(named))
    except PunaError as error:
        beside = folder / str(named)  # a path in the configuration may be relative to it
        if not beside.exists():
            raise PunaError(f"{folder} holds an adapter of {named}: {error}") from None
        place = beside
    if place.resolve() == folder.resolve():
        raise PunaError(f"{folder} holds an adapter that names itself as its base. Give the base's folder.")
    source = open_source(place, text_only)
    return MergedSource(source, checked(folder, source))


def checked(folder: Path, source: Source) -> Adapter:
    """The adapter in a folder, read for a base: whole weights that came along must be the base's own."""
    adapter = read_adapter(folder, source.config, source.shapes())
    for name, weight in adapter.base_layers.items():
        stored = EMBEDDING if name == HEAD and source.config.tie_word_embeddings else name
        if stored not in source.shapes() or not torch.equal(weight.float(), source.read(stored).float()):
            raise PunaError(
                f"{folder} brings its own {name}, which is not the base's. Merge the adapter with PEFT, and load that."
            )
    return adapter
