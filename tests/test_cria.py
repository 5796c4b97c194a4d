"""The bundled model: its size, its words, its eyes, and its held-out score."""

import json
import lzma
import random
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import torch
from PIL import Image

import puna
from puna.checkpoint import load
from puna.engine import Model
from puna.train.evaluate import bits_per_byte

DATA = Path(__file__).parents[2] / "shared" / "data"
FOLDER = Path(str(resources.files("puna"))) / "data" / "cria"
sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "cria"))


@pytest.fixture(scope="module")
def cria() -> Model:
    return puna.load("cria")


def test_it_fits_its_size_and_has_a_card() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 24_000_000
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for word in ("bits per byte", "Wikipedia", "CC BY-SA", "wrong about the world", "compute", "Fashion-MNIST", "NLVR"):
        assert word in card


def test_it_is_a_llama4(cria: Model) -> None:
    config = cria.config
    assert config.architecture == "llama4"
    assert len(config.moe_layers) == config.num_layers
    assert config.nope_layers
    assert config.attention_chunk_size
    assert config.attention_chunk_size < config.context_length


@pytest.mark.parametrize("question", ["Hello!", "What is a volcano?", "Tell me about France.", "Who are you?"])
def test_it_answers_in_whole_words(cria: Model, question: str) -> None:
    """As `puna chat` asks it; greedy it may loop, which its card says."""
    reply = cria.generate([{"role": "user", "content": question}], repetition_penalty=1.1, seed=1, max_tokens=60)
    words = re.findall(r"[A-Za-z]+", reply.text)
    assert len(words) >= 5
    assert reply.text.replace("\xa0", " ").isprintable() or "\n" in reply.text  # articles write 5\xa0km so
    assert not set(reply.token_ids[:-1]) & cria.tokenizer.control_ids


def test_it_names_itself_and_ends(cria: Model) -> None:
    reply = cria.generate([{"role": "user", "content": "Who are you?"}], temperature=0, max_tokens=100)
    assert "cria" in reply.text
    assert reply.finish_reason == "stop"


def test_a_second_turn_follows_the_first(cria: Model) -> None:
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello! I am cria."},
            {"role": "user", "content": "What is a guitar?"}]  # fmt: skip
    reply = cria.generate(talk, temperature=0, max_tokens=60)
    assert len(reply.text) > 20


def test_ten_words_of_english_are_no_surprise(cria: Model) -> None:
    """Far below the 8 bits of a random byte, without any data at hand."""
    texts = ["The city is located in the north of the country and has a population of about ten thousand people."]
    assert bits_per_byte(load(FOLDER).model, cria.tokenizer, texts)[0] < 2.0


@pytest.mark.skipif(not DATA.exists(), reason="../shared/data is not here: held-out articles can't be scored")
def test_held_out_articles(cria: Model) -> None:
    """First 1,500 characters of articles that the recipe held out: at most what the card claims, give or take."""
    from prepare import held_out

    texts = []
    with lzma.open(DATA / "text" / "wikipedia-2.jsonl.xz", "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if held_out(row["title"]):
                texts.append(row["text"][:1500])
            if len(texts) == 40:
                break
    claimed = float(re.search(r"\*\*([0-9.]+) bits per byte", (FOLDER / "README.md").read_text("utf-8"))[1])
    torch.set_num_threads(1)
    score, error = bits_per_byte(load(FOLDER).model, cria.tokenizer, texts)
    assert score <= claimed + 3 * error


def test_it_sees_towers(cria: Model) -> None:
    """What the boxes of drawn pictures hold, block by block; few boxes can be right by guessing."""
    from pictures import draw, invent, is_tower
    from questions import ASK_SCENE, describe

    chance, hits = random.Random(4), []
    for scene in [scene for scene in (invent(chance) for _ in range(12)) if is_tower(scene)]:
        said, held = (text.split(". ") for text in (_seen(cria, draw(scene), ASK_SCENE), describe(scene)))
        hits += [say.strip(".") == hold.strip(".") for say, hold in zip(said, held, strict=False)]
    assert len(hits) >= 18
    assert sum(hits) / len(hits) >= 0.6


def test_it_judges_statements_about_pictures(cria: Model) -> None:
    """With yes or no, for drawn towers; half of them are true, whatever their words."""
    from pictures import draw, invent, is_tower
    from questions import ASK_TRUE
    from statements import state

    chance, hits = random.Random(5), []
    for scene in [scene for scene in (invent(chance) for _ in range(80)) if is_tower(scene)]:
        text, true = state(chance, scene)
        said = _seen(cria, draw(scene), ASK_TRUE.format(text))
        assert said in ("Yes.", "No.")
        hits.append(said == ("Yes." if true else "No."))
    assert sum(hits) / len(hits) >= 0.57


def test_pictures_leave_text_alone(cria: Model) -> None:
    """Text alone goes without the tower; another picture gives another answer."""
    from pictures import draw, invent, is_tower
    from questions import ASK_SCENE

    chance = random.Random(6)
    first, second = [draw(scene) for scene in (invent(chance) for _ in range(8)) if is_tower(scene)][:2]
    assert _seen(cria, first, ASK_SCENE) != _seen(cria, second, ASK_SCENE)
    assert cria.prepare([{"role": "user", "content": ASK_SCENE}]).pixel_values is None


def _seen(cria: Model, picture: Image.Image, question: str) -> str:
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    return cria.generate([{"role": "user", "content": content}], temperature=0, max_tokens=90).text.strip()


@pytest.mark.skipif(not DATA.exists(), reason="../shared/data is not here: held-out pictures can't be shown")
def test_held_out_clothes(cria: Model) -> None:
    """At least what the card claims, give or take two standard errors, of 60 pieces."""
    from judge import clothes, right

    claimed = re.search(r"Fashion-MNIST's test part.*?\*\*([0-9.]+) %", (FOLDER / "README.md").read_text("utf-8"))
    share = float(claimed[1]) / 100
    hits = sum(right(cria, question) for question in clothes(DATA, 60))
    assert hits / 60 > share - 2 * (share * (1 - share) / 60) ** 0.5


def test_make_chat_speaks_first_of_its_size() -> None:
    """The command of `make chat`, as a pipe."""
    done = subprocess.run([Path(sys.executable).parent / "puna", "chat", "cria", "--max-tokens", "20", "--seed", "1"],
                          input="Hello\n", text=True, capture_output=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    first = (done.stdout + done.stderr).splitlines()[0]
    assert "very small" in first
