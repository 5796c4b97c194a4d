"""Hugging Face folders: config.json and safetensors, one file or many with an index, experts fused or split.

Weights may be floats, or compressed as `puna.checkpoint.compressed_config` knows.
"""

import math
import re
from pathlib import Path

import torch
from torch import Tensor

from puna.checkpoint.compressed_config import read_quantisation
from puna.checkpoint.fused_fp8 import FusedFloat8
from puna.checkpoint.hf_config import read_config, read_generation
from puna.checkpoint.hf_vision import is_tower, layer_name, tower_name
from puna.checkpoint.safetensors_read import SafetensorsFile
from puna.checkpoint.source import GenerationDefaults
from puna.checkpoint.stored import FirstRows, Plain, Stored, collect
from puna.checkpoint.validate import read_json, weights_file
from puna.errors import PunaError
from puna.family.config import ModelConfig
from puna.family.vision import Llama32Vision
from puna.model.quantized import Weight, stacked
from puna.text.tokenizer import Tokenizer

# in a file's metadata: the embedding is the head's few bits once more, in floats
EMBEDDING_IS_HEAD = {"puna.embedding": "lm_head.weight"}
INDEX = "model.safetensors.index.json"
_TEXT = re.compile(r"(?:language_model\.model\.|model\.language_model\.|model\.)(.*)")
_HEAD = {"lm_head.weight", "language_model.lm_head.weight"}
_SPLIT = re.compile(r"(layers\.\d+\.feed_forward\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


class HuggingFaceSource:
    """A folder written by transformers' `save_pretrained`, or one with the same contents (see `Source`).

    text_only: leave out what a model needs for pictures.
    """

    format = "safetensors"

    def __init__(self, folder: Path, file: Path | None = None, text_only: bool = False) -> None:
        self.path = folder
        self.config: ModelConfig = read_config(folder / "config.json")
        self.generation: GenerationDefaults = read_generation(folder / "generation_config.json", self.config)
        self._stored: dict[str, str] = {}  # decoder's name -> stored name
        self._split: dict[str, dict[tuple[int, str], str]] = {}  # "layers.N....experts" -> (expert, kind) -> stored
        self._files: dict[str, SafetensorsFile] = {}  # stored tensor -> file
        self._open(file)
        contents = collect(self._files, read_quantisation(folder / "config.json"))
        self._weights, self._notes = contents.weights, list(contents.notes)
        self.packed_notes = contents.packed_notes
        self._vision = self.config.vision  # whether it is loaded or not
        if self._vision is not None and not any(map(is_tower, self._weights)):
            self._notes.append("The weights hold no vision tower, though the configuration has one: text only.")
            text_only = True
        if text_only:
            self.config = self.config.with_(vision=None)
        self._name_tensors()
        self._settle_head()

    @property
    def notes(self) -> tuple[str, ...]:
        """See `Source.notes`."""
        return tuple(self._notes)

    def map(self) -> None:
        """From now on give plain tensors as the files' own pages: for processes that keep only a part of each."""
        for file in self._files.values():
            file.mapped = True

    def _open(self, file: Path | None) -> None:
        index = self.path / INDEX
        if file is None and index.is_file():
            file = index
        if file is None:
            names = sorted(entry.name for entry in self.path.glob("*.safetensors"))
            if "model.safetensors" in names:
                names = ["model.safetensors"]
            if len(names) != 1:
                raise PunaError(
                    f"{self.path} holds {len(names)} safetensors files but no {INDEX}, so nothing says which belong "
                    "together. Download the index too."
                )
            file = self.path / names[0]
        if file.name.endswith(".index.json"):
            self._open_index(file)
            return
        opened = SafetensorsFile(weights_file(self.path, file.name, self.path))
        self._files = dict.fromkeys(opened.entries, opened)

    def _open_index(self, index: Path) -> None:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise PunaError(f"{index} has no weight_map. Download the index again.")
        files: dict[str, SafetensorsFile] = {}
        for stored, name in weight_map.items():
            if not isinstance(name, str) or name not in files:
                files[name] = SafetensorsFile(weights_file(self.path, name, index))
            if stored not in files[name].entries:
                raise PunaError(
                    f"{index} places tensor {stored} in {name}, which does not hold it. Download both again."
                )
            self._files[stored] = files[name]
        for name, file in files.items():
            unlisted = next((stored for stored in file.entries if self._files.get(stored) is not file), None)
            if unlisted is not None:
                raise PunaError(f"{self.path / name} holds tensor {unlisted}, which {index} does not place there.")

    def _name_tensors(self) -> None:
        vision = []
        for stored in self._weights:
            if stored.endswith("rotary_emb.inv_freq"):
                continue  # a buffer of old transformers versions, computed from the config
            name = self._name(stored)
            if name.startswith(("vision.", "cross_layers.")) and self.config.vision is None:
                vision.append(stored)
                continue
            if split := _SPLIT.fullmatch(name):
                self._split.setdefault(split[1], {})[int(split[2]), split[3]] = stored
                continue
            if name in self._stored:
                raise PunaError(f"{self.path} holds {name} twice, as {self._stored[name]} and as {stored}.")
            self._stored[name] = stored
        if vision:
            count = sum(math.prod(self._weights[stored].shape) for stored in vision)
            self._notes.append(f"Left out {len(vision)} vision tensors ({count:,} parameters): this load is text only.")
        embedding = self._stored.get("embed_tokens.weight")
        if embedding and isinstance(self._vision, Llama32Vision) and self.config.vision is None:
            self._weights[embedding] = FirstRows(self._weights[embedding], self.config.vocab_size)
        self._check_split()

    def _name(self, stored: str) -> str:
        """The decoder's name of a stored tensor; its own where the decoder has no such tensor."""
        if is_tower(stored):
            return tower_name(stored)
        match = _TEXT.fullmatch(stored)
        if stored in _HEAD:
            return "lm_head.weight"
        if match is None:
            return stored
        name = match[1]
        if isinstance(self._vision, Llama32Vision):
            name = layer_name(name, self._vision)
        if self.config.architecture == "llama":
            name = re.sub(r"^((?:cross_)?layers\.\d+)\.mlp\.", r"\1.feed_forward.", name)
        return name

    def _check_split(self) -> None:
        for prefix, parts in self._split.items():
            wanted = {(e, kind) for e in range(self.config.num_experts) for kind in ("gate", "up", "down")}
            for problem, names in (("is missing", wanted - set(parts)), ("is one too many", set(parts) - wanted)):
                if names:
                    expert, kind = min(names)
                    raise PunaError(
                        f"{self.path}: tensor {prefix}.{expert}.{kind}_proj.weight {problem} "
                        f"(the configuration has {self.config.num_experts} experts)."
                    )
            for kind in ("gate", "up", "down"):
                shapes = {e: self._weights[parts[e, kind]].shape for e in range(self.config.num_experts)}
                odd = next((e for e, shape in shapes.items() if shape != shapes[0] or len(shape) != 2), None)
                if odd is not None:
                    stored = parts[odd, kind]
                    raise PunaError(
                        f"{self._weights[stored].where} has shape {list(shapes[odd])}, unlike its fellow experts."
                    )

    def _settle_head(self) -> None:
        """A head stored beside a tied embedding is dropped if equal and used if not, as transformers 5 does."""
        if not self.config.tie_word_embeddings:
            self._tie_packed_head()
            return
        if "lm_head.weight" not in self._stored:
            return
        if "embed_tokens.weight" not in self._stored or torch.equal(
            self.read("lm_head.weight"), self.read("embed_tokens.weight")
        ):
            self._notes.append("Left out lm_head.weight: the configuration ties it to the embedding.")
            del self._stored["lm_head.weight"]
        else:
            self._notes.append("The configuration ties lm_head.weight to the embedding, but they differ: not tied.")
            self.config = self.config.with_(tie_word_embeddings=False)

    def _tie_packed_head(self) -> None:
        """`write_weights` makes two of one matrix in few bits, for readers who know no such embedding, and says so in
        every file; whoever changed the embedding since has written a file that doesn't."""
        if not all(EMBEDDING_IS_HEAD.items() <= file.metadata.items() for file in self._files.values()):
            return
        if "lm_head.weight" not in self._stored or "embed_tokens.weight" not in self._stored:
            return
        self._notes.append("Left out embed_tokens.weight: it is lm_head.weight, which is in fewer bits.")
        self._stored["embed_tokens.weight"] = self._stored.pop("lm_head.weight")
        self.config = self.config.with_(tie_word_embeddings=True)

    def tokenizer(self) -> Tokenizer | None:
        """See `Source.tokenizer`."""
        from puna.text import load_tokenizer

        return load_tokenizer(self.path)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Source.shapes`."""
        shapes = {name: self._weights[stored].shape for name, stored in self._stored.items()}
        for prefix, parts in self._split.items():
            out, width = self._weights[parts[0, "gate"]].shape
            down_out, down_in = self._weights[parts[0, "down"]].shape
            shapes[f"{prefix}.gate_up_proj"] = (self.config.num_experts, width, 2 * out)
            shapes[f"{prefix}.down_proj"] = (self.config.num_experts, down_in, down_out)
        return shapes

    def where(self, name: str) -> str:
        """See `Source.where`."""
        if name in self._stored:
            return self._weights[self._stored[name]].where
        prefix, kinds = self._experts(name)
        stored = self._split[prefix][0, kinds[0]]
        return f"{self._weights[stored].where} and its fellow experts"

    def read(self, name: str) -> Tensor:
        """See `Source.read`."""
        if name in self._stored:
            return self._weights[self._stored[name]].read()
        return self.read_rows(name, 0, self.config.num_experts)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows (of experts: whole experts) start..stop-1 along the first axis, without reading the others."""
        if name in self._stored:
            return self._weights[self._stored[name]].read_rows(start, stop)
        prefix, kinds = self._experts(name)
        first = self._weights[self._split[prefix][start, kinds[0]]].read()
        fused = first.new_empty(stop - start, *self.shapes()[name][1:])
        for (expert, part), stored in self._split[prefix].items():
            if part in kinds and start <= expert < stop:
                columns = fused[expert - start].chunk(len(kinds), -1)[kinds.index(part)]
                columns.copy_(self._weights[stored].read().T)
        return fused

    def is_plain(self, name: str) -> bool:
        """Whether a tensor is stored in floats, so that `read_rows` gives them as they are."""
        if name in self._stored:
            return isinstance(self._weights[self._stored[name]], Plain | FirstRows)
        prefix, kinds = self._experts(name)
        stored = (stored for (_, kind), stored in self._split[prefix].items() if kind in kinds)
        return all(isinstance(self._weights[each], Plain) for each in stored)

    def read_packed(self, name: str) -> Weight | list[Weight]:
        """See `Source.read_packed`."""
        if name in self._stored:
            return self._weights[self._stored[name]].read_packed()
        prefix, kinds = self._experts(name)
        parts = self._split[prefix]
        return [
            stacked([_matrix(self._weights[parts[expert, kind]]) for kind in kinds])
            for expert in range(self.config.num_experts)
        ]

    def read_expert(self, name: str, expert: int, packed: bool) -> Weight:
        """See `Source.read_expert`."""
        if name in self._stored:
            stored_as = self._weights[self._stored[name]]
            if packed and isinstance(stored_as, FusedFloat8):
                return stored_as.experts(expert, expert + 1)[0]
            return stored_as.read_rows(expert, expert + 1)[0].T
        prefix, kinds = self._experts(name)
        stored = [self._weights[self._split[prefix][expert, kind]] for kind in kinds]
        return stacked([_matrix(one) if packed else one.read() for one in stored])

    def _experts(self, name: str) -> tuple[str, tuple[str, ...]]:
        """The prefix of a layer's split experts, and which of their projections make up `name`."""
        prefix, _, kind = name.rpartition(".")
        return prefix, ("down",) if kind == "down_proj" else ("gate", "up")


def _matrix(stored: Stored) -> Weight:
    """A single weight in its stored bits."""
    weight = stored.read_packed()
    assert not isinstance(weight, list), "experts that are stored apart are matrices"
    return weight
