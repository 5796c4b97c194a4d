"""Packing: documents of a row don't see each other; losses and gradients are those of documents one by one."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.errors import PunaError
from puna.model import Decoder
from puna.text.tokenizer import Tokenizer
from puna.train.config import Source, Stage, TrainConfig, checked_config
from puna.train.data import StageData, make_rows
from puna.train.loop import gradients, recomputing
from puna.train.loss import linear_cross_entropy
from puna.train.method import Batch, Document, Example
from puna.train.methods import Full, Pretrain
from puna.train.optimizer import Optimizer
from puna.train.routing import Routing
from puna.train.session import Session
from puna.train.tokenised import Tokenised, tokenise
from tiny import CONFIGS, decoder
from training import CHAT, SETTINGS, lines, new_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return new_tokenizer()


def documents(lengths: Sequence[int], vocab: int = 96) -> list[Document]:
    """Random ones, of so many tokens, most of which count."""
    chance = np.random.default_rng(0)
    return [
        Document(chance.integers(0, vocab, n).astype(np.uint32), np.arange(n).astype(bool) & (chance.random(n) < 0.7))
        for n in lengths
    ]


def one_by_one(model: Decoder, parts: Sequence[Document]) -> tuple[float, dict[str, torch.Tensor]]:
    """Summed loss and gradients of documents that go through the model's plain forward pass alone."""
    model.zero_grad()
    total = 0.0
    for part in filter(lambda each: each.predictions, parts):
        ids = torch.from_numpy(part.tokens.astype(np.int64))
        targets = ids[1:].where(torch.from_numpy(part.counted[1:]), -100)
        logits = model(ids[None, :-1])[0]
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)
        if part.counted[1:].any():
            loss.backward()
            total += loss.item()
    return total, taken(model)


def taken(model: Decoder) -> dict[str, torch.Tensor]:
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return grads


def alike(grads: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert grads.keys() == others.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, others[name], rtol=1e-4, atol=3e-5, msg=lambda said, at=name: f"{at}: {said}")


@pytest.mark.parametrize("lengths", [(40, 3, 17, 1, 40, 9, 33), (21, 21, 21, 21)], ids=["mixed", "equal"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_packed_equals_unpacked(kind: str, lengths: tuple[int, ...]) -> None:
    """Chunks of 8 and a temperature floor of 4 begin anew with each document, NoPE layers see no other one."""
    model, parts = decoder(kind).train(), documents(lengths)
    batch = Batch.of([Example(tuple(parts))], CPU)
    loss = linear_cross_entropy(batch.states(model), model.head_weight, batch.targets_N)
    loss.backward()
    packed = taken(model)
    total, grads = one_by_one(model, parts)
    assert loss.item() == pytest.approx(total, rel=1e-5)
    alike(packed, grads)


@pytest.mark.parametrize("kind", ["scout", "llama3.1"])
def test_computing_again_changes_nothing(kind: str) -> None:
    model, batch = decoder(kind).train(), Batch.of([Example(tuple(documents((30, 12, 30))))], CPU)
    found = []
    for on in (False, True):
        routing = Routing(model, "auxiliary", 0.1)
        routing.begin(1.0)
        routing.open(72)
        with recomputing(model, on):
            loss = linear_cross_entropy(batch.states(model), model.head_weight, batch.targets_N)
            term = routing.close()
            (loss if term is None else loss + term).backward()
        found.append((loss.item(), taken(model), {at: load.tolist() for at, load in routing.loads.items()}))
        routing.remove()
    assert found[0][0] == found[1][0]
    assert found[0][2] == found[1][2]  # what is computed again isn't counted again
    for name, grad in found[0][1].items():
        assert torch.equal(grad, found[1][1][name]), name


def session(model: Decoder, tokenizer: Tokenizer, config: TrainConfig) -> Session:
    """Of a float32 model, without data."""
    method = Pretrain(config)
    method.prepare(model, 0)
    optimizer = Optimizer(dict(model.named_parameters()), muon=False, rate=1e-3)
    return Session(config, model, tokenizer, method, None, optimizer, Routing(model, config.balancing, 0.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["scout", "llama3.2"])
def test_one_pass_of_32_equals_four_of_8(kind: str, tokenizer: Tokenizer) -> None:
    """Documents count very different numbers of tokens: a mean of the passes' means would be another loss."""
    parts = documents([int(n) for n in np.linspace(2, 40, 32)])
    found = []
    for size in (32, 8):
        model = decoder(kind).train()
        run = session(model, tokenizer, checked_config({**SETTINGS, "dtype": "float32"}, "test"))
        passes = [Batch.of([Example((part,)) for part in parts[i : i + size]], CPU) for i in range(0, 32, size)]
        loss, _ = gradients(run, passes, 1.0)
        assert len(passes) == 32 // size
        found.append((loss, run.optimizer.gradients()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    alike(found[0][1], found[1][1])
    total, _ = one_by_one(decoder(kind).train(), parts)
    assert found[0][0] == pytest.approx(total / sum(int(part.counted[1:].sum()) for part in parts), rel=1e-5)


def columns(lengths: Sequence[int]) -> Tokenised:
    """Documents whose tokens are all different numbers."""
    ends = np.cumsum([0, *lengths])
    return Tokenised(
        np.arange(ends[-1], dtype=np.uint32),
        np.ones(ends[-1], np.bool_),
        ends,
        np.arange(len(lengths) + 1),
        shows=np.zeros(len(lengths) + 1, np.int64),
        pictures=np.zeros(1, np.int64),
        picture_bytes=np.zeros(0, np.uint8),
        low=np.zeros(0, np.bool_),
        extras=[],
        unused=[],
        where="x",
    )


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12).filter(lambda each: max(each) > 1),
    length=st.integers(8, 20),
    packing=st.sampled_from(["stream", "starts", "whole"]), seed=st.integers(0, 3),
)  # fmt: skip
def test_rows_hold_every_token_once_or_say_so(lengths: list[int], length: int, packing: str, seed: int) -> None:
    config = checked_config(SETTINGS, "test")
    source = Source(file="x", packing=packing, overlong="split")  # type: ignore[arg-type]
    rows = make_rows(source, length, True, columns(lengths), Pretrain(config), seed)
    held = [part for row in range(len(rows)) for example in rows.examples(row) for part in example.documents]
    for row in range(len(rows)):
        assert sum(example.predictions for example in rows.examples(row)) <= length
    tokens = np.concatenate([part.tokens for part in held])
    if packing == "whole":  # the last token of a part begins the next one, so that it is predicted
        predicted = np.concatenate([part.tokens[1:] for part in held])
        firsts = np.cumsum([0, *lengths])[:-1]
        assert sorted(predicted) == sorted(set(range(sum(lengths))) - set(firsts.tolist()))
    else:
        assert len(set(tokens.tolist())) == len(tokens)
        assert len(tokens) + rows.left_out == sum(lengths)


def test_rows_that_see_each_other_are_one_document() -> None:
    config = checked_config(SETTINGS, "test")
    rows = make_rows(Source(file="x"), 9, False, columns([6, 6, 6]), Pretrain(config), 0)
    (example,) = rows.examples(0)
    (only,) = example.documents
    assert only.tokens.tolist() == list(range(10))
    assert only.counted.tolist() == [False, *[True] * 5, False, *[True] * 3]  # nothing tells a document's first token


def test_a_long_example_is_refused_by_line_or_split(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = checked_config(SETTINGS, "test")
    long = [*CHAT, {"role": "user", "content": "a" * 90}, {"role": "assistant", "content": "b" * 90}]
    path = lines(tmp_path / "chats.jsonl", [{"messages": CHAT}, {"messages": long}])
    read = tokenise(path, Full(config), tokenizer, None)
    with pytest.raises(
        PunaError, match=r"chats\.jsonl:2: [0-9]+ tokens to predict, a row holds 110\n.*1 of 2 are too long"
    ):
        make_rows(Source(file=path.name), 110, True, read, Full(config), 0)
    rows = make_rows(Source(file=path.name, overlong="split"), 110, True, read, Full(config), 0)
    assert rows.split == 1
    assert sum(e.predictions for r in range(len(rows)) for e in rows.examples(r)) == int((read.lengths - 1).sum())


def test_order_is_of_seed_and_place_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", [{"text": f"llama {i} " * 4} for i in range(12)])
    lines(tmp_path / "b.jsonl", [{"text": f"grass {i} " * 4} for i in range(5)])
    config = checked_config(SETTINGS, "test")
    stage = Stage(length=16, sources=[Source(file="a.jsonl", weight=3), Source(file="b.jsonl", weight=1)])

    def data(needed: int, seed: int) -> StageData:
        return StageData(stage, needed, tmp_path, tokenizer, Pretrain(config), seed)

    long, short = data(80, 0), data(20, 0)
    assert short.order.tolist() == long.order[:20].tolist() != data(20, 1).order.tolist()
    assert np.bincount(long.order[:, 0]).tolist() == [60, 20]  # by weight
    sources = [long.order[long.order[:, 0] == i][:, 1] for i in range(2)]
    for rows, chosen in zip(long.sources, sources, strict=True):  # whole epochs
        assert sorted(chosen[: len(rows)].tolist()) == list(range(len(rows)))
    assert len(data(0, 0).order) == 0  # a stage too short for a step
