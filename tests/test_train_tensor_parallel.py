"""Decoders that two processes train in slices: losses, gradients and runs of one process, and the bytes of each."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from puna.checkpoint.source import open_source, save
from puna.family.config import ModelConfig
from puna.family.sharding import Mesh
from puna.model import Decoder
from puna.text.train import train_tokenizer
from puna.train.config import checked_config
from puna.train.mesh_plan import Layout, rank_bytes
from puna.train.method import Batch, Document, Example
from puna.train.methods import METHODS
from puna.train.plan import saved_bytes
from puna.train.routing import Routing
from ranks import run_ranks
from test_train_processes import check_alike, table
from tiny import EXPERTS, LLAMA, LLAMA4, decoder
from train_processes_worker import run as run_here

# Sums in another order round otherwise: of the gradient's norm, at most 8e-7 was measured.
TOLERANCE = 1e-5
EVERYTHING = ["attention", "feed_forward", "experts", "router", "output"]
CASES: dict[str, dict[str, Any]] = {
    "dense": {"shape": "llama3.1", "expert": 1, "loss": "sum"},
    "tied, an odd vocabulary, tokens that weigh": {"shape": "odd vocabulary", "expert": 1, "loss": "tokens"},
    "one key/value head on both": {"shape": "one head", "expert": 1, "loss": "tokens"},
    "experts split in width": {"shape": "scout", "expert": 1, "loss": "sum"},
    "experts dealt": {"shape": "scout", "expert": 2, "loss": "tokens"},
    "experts without rows, computed again": {"shape": "many experts", "expert": 2, "loss": "sum", "recompute": True},
    "LoRA of everything": {"shape": "scout", "expert": 2, "loss": "sum", "lora": {"rank": 4, "targets": EVERYTHING}},
    "LoRA of experts split in width, with dropout": {
        "shape": "maverick", "expert": 1, "loss": "sum", "lora": {"rank": 4, "dropout": 0.3}, "recompute": True,
    },
    "DoRA, tied output": {
        "shape": "odd vocabulary", "expert": 1, "loss": "sum",
        "lora": {"rank": 4, "dora": True, "targets": ["attention", "feed_forward", "output"]},
    },
    "DoRA of copied heads, with dropout": {
        "shape": "one head", "expert": 1, "loss": "sum", "lora": {"rank": 4, "dora": True, "dropout": 0.3},
    },
}  # fmt: skip
# of each layer in turn: attention; a dense layer, or the routed experts and the shared one
SHARES = ("attention", "dense layer", "second attention", "experts", "shared expert")
MISTAKES: dict[str, dict[str, Any]] = {
    "no sums": {"shape": "llama3.1", "without": "sum"},
    "no shares": {"shape": "llama3.1", "without": "share"},
    "no largest": {"shape": "llama3.1", "without": "largest"},
    "parts of copied heads": {"shape": "one head", "without": "finish"},
} | {f"no share before {what}": {"shape": "maverick", "without": f"share {at}"} for at, what in enumerate(SHARES)}
MESH = {"tensor": 2, "expert": 2}


def settings(method: str, **changes: Any) -> dict[str, Any]:
    """Five steps of several passes."""
    return {
        "method": method, "steps": 5, "batch_tokens": 192, "micro_tokens": 64, "dtype": "float32", "rate": 3e-3,
        "save_every": 2, "evaluate_every": 3, "stages": [{"length": 64, "sources": [{"file": "chats.jsonl"}]}],
    } | changes  # fmt: skip


RUNS: dict[str, dict[str, Any]] = {
    "all weights": {"base": "sparse", "settings": settings("full", mesh=MESH)},
    "updates": {"base": "sparse", "settings": settings("lora", mesh=MESH, options={"rank": 4})},
    "updates of four bits": {"base": "dense", "settings": settings("qlora", mesh={"tensor": 2}, options={"rank": 4})},
    "three experts dealt to two": {"base": "odd", "settings": settings("full")},
    "stopped": {"base": "sparse", "settings": settings("full", mesh=MESH), "stop": True},
}
HELD: dict[str, tuple[str, str, str, dict[str, int]]] = {  # base, method, dtype, mesh
    "full, split": ("sparse", "full", "bfloat16", MESH),
    "full, dealt": ("sparse", "full", "bfloat16", {}),
    "three experts, dealt": ("odd", "full", "bfloat16", {}),
    "pretrain, split, float32": ("dense", "pretrain", "float32", {"tensor": 2}),
    "lora, split, float32": ("sparse", "lora", "float32", MESH),
    "qlora, split": ("sparse", "qlora", "bfloat16", MESH),
    "qlora, dealt": ("dense", "qlora", "bfloat16", {}),
}
WORDS = [f"The {a} llama {b} over hill {c}." for a in ("old", "young") for b in ("runs", "looks") for c in "abcd"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases whose halves are whole groups of few bits, and chats."""
    place = tmp_path_factory.mktemp("ranks")
    tokenizer = train_tokenizer(WORDS * 20, 320)
    ids: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "bos_token_id": tokenizer.bos_id,
                           "eos_token_ids": tokenizer.eos_ids}  # fmt: skip
    wide = ids | {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
    layers = {"num_layers": 2, "nope_layers": (1,), "moe_layers": (1,), "expert_intermediate_size": 64}
    sparse = ModelConfig(**LLAMA4 | EXPERTS | wide | layers)
    for name, config in (("dense", ModelConfig(**LLAMA | wide)), ("sparse", sparse),
                         ("odd", sparse.with_(num_experts=3))):  # fmt: skip
        save(decoder(config), config, tokenizer, place / name)
    user = {"role": "user", "content": "Who runs?"}
    rows = [{"messages": [user, {"role": "assistant", "content": words}]} for words in WORDS]
    (place / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.fixture(scope="module")
def seen(folder: Path) -> list[dict[str, Any]]:
    """What each process measured."""
    cases = [{"id": name, "kind": "compare"} | case for name, case in CASES.items()]
    cases += [
        {"id": name, "kind": "compare", "expert": 2 if case["shape"] == "maverick" else 1, "loss": "sum", "passes": 1}
        | case for name, case in MISTAKES.items()
    ]  # fmt: skip
    cases += [{"id": name, "kind": "run", "out": f"two/{name}"} | run for name, run in RUNS.items()]
    cases += [
        {"id": name, "kind": "hold", "base": base,
         "settings": settings(method, dtype=dtype, mesh=mesh, batch_tokens=1024, micro_tokens=512)}
        for name, (base, method, dtype, mesh) in HELD.items()
    ]  # fmt: skip
    return run_ranks("tensor_training_worker.py", folder, cases, 2)


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_one_process(seen: list[dict[str, Any]], name: str) -> None:
    for result in seen:
        found = result[name]
        assert max(found["loss"], found["gradient"]) < TOLERANCE, found
        assert not found["missing"], "every parameter has a gradient, of zeros at least"
        assert not found["alike"], "what both hold stays alike, bit by bit"


@pytest.mark.parametrize("name", MISTAKES)
def test_every_sum_is_needed(seen: list[dict[str, Any]], name: str) -> None:
    assert any(max(result[name]["loss"], result[name]["gradient"]) > 100 * TOLERANCE for result in seen), seen


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_that_of_one_process(
    seen: list[dict[str, Any]], name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that two processes stopped is finished by one."""
    monkeypatch.setenv("PUNA_CACHE", str(folder / "cache"))
    alone = RUNS[name] | {"settings": RUNS[name]["settings"] | {"mesh": {}}, "stop": False}
    run_here(folder, alone | {"out": f"one/{name}"})
    if RUNS[name].get("stop"):
        went_on = run_here(folder, alone | {"out": f"two/{name}", "resume": True})
        assert "resumed at step 2" in went_on["notes"]
    one, two = folder / "one" / name, folder / "two" / name
    check_alike(one, two, TOLERANCE)
    losses = [row["loss"] for row in table(one)]
    assert (len(losses), losses[-1] < 0.9 * losses[0]) == (5, True)
    file = "model.safetensors" if RUNS[name]["settings"]["method"] == "full" else "adapter_model.safetensors"
    whole = load_file(two / file)
    for key, expected in load_file(one / file).items():
        # AdamW's first steps make much of the smallest differences in a gradient near zero
        assert float((whole[key] - expected).norm()) < 10 * TOLERANCE * float(expected.norm()), key


@pytest.mark.parametrize("name", HELD)
def test_the_plan_counts_what_processes_hold(seen: list[dict[str, Any]], name: str, folder: Path) -> None:
    base, method, dtype, mesh = HELD[name]
    found = [result[name] for result in seen]
    layout = Layout(1 if mesh else 2, Mesh(**mesh), method, found[0]["tokens"], getattr(torch, dtype), rank=16)
    config = open_source(folder / base).config
    planned = rank_bytes(config, layout)
    for part in ("weights", "gradients", "optimizer"):
        assert max(each[part] for each in found) == getattr(planned, part), part
    whole = Layout(1, Mesh(), method, dtype=torch.float32)
    assert [each["whole"] for each in found] == [rank_bytes(config, whole).gradients // 4] * 2
    assert all(each["planned"] == each["weights"] + each["optimizer"] for each in found), "--dry-run counts as much"
    if mesh:  # what is kept of rows that experts serve depends on the tokens
        assert max(each["kept"] for each in found) == pytest.approx(planned.kept, rel=0.3)


@pytest.mark.parametrize("shape", ["dense", "experts"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_plan_counts_what_a_pass_keeps(shape: str, dtype: str, method: str) -> None:
    """Against what autograd really keeps; our own attention on the CPU keeps less than PyTorch's, which is counted."""
    sizes = {"hidden_size": 256, "num_heads": 8, "num_kv_heads": 2, "head_dim": 32, "intermediate_size": 704}
    experts = EXPERTS | {"expert_intermediate_size": 448, "moe_layers": (0, 1), "qk_norm": True}
    config = ModelConfig(**LLAMA | sizes) if shape == "dense" else ModelConfig(
        **LLAMA4 | experts | sizes | {"num_layers": 2, "nope_layers": (), "attention_chunk_size": 512})  # fmt: skip
    model = Decoder(config).to(getattr(torch, dtype))
    trained = METHODS[method](checked_config(settings(method, options={"rank": 8} if method == "lora" else {}), "test"))
    trained.prepare(model, 0)
    Routing(model, "none", 0)
    document = Document(np.arange(513, dtype=np.uint32) % config.vocab_size, np.ones(513, bool))
    batch = Batch.of([Example((document,))], torch.device("cpu"))
    measured = saved_bytes(SimpleNamespace(model=model, method=trained), batch)
    layout = Layout(method=method, tokens=512, dtype=getattr(torch, dtype), rank=8)
    assert 0.97 * measured < rank_bytes(config, layout).kept < 1.25 * measured
