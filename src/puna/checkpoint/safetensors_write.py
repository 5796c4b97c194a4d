"""Writing a folder that transformers loads: config, sharded safetensors, generation defaults, tokenizer."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.checkpoint.hf_config import write_config
from puna.checkpoint.huggingface import INDEX
from puna.checkpoint.safetensors_read import DTYPES
from puna.checkpoint.source import GenerationDefaults
from puna.errors import PunaError
from puna.family.config import ModelConfig
from puna.model import Decoder
from puna.text.tokenizer import Tokenizer

MAX_SHARD_BYTES = 5_000_000_000  # as transformers' `save_pretrained` splits
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


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

    `dtype` None keeps each weight's own. Raises PunaError if `path` is a file or a folder with anything in it.
    """
    weights = {hf_name(name, config): tensor.detach() for name, tensor in model.state_dict().items()}
    stored = dtype or model.dtype
    fields = write_config(config, stored)
    with _new_folder(path) as folder:
        _write_json(folder / "config.json", fields)
        _write_json(folder / "generation_config.json", _generation(config, tokenizer, generation))
        _write_shards(folder, weights, dtype, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save(folder)
    return path


def hf_name(name: str, config: ModelConfig) -> str:
    """The decoder's tensor name as Hugging Face stores it."""
    if name.startswith("lm_head."):
        return name
    if config.architecture == "llama":
        name = name.replace(".feed_forward.", ".mlp.")
    return f"model.{name}"


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


def _write_shards(folder: Path, weights: Mapping[str, Tensor], dtype: torch.dtype | None, limit: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    room = limit
    for name, tensor in weights.items():
        size = tensor.numel() * (dtype or tensor.dtype).itemsize
        if size > room and shards[-1]:
            shards.append({})
            room = limit
        shards[-1][name] = tensor
        room -= size
    if len(shards) == 1:
        write_file(folder / "model.safetensors", shards[0], dtype)
        return
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        total += write_file(folder / file, shard, dtype)
        weight_map.update(dict.fromkeys(shard, file))
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_file(path: Path, weights: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> int:
    """Write one .safetensors file, tensor by tensor, and return the bytes of its data.

    The safetensors library's writer wants all tensors of a file in memory in their final dtype; this one casts and
    copies one at a time.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in weights.items():
        kind = dtype or tensor.dtype
        if kind not in _NAMES:
            raise PunaError(f"{name} has dtype {kind}, which is not written as safetensors. Give dtype=torch.bfloat16.")
        size = tensor.numel() * kind.itemsize
        header[name] = {"dtype": _NAMES[kind], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # the data start is aligned to 8 bytes
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in weights.values():
            flat = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous().view(-1)
            if flat.numel():
                file.write(flat.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return at
