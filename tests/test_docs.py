"""Every command in README and docs runs: `sh` and `python` blocks, in order, where a small model and data lie."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from puna.checkpoint.hf_config import write_config
from puna.checkpoint.source import save
from puna.family.config import ModelConfig
from puna.text.train import train_tokenizer
from test_hub import Hub, hub  # noqa: F401 - the fixture is used by name
from tiny import EXPERTS, LLAMA4, decoder
from tiny_pictures import seeing

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SENTENCES = [f"The {a} llama {b} over hill {c}." for a in ("old", "young") for b in ("runs", "looks") for c in "abcd"]
RUN = """
steps: 4
batch_tokens: 128
micro_tokens: 64
heldout: heldout.jsonl
stages:
  - length: 32
    sources: [{file: articles.jsonl}, {file: chats.jsonl, packing: starts}]
"""
LORA = """
method: lora
options: {rank: 8, alpha: 16, targets: [attention, output]}
steps: 2
stages: [{length: 256, sources: [{file: chats.jsonl}]}]
"""
GRPO = """
method: grpo
options: {rank: 2, group: 2, max_tokens: 8}
steps: 1
stages: [{length: 64, sources: [{file: sums.jsonl}]}]
"""
LONGER = """
context: {length: 1024}
steps: 2
batch_tokens: 1024
stages: [{length: 1024, sources: [{file: long.jsonl}]}]
"""
MAKE = {"make chat", "make test", "make serve"}


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """What the pages take for granted: my-llama, scout-int4, my-shape, articles.jsonl, my-data, run.yaml; and for
    pictures my-eyes, chart.png, photo.png, clip.mp4."""
    if "sight.md" in request.node.name:
        seeing(tmp_path)
    tokenizer = train_tokenizer(SENTENCES * 20, 320)
    shape = ModelConfig(
        **LLAMA4 | {"vocab_size": 384, "context_length": 512},
        bos_token_id=tokenizer.bos_id, eos_token_ids=tokenizer.eos_ids, pad_token_id=tokenizer.pad_id,
    )  # fmt: skip
    save(decoder(shape), shape, tokenizer, tmp_path / "my-llama")
    sparse = shape.with_(**EXPERTS, moe_layers=tuple(range(shape.num_layers)))
    save(decoder(sparse), sparse, tokenizer, tmp_path / "scout-int4")
    tokenizer.save(tmp_path / "my-shape")
    (tmp_path / "my-shape/config.json").write_text(json.dumps(write_config(shape, torch.bfloat16)))
    (tmp_path / "my-data").mkdir()
    texts = "".join(json.dumps({"text": " ".join(SENTENCES[i:])}) + "\n" for i in range(8)) * 30
    turns = [{"role": "user", "content": "Who runs?"}, {"role": "assistant", "content": "The old llama."}]
    for place in (tmp_path, tmp_path / "my-data"):
        (place / "articles.jsonl").write_text(texts)
    (tmp_path / "my-data/heldout.jsonl").write_text(texts.splitlines()[0] + "\n")
    (tmp_path / "my-data/chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 20)
    (tmp_path / "run.yaml").write_text(RUN)
    (tmp_path / "lora.yaml").write_text(LORA)
    (tmp_path / "grpo.yaml").write_text(GRPO)
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 4)
    pair = {"prompt": "Who runs?", "chosen": "The old llama.", "rejected": "The hill."}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    labelled = [{"prompt": "Who runs?", "completion": f"The {one}.", "label": one != "hill"} for one in ("dog", "hill")]
    (tmp_path / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    (tmp_path / "longer.yaml").write_text(LONGER)
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": " ".join(SENTENCES * 8)}) + "\n")
    (tmp_path / "sums.jsonl").write_text(json.dumps({"prompt": "1 + 1?", "answer": 2}) + "\n")
    return tmp_path


def environment(hub: Hub) -> dict[str, str]:  # noqa: F811
    """The commands find this environment's `puna`, and for a hub the stand-in."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    hugging_face = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": constants.HF_HUB_CACHE, "HF_TOKEN": ""}
    return {**os.environ, **hugging_face, "PATH": path, "OMP_NUM_THREADS": "1"}


def serve(command: str, folder: Path, env: dict[str, str]) -> None:
    """Start a server, wait until it says where it is, stop it."""
    process = subprocess.Popen(shlex.split(command), cwd=folder, env=env, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)  # fmt: skip
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if "http://" in line:
            break
    process.terminate()
    assert "http://127.0.0.1" in said, said


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run(page: Path, folder: Path, hub: Hub) -> None:  # noqa: F811
    env = environment(hub)
    for line in "\n".join(blocks(page, "sh")).splitlines():
        command = line.partition("#")[0].strip().replace("meta-llama/Llama-3.2-1B-Instruct", "llama/hf")
        if not command:
            continue
        if command in MAKE:  # what they do is tried from a bare clone; here only that the targets exist
            subprocess.run([*shlex.split(command), "-n"], cwd=ROOT, env=env, check=True, capture_output=True)
        elif command.startswith("puna serve"):
            serve(command, folder, env)
        else:
            done = subprocess.run(command, shell=True, cwd=folder, env=env, stdin=subprocess.DEVNULL, text=True,
                                  capture_output=True, timeout=200)  # fmt: skip
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_programs_run(page: Path, folder: Path, hub: Hub) -> None:  # noqa: F811
    for program in blocks(page, "python"):
        done = subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment(hub), text=True,
                              capture_output=True, timeout=200)  # fmt: skip
        assert done.returncode == 0, f"{program}\n{done.stderr}"
