"""KTO against TRL's own trainer's formula, exact under any split into passes, resumed exactly; rows that are wrong."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from puna.errors import PunaError
from puna.train.kto import kto_losses, mismatched
from puna.train.loop import gradients
from puna.train.method import Batch
from puna.train.reference import answers
from puna.train.run import train
from puna.train.session import Session
from test_tune import WORDS, Stopped, configured, no_picture, opened, states, stop_at, tokenizer, work

__all__ = ["no_picture", "tokenizer", "work"]  # fixtures
STAGES: list[dict[str, Any]] = [{"length": 256, "sources": [{"file": "labelled.jsonl"}]}]


@pytest.fixture(scope="module")
def data(work: Path) -> Path:
    """Answers about old llamas are good, those about young ones bad."""
    rows = [{"prompt": [{"role": "user", "content": f"Who runs, {at}?"}], "completion": words, "label": "old" in words}
            for at, words in enumerate(WORDS)]  # fmt: skip
    (work / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return work


def session(base: str, data: Path, changes: dict[str, Any] | None = None, **options: Any) -> Session:
    given = {"options": {"rank": 2, **options}, "stages": STAGES, **(changes or {})}
    return opened(data / base, configured("kto", **given), data)


def moved(run: Session, seed: int = 0) -> Session:
    """With updates that are not zero, so that policy and base differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in run.model.named_parameters():
            if name.endswith("lora_B"):
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return run


def trl_loss(gains: Tensor, good: Tensor, kl: Tensor, beta: float, desirable: float, undesirable: float) -> Tensor:
    """The lines of TRL's `KTOTrainer._compute_loss`, which stand in the middle of a method; good rows come first."""
    self = SimpleNamespace(beta=beta, desirable_weight=desirable, undesirable_weight=undesirable)
    kl = kl.mean().clamp(min=0)
    chosen_losses = 1 - F.sigmoid(self.beta * (gains[good] - kl))
    rejected_losses = 1 - F.sigmoid(self.beta * (kl - gains[~good]))
    return torch.cat((self.desirable_weight * chosen_losses, self.undesirable_weight * rejected_losses), 0)


@pytest.mark.parametrize("mean", [-3.0, 2.0])
def test_losses_and_gradients_are_trls(mean: float) -> None:
    generator = torch.Generator().manual_seed(0)
    gains, kl = (torch.randn(8, generator=generator) * 4 for _ in range(2))
    ours, theirs, good = gains.clone().requires_grad_(), gains.clone().requires_grad_(), torch.arange(8) < 5
    kl = kl - kl.mean() + mean
    loss = kto_losses(ours, good, max(0.0, float(kl.mean())), 0.3, 1.5, 0.7)
    expected = trl_loss(theirs, good, kl, 0.3, 1.5, 0.7)
    torch.testing.assert_close(loss, expected)
    loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize(("seed", "farther"), [(3, True), (4, False)])
def test_a_step_is_trls_from_its_log_probabilities(seed: int, farther: bool, data: Path) -> None:
    """Mismatched as TRL's `add_kl_completion_ids`: each completion goes to the next row of the batch."""
    run = moved(session("dense", data, beta=0.2, desirable=1.3, undesirable=0.8), seed)
    rows = run.order.examples(0)
    assert len(rows) > 2
    loss, metrics = gradients(run, run.passes(0), 1.0)
    base = session("dense", data)
    with torch.no_grad():
        policy, reference = (answers(model, Batch.of(rows, model.device))[0] for model in (run.model, base.model))
        pairs = []
        for at, row in enumerate(rows):
            own, other = row.documents[0], rows[at - 1].documents[0]
            prompt, rest = own.counted.tolist().index(True), other.counted.tolist().index(True)
            ids = torch.tensor([[*own.tokens[:prompt].tolist(), *other.tokens[rest:].tolist()]])
            each = [model(ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[prompt - 1 :].sum()
                    for model in (run.model, base.model)]  # fmt: skip
            pairs.append(each[0] - each[1])
    distance = float(torch.stack(pairs).mean())
    assert (distance > 1) == farther != (distance < -1)
    good = torch.tensor([row.extra["label"] for row in rows])
    expected = trl_loss(policy - reference, good, torch.stack(pairs), 0.2, 1.3, 0.8).mean()
    assert loss == pytest.approx(float(expected), abs=1e-5)
    assert metrics["kl"] == pytest.approx(max(0.0, distance), abs=1e-4)


@pytest.mark.parametrize("base", ["dense", "sparse"])
def test_an_unchanged_policy_has_half_of_each_weight_and_no_distance(base: str, data: Path) -> None:
    run = session(base, data, {"balance": 0.0}, desirable=2.0)
    loss, metrics = gradients(run, run.passes(0), 1.0)
    good = [row.extra["label"] for row in run.order.examples(0)]
    assert loss == pytest.approx(sum(1.0 if each else 0.5 for each in good) / len(good), abs=1e-5)
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-5)
    assert any(float(gradient.abs().max()) > 0 for gradient in run.optimizer.gradients().values())


@pytest.mark.parametrize("base", ["dense", "sparse"])
def test_any_split_into_passes_gives_the_same(base: str, data: Path) -> None:
    found = []
    for room in (1, 110, 10_000):
        run = moved(session(base, data, {"micro_tokens": room, "balance": 0.0}))
        passes = run.passes(0)
        loss, metrics = gradients(run, passes, 1.0)
        found.append((len(passes), loss, metrics, dict(run.optimizer.gradients())))
    assert found[0][0] > found[1][0] > found[2][0] == 1
    for _, loss, metrics, grads in found[1:]:
        assert loss == pytest.approx(found[0][1], abs=1e-6)
        assert metrics == pytest.approx(found[0][2], abs=1e-4)
        for name, gradient in grads.items():
            torch.testing.assert_close(gradient, found[0][3][name], rtol=1e-3, atol=1e-6)


def test_every_completion_meets_another_prompt(data: Path) -> None:
    rows = session("dense", data).order.examples(0)
    for at, (row, other) in enumerate(zip(rows, mismatched(rows), strict=True)):
        own, mixed, before = row.documents[0], other.documents[0], rows[at - 1].documents[0]
        assert mixed.tokens[mixed.counted].tolist() == before.tokens[before.counted].tolist()
        start = int(mixed.counted.argmax())
        assert mixed.tokens[:start].tolist() == own.tokens[: int(own.counted.argmax())].tolist()


@pytest.mark.parametrize("adapter", [True, False])
def test_good_answers_become_likelier_and_bad_ones_less(adapter: bool, data: Path, tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []
    options = {"adapter": adapter, "beta": 0.3, **({"rank": 4} if adapter else {})}
    config = configured("kto", 10, stages=STAGES, batch_tokens=768, micro_tokens=768, options=options,
                        rate=1e-2 if adapter else 2e-3)  # fmt: skip
    train(data / "dense", config, data, tmp_path / "out", report=lambda step: seen.append(dict(step.metrics)))
    assert seen[-1]["margin"] > 0.1 > abs(seen[0]["margin"])
    assert seen[-1]["accuracy"] > 0.8
    assert (tmp_path / "out" / ("adapter_config.json" if adapter else "model.safetensors")).is_file()


def test_a_run_that_stopped_goes_on_to_the_same_bits(data: Path, tmp_path: Path) -> None:
    config = configured("kto", 5, stages=STAGES, options={"rank": 2, "dropout": 0.2})
    train(data / "dense", config, data, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(data / "dense", config, data, tmp_path / "cut", report=stop_at(4))
    train(data / "dense", config, data, tmp_path / "cut", resume=True)
    assert states(tmp_path / "cut") == states(tmp_path / "whole")


@pytest.mark.parametrize(("row", "said"), [
    ({"prompt": "Who?", "completion": "I."}, "1: label: missing"),
    ({"prompt": "Who?", "completion": "I.", "label": 1}, "1: label: must be true .* not 1"),
    ({"prompt": "Who?", "completion": "I.", "label": "good"}, "1: label: must be true .* not 'good'"),
    ({"prompt": "Who?", "label": True}, "1: completion: missing"),
    ({"completion": "I.", "label": True}, "1: prompt: missing"),
    ({"prompt": "", "completion": "I.", "label": True}, "1: prompt: must be a text"),
    ({"prompt": "Who?", "completion": [{"role": "user", "content": "I."}], "label": True},
     "1: completion: no assistant message"),
    ({"prompt": "Who?", "chosen": "I.", "rejected": "You."}, "1: completion: missing; .*method dpo"),
])  # fmt: skip
def test_rows_that_are_wrong_are_told_by_line_and_field(row: dict[str, Any], said: str, data: Path) -> None:
    (data / "wrong.jsonl").write_text(json.dumps(row) + "\n")
    stages = [{"length": 64, "sources": [{"file": "wrong.jsonl"}]}]
    with pytest.raises(PunaError, match=f"wrong.jsonl:{said}"):
        session("dense", data, {"stages": stages})


def test_a_chat_may_hold_its_prompt(data: Path) -> None:
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]
    rows = [{"completion": turns, "label": True}, {"prompt": turns[:1], "completion": turns, "label": True},
            {"prompt": "Who?", "completion": "I.", "label": True}]  # fmt: skip
    (data / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stages = [{"length": 64, "sources": [{"file": "chats.jsonl"}]}]
    found = session("dense", data, {"stages": stages}).order.examples(0)
    assert len({row.documents[0].tokens.tobytes() for row in found}) == 1


@pytest.mark.parametrize(("options", "words"), [
    ({"beta": 0}, "options.beta"), ({"desirable": -1}, "options.desirable"), ({"loss": "kto"}, "options.loss: no such"),
])  # fmt: skip
def test_wrong_options_are_told(options: dict[str, Any], words: str, data: Path) -> None:
    with pytest.raises(PunaError, match=words):
        session("dense", data, **options)


def test_a_row_alone_in_its_step_has_no_distance(data: Path) -> None:
    run = moved(session("dense", data))
    alone = run.order.examples(0)[0]
    assert run.method.expand(run.model, run.tokenizer, [alone], 0)[0].extra["distance"] == 0.0
