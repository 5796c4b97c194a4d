"""Preference losses against TRL's, with transformers' log-probabilities; policy = reference; runs of each kind."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from puna.checkpoint.safetensors_write import hf_name
from puna.checkpoint.source import load
from puna.errors import PunaError
from puna.model.adapt import updates
from puna.train.dpo import DPO
from puna.train.loop import gradients
from puna.train.method import Batch
from puna.train.preference import LOSSES, Pairs
from puna.train.reference import answers
from puna.train.run import train
from puna.train.session import Session
from test_tune import WORDS, configured, no_picture, opened, tokenizer, work
from tiny import LLAMA

__all__ = ["no_picture", "tokenizer", "work"]  # fixtures


@pytest.fixture(scope="module")
def data(work: Path) -> Path:
    """Pairs of which the longer answer is chosen."""
    rows = [{"prompt": [{"role": "user", "content": "Who runs?"}], "chosen": words,
             "rejected": words.split()[1]} for words in WORDS]  # fmt: skip
    (work / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return work


def session(base: str, data: Path, **options: Any) -> Session:
    stages = [{"length": 256, "sources": [{"file": "pairs.jsonl"}]}]
    ranked = {"rank": 2, **options} if options.get("adapter", True) else options
    return opened(data / base, configured("dpo", options=ranked, stages=stages), data)


def drawn(count: int = 6) -> Pairs:
    """Log-probabilities as answers have them."""
    generator = torch.Generator().manual_seed(0)
    values = [-torch.rand(count, generator=generator) * 40 - 1 for _ in range(4)]
    chosen, rejected = (torch.randint(3, 20, (count,), generator=generator).float() for _ in range(2))
    return Pairs(*[value.requires_grad_() for value in values], chosen, rejected)


def trl_loss(name: str, pairs: Pairs, beta: float, extra: float) -> Tensor:
    """What TRL gives; its DPO losses stand in the middle of a trainer's method, and are restated."""
    delta = (pairs.chosen - pairs.chosen_reference) - (pairs.rejected - pairs.rejected_reference)
    if name == "sigmoid":
        return -F.logsigmoid(beta * delta) * (1 - extra) - F.logsigmoid(-beta * delta) * extra
    if name == "hinge":
        return torch.relu(1 - beta * delta)
    if name == "ipo":
        chosen = (pairs.chosen - pairs.chosen_reference) / pairs.chosen_tokens
        rejected = (pairs.rejected - pairs.rejected_reference) / pairs.rejected_tokens
        return (chosen - rejected - 1 / (2 * beta)) ** 2
    pytest.importorskip("trl")
    averages = pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), beta=beta, loss_type="simpo", alpha=0.0,
                              simpo_gamma=extra, label_smoothing=0.0)  # fmt: skip
    if name == "simpo":
        from trl.experimental.cpo import CPOTrainer

        losses: Tensor = CPOTrainer.cpo_loss(trainer, *averages)[0]
        return losses
    from trl.experimental.orpo import ORPOTrainer

    return -averages[0] - ORPOTrainer.odds_ratio_loss(trainer, *averages)[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "extra"), [("sigmoid", 0.0), ("sigmoid", 0.1), ("hinge", 0.0), ("ipo", 0.0),
                                             ("simpo", 1.5), ("orpo", 0.0)])  # fmt: skip
def test_losses_and_gradients_are_trls(name: str, extra: float) -> None:
    ours, theirs = drawn(), drawn()
    loss, expected = LOSSES[name](ours, 0.3, extra), trl_loss(name, theirs, 0.3, extra)
    torch.testing.assert_close(loss, expected)
    loss.sum().backward()
    expected.sum().backward()
    for mine, peer in ((ours.chosen, theirs.chosen), (ours.rejected, theirs.rejected)):
        torch.testing.assert_close(mine.grad, peer.grad)


@pytest.mark.parametrize("base", ["dense", "sparse"])
def test_an_unchanged_policy_has_the_loss_ln_2(base: str, data: Path) -> None:
    run = session(base, data)
    loss, metrics = gradients(run, run.passes(0), 1.0)
    assert loss == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["margin"] == pytest.approx(0.0, abs=1e-5)
    assert any(float(gradient.abs().max()) > 0 for gradient in run.optimizer.gradients().values())


def test_answers_have_transformers_log_probabilities(data: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    run = session("dense", data)
    config = run.model.config
    peer = LlamaForCausalLM(LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, intermediate_size=LLAMA["intermediate_size"], rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 500_000.0, "rope_type": "default"}, attn_implementation="eager",
    )).eval()  # fmt: skip
    base = load(data / "dense").model
    peer.load_state_dict({hf_name(name, config): weight for name, weight in base.state_dict().items()})
    examples = run.order.examples(0)
    with torch.no_grad():
        sums, counts = answers(run.model, Batch.of(examples, run.model.device))
        documents = [document for example in examples for document in example.documents]
        for document, total, count in zip(documents, sums, counts, strict=True):
            ids = torch.from_numpy(document.tokens.astype("int64"))[None]
            each = peer(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            marks = torch.from_numpy(document.counted[1:])
            assert float(count) == int(marks.sum()) > 0
            torch.testing.assert_close(total, (each * marks).sum(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"loss": "ipo"}, {"loss": "simpo"}, {"loss": "orpo"}, {"adapter": False},
                                     {"bits": 4}], ids=str)  # fmt: skip
def test_preferences_are_learnt(options: dict[str, Any], data: Path) -> None:
    adapter = options.get("adapter", True)
    run = session("dense", data, **({"rank": 4, **options} if adapter else options))
    run.optimizer.rate = 1e-2
    run.model.train()
    for step in range(10):
        _, metrics = gradients(run, run.passes(step % 4), 1.0)
        run.optimizer.step(1.0)
    assert metrics["accuracy"] > 0.9


@pytest.mark.parametrize("adapter", [True, False])
def test_a_run_ends_with_an_adapter_or_weights(adapter: bool, data: Path, tmp_path: Path) -> None:
    stages = [{"length": 256, "sources": [{"file": "pairs.jsonl"}]}]
    train(data / "dense", configured("dpo", 1, stages=stages, options={"adapter": adapter}), data, tmp_path / "out")
    assert (tmp_path / "out" / ("adapter_config.json" if adapter else "model.safetensors")).is_file()


def test_the_reference_is_computed_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = session("dense", data)
    method = run.method
    assert isinstance(method, DPO)
    batches: list[int] = []
    real = answers
    monkeypatch.setattr("puna.train.reference.answers", lambda model, batch: (batches.append(len(batch.examples)),
                                                                        real(model, batch))[1])  # fmt: skip
    batch = Batch.of(run.order.examples(0), run.model.device)
    distinct = {tuple(d.tokens.tolist()) for e in batch.examples for d in e.documents}
    for _ in range(2):
        method.loss(run.model, batch)
    assert len(batches) == len({tuple(e.documents[0].tokens.tolist()) for e in batch.examples})
    assert len(method._reference._known) == len(distinct)
    assert all(float(update.b.abs().max()) == 0 for update in updates(run.model).values())


@pytest.mark.parametrize(("options", "words"), [
    ({"loss": "ipo", "label_smoothing": 0.1}, "loss ipo has none"), ({"gamma": 1.0}, "loss sigmoid has none"),
    ({"loss": "ppo"}, "options.loss"), ({"beta": 0}, "options.beta"), ({"adapter": False, "bits": 4}, "options.bits"),
])  # fmt: skip
def test_wrong_options_are_told(options: dict[str, Any], words: str, data: Path) -> None:
    with pytest.raises(PunaError, match=words):
        session("dense", data, **options)
