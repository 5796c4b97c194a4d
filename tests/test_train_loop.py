"""The loop's parts: optimizer against PyTorch's, routers and their balance, the plan, what a run leaves."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from puna.errors import PunaError
from puna.model.feedforward import MixtureOfExperts
from puna.train.base import open_base
from puna.train.config import checked_config, read_config
from puna.train.loop import Evaluation, Progress
from puna.train.method import Batch, Document, Example
from puna.train.optimizer import Optimizer
from puna.train.plan import kinds, saved_bytes
from puna.train.processes import Processes
from puna.train.routing import Routing, balance_loss
from puna.train.run import plan, train
from puna.train.session import Session
from puna.train.watching import Events, keep
from test_cli_generate import Puna, run
from tiny import CONFIGS, decoder, token_ids
from training import cache, tokenizer, work

__all__ = ["cache", "run", "tokenizer", "work"]  # the fixtures


def steps(parameters: dict[str, nn.Parameter], optimizer: Optimizer, gradients: list[dict[str, torch.Tensor]]) -> None:
    for each in gradients:
        for name, grad in each.items():
            (parameters[name] * grad).sum().backward()
        optimizer.step(1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_is_pytorchs(dtype: torch.dtype) -> None:
    """Masters to float32's rounding; bfloat16 weights are the masters, rounded."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (600, 700), "b": (5,)}  # one of several blocks, one that has no weight decay
    first = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    gradients = [{name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
                 for _ in range(4)]  # fmt: skip
    mine = {name: nn.Parameter(value.clone()) for name, value in first.items()}
    optimizer = Optimizer(mine, muon=False, rate=0.01, weight_decay=0.1, clip=3.0)
    steps(mine, optimizer, gradients)
    theirs = {name: nn.Parameter(value.float()) for name, value in first.items()}
    groups = [{"params": [theirs["a"]], "weight_decay": 0.1}, {"params": [theirs["b"]], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))
    for each in gradients:
        for name, grad in each.items():
            theirs[name].grad = grad.float()
        nn.utils.clip_grad_norm_(theirs.values(), 3.0)
        reference.step()
    state = optimizer.state_dict()
    for name in shapes:
        torch.testing.assert_close(state[f"{name}/master"], theirs[name].data, rtol=1e-5, atol=1e-6)
        master = state[f"{name}/master"]
        rounding = (master.to(dtype).float() - master).abs()
        assert torch.equal((mine[name].data.float() - master).abs(), rounding)  # a tie may go the other way


def test_masters_survive_saving_to_the_last_bit() -> None:
    weight = {"a": nn.Parameter(torch.randn(300, generator=torch.Generator().manual_seed(0)).bfloat16())}
    optimizer = Optimizer(weight, muon=False, rate=1e-4)
    steps(weight, optimizer, [{"a": torch.ones(300).bfloat16()}] * 3)
    saved = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    other = {"a": nn.Parameter(torch.zeros(300).bfloat16())}
    again = Optimizer(other, muon=False, rate=1e-4)
    again.load_state_dict(saved, 3)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in again.state_dict().items())
    assert torch.equal(other["a"], weight["a"])
    assert (saved["a/master"] != weight["a"].float()).any()  # more than the weights' own bits


def test_sums_of_passes_are_float32() -> None:
    """Of bfloat16 gradients: 1 + 256 passes of 1/256 would stay 1 in bfloat16."""
    weight = {"a": nn.Parameter(torch.zeros(1).bfloat16())}
    optimizer = Optimizer(weight, muon=False, rate=1.0)
    optimizer.passes = 257
    for grad in (1.0, *[1 / 256] * 256):
        (weight["a"] * torch.tensor(grad).bfloat16()).sum().backward()
    assert optimizer.gradients()["a"].item() == 2.0


def test_balance_loss() -> None:
    even = 10 * torch.eye(4).repeat(3, 1)
    assert balance_loss(even, even.topk(1).indices).item() == pytest.approx(1)
    crowded = 100.0 * F.one_hot(torch.zeros(12, dtype=torch.long), 4)
    assert balance_loss(crowded, crowded.topk(1).indices).item() == pytest.approx(4)


def batch(kind: str, length: int = 64) -> Batch:
    ids = token_ids(CONFIGS[kind], length + 1)[0].numpy().astype(np.uint32)
    return Batch.of([Example((Document(ids, np.arange(length + 1) > 0),))], torch.device("cpu"))


def test_the_bias_evens_the_load_and_leaves_the_gates_alone() -> None:
    model = decoder("scout").train()
    routing = Routing(model, "bias", 0.05)
    worst = []
    for _ in range(60):
        routing.begin(1.0)
        routing.open(64)
        batch("scout").states(model)
        assert routing.close() is None
        assert all(int(load.sum()) == 64 for load in routing.loads.values())  # every token is served: none is dropped
        worst.append(max(routing.imbalance().values()))
        routing.end()
    assert worst[-1] < 1.5 < worst[0]
    mixture = model.layers[0].feed_forward
    assert isinstance(mixture, MixtureOfExperts)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    gates, experts = mixture.route(x)
    logits = F.linear(x, mixture.router.weight)
    assert torch.equal(experts[:, 0], (logits + mixture.bias_E).argmax(-1))
    torch.testing.assert_close(gates, logits.gather(1, experts).sigmoid())
    routing.begin(0.0)  # the schedule's end: what was trained is what is served
    assert torch.equal(mixture.route(x)[1][:, 0], logits.argmax(-1))


def test_routers_compute_in_float32_and_serve_as_they_were() -> None:
    model = decoder("scout", dtype=torch.bfloat16).train()
    names = [name for name, _ in model.named_parameters()]
    before = model(token_ids(model.config))
    routing = Routing(model, "auxiliary", 0.01)
    seen: list[torch.dtype] = []
    for mixture in routing.mixtures.values():
        watch = mixture.watch
        mixture.watch = lambda logits, chosen, then=watch: (seen.append(logits.dtype), then(logits, chosen))
    assert [name for name, _ in model.named_parameters()] == names
    model(token_ids(model.config))
    assert seen == [torch.float32] * 4
    routing.remove()
    assert [name for name, _ in model.named_parameters()] == names
    assert torch.equal(model(token_ids(model.config)), before)


def test_the_plan_says_what_trains_and_what_it_takes(work: Path, run: Puna) -> None:
    arguments = ("train", work / "shape", "--data", work, "--config", work / "run.yaml", "--dry-run")
    found = json.loads(run(*arguments, "--json").stdout)
    assert found["trainable"]["experts"] == 4 * (32 * 64 + 32 * 32)
    assert found["frozen"] == {}
    assert sum(found["optimizers"].values()) == sum(found["trainable"].values())
    assert found["memory_total"] == sum(found["memory"].values())
    assert found["memory"]["optimizer"] > 0
    assert found["passes"] == 2
    said = run(*arguments).stdout
    for words in ("experts", "memory: ", "activations", "tokens: 1,0", "the first step took"):
        assert words in said
    assert not (work / "out").exists()


def test_kinds_are_the_optimizers_own(work: Path) -> None:
    config = checked_config({**read_config(work / "run.yaml").model_dump(), "method": "pretrain"}, "test")
    model, tokenizer, _ = open_base(work / "shape", config, Processes.alone())
    session = Session.of(model, tokenizer, config, work, None)
    trainable, frozen = kinds(session)
    assert sum(trainable.values()) == sum(p.numel() for p in session.optimizer.parameters.values())
    assert "other" not in trainable | frozen
    small, large = (saved_bytes(session, batch_of(session, n)) / n for n in (32, 64))
    assert small == pytest.approx(large, rel=0.15)  # a token takes so much, however many there are


def batch_of(session: Session, length: int) -> Batch:
    ids = np.arange(length + 1, dtype=np.uint32)
    return Batch.of([Example((Document(ids, ids > 0),))], session.model.device)


def test_a_plan_that_does_not_fit_is_refused(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puna.train.plan.available_bytes", lambda _: 1000)
    with pytest.raises(PunaError, match="lower micro_tokens"):
        plan(work / "shape", read_config(work / "run.yaml"), work)


def test_evaluations_from_above_are_scored_and_kept(work: Path, tmp_path: Path) -> None:
    config = read_config(work / "run.yaml", steps=4, evaluate_every=2)
    asked: list[bool] = []
    score = Evaluation(("answers",), lambda model, _: (asked.append(model.training), {"answers": len(asked) / 10})[1])
    reports: list[Progress] = []
    train(work / "shape", config, work, tmp_path / "out", report=reports.append, evaluations=[score])
    assert asked == [False, False]
    assert [each.scores.get("answers") for each in reports] == [None, 0.1, None, 0.2]
    header, *rows = (tmp_path / "out" / "metrics.csv").read_text().splitlines()
    at = header.split(",").index("answers")
    assert [row.split(",")[at] for row in rows] == ["", "0.1", "", "0.2"]
    assert (tmp_path / "out" / "experts.csv").read_text().splitlines()[0] == "step,layer,busiest,idle"
    events = read_events(tmp_path / "out" / "events.out.tfevents.puna")
    assert [step for step, _ in events] == [1, 2, 3, 4]
    assert events[1][1]["answers"] == pytest.approx(0.1)
    assert events[3][1]["loss"] == pytest.approx(reports[3].loss, rel=1e-6)
    assert "experts/1/busiest" in events[0][1]


def read_events(path: Path) -> list[tuple[int, dict[str, float]]]:
    """Steps and scalars, by our own reading of the format; the checksums are tried against a known value elsewhere."""
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        event = data[at + 12 : at + 12 + size]
        at += 16 + size
        if event[9] != 0x10:
            assert event[9:] == b"\x1a\x0dbrain.Event:2"
            continue
        values, rest = {}, event[event.index(b"\x2a") :]
        place = 1 + (2 if rest[1] > 127 else 1)
        while place < len(rest):
            name = rest[place + 4 : place + 4 + rest[place + 3]].decode()
            values[name] = struct.unpack_from("<f", rest, place + 5 + len(name))[0]
            place += 2 + rest[place + 1]
        found.append((event[10], values))
    return found


def test_events_are_tensorboards(tmp_path: Path) -> None:
    """A record as TensorFlow 2 writes it, but for the time."""
    events = Events(tmp_path / "e")
    events.close()
    data = (tmp_path / "e").read_bytes()
    assert data[:8] == struct.pack("<Q", 24)
    assert data[8:12] == bytes.fromhex("a37f4b22")  # masked CRC-32C of the length 24, in every such file


def test_tables_keep_whole_rows_up_to_a_step(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("step,loss\n1,0.5\n2,0.25\n3,0.1\n4")
    assert keep(path, 2, ("step", "loss")) == [{"step": "1", "loss": "0.5"}, {"step": "2", "loss": "0.25"}]
    assert path.read_text().splitlines() == ["step,loss", "1,0.5", "2,0.25"]
    assert keep(path, 0, ("step", "loss")) == []
