"""Makers of damaged checkpoints, training data and folders, each in the folder where a command then runs."""

import fcntl
import json
import socket
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import tiny
from checkpoint_writers import write_meta
from puna.checkpoint import save
from puna.checkpoint.gguf_format import pack_header
from puna.checkpoint.gguf_read import GGUFSource
from puna.family.config import ModelConfig
from puna.text.train import train_tokenizer

GOOD = '{"text": "The llama eats grass."}'  # a row to train on
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")

Make = Callable[[Path], Any]  # what it returns is kept alive while the command runs


@cache
def _tiny_files() -> dict[str, bytes]:
    """A small checkpoint with tokenizer, safetensors of one layer."""
    tokenizer = train_tokenizer(["The llama eats grass on the high plain. Hello!"] * 4, 330)
    config = ModelConfig("llama", tokenizer.vocab_size, 32, 1, 4, 2, 8, 32, 64, bos_token_id=tokenizer.bos_id,
                         eos_token_ids=tokenizer.eos_ids)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        out = save(tiny.decoder(config), config, tokenizer, Path(folder) / "tiny")
        save(tiny.decoder(config), config, tokenizer, out / "tiny.gguf", "gguf", type="F32")
        return {file.name: file.read_bytes() for file in out.iterdir()}


def nothing(here: Path) -> None:
    """For mistakes that need no file."""


def checkpoint(here: Path) -> Path:
    """A whole checkpoint, the folder `tiny`."""
    folder = here / "tiny"
    folder.mkdir()
    for name, data in _tiny_files().items():
        if name != "tiny.gguf":
            (folder / name).write_bytes(data)
    return folder


def without(*names: str) -> Make:
    """The checkpoint less some of its files."""
    def make(here: Path) -> None:
        folder = checkpoint(here)
        for name in names:
            (folder / name).unlink()
    return make


def replaced(name: str, data: str | bytes) -> Make:
    """The checkpoint with other contents in one file."""
    def make(here: Path) -> None:
        (checkpoint(here) / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return make


def written(name: str, data: str | bytes) -> Make:
    """The checkpoint, and a file beside it."""
    def make(here: Path) -> None:
        checkpoint(here)
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return make


def config(**changes: Any) -> Make:
    """The checkpoint with keys of config.json changed; None takes a key away."""
    def make(here: Path) -> None:
        path = checkpoint(here) / "config.json"
        values = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return make


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Make:
    """The checkpoint with other weights, in a file that is in itself whole."""
    def make(here: Path) -> None:
        path = checkpoint(here) / "model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path)
    return make


def nan(weights: dict[str, torch.Tensor]) -> None:
    """Put one NaN among them."""
    weights["model.layers.0.mlp.up_proj.weight"][3, 1] = float("nan")


def overlapping(here: Path) -> None:
    path = checkpoint(here) / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    entries = {name: header[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("up", "gate")}
    entries["up"]["data_offsets"] = entries["gate"]["data_offsets"]
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])


def truncated(here: Path) -> None:
    path = checkpoint(here) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def adapter(here: Path) -> None:
    (here / "lora").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (here / "lora" / name).touch()


def index(file: str) -> Make:
    """An index that places every tensor in `file`."""
    def make(here: Path) -> None:
        folder = checkpoint(here)
        places = dict.fromkeys(load_file(folder / "model.safetensors"), file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return make


def two_files(here: Path) -> None:
    folder = checkpoint(here)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "b.safetensors").write_bytes((folder / "a.safetensors").read_bytes())


def damaged_model(here: Path) -> None:
    without(*TOKENIZER)(here)
    (here / "tiny" / "tokenizer.model").write_bytes(b"\0\1\2 no model")


class Evil:
    """Runs code when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('the code in the file has run')",)


def meta(change: Callable[[Path], Any]) -> Make:
    """Meta's files in the folder `meta`, with something done to them."""
    def make(here: Path) -> None:
        write_meta(here / "meta", tiny.decoder("llama2"), 1)
        change(here / "meta")
    return make


def cut(path: Path) -> None:
    """Take away a file's end."""
    path.write_bytes(path.read_bytes()[:-500])


def gguf(change: Callable[[bytes], bytes]) -> Make:
    """tiny.gguf, with something done to its bytes."""
    def make(here: Path) -> None:
        (here / "tiny.gguf").write_bytes(change(_tiny_files()["tiny.gguf"]))
    return make


def gguf_header(kind: str | None = None, **fields: Any) -> Make:
    """tiny.gguf with other metadata, or with attn_v said to be of another type."""
    def make(here: Path) -> None:
        path = here / "tiny.gguf"
        path.write_bytes(_tiny_files()["tiny.gguf"])
        source = GGUFSource(path)
        types = {t.name: t.type for t in source._tensors.values()}
        if kind:
            types["blk.0.attn_v.weight"] = type(types["blk.0.attn_v.weight"])[kind]
        table = [(t.name, t.shape, types[t.name]) for t in source._tensors.values()]
        changed = {name.replace("__", "."): value for name, value in fields.items()}
        path.write_bytes(pack_header({**source.fields, **changed}, table) + bytes(path.stat().st_size))
    return make


def llama2c(here: Path) -> None:
    header = torch.tensor([32, 48, 2, 4, 2, 96, 64], dtype=torch.int32)
    (here / "stories.bin").write_bytes(header.numpy().tobytes() + bytes(5000))


def locked(here: Path) -> Any:
    written("rows.jsonl", '{"text": "Hello"}')(here)
    (here / "run").mkdir()
    lock = (here / "run" / ".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def port_taken(here: Path) -> Any:
    """Port 0 can't be in use, so the command's PORT stands for the one that is taken here."""
    taken = socket.create_server(("127.0.0.1", 0))
    (here / "PORT").write_text(str(taken.getsockname()[1]))
    return taken


def rows(*lines: str, yaml: str | None = None) -> Make:
    """The checkpoint, rows.jsonl and, where given, run.yaml."""
    def make(here: Path) -> None:
        written("rows.jsonl", "\n".join(lines) + "\n")(here)
        if yaml is not None:
            (here / "run.yaml").write_text(yaml)
    return make


def damaged_state(here: Path) -> None:
    rows(GOOD, yaml="steps: 1\nstages: [{length: 8, sources: [{file: rows.jsonl}]}]\n")(here)
    (here / "run" / "state-00000001").mkdir(parents=True)
    (here / "run" / "state-00000001" / "facts.json").write_text("{")
