"""`puna tune`: adapters and weights out of one command, repeatable, resumed exactly, served as trained."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import puna
from puna.checkpoint.source import open_source, save
from puna.errors import PunaError
from puna.family.config import ModelConfig
from puna.text.tokenizer import Tokenizer
from puna.text.train import train_tokenizer
from puna.train.config import TrainConfig, checked_config
from puna.train.lora import opener
from puna.train.method import Batch
from puna.train.run import train
from puna.train.session import Session
from tiny import EXPERTS, LLAMA, LLAMA4, decoder

WORDS = [f"The {a} llama {b} over hill {c}." for a in ("old", "young") for b in ("runs", "looks") for c in "abcd"]
CHAT = [{"role": "user", "content": "Who runs?"}, {"role": "assistant", "content": "The old llama."}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(WORDS * 20, 320)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Bases `dense` and `sparse`, and chats.jsonl."""
    place = tmp_path_factory.mktemp("tune")
    ids: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "bos_token_id": tokenizer.bos_id,
                           "eos_token_ids": tokenizer.eos_ids}  # fmt: skip
    dense = ModelConfig(**LLAMA | ids)
    sparse = ModelConfig(**LLAMA4 | EXPERTS | ids | {"num_layers": 2, "nope_layers": (1,), "moe_layers": (0, 1)})
    for name, config in (("dense", dense), ("sparse", sparse)):
        save(decoder(config), config, tokenizer, place / name)
    chats = [{"messages": [CHAT[0], {"role": "assistant", "content": words}]} for words in WORDS]
    (place / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    return place


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves are drawn in the tests of training; here they would take longer than the runs."""
    monkeypatch.setattr("puna.train.run.draw_curves", lambda *_: None)


def configured(method: str, steps: int = 4, **changes: Any) -> TrainConfig:
    return checked_config(
        {"method": method, "steps": steps, "batch_tokens": 256, "micro_tokens": 128, "dtype": "float32", "rate": 3e-3,
         "save_every": 2, "stages": [{"length": 128, "sources": [{"file": "chats.jsonl"}]}], **changes},
        "test",
    )  # fmt: skip


@pytest.mark.parametrize("base", ["dense", "sparse"])
@pytest.mark.parametrize("method", ["lora", "dora", "qlora", "full"])
def test_a_run_ends_with_what_is_served(base: str, method: str, work: Path, tmp_path: Path) -> None:
    options = {} if method == "full" else {"rank": 4}
    losses: list[float] = []
    train(work / base, configured(method, 6, options=options), work, tmp_path / "out",
          report=lambda step: losses.append(step.loss))  # fmt: skip
    assert losses[-1] < losses[0]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"README.md", "lineage.json"} <= names
    prompt = [1, 5, 9, 2]
    before = puna.load(work / base, dtype="float32", quantize="int4" if method == "qlora" else None).logits(prompt)
    if method == "full":
        after = puna.load(tmp_path / "out").logits(prompt)
    else:
        assert {"adapter_config.json", "adapter_model.safetensors"} <= names
        quantize = "int4" if method == "qlora" else None
        after = puna.load(work / base, adapter=tmp_path / "out", dtype="float32", quantize=quantize).logits(prompt)
    assert (after - before).abs().max() > 1e-3


def states(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


class Stopped(Exception):
    """Stands for a kill."""


def stop_at(step: int) -> Any:
    def report(progress: Any) -> None:
        if progress.step == step:
            raise Stopped

    return report


@pytest.mark.parametrize(("method", "options"), [("lora", {"rank": 2, "dropout": 0.2}), ("dora", {"rank": 2})])
def test_a_stopped_run_goes_on_bit_for_bit(method: str, options: dict[str, Any], work: Path, tmp_path: Path) -> None:
    config = configured(method, 6, options=options, recompute=method == "lora")
    train(work / "sparse", config, work, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(work / "sparse", config, work, tmp_path / "stopped", report=stop_at(5))
    train(work / "sparse", config, work, tmp_path / "stopped", resume=True)
    assert states(tmp_path / "stopped") == states(tmp_path / "whole")
    other = configured(method, 6, options=options, seed=1)
    train(work / "sparse", other, work, tmp_path / "other")
    assert states(tmp_path / "other") != states(tmp_path / "whole")


def test_recomputed_passes_drop_the_same_inputs(work: Path) -> None:
    gradients = []
    for recompute in (False, True):
        config = configured("lora", options={"rank": 2, "dropout": 0.3}, recompute=recompute)
        gradients.append(first_gradients(work / "dense", config, work))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-6)


def opened(base: Path, config: TrainConfig, data: Path) -> Session:
    loaded = opener(config)(open_source(base), "cpu", torch.float32)
    assert loaded.tokenizer is not None
    return Session.of(loaded.model, loaded.tokenizer, config, data, None)


def first_gradients(base: Path, config: TrainConfig, data: Path) -> dict[str, torch.Tensor]:
    from puna.train.loop import gradients

    session = opened(base, config, data)
    session.model.train()
    gradients(session, session.passes(0), 1.0)
    return session.optimizer.gradients()


def test_a_base_in_four_bits_takes_less_memory(work: Path) -> None:
    def held(method: str) -> int:
        model = opened(work / "sparse", configured(method, options={"rank": 1}), work).model
        layers = [*model.parameters(), *model.buffers()]
        return sum(t.nbytes for t in layers)

    assert held("qlora") < 0.5 * held("lora")


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("lora", {"rnak": 3}, "options.rnak: no such option; lora has rank, alpha"),
        ("lora", {"rank": 0}, "options.rank: Input should be greater than 0"),
        ("lora", {"rank": 10**12}, "options.rank: 1,000,000,000,000 is more than the model's width, 32"),
        ("lora", {"alpha": math.inf}, "options.alpha: Input should be a finite number"),
        ("dpo", {"adapter": False, "rank": 4}, "options.rank: is an adapter's, and all weights are to train"),
        ("lora", {"targets": ["experts"]}, "this model has no experts"),
        ("lora", {"targets": ["wings"]}, "'wings' is not one; choose from attention"),
        ("dora", {"dora": False}, "method dora has it"),
    ],
)
def test_wrong_options_are_told(method: str, options: dict[str, Any], words: str, work: Path, tmp_path: Path) -> None:
    with pytest.raises(PunaError, match=words):
        train(work / "dense", configured(method, options=options), work, tmp_path / "out")


def test_only_updates_train(work: Path) -> None:
    session = opened(work / "sparse", configured("lora", options={"rank": 2}), work)
    before = {name: p.detach().clone() for name, p in session.model.named_parameters() if not p.requires_grad}
    assert set(session.optimizer.parameters) == {n for n, _ in session.model.named_parameters() if "lora_" in n}
    session.model.train()
    for step in range(2):
        for batch in session.passes(step):
            assert isinstance(batch, Batch)
            session.method.loss(session.model, batch).sum.backward()
        session.optimizer.step(1.0)
    assert all(torch.equal(p, before[n]) for n, p in session.model.named_parameters() if n in before)
