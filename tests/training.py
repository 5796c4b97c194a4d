"""A small shape with its tokenizer, data and a configuration: what the tests of training share."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from puna.checkpoint.hf_config import write_config
from puna.family.config import ModelConfig
from puna.text.tokenizer import Tokenizer
from puna.text.train import train_tokenizer
from tiny import EXPERTS, LLAMA4

TEXTS = [f"The llama number {i} eats grass on the high plain.\u2028 It is not hungry any more! 🦙" for i in range(20)]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What does it eat?"},
        {"role": "assistant", "content": "Grass 🦙."}, {"role": "user", "content": "<|eot|> And then?"},
        {"role": "assistant", "content": " It rests."}]  # fmt: skip
SETTINGS: dict[str, Any] = {
    "steps": 8, "batch_tokens": 128, "micro_tokens": 64, "save_every": 3, "evaluate_every": 4,
    "heldout": "heldout.jsonl",
    "stages": [{"length": 32, "share": 3, "sources": [{"file": "texts.jsonl"}]},
               {"length": 64, "sources": [{"file": "chats.jsonl", "packing": "starts"}, {"file": "texts.jsonl"}]}],
}  # fmt: skip


def new_tokenizer() -> Tokenizer:
    """Of the texts' own words."""
    return train_tokenizer(TEXTS, 340)


def lines(path: Path, rows: list[Any]) -> Path:
    """JSON lines; a row that is text stands as it is."""
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def shape(tokenizer: Tokenizer) -> ModelConfig:
    """Two layers, the second with experts and without rotation."""
    layers = {"num_layers": 2, "nope_layers": (1,), "moe_layers": (1,), "vocab_size": tokenizer.vocab_size,
              "bos_token_id": tokenizer.bos_id, "eos_token_ids": tokenizer.eos_ids}  # fmt: skip
    return ModelConfig(**LLAMA4 | EXPERTS | layers)


def make_work(folder: Path, tokenizer: Tokenizer) -> Path:
    """shape (config and tokenizer, no weights), texts.jsonl, chats.jsonl, heldout.jsonl, run.yaml."""
    tokenizer.save(folder / "shape")
    (folder / "shape" / "config.json").write_text(json.dumps(write_config(shape(tokenizer), torch.bfloat16)))
    (folder / "shape" / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.25}')
    lines(folder / "texts.jsonl", [{"text": text} for text in TEXTS])
    lines(folder / "heldout.jsonl", [{"text": "The llama eats. 🦙"}])
    lines(folder / "chats.jsonl", [{"messages": CHAT}] * 6)
    (folder / "run.yaml").write_text(yaml.safe_dump(SETTINGS))
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return new_tokenizer()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenised data are kept in the test's own folder."""
    monkeypatch.setenv("PUNA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return make_work(tmp_path_factory.mktemp("train"), tokenizer)
