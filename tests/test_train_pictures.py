"""Training on chats that show pictures: read, laid out and seen as the server does, packed without leaks."""

import base64
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import puna
from puna.checkpoint.peft import read_adapter
from puna.checkpoint.source import open_source
from puna.engine.picture_parts import prepare
from puna.errors import PunaError
from puna.model import Decoder
from puna.model.pictures import PassPictures
from puna.text.pictures import Vision
from puna.train.config import Source, TrainConfig, checked_config
from puna.train.data import make_rows
from puna.train.loop import gradients
from puna.train.method import Batch, Example
from puna.train.methods import METHODS
from puna.train.reference import Reference
from puna.train.run import train
from puna.train.session import Session
from puna.train.tokenised import Tokenised, tokenise
from tiny_pictures import KINDS, checkpoint_of, config, plain, png, tokenizer
from training import lines

CONFIG = checked_config({"method": "full", "steps": 1, "stages": [{"sources": [{"file": "a"}]}]}, "here")


def url(data: bytes) -> dict[str, Any]:
    """OpenAI's part."""
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(data).decode()}}


def chat(*content: Any, answer: str = "A red square.") -> dict[str, Any]:
    """A row."""
    parts = [{"type": "text", "text": each} if isinstance(each, str) else each for each in content]
    return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]}


ROWS = [chat("What is it?", url(png(1, 60, 40))), chat("Describe it."),
        chat(url(png(2)), "and", url(png(3, 30, 90)), "Which?", answer="Both."),
        chat("Again:", url(png(1, 60, 40)), answer="The same.")]  # fmt: skip


def vision_of(kind: str) -> Vision:
    """How the tiny model of a kind sees."""
    vision = config(kind).vision
    assert vision is not None
    return vision


def read(folder: Path, rows: list[Any], kind: str = "llama4", cache: Path | None = None) -> Tokenised:
    """Rows as a source of the method that trains all weights."""
    return tokenise(lines(folder / "rows.jsonl", rows), METHODS["full"](CONFIG), tokenizer(), cache, vision_of(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_laid_out_as_the_server_does(tmp_path: Path, kind: str) -> None:
    found = read(tmp_path, ROWS, kind)
    assert [len(found.example(i).documents[0].pictures) for i in range(4)] == [1, 0, 2, 1]
    for i in (0, 2):
        (document,) = found.example(i).documents
        served = prepare(tokenizer(), vision_of(kind), ROWS[i]["messages"][:1], None)
        assert document.tokens[: len(served.token_ids)].tolist() == served.token_ids
        assert not document.counted[: len(served.token_ids)].any()
        said = document.tokens[document.counted].tolist()
        assert tokenizer().decode(said).startswith(ROWS[i]["messages"][1]["content"])
        assert served.pixel_values is not None
        pixels = [picture.cut(vision_of(kind)).pixels for picture in document.pictures]
        assert torch.equal(torch.cat([torch.from_numpy(each) for each in pixels]), served.pixel_values)


def one_by_one(decoder: Decoder, examples: list[Example]) -> Tensor:
    """The summed loss of documents that are each a pass of the whole model."""
    losses = []
    for example in examples:
        (document,) = example.documents
        ids = document.tokens[:-1].astype(int).tolist()
        shown = None
        if document.pictures:
            cut = [picture.cut(decoder.config.vision) for picture in document.pictures]  # type: ignore[arg-type]
            pixels = torch.cat([torch.from_numpy(each.pixels) for each in cut])
            placed = decoder.place(ids, decoder.look(pixels, [each.grid for each in cut]))
            shown = PassPictures.joined([placed.share(0, len(ids), 0)])
        logits = decoder(torch.tensor([ids]), pictures=shown)[0]
        targets = torch.from_numpy(document.tokens[1:].astype(int))
        marks = torch.from_numpy(document.counted[1:])
        losses.append(F.cross_entropy(logits[marks], targets[marks], reduction="sum"))
    return torch.stack(losses).sum()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_of_several_is_each_by_itself(tmp_path: Path, kind: str, recompute: bool) -> None:
    """Loss and gradients; pictures of one document are seen by no other."""
    examples = [read(tmp_path, ROWS, kind).example(i) for i in range(4)]
    decoder, alone = plain(kind), plain(kind)
    settings = CONFIG.model_copy(update={"recompute": recompute, "balancing": "none"})
    session = session_of(decoder, settings, tmp_path)
    loss, _ = gradients(session, [Batch.of(examples, decoder.device)], 1.0)
    reference = one_by_one(alone, examples)
    reference.backward()
    counted = sum(int(example.documents[0].counted.sum()) for example in examples)
    assert loss * counted == pytest.approx(reference.item(), rel=1e-5)
    compared = 0
    for name, weight in decoder.named_parameters():
        other = alone.get_parameter(name).grad
        if name.startswith("vision."):
            assert weight.grad is None
        elif other is not None:
            assert weight.grad is not None, name
            torch.testing.assert_close(weight.grad * counted, other, rtol=1e-3, atol=1e-4)
            compared += 1
    assert compared > 10


def session_of(decoder: Decoder, settings: TrainConfig, folder: Path) -> Session:
    """A session whose data nobody asks for."""
    lines(folder / "a.jsonl", [{"text": "words enough to be a row"}])
    stages = [{"sources": [{"file": "a.jsonl"}]}]
    whole = checked_config({**settings.model_dump(), "dtype": "float32", "stages": stages}, "here")
    return Session.of(decoder, tokenizer(), whole, folder, None)


@pytest.mark.parametrize("kind", KINDS)
def test_another_picture_is_another_loss(tmp_path: Path, kind: str) -> None:
    session = session_of(plain(kind), CONFIG, tmp_path)
    losses = []
    for seed in (1, 5):
        example = read(tmp_path, [chat("What?", url(png(seed)))], kind).example(0)
        losses.append(session.method.loss(session.model, Batch.of([example], session.model.device)).sum.item())
    assert losses[0] != losses[1]


def test_pictures_are_files_beside_the_data_too_and_low_detail_is_one_tile(tmp_path: Path) -> None:
    (tmp_path / "shots").mkdir()
    (tmp_path / "shots" / "a.png").write_bytes(png(1, 60, 40))
    named = {"type": "image", "image": "shots/a.png"}
    low = url(png(1, 60, 40))
    low["image_url"]["detail"] = "low"
    cache = tmp_path / "cache"
    found = read(tmp_path, [chat(named, "What?"), chat(url(png(1, 60, 40)), "What?"), chat(low, "What?")], cache=cache)
    beside, inside, coarse = (found.example(i).documents[0] for i in range(3))
    assert beside.tokens.tolist() == inside.tokens.tolist()
    assert beside.pictures[0].data == inside.pictures[0].data
    assert len(coarse.tokens) < len(inside.tokens)
    assert coarse.pictures[0].low
    (tmp_path / "shots" / "a.png").write_bytes(png(9, 60, 40))  # the rows are the same: kept data would be stale
    assert read(tmp_path, [chat(named, "What?")], cache=cache).example(0).documents[0].pictures[0].data == png(
        9, 60, 40
    )


def test_kept_data_hold_their_pictures(tmp_path: Path) -> None:
    first = read(tmp_path, ROWS, cache=tmp_path / "cache")
    again = read(tmp_path, ROWS, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert again.fingerprint == first.fingerprint == read(tmp_path, ROWS).fingerprint
    assert again.example(2).documents[0].pictures == read(tmp_path, ROWS).example(2).documents[0].pictures


@pytest.mark.parametrize(
    ("part", "told"),
    [({"type": "image", "image": "../a.png"}, "lies outside"), ({"type": "image", "image": "none.png"}, "can't read"),
     ({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}, "no data URL"),
     (url(b"no picture"), "picture"), ({"type": "video", "video": "a.mp4"}, "a video"),
     ({"type": "image", "image": 3}, "data URL")],
)  # fmt: skip
def test_what_can_not_be_seen_is_told_by_its_place(tmp_path: Path, part: Any, told: str) -> None:
    with pytest.raises(PunaError, match=rf"rows.jsonl:2: messages\[0\].content\[1\].*{told}"):
        read(tmp_path, [ROWS[0], chat("What?", part)])


def test_documents_with_pictures_stay_whole(tmp_path: Path) -> None:
    found = read(tmp_path, ROWS)
    method = METHODS["full"](CONFIG)
    for wrong, source in (
        ("packing", Source(file="a", packing="stream")),
        ("overlong", Source(file="a", overlong="split")),
    ):
        with pytest.raises(PunaError, match=f"{wrong}: documents with pictures stay whole"):
            make_rows(source, 500, True, found, method, 0)
    with pytest.raises(PunaError, match="a row holds 16"):
        make_rows(Source(file="a"), 16, True, found, method, 0)


def test_preferences_show_pictures_and_rewards_do_not(tmp_path: Path) -> None:
    pair = {"prompt": ROWS[0]["messages"][:1], "chosen": "Red.", "rejected": "Blue."}
    path = lines(tmp_path / "pairs.jsonl", [pair])
    dpo = METHODS["dpo"](CONFIG.model_copy(update={"method": "dpo"}))
    found = tokenise(path, dpo, tokenizer(), None, vision_of("llama4")).example(0)
    assert [len(document.pictures) for document in found.documents] == [1, 1]
    grpo = METHODS["grpo"](CONFIG.model_copy(update={"method": "grpo"}))
    path = lines(tmp_path / "sums.jsonl", [{**ROWS[0], "answer": "3"}])
    with pytest.raises(PunaError, match="answers texts alone"):
        tokenise(path, grpo, tokenizer(), None, vision_of("llama4"))


@pytest.mark.parametrize(
    ("kind", "method", "steps", "rate"), [("llama4", "full", 100, 1e-2), ("llama3.2", "qlora", 100, 5e-3)]
)
def test_a_run_learns_what_it_is_shown_and_is_served(
    tmp_path: Path, kind: str, method: str, steps: int, rate: float
) -> None:
    """Two pictures with two names; afterwards each gets its own."""
    base = checkpoint_of(kind, tmp_path / "base")
    names = {1: "A", 5: "B"}
    lines(tmp_path / "rows.jsonl", [chat("Name it.", url(png(seed)), answer=name) for seed, name in names.items()])
    options = {} if method == "full" else {"targets": ["attention", "feed_forward", "output"]}
    settings = {"method": method, "options": options, "steps": steps, "batch_tokens": 256, "rate": rate, "decay": 0.2,
                "dtype": "float32", "stages": [{"length": 128, "sources": [{"file": "rows.jsonl"}]}]}  # fmt: skip
    losses: list[float] = []
    out = tmp_path / "out"
    train(base, checked_config(settings, "here"), tmp_path, out, report=lambda step: losses.append(step.loss))
    assert losses[-1] < 0.02 * losses[0]
    served = puna.load(out)
    for seed, name in names.items():
        question = chat("Name it.", url(png(seed)))["messages"][:1]
        assert served.generate(served.prepare(question), max_tokens=1, temperature=0).text == name


def test_an_adapter_of_a_model_that_sees_is_read_and_not_taken_for_one_of_its_text(tmp_path: Path) -> None:
    """In Llama 3.2 the layers that see are counted among the others: without them the numbers would be wrong."""
    base = checkpoint_of("llama3.2", tmp_path / "base")
    lines(tmp_path / "rows.jsonl", [chat("Name it.", url(png(1)))])
    settings = {"method": "lora", "steps": 1, "batch_tokens": 128, "dtype": "float32",
                "stages": [{"length": 128, "sources": [{"file": "rows.jsonl"}]}]}  # fmt: skip
    train(base, checked_config(settings, "here"), tmp_path, tmp_path / "out")
    source = open_source(base)
    read_adapter(tmp_path / "out", source.config, source.shapes())
    with pytest.raises(PunaError, match="adapter of a model that sees"):
        read_adapter(tmp_path / "out", source.config.with_(vision=None), source.shapes())


def test_the_base_is_asked_anew_for_another_picture(tmp_path: Path) -> None:
    """Rows whose tokens are the same are not the same answers."""
    rows = [{"prompt": chat("What?", url(png(seed)))["messages"][:1], "chosen": "Red.", "rejected": "Blue."}
            for seed in (1, 5)]  # fmt: skip
    dpo = METHODS["dpo"](CONFIG.model_copy(update={"method": "dpo"}))
    found = tokenise(lines(tmp_path / "pairs.jsonl", rows), dpo, tokenizer(), None, vision_of("llama4"))
    examples = [found.example(i) for i in range(2)]
    assert examples[0].documents[0].tokens.tolist() == examples[1].documents[0].tokens.tolist()
    reference, decoder = Reference(), plain("llama4")
    together = reference.logprobs(decoder, examples)
    alone = torch.cat([Reference().logprobs(decoder, [example]) for example in examples])
    assert together[0] != together[2]
    torch.testing.assert_close(together, alone)
