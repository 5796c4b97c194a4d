"""Meta's own files: `consolidated.NN.pth` (one a tensor-parallel rank) and `params.json`, Llama 2 to Llama 4.

Pickle is read weights-only and mapped; a tensor's shards are joined when it is asked for.
"""

import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from puna.checkpoint.meta_names import Recipe, recipes, same
from puna.checkpoint.meta_params import read_params
from puna.checkpoint.source import GenerationDefaults
from puna.checkpoint.validate import weights_file
from puna.errors import PunaError
from puna.text.tokenizer import Tokenizer

_SHARD = re.compile(r"consolidated\.(\d+)\.pth")
# What Meta's own loaders drop: buffers and training statistics.
_DROPPED = re.compile(r"(rope\.freqs|_extra_state|global_gate_stats_3E|running_gate_stats_3E|expert_activation_DE)$")
_VISION = re.compile(r"(vision_embeddings|vision_projection)\.")
_RESIDENT = 32  # a shard is mapped anew after each 1/32 of it was read: pages of a mapping stay resident until it goes


class _Shard:
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
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def tensor(self, name: str) -> Tensor:
        """A mapped tensor, to be copied at once."""
        if self._touched > self._limit:
            self._tensors, self._touched = self._map(), 0
        tensor = self._tensors[name]
        self._touched += tensor.numel() * tensor.element_size()
        return tensor


class MetaSource:
    """A folder with `consolidated.*.pth` and `params.json` (see `Source`)."""

    format = "meta"

    def __init__(self, folder: Path) -> None:
        self.path = folder
        params = folder / "params.json"
        if not params.is_file():
            raise PunaError(f"{params} is missing. Meta's weights need it: download it into the same folder.")
        self._shards = [_Shard(path) for path in _shard_paths(folder)]
        first = self._shards[0]
        for shard in self._shards[1:]:
            if odd := shard.names ^ first.names:
                raise PunaError(f"{shard.path} and {first.path} disagree on tensor {min(odd)}: shards of two models?")
        stored = {name: first.shape(name) for name in sorted(first.names) if not _VISION.match(name)}
        self.config = read_params(params, stored, len(self._shards))
        self.generation = GenerationDefaults()
        self._notes: list[str] = []
        if left_out := len(first.names) - len(stored):
            self._notes.append(f"Left out {left_out} vision tensors: this load is text only.")
        known = recipes(self.config)
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
        embedding, head = (self._shards[0].tensor(name) for name in ("tok_embeddings.weight", "output.weight"))
        if embedding.shape == head.shape and not torch.equal(embedding[:1], head[:1]):
            return  # one row tells nearly every untied model without reading either matrix
        if torch.equal(self.read("embed_tokens.weight"), self.read("lm_head.weight")):
            self._notes.append("Left out output.weight: it equals the embedding, so the two are tied.")
            del self._recipes["lm_head.weight"]
            self.config = self.config.with_(tie_word_embeddings=True)

    def tokenizer(self) -> Tokenizer | None:
        """See `Source.tokenizer`."""
        from puna.text import load_tokenizer

        return load_tokenizer(self.path)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Source.shapes`. Joined on the meta device, so nothing is read."""
        shapes = {}
        for name, recipe in self._recipes.items():
            parts = [
                [torch.empty(shard.shape(stored), device="meta") for shard in self._shards] for stored in recipe.stored
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
        parts = [[shard.tensor(stored) for shard in self._shards] for stored in recipe.stored]
        whole = recipe.join(*parts)
        mapped = {part.untyped_storage().data_ptr() for shards in parts for part in shards}
        if whole.untyped_storage().data_ptr() in mapped:  # a view would keep the file mapped
            return whole.clone(memory_format=torch.contiguous_format)
        return whole


def _shard_paths(folder: Path) -> list[Path]:
    found = {int(match[1]): entry for entry in folder.iterdir() if (match := _SHARD.fullmatch(entry.name))}
    if not found:
        raise PunaError(f"{folder} holds no consolidated.NN.pth beside its params.json. Download the weights too.")
    for rank in range(max(found) + 1):
        if rank not in found:
            raise PunaError(f"{folder / f'consolidated.{rank:02}.pth'} is missing: shards must count up from 00.")
    return [weights_file(folder, found[rank].name, folder) for rank in sorted(found)]
