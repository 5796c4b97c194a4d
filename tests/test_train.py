"""Training: the loss against PyTorch's, data and their marks, runs that are killed and go on, folders that load."""

import csv
import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

import puna
from puna.checkpoint.hf_config import write_config
from puna.errors import PunaError
from puna.family.config import ModelConfig
from puna.text.tokenizer import Tokenizer
from puna.text.train import train_tokenizer
from puna.train.checkpoint import RunFolder
from puna.train.config import Source, Stage, checked_config, read_config
from puna.train.data import StageData, documents, make_rows
from puna.train.evaluate import bits_per_byte
from puna.train.loop import _accumulate
from puna.train.loss import IGNORED, RouterWatch, balance_loss, linear_cross_entropy
from puna.train.optimizer import orthogonalised
from test_cli_generate import Puna, run
from tiny import EXPERTS, LLAMA, LLAMA4, decoder
from tiny import token_ids as random_ids

__all__ = ["run"]  # the fixture
TEXTS = [f"The llama number {i} eats grass on the high plain.\u2028 It is not hungry any more! 🦙" for i in range(20)]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What does it eat?"},
        {"role": "assistant", "content": "Grass 🦙."}, {"role": "user", "content": "<|eot|> And then?"},
        {"role": "assistant", "content": " It rests."}]  # fmt: skip
SETTINGS: dict[str, Any] = {
    "steps": 8, "batch_tokens": 128, "micro_tokens": 64, "save_every": 3, "evaluate_every": 4,
    "heldout": "heldout.jsonl",
    "stages": [{"length": 32, "share": 3, "sources": [{"file": "texts.jsonl"}]},
               {"length": 64, "sources": [{"file": "chats.jsonl", "documents": True}, {"file": "texts.jsonl"}]}],
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 340)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A shape (config and tokenizer, no weights), data and a configuration."""
    folder = tmp_path_factory.mktemp("train")
    layers = {"num_layers": 2, "nope_layers": (1,), "moe_layers": (1,), "vocab_size": tokenizer.vocab_size,
              "bos_token_id": tokenizer.bos_id, "eos_token_ids": tokenizer.eos_ids}  # fmt: skip
    tokenizer.save(folder / "shape")
    config = write_config(ModelConfig(**LLAMA4 | EXPERTS | layers), torch.bfloat16)
    (folder / "shape" / "config.json").write_text(json.dumps(config))
    (folder / "shape" / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.25}')
    lines(folder / "texts.jsonl", [{"text": text} for text in TEXTS])
    lines(folder / "heldout.jsonl", [{"text": "The llama eats. \ud800"}])
    lines(folder / "chats.jsonl", [{"messages": CHAT}] * 6)
    (folder / "run.yaml").write_text(yaml.safe_dump(SETTINGS))
    return folder


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_loss_and_gradients_are_pytorchs(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(700, 16, generator=generator).to(dtype).requires_grad_()  # more than one block of rows
    weight = torch.randn(50, 16, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(50, (700,), generator=generator)
    targets[::3] = IGNORED
    loss = linear_cross_entropy(x, weight, targets)
    (loss / 7).backward()
    x_full, weight_full = (t.detach().float().requires_grad_() for t in (x, weight))
    expected = F.cross_entropy(x_full @ weight_full.T, targets, ignore_index=IGNORED, reduction="sum")
    (expected / 7).backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for mine, reference in ((x, x_full), (weight, weight_full)):
        assert mine.grad is not None
        assert (mine.grad.float() - reference.grad).norm() <= tolerance * reference.grad.norm()
        assert mine.grad.dtype == dtype
    assert not x.grad[::3].any()


def test_loss_without_any_target_is_zero() -> None:
    x = torch.ones(3, 4, requires_grad=True)
    loss = linear_cross_entropy(x, torch.ones(5, 4, requires_grad=True), torch.full((3,), IGNORED))
    loss.backward()
    assert loss.item() == 0
    assert not x.grad.any()


def test_micro_batches_do_not_change_the_step() -> None:
    """One pass of 8 rows equals 4 passes of 2, though rows count different numbers of tokens."""
    found = []
    ids = random_ids(decoder("scout").config, 17, 8).numpy()
    counted = np.arange(17) < np.arange(2, 18, 2)[:, None]
    for rows in (8, 2):
        model = decoder("scout").train()
        settings = checked_config({**SETTINGS, "micro_tokens": 16 * rows, "balance": 0}, "test")
        stage = Stage(length=16, sources=[Source(file="-")])
        loss, imbalance = _accumulate(model, RouterWatch(model), settings, stage, ids, counted)
        found.append((loss, {name: parameter.grad for name, parameter in model.named_parameters()}))
        assert imbalance >= 1
    (loss, whole), (loss_in_parts, parts) = found
    assert loss == pytest.approx(loss_in_parts, rel=1e-5)
    for name, grad in whole.items():
        torch.testing.assert_close(parts[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_balance_loss() -> None:
    even = 10 * torch.eye(4).repeat(3, 1)
    assert balance_loss(even, 1).item() == pytest.approx(1)
    crowded = 100.0 * F.one_hot(torch.zeros(12, dtype=torch.long), 4)
    assert balance_loss(crowded, 1).item() == pytest.approx(4)


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (3, 16, 48)])
def test_orthogonalised_has_singular_values_near_one(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 37
    values = torch.linalg.svdvals(orthogonalised(matrix).float())
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_bits_per_byte_of_a_uniform_model(tokenizer: Tokenizer) -> None:
    model = decoder(ModelConfig(**LLAMA | {"vocab_size": tokenizer.vocab_size}))
    assert model.lm_head is not None
    torch.nn.init.zeros_(model.lm_head.weight)
    texts = ["The llama eats.", "Grass 🦙 世界"]
    tokens, size = sum(len(tokenizer.encode(text)) for text in texts), sum(len(text.encode()) for text in texts)
    found, error = bits_per_byte(model, tokenizer, texts)
    assert found == pytest.approx(math.log2(tokenizer.vocab_size) * tokens / size, rel=1e-6)
    assert error >= 0


def test_loss_is_on_the_assistants_tokens_and_their_end_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    ((ids, counted),) = documents(lines(tmp_path / "chats.jsonl", [{"messages": CHAT}]), tokenizer)
    assert ids == tokenizer.render(CHAT, add_generation_prompt=False)
    learned = [token for token, marked in zip(ids, counted, strict=True) if marked]
    end = ids[-1]
    assert end in tokenizer.eos_ids
    assert learned == [*tokenizer.encode("Grass 🦙."), end, *tokenizer.encode(" It rests."), end]


def test_rows_hold_the_tools_that_the_server_would_render(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    ((ids, _),) = documents(lines(tmp_path / "t.jsonl", [{"messages": CHAT, "tools": tools}]), tokenizer)
    assert ids == tokenizer.render(CHAT, tools, add_generation_prompt=False)


def test_texts_begin_once_and_may_hold_line_separators(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a\u2028b\x85c<|begin_of_text|>"}\r\n{"text": "d"}', encoding="utf-8")
    first, second = documents(path, tokenizer)
    assert first[0] == [tokenizer.bos_id, *tokenizer.encode("a\u2028b\x85c<|begin_of_text|>")]
    assert first[0].count(tokenizer.bos_id) == 1
    assert second == ([tokenizer.bos_id, *tokenizer.encode("d")], [True, True])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": \n', "rows.jsonl:2: not JSON"),
        ("[" * 100_000 + "\n", "rows.jsonl:2: "),
        ("\n", "rows.jsonl:2: not JSON"),
        ("[1]\n", "rows.jsonl:2: a row is an object"),
        ({"text": "a", "messages": []}, "rows.jsonl:2: a row is an object with either"),
        ({"text": 3}, "rows.jsonl:2: text: "),
        ({"text": ""}, "rows.jsonl:2: text: "),
        ({"messages": []}, "rows.jsonl:2: messages: "),
        ({"messages": ["a"]}, "rows.jsonl:2: messages"),
        ({"messages": CHAT[:2]}, "rows.jsonl:2: messages: no assistant"),
        ({"messages": CHAT[2:]}, r"rows.jsonl:2: messages\[0\].role: "),
        ({"messages": [CHAT[1], {"role": "assistant", "content": 3}]}, r"rows.jsonl:2: messages\[1\].content: "),
        ({"messages": [{"role": "llama", "content": "a"}, CHAT[2]]}, r"rows.jsonl:2: messages\[0\].role: "),
    ],
)
def test_data_errors_name_file_line_and_field(row: Any, message: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(PunaError, match=message):
        list(documents(lines(tmp_path / "rows.jsonl", [{"text": "good"}, row]), tokenizer))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"steps": 0}, "steps: "),
        ({"stpes": 3}, "stpes: "),
        ({"seed": -1}, "seed: "),
        ({"stages": []}, "stages: "),
        ({"stages": [{"length": 32, "sources": [{"file": "a", "weight": 0}]}]}, r"stages.0.sources.0.weight: "),
        ({"stages": [{"lenght": 32, "sources": [{"file": "a"}]}]}, r"stages.0.lenght: "),
    ],
)
def test_config_errors_name_file_and_field(change: dict[str, Any], field: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(SETTINGS | change))
    with pytest.raises(PunaError, match=f"run.yaml: {field}"):
        read_config(path)


@pytest.mark.parametrize("text", ["steps: [", "- 1", "steps: \x00"])
def test_a_config_that_is_no_mapping_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(PunaError, match=r"run\.yaml"):
        read_config(tmp_path / "run.yaml")


def test_rows_are_whole_epochs_in_an_order_of_the_seed(work: Path, tokenizer: Tokenizer) -> None:
    stage = Stage(length=8, sources=[Source(file="texts.jsonl")])
    count = len(make_rows(stage.sources[0], 8, work, tokenizer))
    orders = [StageData(stage, 2 * count, work, tokenizer, seed).order[:, 1].tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted([*range(count)] * 2)
    assert len(StageData(stage, 0, work, tokenizer, 0).order) == 0  # a stage too short for a step


def test_text_shorter_than_a_row_still_makes_one(work: Path, tokenizer: Tokenizer) -> None:
    rows = make_rows(Source(file="texts.jsonl"), 5000, work, tokenizer)
    assert rows.tokens.shape == (1, 5001)
    assert not rows.counted[0, -1]


def train(work: Path, out: str, *more: str) -> list[str]:
    return ["train", str(work / "shape"), "--data", str(work), "--config", str(work / "run.yaml"), "--out",
            str(work / out), *more]  # fmt: skip


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from puna.train.config import read_config
from puna.train.pretrain import pretrain
work = Path(sys.argv[1])
def report(step):
    if step.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
pretrain(work / "shape", read_config(work / "run.yaml"), work, work / "killed", resume=True, report=report, note=print)
"""


def test_a_run_that_is_killed_goes_on_to_the_same_weights(work: Path, tokenizer: Tokenizer, run: Puna) -> None:
    whole = run(*train(work, "whole"))
    assert "started at step 0" in whole.stdout
    killed = subprocess.run([sys.executable, "-c", KILLED, str(work)], capture_output=True, text=True, timeout=250)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (work / "killed" / "model.safetensors").exists()
    with (work / "killed" / "metrics.csv").open("a") as file:
        file.write("4,1.0,1.0,512,9,1.0,\n5,1.")  # what a buffer may have let out before the kill
    again = run(*train(work, "killed", "--resume"))
    assert "resumed at step 3" in again.stdout
    assert weights(work / "killed") == weights(work / "whole")
    with (work / "killed" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [*range(1, 9)]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"]) - 0.3  # it learns

    folder = {path.name for path in (work / "killed").iterdir()}
    expected = {"model.safetensors", "config.json", "tokenizer.json", "README.md", "lineage.json", "curves.png"}
    assert expected <= folder
    assert ".lock" not in folder
    record = json.loads((work / "killed" / "lineage.json").read_text())
    assert set(record["data"]) == {"texts.jsonl", "chats.jsonl"}
    assert "config.json" in record["base"]["files"]
    assert "killed" in (work / "killed" / "README.md").read_text()
    ids = tokenizer.render(CHAT)
    llama = puna.load(work / "killed", dtype="float32")
    assert llama.tokenizer.render(CHAT) == ids
    assert llama.defaults.temperature == 0.25  # the base's way of being sampled travels along

    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(work / "killed", dtype=torch.float32)
    assert AutoTokenizer.from_pretrained(work / "killed").encode("Grass 🦙", add_special_tokens=False) == \
        tokenizer.encode("Grass 🦙")  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(llama.logits(ids), theirs(torch.tensor([ids])).logits[0], rtol=0, atol=1e-4)


def test_one_file_is_enough_and_a_checkpoint_goes_on(work: Path, run: Puna) -> None:
    shape, texts, chats = work / "shape", work / "texts.jsonl", work / "chats.jsonl"
    first = run("train", shape, "--data", texts, "--out", work / "a", "--steps", 1, "--resume")
    assert "resumed at step 0" in first.stdout
    assert torch.tensor([1e-39]).mul(1.0).item() > 0  # denormals are flushed during a run only
    config = work / "rates.yaml"
    config.write_text("steps: 5\nmatrix_rate: 0.01\nbatch_tokens: 512")
    run("train", work / "a", "--data", chats, "--config", config, "--out", work / "b", "--steps", 1)
    assert weights(work / "b") != weights(work / "a")
    done = run("train", shape, "--data", texts, "--out", work / "a", "--steps", 1, "--resume")
    assert "resumed at step 1" in done.stdout
    for arguments, message in (
        (("--data", texts, "--out", work / "a"), "the folder is not empty"),
        (("--data", texts, "--out", texts), "texts.jsonl: "),
        (("--data", texts, "--config", work / "run.yaml", "--out", work / "c"), "chats.jsonl"),
        (("--data", work / "none.jsonl", "--out", work / "c"), "none.jsonl: no such data file"),
        (("--data", work, "--out", work / "c"), "--config must say"),
    ):
        assert message in run("train", shape, *arguments, code=1).stderr


def test_a_folder_in_use_is_locked(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", resume=False)
    with pytest.raises(PunaError, match="another run is using this folder"):
        RunFolder(tmp_path / "run", resume=True)
    folder.close()
    RunFolder(tmp_path / "run", resume=False).close()
    assert not list((tmp_path / "run").iterdir())


def test_a_state_of_another_model_or_a_damaged_one_is_an_error(work: Path, run: Puna) -> None:
    folder = RunFolder(work / "other", resume=True)
    folder.save({"a/master": torch.ones(2)}, {"step": 1, "tokens": 2})
    folder.close()
    texts = ("--data", work / "texts.jsonl", "--out", work / "other", "--resume")
    assert "another shape" in run("train", work / "shape", *texts, code=1).stderr
    (work / "other" / "state-00000001" / "optimizer.safetensors").write_bytes(b"damaged")
    assert "the saved state is damaged" in run("train", work / "shape", *texts, code=1).stderr
