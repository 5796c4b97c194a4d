"""Meta's own files: `consolidated.NN.pth` (one a tensor-parallel rank) and `params.json`, Llama 2 to Llama 4.

A tensor's shards are joined when it is asked for. Quantised releases: `puna.checkpoint.meta_bits`.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from puna.checkpoint.fewbits import FALLBACK_GROUP, beside, fallback
from puna.checkpoint.meta_bits import COMPANION, RankBits
from puna.checkpoint.meta_names import COLUMNS, Recipe, recipes, same
from puna.checkpoint.meta_params import read_params
from puna.checkpoint.meta_shard import Shard
from puna.checkpoint.meta_vision import TEXT, is_vision, vision_recipes
from puna.checkpoint.source import GenerationDefaults
from puna.checkpoint.validate import weights_file
from puna.errors import PunaError
from puna.model.quantized import Weight, by_rows, stacked
from puna.text.tokenizer import Tokenizer

_SHARD = re.compile(r"consolidated\.(?:(\d+)\.)?pth")  # a model of one shard may have no number


class MetaSource:
    """A folder with `consolidated.*.pth` and `params.json` (see `Source`). text_only: without what is for pictures."""

    format = "meta"

    def __init__(self, folder: Path, text_only: bool = False) -> None:
        self.path = folder
        params = folder / "params.json"
        if not params.is_file():
            raise PunaError(f"{params} is missing. Meta's weights need it: download it into the same folder.")
        self._shards = [Shard(path) for path in _shard_paths(folder)]
        first = self._shards[0]
        for shard in self._shards[1:]:
            if odd := shard.names ^ first.names:
                raise PunaError(f"{shard.path} and {first.path} disagree on tensor {min(odd)}: shards of two models?")
        text = [name for name in sorted(first.names) if not (text_only and is_vision(name))]
        companions = [name for name in text if (match := COMPANION.fullmatch(name)) and f"{match[1]}.weight" in text]
        stored = {name: first.shape(name) for name in text if name not in companions}
        self.config, quantisation = read_params(params, stored, len(self._shards))
        self._ranks = [RankBits(s, rank, quantisation, self.config.num_experts) for rank, s in enumerate(self._shards)]
        if companions and len(self._shards) > 1:
            raise PunaError(
                f"{folder}: integers with scales in {len(self._shards)} shards are not supported, only in one. "
                "Load the bfloat16 release."
            )
        self.generation = GenerationDefaults()
        self._notes: list[str] = []
        if left_out := len(first.names) - len(text):
            self._notes.append(f"Left out {left_out} vision tensors: this load is text only.")
        known = recipes(self.config)
        if any(name.startswith(TEXT) for name in stored):
            known = {name: Recipe(tuple(TEXT + part for part in recipe.stored), recipe.join)
                     for name, recipe in known.items()}  # fmt: skip
        known |= vision_recipes(self.config)
        self._recipes = {name: recipe for name, recipe in known.items() if set(recipe.stored) <= set(stored)}
        used = {name for recipe in self._recipes.values() for name in recipe.stored}
        self._recipes.update({name: Recipe((name,), same) for name in stored if name not in used})
        self._settle_head()

    @property
    def notes(self) -> tuple[str, ...]:
        """See `Source.notes`."""
        return tuple(self._notes)

    def _settle_head(self) -> None:
        """Files of tied models store the embedding twice; equal copies become one."""
        shapes = self.shapes()
        if "lm_head.weight" not in shapes or shapes["lm_head.weight"] != shapes.get("embed_tokens.weight"):
            return
        stored = [self._recipes[name].stored[0] for name in ("embed_tokens.weight", "lm_head.weight")]
        if len({self._ranks[0].quantised(name) for name in stored}) > 1:
            return
        embedding, head = (self._shards[0].tensor(name) for name in stored)
        if embedding.shape == head.shape and not torch.equal(embedding[:1], head[:1]):
            return  # one row tells nearly every untied model without reading either matrix
        if self._same(*stored):
            self._notes.append("Left out output.weight: it equals the embedding, so the two are tied.")
            del self._recipes["lm_head.weight"]
            self.config = self.config.with_(tie_word_embeddings=True)

    def _same(self, one: str, other: str) -> bool:
        """Whether two stored weights are equal, their scales too."""
        for rank in self._ranks:
            for part in ("weight", "scales", "zeros"):
                names = [f"{name.removesuffix('weight')}{part}" for name in (one, other)]
                held = [name in rank.shard.names for name in names]
                if any(held) and not (all(held) and torch.equal(*(rank.shard.tensor(name) for name in names))):
                    return False
        return True

    def tokenizer(self) -> Tokenizer | None:
        """See `Source.tokenizer`."""
        from puna.text import load_tokenizer

        return load_tokenizer(self.path)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Source.shapes`. Joined on the meta device, so nothing is read."""
        shapes = {}
        for name, recipe in self._recipes.items():
            parts = [
                [torch.empty(rank.shape(stored), device="meta") for rank in self._ranks] for stored in recipe.stored
            ]
            try:
                shapes[name] = tuple(recipe.join(*parts).shape)
            except (RuntimeError, IndexError, ValueError):
                sizes = ", ".join(str(list(part.shape)) for part in parts[0][:4])
                raise PunaError(
                    f"{self.where(name)}: {len(self._shards)} shard(s) of shape {sizes} do not fit params.json "
                    f"or each other. Check that params.json belongs to these weights and no shard is missing."
                ) from None
        return shapes

    def where(self, name: str) -> str:
        """See `Source.where`."""
        file = self._shards[0].path if len(self._shards) == 1 else self.path / "consolidated.*.pth"
        return f"{file}, tensor {self._recipes[name].stored[0]}"

    def read(self, name: str) -> Tensor:
        """See `Source.read`."""
        recipe = self._recipes[name]
        parts = [[rank.tensor(stored) for rank in self._ranks] for stored in recipe.stored]
        whole = recipe.join(*parts)
        mapped = {part.untyped_storage().data_ptr() for shards in parts for part in shards}
        if whole.untyped_storage().data_ptr() in mapped:  # a view would keep the file mapped
            return whole.clone(memory_format=torch.contiguous_format)
        return whole

    def read_packed(self, name: str) -> Weight | list[Weight]:
        """See `Source.read_packed`."""
        recipe = self._recipes[name]
        if not all(rank.quantised(stored) for rank in self._ranks for stored in recipe.stored):
            return self.read(name)
        if recipe.stored[0] in self._ranks[0].expert_names:
            return self._few_bits(name)
        (stored,) = recipe.stored
        rank_weights = [rank.weight(stored) for rank in self._ranks]
        columns = recipe.join is COLUMNS and len(self._ranks) > 1
        if self._ranks[0].adapted(stored) or columns or any(isinstance(weight, Tensor) for weight in rank_weights):
            return fallback(self.read(name))
        return by_rows(stacked(rank_weights), lambda part: recipe.join([part]))

    def read_expert(self, name: str, expert: int, packed: bool) -> Weight:
        """See `Source.read_expert`."""
        recipe = self._recipes[name]
        if packed and all(rank.quantised(stored) for rank in self._ranks for stored in recipe.stored):
            return self._few_bits(name, expert)[0]
        parts = [[rank.expert(stored, expert) for rank in self._ranks] for stored in recipe.stored]
        return recipe.join(*parts, experts=1)[0].T.clone()  # a view would keep the file mapped

    def _few_bits(self, name: str, only: int | None = None) -> list[Weight]:
        """Routed experts in few bits, all or one."""
        join = beside if name.endswith("down_proj") else stacked
        stored = self._recipes[name].stored
        parts = [rank.expert_weights(each, only) for each in stored for rank in self._ranks]
        return [_kept(join(of_one)) for of_one in zip(*parts, strict=True)]

    @property
    def packed_notes(self) -> tuple[str, ...]:
        """See `Source.packed_notes`."""
        adapted = sum(self._ranks[0].adapted(stored) for recipe in self._recipes.values() for stored in recipe.stored)
        as_int8 = f"packed as int8 with a scale for {FALLBACK_GROUP} inputs"
        notes = [f"{adapted} weights with QLoRA adaptors merged, {as_int8}."] if adapted else []
        if len(self._ranks) > 1 and any(rank.side_files for rank in self._ranks):
            notes.append(f"FP8 matrices that ranks split by columns have a scale a row and rank: {as_int8}.")
        return tuple(notes)


def _kept(weight: Weight) -> Weight:
    return fallback(weight) if isinstance(weight, Tensor) else weight


def _shard_paths(folder: Path) -> list[Path]:
    found = {int(match[1] or 0): entry for entry in folder.iterdir() if (match := _SHARD.fullmatch(entry.name))}
    if not found:
        raise PunaError(f"{folder} holds no consolidated.NN.pth beside its params.json. Download the weights too.")
    for rank in range(max(found) + 1):
        if rank not in found:
            raise PunaError(f"{folder / f'consolidated.{rank:02}.pth'} is missing: shards must count up from 00.")
    return [weights_file(folder, found[rank].name, folder) for rank in sorted(found)]
