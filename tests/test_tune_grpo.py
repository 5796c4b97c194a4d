"""GRPO: the number that an answer ends with, advantages, the loss against TRL's formula, groups by our own engine."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from puna.errors import PunaError
from puna.train.grpo import GRPO, advantages, packed_copy
from puna.train.loop import gradients
from puna.train.method import Batch, Example
from puna.train.rewards import checked_answer, number_of, numeric_reward
from puna.train.run import train
from puna.train.session import Session
from test_tune import configured, no_picture, opened, states, tokenizer, work
from tiny import token_ids

__all__ = ["no_picture", "tokenizer", "work"]  # fixtures


@pytest.fixture(scope="module")
def data(work: Path) -> Path:
    """Questions whose solution is left out."""
    rows = [{"messages": [{"role": "user", "content": f"Who runs over hill {n}?"},
                          {"role": "assistant", "content": f"The llama.\n#### {n}"}], "answer": str(n)}
            for n in range(4)]  # fmt: skip
    (work / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return work


def settings(steps: int = 2, **options: Any) -> Any:
    given = {"rank": 2, "group": 4, "max_tokens": 12, **options}
    stages = [{"length": 128, "sources": [{"file": "sums.jsonl"}]}]
    return configured("grpo", steps, options=given, stages=stages, batch_tokens=128, micro_tokens=64)


def session(base: str, data: Path, **options: Any) -> Session:
    return opened(data / base, settings(**options), data)


def rewarded(monkeypatch: pytest.MonkeyPatch, reward: Any) -> None:
    monkeypatch.setattr("puna.train.grpo.numeric_reward", reward)


@pytest.mark.parametrize(("text", "number"), [
    ("Natalia sold 48+24 = 72 clips.\n#### 72", "72"), ("#### 1,234.50 of 9", "1234.5"), ("It is -3.", "-3"),
    ("5 and 7", "7"), ("none", None), ("#### none, after 4", "4"), ("#### -0", "0"), ("#### 007", "7"),
    ("It costs $.50", "0.5"), ("####", None),
])  # fmt: skip
def test_the_number_that_an_answer_ends_with(text: str, number: str | None) -> None:
    assert number_of(text) == number
    assert numeric_reward(text, "72") == float(number == "72")


def test_answers_that_cannot_be_checked_are_told() -> None:
    assert checked_answer(72) == checked_answer("72.0") == "72"
    for wrong in ("many", None, True, [72]):
        with pytest.raises(PunaError, match="answer: must be a number"):
            checked_answer(wrong)


def test_advantages_are_trls() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0])
    expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    assert advantages(rewards.tolist()) == pytest.approx(expected.tolist(), rel=1e-5)
    assert advantages([1.0, 1.0, 1.0]) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("base", ["dense", "sparse"])
def test_constant_rewards_give_no_gradient(base: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewarded(monkeypatch, lambda *_: 1.0)
    run = session(base, data)
    _, metrics = gradients(run, run.passes(0), 1.0)
    assert metrics["reward"] == 1.0
    found = run.optimizer.gradients()
    assert found
    assert all(float(gradient.abs().max()) == 0 for gradient in found.values())


def trl(logprobs: Tensor, base: Tensor, advantage: float, beta: float) -> Tensor:
    """TRL's loss of one answer, `GRPOTrainer._compute_loss` with loss_type "grpo" and its first update of a batch."""
    coefficient = torch.exp(logprobs - logprobs.detach())
    per_token = -torch.min(coefficient * advantage, coefficient.clamp(0.8, 1.2) * advantage)
    per_token = per_token + beta * (torch.exp(base - logprobs) - (base - logprobs) - 1)
    return per_token.sum() / len(per_token)


def test_the_loss_and_its_gradient_are_trls(data: Path) -> None:
    run = session("dense", data, beta=0.3)
    method = run.method
    assert isinstance(method, GRPO)
    with torch.no_grad():
        for name, weight in run.model.named_parameters():
            if name.endswith("lora_B"):
                weight.fill_(0.05)
    examples = []
    for seed, (advantage, length) in enumerate([(0.7, 5), (-1.2, 9)]):
        ids = token_ids(run.model.config, length=20, seed=seed)[0].numpy().astype("uint32")
        marks = torch.arange(20) >= 20 - length
        extra = {"advantage": advantage, "reward": 0.0, "logprobs": [-1.0] * length}
        examples.append(Example((type(run.order.examples(0)[0].documents[0])(ids, marks.numpy()),), extra))
    batch = Batch.of(examples, run.model.device)
    losses: list[Tensor] = []
    from puna.model.adapt import switched_off

    for example in examples:
        document = example.documents[0]
        ids = torch.from_numpy(document.tokens.astype("int64"))[None]

        def each(ids: Tensor = ids, count: int = len(example.extra["logprobs"])) -> Tensor:
            logits = run.model(ids)[0, :-1].log_softmax(-1)
            return logits.gather(1, ids[0, 1:, None])[-count:, 0]

        with torch.no_grad(), switched_off(run.model):
            base = each()
        losses.append(trl(each(), base, example.extra["advantage"], 0.3))
    expected = torch.stack(losses).sum()
    trained = [p for p in run.model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(expected, trained)
    found = method.loss(run.model, batch).sum
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(torch.autograd.grad(found, trained), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("base", "bits"), [("dense", None), ("sparse", None), ("sparse", 4)])
def test_the_engine_and_the_trainer_agree(base: str, bits: int | None, data: Path) -> None:
    run = session(base, data, **({"bits": bits} if bits else {}))
    with torch.no_grad():
        for name, weight in run.model.named_parameters():
            if name.endswith("lora_B"):
                weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    ids = token_ids(run.model.config)
    with torch.no_grad():
        torch.testing.assert_close(packed_copy(run.model)(ids), run.model(ids), rtol=1e-3, atol=1e-3)
    _, metrics = gradients(run, run.passes(0), 1.0)
    assert metrics["gap"] < 1e-4
    assert metrics["tokens_answered"] > 0


def test_a_rewarded_habit_grows(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewarded is how early an answer ends: with random weights that is learnt in a few steps."""
    rewarded(monkeypatch, lambda text, _: -float(len(text)))
    run = opened(data / "dense", settings(8, group=8), data)
    run.optimizer.rate = 2e-2
    run.model.train()
    rewards = []
    for step in range(6):
        rewards.append(gradients(run, run.passes(step), 1.0)[1]["reward"])
        run.optimizer.step(1.0)
    assert rewards[-1] > rewards[0] + 1


def test_a_run_is_repeatable(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewarded(monkeypatch, lambda text, _: float(len(text) % 3))
    for name in ("one", "two"):
        train(data / "sparse", settings(), data, tmp_path / name)
    assert states(tmp_path / "one") == states(tmp_path / "two")


@pytest.mark.parametrize(("options", "words"), [
    ({"beta": 0.1, "adapter": False}, "options.beta"), ({"group": 1}, "options.group"),
    ({"max_tokens": 4096}, "the model's context is 256; lower it"),
])  # fmt: skip
def test_wrong_options_are_told(options: dict[str, Any], words: str, data: Path) -> None:
    with pytest.raises(PunaError, match=words):
        session("dense", data, **options).passes(0)
