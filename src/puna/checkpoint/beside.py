"""A text model in GGUF with a Llama 4 tower in a file beside it: NAME.gguf and NAME.vision.safetensors.

GGUF keeps towers apart from texts, too (llama.cpp's mmproj files). The tensors have Hugging Face's names; the header's
metadata `vision` holds the tower's shape as JSON, field by field that of `puna.family.vision.Llama4Vision`.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from puna.checkpoint.gguf_read import GGUFSource
from puna.checkpoint.hf_vision import is_tower, stored_name, tower_name
from puna.checkpoint.safetensors_read import SafetensorsFile
from puna.checkpoint.source import GenerationDefaults
from puna.errors import PunaError
from puna.family.vision import Llama4Vision
from puna.model import Decoder
from puna.model.quantized import Weight
from puna.text.tokenizer import Tokenizer

SUFFIX = ".vision.safetensors"


def tower_file(gguf: Path) -> Path:
    """Where the tower of a GGUF file lies, if it has one."""
    return gguf.with_name(gguf.stem + SUFFIX)


class BesideSource:
    """An opened text model with its tower; see `puna.checkpoint.source.Source`.

    Raises PunaError where either file is damaged, or where the tower is not one for this text model.
    """

    def __init__(self, text: GGUFSource, file: Path) -> None:
        self._text, self._file = text, SafetensorsFile(file)
        self.path, self.format = text.path, text.format
        try:
            vision = Llama4Vision(**json.loads(self._file.metadata["vision"]))
        except (KeyError, TypeError, ValueError) as error:
            raise PunaError(f"{file}: the metadata 'vision' describes no tower ({error!r}); take the file away to load "
                            "the text model alone") from None
        if vision.image_token_id >= text.config.vocab_size:
            raise PunaError(f"{file}: image_token_id {vision.image_token_id} is not in the vocabulary of {text.path}; "
                            "take the file away, or put the right one there")
        self.config = text.config.with_(vision=vision)
        self._names = {tower_name(name) if is_tower(name) else name: name for name in self._file.entries}

    @property
    def generation(self) -> GenerationDefaults:
        """See `Source.generation`."""
        return self._text.generation

    @property
    def notes(self) -> tuple[str, ...]:
        """See `Source.notes`."""
        return self._text.notes

    @property
    def packed_notes(self) -> tuple[str, ...]:
        """See `Source.packed_notes`."""
        return self._text.packed_notes

    def tokenizer(self) -> Tokenizer | None:
        """See `Source.tokenizer`."""
        return self._text.tokenizer()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Source.shapes`."""
        return self._text.shapes() | {name: self._file.entries[stored].shape for name, stored in self._names.items()}

    def where(self, name: str) -> str:
        """See `Source.where`."""
        if name in self._names:
            return f"{self._file.path}: tensor {self._names[name]!r}"
        return self._text.where(name)

    def read(self, name: str) -> Tensor:
        """See `Source.read`."""
        return self._file.read(self._names[name]) if name in self._names else self._text.read(name)

    def read_packed(self, name: str) -> Weight | list[Weight]:
        """See `Source.read_packed`."""
        return self._file.read(self._names[name]) if name in self._names else self._text.read_packed(name)

    def read_expert(self, name: str, expert: int, packed: bool) -> Weight:
        """See `Source.read_expert`."""
        return self._text.read_expert(name, expert, packed)


def write_tower(model: Decoder, gguf: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the tower of a Llama 4 model with plain weights beside its text model's file."""
    vision = model.config.vision
    if not isinstance(vision, Llama4Vision):
        raise PunaError("only Llama 4's towers are kept beside a GGUF file; write the model as safetensors")
    tensors = {stored_name(name, model.config): tensor.to(dtype).contiguous()
               for name, tensor in model.state_dict().items() if name.startswith("vision.")}
    file = tower_file(gguf)
    save_file(tensors, file, {"format": "pt", "vision": json.dumps(asdict(vision))})
    return file
