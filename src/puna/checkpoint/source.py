"""What every checkpoint format offers (`Source`), and the two doors of this room: `load` and `save`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from puna.errors import PunaError
from puna.family.config import ModelConfig
from puna.model import Decoder
from puna.model.quantized import Weight
from puna.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class GenerationDefaults:
    """How a checkpoint asks to be sampled; None or () where it does not say."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    eos_token_ids: tuple[int, ...] = ()


class Source(Protocol):
    """An opened checkpoint: its header is read and checked, its weights are still on disk.

    Names are the decoder's own (`Decoder.state_dict`), layouts too: rows of q and k in the order of
    `ModelConfig.rope_pairs`, experts fused. Whatever a format stores otherwise, its source turns round in `read`.
    """

    @property
    def path(self) -> Path:
        """The file or folder."""
        ...

    @property
    def format(self) -> str:
        """ "safetensors", "meta", "gguf" or "llama2.c"."""
        ...

    @property
    def config(self) -> ModelConfig:
        """The decoder's shape."""
        ...

    @property
    def generation(self) -> GenerationDefaults:
        """Sampling defaults that come with the weights."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out knowingly, one sentence each: vision weights of a text-only load, for example."""
        ...

    @property
    def packed_notes(self) -> tuple[str, ...]:
        """Where `read_packed` gives other bits than the file's, one sentence each."""
        ...

    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's tokenizer, or None where it has none."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor that `read` can give. A stored tensor without a place in a decoder appears under its
        stored name, so that it is reported as extra."""
        ...

    def where(self, name: str) -> str:
        """File and stored name of a tensor, for error messages."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU in memory of its own, in its stored dtype (quantised: exactly, in float32)."""
        ...

    def read_packed(self, name: str) -> Weight | list[Weight]:
        """As `read`, but a weight stored in few bits stays so: the file's own integers and scales where `Quantized` or
        `Float8` can say them, else int8 with a scale for 32 inputs (`packed_notes` says which). Rows are outputs; of
        routed experts stored in few bits there is one matrix an expert, gate above up."""
        ...

    def read_expert(self, name: str, expert: int, packed: bool) -> Weight:
        """One expert of a tensor of routed experts, as a matrix whose rows are outputs; the other experts' bytes are
        not read where the format allows. packed: as `read_packed` gives it, else as `read` does."""
        ...


@dataclass
class Loaded:
    """A checkpoint in memory: the model in eval mode and everything that came with it."""

    model: Decoder
    config: ModelConfig
    tokenizer: Tokenizer | None
    generation: GenerationDefaults
    source_format: str
    path: Path
    notes: tuple[str, ...] = ()


def open_source(path: str | Path, text_only: bool = False) -> Source:
    """Open a checkpoint on disk, recognising its format by what lies there.

    text_only: leave out a model's tower and whatever else it needs for pictures, as a note says then.
    Raises PunaError where nothing is recognised or the header is wrong.
    """
    path = Path(path)
    if not path.exists():
        raise PunaError(f"{path} does not exist. Give a checkpoint's file or folder.")
    return _open_folder(path, text_only) if path.is_dir() else _open_file(path, text_only)


def _open_file(path: Path, text_only: bool) -> Source:
    if path.suffix == ".gguf" or _starts_with(path, b"GGUF"):
        from puna.checkpoint.beside import BesideSource, tower_file
        from puna.checkpoint.gguf_read import GGUFSource

        text, tower = GGUFSource(path), tower_file(path)
        return BesideSource(text, tower) if tower.is_file() and not text_only else text
    if path.name.endswith((".safetensors", ".safetensors.index.json")):
        from puna.checkpoint.huggingface import HuggingFaceSource

        return HuggingFaceSource(path.parent, path, text_only)
    if path.suffix == ".pth":
        from puna.checkpoint.meta import MetaSource

        return MetaSource(path.parent, text_only)
    if path.suffix == ".bin" and not _starts_with(path, b"PK"):
        from puna.checkpoint.llama2c import Llama2cSource

        return Llama2cSource(path)
    hint = (
        "Pickled Hugging Face weights are not read: save them as safetensors (`save_pretrained`)."
        if path.suffix == ".bin"
        else "Known are .safetensors, .gguf, Meta's consolidated.*.pth and llama2.c's .bin."
    )
    raise PunaError(f"{path} is in no known checkpoint format. {hint}")


def _open_folder(folder: Path, text_only: bool) -> Source:
    names = sorted(entry.name for entry in folder.iterdir())
    if any(name.endswith((".safetensors", ".safetensors.index.json")) and not name.endswith(".vision.safetensors")
           for name in names):  # fmt: skip
        if "adapter_config.json" in names and "config.json" not in names:
            raise PunaError(f"{folder} holds an adapter, not a whole model. Load the base model that it names.")
        from puna.checkpoint.huggingface import HuggingFaceSource

        return HuggingFaceSource(folder, text_only=text_only)
    if any(name.startswith("consolidated.") and name.endswith(".pth") for name in names) or "params.json" in names:
        from puna.checkpoint.meta import MetaSource

        return MetaSource(folder, text_only)
    files = [folder / name for name in names if name.endswith((".gguf", ".bin"))]
    if len(files) == 1:
        return _open_file(files[0], text_only)
    if files:
        raise PunaError(f"{folder} holds {len(files)} checkpoints ({files[0].name}, {files[1].name}, ...). Name one.")
    raise PunaError(
        f"{folder} holds no checkpoint: no .safetensors, no consolidated.*.pth with params.json, no .gguf, no .bin. "
        "Name another folder, or fetch a checkpoint with `puna pull`."
    )


def _starts_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def load(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, revision: str | None = None
) -> Loaded:
    """Load a checkpoint by bundled name, hub id, folder or file.

    Weights stream from disk one tensor at a time, each cast and moved on its own, so memory peaks one tensor above the
    loaded model. `dtype` None keeps the stored one; where a file mixes several, the embedding's.
    Raises PunaError naming file and tensor for anything that is missing, superfluous, misshapen or not finite; a model
    is returned whole or not at all.
    """
    from puna.checkpoint.hub import resolve

    return load_source(open_source(resolve(path, revision=revision)), device, dtype)


def load_source(
    source: Source,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    model: Decoder | None = None,
) -> Loaded:
    """As `load`, from an opened checkpoint. model: what to fill, made on the meta device (default: by the source's
    configuration)."""
    from puna.checkpoint.validate import check_finite, check_shapes

    model = model or _empty_decoder(source)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_shapes(source, expected)
    weights: dict[str, Tensor] = {}
    for name in expected:
        tensor = source.read(name)
        check_finite(tensor, source.where(name))
        dtype = dtype or tensor.dtype
        weights[name] = tensor.to(device=device, dtype=dtype)
    model.load_state_dict(weights, assign=True)
    return Loaded(
        model=model.eval(),
        config=source.config,
        tokenizer=source.tokenizer(),
        generation=source.generation,
        source_format=source.format,
        path=source.path,
        notes=source.notes,
    )


def _empty_decoder(source: Source) -> Decoder:
    """The decoder on the meta device, unless the configuration asks for one that these weights can't fill."""
    tensors = len(source.shapes())
    if source.config.num_layers > tensors:
        raise PunaError(
            f"{source.path}: the configuration has {source.config.num_layers} layers, the weights only {tensors} "
            "tensors. Check that the configuration belongs to these weights."
        )
    try:
        with torch.device("meta"):
            return Decoder(source.config)
    except (RuntimeError, OverflowError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise PunaError(f"{source.path}: the configuration describes an impossible model: {reason}.") from None


def save(
    model: Decoder,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    path: str | Path,
    format: str = "safetensors",
    **options: Any,
) -> Path:
    """Write a model: "safetensors" is a folder that transformers loads, "gguf" one file that llama.cpp loads.

    `options` go to `write_safetensors` or `write_gguf`. Written beside the target and renamed at the end, so a target
    is complete or absent. Raises PunaError for an unknown format and for a target that exists.
    """
    if format == "safetensors":
        from puna.checkpoint.safetensors_write import write_safetensors

        return write_safetensors(model, config, tokenizer, Path(path), **options)
    if format == "gguf":
        from puna.checkpoint.gguf_write import write_gguf

        return write_gguf(model, config, tokenizer, Path(path), **options)
    raise PunaError(f"Format {format!r} is not one that can be written. Choose safetensors or gguf.")
