"""Training: the loss against PyTorch's, runs that are killed and go on, folders that load."""

import csv
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file

import puna
from puna.errors import PunaError
from puna.family.config import ModelConfig
from puna.text.tokenizer import Tokenizer
from puna.train.checkpoint import RunFolder
from puna.train.config import read_config
from puna.train.evaluate import bits_per_byte
from puna.train.loss import IGNORED, linear_cross_entropy, token_losses
from puna.train.optimizer import orthogonalised
from test_cli_generate import Puna, run
from tiny import LLAMA, decoder
from training import CHAT, SETTINGS, cache, tokenizer, work

__all__ = ["cache", "run", "tokenizer", "work"]  # the fixtures


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


def test_losses_of_each_token_are_pytorchs() -> None:
    """With weights of their own, as preferences and rewards give them."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(600, 16, generator=generator), torch.randn(50, 16, generator=generator)
    targets = torch.randint(50, (600,), generator=generator)
    targets[::3] = IGNORED
    scale = torch.randn(600, generator=generator)
    found = []
    for mine in (True, False):
        inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        if mine:
            losses = token_losses(*inputs, targets)
        else:
            logits = inputs[0] @ inputs[1].T
            losses = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
        (losses * scale).sum().backward()
        found.append((losses, inputs[0].grad, inputs[1].grad))
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


def test_loss_without_any_target_is_zero() -> None:
    x = torch.ones(3, 4, requires_grad=True)
    loss = linear_cross_entropy(x, torch.ones(5, 4, requires_grad=True), torch.full((3,), IGNORED))
    loss.backward()
    assert loss.item() == 0
    assert not x.grad.any()


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


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"steps": 0}, "steps: "),
        ({"stpes": 3}, "stpes: "),
        ({"steps": True}, "steps: must not be true"),
        ({"seed": -1}, "seed: "),
        ({"seed": 2**70}, "seed: "),
        ({"rate": math.inf}, "rate: input should be a finite number"),
        ({"device": "tpu"}, "device: 'tpu' is not one; use cpu"),
        ({"device": "cuda:99"}, "device: there is no cuda:99 here"),
        ({"stages": []}, "stages: "),
        ({"method": "magic"}, "method: no method is called 'magic'"),
        ({"stages": [{"length": 32, "sources": [{"file": "a", "weight": 0}]}]}, r"stages.0.sources.0.weight: "),
        ({"stages": [{"lenght": 32, "sources": [{"file": "a"}]}]}, r"stages.0.lenght: "),
    ],
)
def test_config_errors_name_file_and_field(change: dict[str, Any], field: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(SETTINGS | change))
    with pytest.raises(PunaError, match=f"run.yaml: {field}"):
        read_config(path)


@pytest.mark.parametrize("text", ["steps: [", "- 1", "steps: \x00", "steps: 1\nsteps: 2", "a: " + "[" * 900])
def test_a_config_that_is_no_mapping_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(PunaError, match=r"run\.yaml"):
        read_config(tmp_path / "run.yaml")


def train(work: Path, out: str, *more: str) -> list[str]:
    return ["train", str(work / "shape"), "--data", str(work), "--config", str(work / "run.yaml"), "--out",
            str(work / out), *more]  # fmt: skip


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from puna.train.config import read_config
from puna.train.run import train
work = Path(sys.argv[1])
def report(step):
    if step.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
train(work / "shape", read_config(work / "run.yaml"), work, work / "killed", resume=True, report=report, note=print)
"""


def test_a_run_that_is_killed_goes_on_to_the_same_weights(work: Path, tokenizer: Tokenizer, run: Puna) -> None:
    whole = run(*train(work, "whole"))
    assert "started at step 0" in whole.stdout
    killed = subprocess.run([sys.executable, "-c", KILLED, str(work)], capture_output=True, text=True, timeout=250)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (work / "killed" / "model.safetensors").exists()
    with (work / "killed" / "metrics.csv").open("a") as file:
        file.write("4,1.0,1.0,1.0,512,9,1.0,1.0,\n5,1.")  # what a buffer may have let out before the kill
    again = run(*train(work, "killed", "--resume"))
    assert "resumed at step 3" in again.stdout
    assert weights(work / "killed") == weights(work / "whole")
    with (work / "killed" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [*range(1, 9)]
    with (work / "whole" / "metrics.csv").open() as file:
        undisturbed = list(csv.DictReader(file))
    for name in ("loss", "norm", "expert_imbalance", "heldout_bpb"):  # to the last digit
        assert [row[name] for row in rows] == [row[name] for row in undisturbed]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"]) - 0.3  # it learns

    folder = {path.name for path in (work / "killed").iterdir()}
    expected = {"model.safetensors", "config.json", "tokenizer.json", "README.md", "lineage.json", "curves.png",
                "experts.csv"}  # fmt: skip
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


def test_kills_at_random_moments_change_nothing(work: Path) -> None:
    """In a process that forks before anything else runs in it. AdamW, bias balancing, whole chats, two epochs."""
    sources = [{"file": "texts.jsonl"}, {"file": "chats.jsonl", "overlong": "split"}]
    changes = {"steps": 10, "save_every": 2, "method": "full", "balancing": "bias", "rate": 0.003,
               "stages": [{"length": 64, "sources": sources}]}  # fmt: skip
    (work / "kills.yaml").write_text(yaml.safe_dump({**SETTINGS, **changes}))
    code = """
import sys
from pathlib import Path
from kills import differences, killed_and_whole
from puna.train.config import read_config
work = Path(sys.argv[1])
*runs, died = killed_and_whole(work, read_config(work / "kills.yaml"), 5, seed=1)
print(died, differences(*runs))
"""
    done = subprocess.run([sys.executable, "-c", code, str(work)], capture_output=True, text=True, timeout=280,
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    died, _, different = done.stdout.strip().partition(" ")
    assert int(died) >= 1
    assert different == "[]"


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
        (("--data", work, "--out", work / "c"), "a folder of text holds"),
    ):
        assert message in run("train", shape, *arguments, code=1).stderr


def test_a_folder_in_use_is_locked(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", resume=False)
    with pytest.raises(PunaError, match="another run is using this folder"):
        RunFolder(tmp_path / "run", resume=True)
    folder.close()
    RunFolder(tmp_path / "run", resume=False).close()
    assert not (tmp_path / "run").exists()  # a run that wrote nothing leaves nothing


def test_what_a_resumed_run_is_made_of_is_the_same(work: Path, tmp_path: Path, run: Puna) -> None:
    texts, base = tmp_path / "texts.jsonl", shutil.copytree(work / "shape", tmp_path / "base")
    shutil.copy(work / "texts.jsonl", texts)
    options = ("--data", texts, "--out", tmp_path / "out", "--steps", 1)
    run("train", base, *options)
    texts.write_text(texts.read_text().replace("grass", "thyme"))
    assert "was made with other data" in run("train", base, *options, "--resume", code=1).stderr
    texts.write_text(texts.read_text().replace("thyme", "grass"))
    assert "resumed at step 1" in run("train", base, *options, "--resume").stdout
    shutil.copytree(tmp_path / "out", trained := tmp_path / "trained")
    options = ("--data", texts, "--out", tmp_path / "next", "--steps", 1)
    run("train", trained, *options)
    tensors = load_file(trained / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, trained / "model.safetensors", {"format": "pt"})
    assert "was made with other base" in run("train", trained, *options, "--resume", code=1).stderr


def test_a_full_disk_is_told_and_the_run_goes_on(
    work: Path, tmp_path: Path, run: Puna, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "small.yaml").write_text("steps: 2\nbatch_tokens: 256\n")
    options = ("train", work / "shape", "--data", work / "texts.jsonl", "--config", tmp_path / "small.yaml",
               "--out", tmp_path / "out")  # fmt: skip
    with monkeypatch.context() as patched:
        patched.setattr("puna.train.checkpoint.save_file", full)
        assert "No space left on device" in run(*options, code=1).stderr
    assert "resumed at step 0" in run(*options, "--resume").stdout


def test_a_folder_of_something_else_is_left_alone(work: Path, tmp_path: Path, run: Puna) -> None:
    mine = shutil.copytree(work / "shape", tmp_path / "mine")
    before = {file.name: file.read_bytes() for file in mine.iterdir()}
    other = run("train", mine, "--data", work / "texts.jsonl", "--out", mine, "--steps", 1, "--resume", code=1)
    assert "no run has saved in this folder" in other.stderr
    assert {file.name: file.read_bytes() for file in mine.iterdir()} == before


def test_a_state_of_another_model_or_a_damaged_one_is_an_error(work: Path, run: Puna) -> None:
    folder = RunFolder(work / "other", resume=True)
    folder.save({"a/master": torch.ones(2)}, {"step": 1, "tokens": 2, "order": {}})
    folder.close()
    texts = ("--data", work / "texts.jsonl", "--out", work / "other", "--resume")
    assert "another shape" in run("train", work / "shape", *texts, code=1).stderr
    (work / "other" / "state-00000001" / "optimizer.safetensors").write_bytes(b"damaged")
    assert "the saved state is damaged" in run("train", work / "shape", *texts, code=1).stderr
