"""The retrieval test: what it builds, what it counts, its command; and a small model that learns to find."""

import copy
import json
import math
import random
import re
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import puna
from puna.checkpoint.hf_config import write_config
from puna.checkpoint.source import save
from puna.cli.evaluate import app
from puna.errors import PunaError
from puna.evaluate.haystack import FACT, KEYS, Builder, Haystack, common, read_filler
from puna.evaluate.positions import bits_by_position
from puna.evaluate.retrieval import Found, ask, cells, draw, retrieval, retrieve
from puna.family.config import ModelConfig
from puna.text.tokenizer import Tokenizer
from puna.text.train import train_tokenizer
from puna.train.config import checked_config
from puna.train.evaluate import bits_per_byte
from puna.train.run import train
from tiny import LLAMA, LLAMA4, decoder

SENTENCES = read_filler(None)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(SENTENCES * 2, 600)


class Oracle:
    """A decoder that says of every text what comes next as `knows` says: the ids of an answer, given the text so far,
    or none. Its cache is the ids."""

    config = ModelConfig(**LLAMA)
    device = torch.device("cpu")

    def __init__(self, tokenizer: Tokenizer, knows: Any) -> None:
        self.tokenizer, self.knows = tokenizer, knows
        self.vocabulary, self.pieces = tokenizer.vocab_size, 0

    def new_cache(self) -> "Ids":
        return Ids()

    def __call__(self, ids_1S: Tensor, cache: "Ids", rows: Tensor | None = None) -> Tensor:
        self.pieces += 1
        logits = torch.zeros(1, ids_1S.shape[1], self.vocabulary)
        places = range(ids_1S.shape[1]) if rows is None else [ids_1S.shape[1] - 1]
        for place in places:
            seen = [*cache.ids, *ids_1S[0, : place + 1].tolist()]
            following = self._next(seen)
            if following is not None:
                logits[0, place, following] = 20.0
        cache.ids += ids_1S[0].tolist()
        return logits if rows is None else logits[:, rows]

    def _next(self, seen: list[int]) -> int | None:
        text = self.tokenizer.decode(seen)
        asked = re.search(r"The secret number of (\w+) is ?(\d*)$", text) or re.search(
            r"secret number of (\w+)\? Answer with the number alone\.\W*assistant\W*(\d*)$", text
        )
        if asked is None:
            return None
        value = self.knows(re.findall(r"The secret number of (\w+) is (\d+)\.", text), asked[1])
        before = FACT.format(key=asked[1])
        whole = self.tokenizer.encode(f"{before} {value}")[len(self.tokenizer.encode(before)) :]
        if "Answer with" in text:
            whole = self.tokenizer.encode(value)
        said = [n for n in range(len(whole)) if seen[len(seen) - n :] == whole[:n]
                and self.tokenizer.decode(whole[:n]).strip() == asked[2]]  # fmt: skip
        return whole[said[-1]] if said else None


class Ids:
    def __init__(self) -> None:
        self.ids: list[int] = []

    def fork(self) -> "Ids":
        return copy.deepcopy(self)


def finds(facts: list[tuple[str, str]], key: str) -> str:
    return dict(facts)[key]


def first(facts: list[tuple[str, str]], key: str) -> str:
    return facts[0][1]


def nothing(facts: list[tuple[str, str]], key: str) -> str:
    return "7"


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(("length", "depths"), [(300, 2), (420, 4), (700, 5)])
def test_facts_stand_at_their_depths_and_the_text_fills_its_length(
    tokenizer: Tokenizer, chat: bool, length: int, depths: int
) -> None:
    builder = Builder(tokenizer, SENTENCES, depths, 0, chat)
    hay = builder.haystack(length, 1)
    sizes = [len(prompt) + max(map(len, hay.answers)) for prompt in hay.prompts]
    assert length - max(builder.sizes) - 4 < max(sizes) <= length
    shared = common(hay.prompts)
    assert shared > 0.7 * length - 60
    assert len({prompt[:shared] for prompt in hay.prompts}) == 1
    text = tokenizer.decode(list(hay.prompts[0]))
    facts = list(re.finditer(r"The secret number of (\w+) is (\d{5})\.", text))
    assert tuple(fact[2] for fact in facts) == hay.values
    assert len({fact[1] for fact in facts} & set(KEYS)) == depths
    begin, end = facts[0].start(), facts[-1].end()
    for i, fact in enumerate(facts):
        assert abs((fact.start() - begin) / (end - begin) - i / (depths - 1)) < 0.25
    for prompt, value, ids in zip(hay.prompts, hay.values, hay.answers, strict=True):
        assert tokenizer.decode([*prompt, *ids]).endswith(value)
    assert builder.haystack(length, 1) == hay != builder.haystack(length, 2)
    assert Builder(tokenizer, SENTENCES, depths, 1, chat).haystack(length, 1) != hay


@pytest.mark.parametrize("chat", [False, True])
def test_who_finds_everything_has_all_and_who_finds_nothing_chance(tokenizer: Tokenizer, chat: bool) -> None:
    def asked(knows: Any) -> list[Found]:
        oracle: Any = Oracle(tokenizer, knows)
        return retrieve(oracle, tokenizer, [300], samples=2, depths=3, chat=chat)

    assert all(one.exact and one.chosen and one.margin > 10 for one in asked(finds))
    told = asked(first)
    assert [one.exact for one in told] == [True, False, False] * 2
    assert all(not one.chosen and abs(one.margin) < 1e-3 for one in told)
    assert not any(one.exact or one.chosen for one in asked(nothing))


def test_the_text_goes_through_the_model_once(tokenizer: Tokenizer) -> None:
    oracle: Any = Oracle(tokenizer, finds)
    hay = Builder(tokenizer, SENTENCES, 3, 0, False).haystack(300, 0)
    list(ask(oracle, tokenizer, hay, 300))
    longest = max(map(len, hay.answers))
    assert oracle.pieces <= 1 + 3 * (1 + 3 + longest)


@pytest.mark.parametrize("kind", ["llama", "llama4"])
def test_answers_are_those_of_the_plain_pass(tokenizer: Tokenizer, kind: str) -> None:
    shape = LLAMA if kind == "llama" else LLAMA4
    model = decoder(ModelConfig(**shape | {"vocab_size": tokenizer.vocab_size}))
    hay = Builder(tokenizer, SENTENCES, 3, 0, False).haystack(250, 0)
    found = list(ask(model, tokenizer, hay, 250))
    sums = torch.zeros(3, 3)
    for q, prompt in enumerate(hay.prompts):
        for v, answer in enumerate(hay.answers):
            with torch.no_grad():
                logprobs = model(torch.tensor([[*prompt, *answer]]))[0].log_softmax(-1)
            rows = logprobs[len(prompt) - 1 : len(prompt) + len(answer) - 1]
            sums[q, v] = rows.gather(1, torch.tensor(answer)[:, None]).sum()
            if q == v:
                assert found[q].exact == (rows.argmax(-1).tolist() == list(answer))
    gains = sums - sums.mean(0)
    for q, one in enumerate(found):
        others = [float(gains[q, v]) for v in range(3) if v != q]
        assert one.margin == pytest.approx(float(gains[q, q]) - sum(others) / 2, abs=1e-4)
        assert one.chosen == (float(gains[q, q]) > max(others))


def test_cells_have_their_intervals() -> None:
    found = [Found(64, depth, exact, True, margin) for depth, exact, margin in
             ((0.0, True, 1.0), (1.0, False, 3.0), (0.0, True, 2.0), (1.0, True, 2.0))]  # fmt: skip
    shallow, deep, whole = cells(found)
    assert (shallow.exact, deep.exact, whole.exact, whole.questions) == (1.0, 0.5, 0.75, 4)
    assert whole.exact_interval == pytest.approx((0.3006, 0.9544), abs=1e-3)
    assert whole.margin_interval == pytest.approx((2 - 0.8002, 2 + 0.8002), abs=1e-3)
    (alone, *_) = cells(found[:1])
    assert alone.margin_interval == (-math.inf, math.inf)
    assert alone.as_dict()["margin_interval"] is None


def test_it_joins_the_loop(tokenizer: Tokenizer) -> None:
    evaluation = retrieval([250, 300], samples=1, depths=2)
    scores = evaluation.score(Oracle(tokenizer, finds), tokenizer)  # type: ignore[arg-type]
    assert scores == dict.fromkeys(evaluation.names, 1.0)
    assert evaluation.names == ("exact_250", "chosen_250", "exact_300", "chosen_300")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A random model of 256 tokens, and a text."""
    place = tmp_path_factory.mktemp("retrieval")
    config = ModelConfig(**LLAMA | {"vocab_size": tokenizer.vocab_size})
    save(decoder(config), config, tokenizer, place / "model")
    (place / "long.jsonl").write_text("".join(json.dumps({"text": " ".join(SENTENCES)}) + "\n" for _ in range(2)))
    return place


def test_the_command_gives_cells_and_a_picture(folder: Path) -> None:
    arguments = ["retrieval", str(folder / "model"), "--lengths", "220,300", "--samples", "1", "--depths", "2"]
    given = CliRunner().invoke(app, [*arguments, "--json", "--picture", str(folder / "map.png")])
    assert given.exit_code == 0, given.output
    told = json.loads(given.output)
    assert told["context"] == 256
    assert [(cell["length"], cell["depth"]) for cell in told["cells"]] == [
        (220, 0.0), (220, 1.0), (220, None), (300, 0.0), (300, 1.0), (300, None)]
    assert (folder / "map.png").read_bytes().startswith(b"\x89PNG")
    shown = CliRunner().invoke(app, [*arguments, "--text", str(folder / "long.jsonl")])
    assert shown.exit_code == 0
    assert "300 (past 256)" in shown.output
    assert "by chance 50% is chosen" in shown.output
    draw(cells([Found(8, 0.0, True, True, 1.0)]), folder / "one.png")


@pytest.mark.parametrize(("arguments", "said"), [
    (["--lengths", "long"], "--lengths must be whole numbers"),
    (["--lengths", "60"], "60 tokens have no room for 5 facts"),
    (["--lengths", "0"], "retrieval needs a length"),
    (["--text", "short.txt"], r"only \d+ sentences to hide facts in"),
    (["--text", "wrong.jsonl"], r"wrong.jsonl:1: text: must be a string"),
])  # fmt: skip
def test_what_cant_be_asked_is_refused(folder: Path, arguments: list[str], said: str) -> None:
    (folder / "short.txt").write_text("One sentence. And another.")
    (folder / "wrong.jsonl").write_text('{"text": 3}\n')
    given = [str(folder / each) if each.endswith((".txt", ".jsonl")) else each for each in arguments]
    result = CliRunner().invoke(app, ["retrieval", str(folder / "model"), *given])
    assert isinstance(result.exception, PunaError)
    assert re.search(said, str(result.exception))


def test_bits_by_position_are_the_plain_pass(folder: Path, tokenizer: Tokenizer) -> None:
    model = decoder(ModelConfig(**LLAMA | {"vocab_size": tokenizer.vocab_size}))
    text = " ".join(SENTENCES)[:800]
    count = len(tokenizer.encode(text))
    (band,) = bits_by_position(model, tokenizer, [text], [count])
    assert (band.bits, band.interval) == (pytest.approx(bits_per_byte(model, tokenizer, [text])[0], abs=1e-4), None)
    bands = bits_by_position(model, tokenizer, [" ".join(SENTENCES)], [100, count], most=3)
    assert [(one.first, one.last, one.windows) for one in bands] == [(0, 100, 3), (100, count, 3)]
    assert all(one.interval and one.interval[0] < one.bits < one.interval[1] for one in bands)
    with pytest.raises(PunaError, match="no text has"):
        bits_by_position(model, tokenizer, [text], [count + 1])
    with pytest.raises(PunaError, match="edges that grow"):
        bits_by_position(model, tokenizer, [text], [8, 4])
    result = CliRunner().invoke(app, ["positions", str(folder / "model"), str(folder / "long.jsonl"),
                                      "--edges", "64,128", "--json"])  # fmt: skip
    assert result.exit_code == 0
    assert [one["last"] for one in json.loads(result.output)["bands"]] == [64, 128]
    result = CliRunner().invoke(app, ["positions", str(folder / "model"), str(folder / "long.jsonl"), "--edges", "64"])
    assert result.exit_code == 0
    assert "0 to 63" in result.output


# A language that a small model learns in seconds: keys (upper case) that keep their values (lower case) through a text,
# among digits.
PAIRS, SHORT, LONG = 4, 48, 384


def letters_text(draw: random.Random, length: int, noise: float) -> str:
    pairs = letters_pairs(draw)
    text = ""
    while len(text) < length:
        text += draw.choice(string.digits) if draw.random() < noise else draw.choice(pairs)
    return text[:length]


def letters_pairs(draw: random.Random) -> list[str]:
    keys, values = (draw.sample(letters[:16], PAIRS) for letters in (string.ascii_uppercase, string.ascii_lowercase))
    return [key + value for key, value in zip(keys, values, strict=True)]


def letters_haystack(draw: random.Random, length: int, tokenizer: Tokenizer) -> Haystack:
    """A fact at each of four depths among digits, and each key again at the end."""
    pairs, room = letters_pairs(draw), length - 3 - 2 * PAIRS
    cuts = [round(room * i / (PAIRS - 1)) for i in range(PAIRS)]
    digits = "".join(draw.choice(string.digits) for _ in range(room))
    text = pairs[0] + "".join(digits[a:b] + pair for a, b, pair in zip(cuts, cuts[1:], pairs[1:], strict=False))
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    prompts = tuple((*bos, *tokenizer.encode(text + pair[0])) for pair in pairs)
    return Haystack(prompts, tuple(p[1] for p in pairs), tuple(tuple(tokenizer.encode(p[1])) for p in pairs))


def found_share(folder: Path, length: int) -> float:
    """How many of 48 facts a model finds."""
    llama = puna.load(folder, context=SHORT)
    assert llama.tokenizer is not None
    hays = [letters_haystack(random.Random(seed), length, llama.tokenizer) for seed in range(12)]
    found = [one for hay in hays for one in ask(llama.decoder, llama.tokenizer, hay, length)]
    return cells(found)[-1].exact


def test_a_longer_context_restores_what_a_shorter_one_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUNA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("puna.train.run.draw_curves", lambda *_: None)
    letters = train_tokenizer(["x"], 256 + 64)  # a token a letter
    shape = ModelConfig(**LLAMA | {"vocab_size": letters.vocab_size, "hidden_size": 64, "num_heads": 2, "head_dim": 32,
                                   "intermediate_size": 64, "context_length": SHORT, "rope_theta": 10_000.0},
                        bos_token_id=letters.bos_id, eos_token_ids=letters.eos_ids)  # fmt: skip
    letters.save(tmp_path / "shape")
    (tmp_path / "shape/config.json").write_text(json.dumps(write_config(shape, torch.float32)))
    draw = random.Random(0)
    for name, length, noise, count in (("short", SHORT, 0.3, 4000), ("long", LONG, 0.85, 200)):
        rows = [{"text": letters_text(draw, length, noise)} for _ in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(base: str, name: str, steps: int, length: int, **more: Any) -> Path:
        stages = [{"length": length, "sources": [{"file": f"{name}.jsonl", "packing": "whole"}]}]
        config = checked_config({"steps": steps, "batch_tokens": 1536, "dtype": "float32", "matrix_rate": 0.05,
                                 "vector_rate": 0.01, "warmup": 0.05, "save_every": steps, "stages": stages, **more},
                                "test")  # fmt: skip
        train(tmp_path / base, config, tmp_path, tmp_path / f"{name}-trained")
        return tmp_path / f"{name}-trained"

    short = run("shape", "short", 210, SHORT)
    before = found_share(short, LONG)
    assert found_share(short, SHORT) > 0.6
    assert before < 0.7
    long = run("short-trained", "long", 50, LONG, context={"length": LONG})
    assert found_share(long, SHORT) > 0.85
    assert found_share(long, LONG) > max(0.8, before + 0.2)
