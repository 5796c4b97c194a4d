"""Writing a folder that transformers loads: config, sharded safetensors, generation defaults, tokenizer."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.checkpoint.compressed_write import CompressedWriter
from puna.checkpoint.hf_config import write_config
from puna.checkpoint.hf_vision import stored_name
from puna.checkpoint.huggingface import EMBEDDING_IS_HEAD, INDEX
from puna.checkpoint.named import named_weights
from puna.checkpoint.safetensors_read import BITS, DTYPES
from puna.checkpoint.source import GenerationDefaults
from puna.checkpoint.stored import HEAD_IN_SIX
from puna.errors import PunaError
from puna.family.config import ModelConfig
from puna.model import Decoder
from puna.model.quantized import Float8, Quantized, Weight
from puna.text.tokenizer import Tokenizer

MAX_SHARD_BYTES = 5_000_000_000  # as transformers' `save_pretrained` splits
_NAMES = {dtype: name for name, dtype in (DTYPES | BITS).items()}


def write_safetensors(
    model: Decoder,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    path: Path,
    dtype: torch.dtype | None = None,
    generation: GenerationDefaults | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write the folder `path`; it appears complete or not at all.

    `dtype` None keeps each weight's own; weights in few bits stay so, as `pack-quantized` of compressed-tensors.
    Raises PunaError if `path` is a file or a folder with anything in it.
    """
    weights = named_weights(model)
    return write_weights(weights, config, tokenizer, path, dtype or model.dtype, dtype, generation, max_shard_bytes)


def write_weights(
    weights: Iterable[tuple[str, Weight | list[Weight]]],
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    path: Path,
    stated: torch.dtype,
    dtype: torch.dtype | None = None,
    generation: GenerationDefaults | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """As `write_safetensors`, of weights that come one by one under the decoder's names.

    Of these never more than one shard is held. `stated` is the dtype that config.json names. Other readers know no
    embedding in few bits, so that is written in `stated`; where it is the output matrix too, its bits are written as
    `lm_head`, and each file's metadata say that the two are one (whoever writes other weights writes other metadata).
    A head of 6 bits is written in 8, which the metadata say, too.
    """
    fields = write_config(config, stated)
    compressed = CompressedWriter()
    metadata = {"format": "pt"}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, weight in weights:
            if name == "embed_tokens.weight" and isinstance(weight, Quantized | Float8):
                yield from compressed.tensors(hf_name(name, config), weight.dequantize(stated))
                if not config.tie_word_embeddings:
                    continue
                name, fields["tie_word_embeddings"] = "lm_head.weight", False
                metadata.update(EMBEDDING_IS_HEAD)
            if name == "lm_head.weight" and isinstance(weight, Quantized) and weight.bits == 6:
                metadata.update(HEAD_IN_SIX)
            yield from compressed.tensors(hf_name(name, config), weight)

    with _new_folder(path) as folder:
        _write_shards(folder, tensors(), dtype, max_shard_bytes, metadata)
        if quantisation := compressed.config():
            fields["quantization_config"] = quantisation
        _write_json(folder / "config.json", fields)
        _write_json(folder / "generation_config.json", _generation(config, tokenizer, generation))
        if tokenizer is not None:
            tokenizer.save(folder)
    return path


def hf_name(name: str, config: ModelConfig) -> str:
    """The decoder's tensor name as Hugging Face stores it."""
    if config.architecture == "llama":
        name = name.replace(".feed_forward.", ".mlp.")
    if config.vision is not None:
        return stored_name(name, config)
    return name if name.startswith("lm_head.") else f"model.{name}"


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise PunaError(f"{path} exists already. Choose another place, or delete it first.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise PunaError(f"{path} cannot be written: {error.strerror}.") from None
    try:
        yield folder
        os.chmod(folder, 0o777 & ~_umask())
        os.replace(folder, path)
    except OSError as error:
        raise PunaError(f"{path} cannot be written: {error.strerror}.") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _generation(
    config: ModelConfig, tokenizer: Tokenizer | None, generation: GenerationDefaults | None
) -> dict[str, Any]:
    chosen = generation or GenerationDefaults()
    # readers take this list for the whole stop set, so what only the tokenizer knows must stand in it too
    of_tokenizer = tokenizer.eos_ids if tokenizer else ()
    eos = tuple(dict.fromkeys((*(chosen.eos_token_ids or config.eos_token_ids), *of_tokenizer)))
    fields = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": config.pad_token_id,
        "temperature": chosen.temperature,
        "top_p": chosen.top_p,
        "top_k": chosen.top_k,
    }
    sampled = {"do_sample": True} if chosen.temperature or chosen.top_p else {}
    return {**{key: value for key, value in fields.items() if value is not None}, **sampled}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_shards(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype | None,
    limit: int,
    metadata: Mapping[str, str],
) -> None:
    """Each shard is written when it is full; how many there are is known, and put into their names, at the end."""
    shard: dict[str, Tensor] = {}
    room, total = limit, 0
    written: list[list[str]] = []
    for name, tensor in tensors:
        size = tensor.numel() * _kind(name, tensor, dtype).itemsize
        if size > room and shard:
            total += write_file(folder / str(len(written)), shard, dtype, metadata)
            written.append(list(shard))
            shard, room = {}, limit
        shard[name] = tensor
        room -= size
    total += write_file(folder / str(len(written)), shard, dtype, metadata)
    written.append(list(shard))
    if len(written) == 1:
        os.replace(folder / "0", folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(written):
        file = f"model-{number + 1:05}-of-{len(written):05}.safetensors"
        os.replace(folder / str(number), folder / file)
        weight_map.update(dict.fromkeys(names, file))
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _kind(name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype to store a tensor in: `dtype` is for plain weights, not for the parts of those in few bits."""
    few = tensor.dtype not in DTYPES.values() or name.endswith(".weight_scale")
    return tensor.dtype if few or dtype is None else dtype


def write_file(
    path: Path,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write one .safetensors file, tensor by tensor, and return the bytes of its data.

    The safetensors library's writer wants all tensors of a file in memory in their final dtype; this one casts and
    copies one at a time.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    at = 0
    for name, tensor in weights.items():
        kind = _kind(name, tensor, dtype)
        if kind not in _NAMES:
            raise PunaError(f"{name} has dtype {kind}, which is not written as safetensors. Give dtype=torch.bfloat16.")
        size = tensor.numel() * kind.itemsize
        header[name] = {"dtype": _NAMES[kind], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # the data start is aligned to 8 bytes
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, tensor in weights.items():
            flat = tensor.detach().to("cpu", _kind(name, tensor, dtype)).contiguous().view(-1)
            if flat.numel():
                file.write(flat.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return at
