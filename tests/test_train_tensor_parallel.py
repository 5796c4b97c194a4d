"""Decoders that two processes train in slices: losses and gradients of one process, and that each sum is needed."""

from typing import Any

import pytest

from ranks import run_ranks

# Sums in another order round otherwise: of the gradient's norm, at most 8e-7 was measured.
TOLERANCE = 1e-5
EVERYTHING = ["attention", "feed_forward", "experts", "router", "output"]
CASES: dict[str, dict[str, Any]] = {
    "dense": {"shape": "llama3.1", "expert": 1, "loss": "sum"},
    "tied, an odd vocabulary": {"shape": "odd vocabulary", "expert": 1, "loss": "sum"},
    "tied, tokens that weigh": {"shape": "llama3.2", "expert": 1, "loss": "tokens"},
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
# of each layer in turn: attention; a dense layer or the routed experts and the shared one; at last the output
SHARES = ("attention", "dense layer", "second attention", "experts", "shared expert")
MISTAKES: dict[str, dict[str, Any]] = {
    "no sums": {"shape": "llama3.1", "without": "sum"},
    "no shares": {"shape": "llama3.1", "without": "share"},
    "no largest": {"shape": "llama3.1", "without": "largest"},
    "parts of copied heads": {"shape": "one head", "without": "finish"},
} | {f"no share before {what}": {"shape": "maverick", "without": f"share {at}"} for at, what in enumerate(SHARES)}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process measured."""
    mistakes = {name: {"expert": 2 if case["shape"] == "maverick" else 1, "loss": "sum", "passes": 1} | case
                for name, case in MISTAKES.items()}  # fmt: skip
    cases = [{"id": name} | case for name, case in (CASES | mistakes).items()]
    return run_ranks("tensor_training_worker.py", tmp_path_factory.mktemp("ranks"), cases, 2)


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_one_process(seen: list[dict[str, Any]], name: str) -> None:
    for result in seen:
        found = result[name]
        assert max(found["loss"], found["gradient"], found["norm"]) < TOLERANCE, found
        assert not found["missing"], "every parameter has a gradient, of zeros at least"
        assert not found["alike"], "what both hold stays alike, bit by bit"


@pytest.mark.parametrize("name", MISTAKES)
def test_every_sum_is_needed(seen: list[dict[str, Any]], name: str) -> None:
    assert any(max(result[name]["loss"], result[name]["gradient"]) > 100 * TOLERANCE for result in seen), seen
