"""The scenes and statements that cria learns to see from."""

import random
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "recipes" / "cria"))

import pictures  # noqa: E402
from pictures import Thing, draw, invent, is_tower, read_nlvr, reordered  # noqa: E402
from questions import ask, describe  # noqa: E402
from see import Divergence  # noqa: E402
from statements import state, statement  # noqa: E402

NLVR = ROOT.parent / "shared" / "data" / "images" / "nlvr.tar"
TOWERS = tuple(tuple(Thing("square", color, 40, 80 - 21 * at, 20) for at, color in enumerate(colors.split()))
               for colors in ("yellow blue", "black black blue yellow", "yellow"))  # fmt: skip
STREWN = (
    (Thing("circle", "blue", 0, 40, 10), Thing("circle", "blue", 50, 50, 20)),
    (Thing("triangle", "black", 30, 70, 30),),
    (Thing("square", "yellow", 20, 20, 30), Thing("circle", "yellow", 60, 60, 10)),
)
TRUE = {
    TOWERS: {"There is a tower with four blocks", "There are exactly two towers with a yellow block at the top",
             "There is no tower with exactly three blocks", "The tower with two blocks has a blue block at the top",
             "There is a tower with a yellow block on top of a blue block", "There are 2 blue blocks",
             "There is a tower with only yellow blocks", "There is a yellow tower", "Two towers have a yellow base",
             "There is at least one tower with a black block above a black block",
             "There is a yellow block as the base of a tower with exactly one block",
             "There is a tower where the second block is blue"},
    STREWN: {"There are exactly three circles", "There is a blue circle touching the wall", "There is a yellow circle",
             "There is a box with only black items", "There is a triangle touching the base",
             "There is one blue circle touching the edge", "There is a box with exactly one item",
             "There is at least 1 item in each box", "There is a box with a yellow square and a yellow circle",
             "None of the squares are touching the edge", "All yellow circles are not touching any edge",
             "One of the grey squares contains exactly one object"},
}  # fmt: skip
FALSE = {
    TOWERS: {"There are exactly two towers with four blocks", "All towers have a black block",
             "There is a black block over a blue block", "There is one yellow block", "There is a black tower",
             "There is a tower with three blocks", "There is a tower with a black block at the top",
             "The three block tower has a yellow base", "There are two towers with a black base"},
    STREWN: {"There are exactly two circles", "There is a black square", "There is a blue circle touching the base",
             "There is a box with only black and blue items", "Each box has one circle",
             "All circles are touching the wall", "There is a box with three items",
             "There is a square touching the corner"},
}  # fmt: skip


@pytest.fixture(scope="module")
def meanings() -> dict[tuple[str, bool], Callable[[pictures.Scene], bool]]:
    """Of many statements in lower case, about towers or not, the scenes of which they are true."""
    chance = random.Random(0)
    return {
        (text.lower(), towers): test
        for _ in range(30_000)
        for towers in (True, False)
        for text, test in [statement(chance, towers)]
    }


@pytest.mark.parametrize("scene", [TOWERS, STREWN], ids=["towers", "strewn"])
def test_statements_are_judged_as_a_reader_would(
    scene: pictures.Scene, meanings: dict[tuple[str, bool], Callable[[pictures.Scene], bool]]
) -> None:
    for expected, sentences in ((True, TRUE[scene]), (False, FALSE[scene])):
        found = {text for text in sentences if (text.lower(), is_tower(scene)) in meanings}
        assert len(found) >= len(sentences) - 3
        assert {text for text in found if meanings[text.lower(), is_tower(scene)](scene) != expected} == set()


def test_words_do_not_tell_whether_a_statement_is_true() -> None:
    """Half are, and guessing by what was mostly true of like words, colours aside, is hardly better than a coin."""
    chance, asked = random.Random(1), []
    for _ in range(1500):
        scene = invent(chance)
        asked += [(re.sub("yellow|black|blue", "red", text.lower()), true)
                  for text, true in (state(chance, scene), state(chance, scene))]  # fmt: skip
    assert 0.46 < np.mean([true for _, true in asked]) < 0.54
    counts: dict[str, list[int]] = {}
    for text, true in asked[:1500]:
        counts.setdefault(text.rstrip("."), [0, 0])[true] += 1
    guesses = [(counts[key][1] > counts[key][0]) == true for text, true in asked[1500:]
               if (key := text.rstrip(".")) in counts and counts[key][0] != counts[key][1]]  # fmt: skip
    assert len(guesses) > 300
    assert np.mean(guesses) < 0.56


def test_questions_and_descriptions() -> None:
    assert describe(TOWERS) == ("First box: from the base yellow, blue. Second box: from the base black, black, blue, "
                                "yellow. Third box: from the base yellow.")  # fmt: skip
    assert describe(STREWN) == ("First box: two blue circles. Second box: one black triangle. Third box: one yellow "
                                "square, one yellow circle.")  # fmt: skip
    chance = random.Random(2)
    asked = dict(ask(chance, scene) for scene in (TOWERS, STREWN) for _ in range(2000))
    assert asked["How many blocks has the second tower?"] == "4."
    assert asked["What color is the block at the base of the first tower?"] == "Yellow."
    assert asked["How many towers have a yellow block at the top?"] == "2."
    assert asked["How many blue circles are there?"] == "2."
    assert asked["How many circles are touching the edge?"] == "1."
    assert asked["How many items are in the third box?"] == "2."


def test_things_do_not_lie_on_each_other() -> None:
    chance = random.Random(3)
    for scene in (invent(chance) for _ in range(300)):
        image = np.asarray(draw(scene))
        assert image.shape == (100, 400, 3)
        for at, box in enumerate(scene):
            colored = (image[:, 150 * at : 150 * at + 100] != 211).any(2).sum()
            share = {"square": 1, "circle": np.pi / 4, "triangle": 0.5}
            area = sum(share[thing.shape] * thing.size**2 for thing in box)
            assert abs(colored - area) < 0.3 * area + 12
        assert is_tower(scene) == all(len({thing.x for thing in box} | {40}) == 1 for box in scene)


@pytest.mark.skipif(not NLVR.is_file(), reason="NLVR's pictures are not here")
def test_our_drawings_are_nlvr_s() -> None:
    rows = read_nlvr(NLVR)
    assert len(rows) == 989
    held_out = {row.number for row in rows if row.held_out}
    assert 0.25 < sum(row.held_out for row in rows) / len(rows) < 0.42
    assert not held_out & {row.number for row in rows if not row.held_out}
    for row in rows[::40]:
        order, png = row.pictures[3]
        theirs = np.asarray(pictures.as_image(png)).astype(int)
        assert np.abs(np.asarray(draw(reordered(row.scene, order))) - theirs).mean() < 0.5


@pytest.mark.skipif(not NLVR.is_file(), reason="NLVR's pictures are not here")
def test_statements_mean_what_nlvr_s_people_meant(
    meanings: dict[tuple[str, bool], Callable[[pictures.Scene], bool]],
) -> None:
    """Where our statements use the very words of a training sentence, they agree with what people said of its scene."""
    seen = [row for row in read_nlvr(NLVR) if not row.held_out]
    agree = [
        meanings[key](row.scene) == row.true
        for row in seen
        if (key := (row.text.lower().strip(" ."), is_tower(row.scene))) in meanings
    ]
    assert len(agree) > 0.4 * len(seen)
    assert np.mean(agree) > 0.98


def test_divergence_and_its_gradient_are_pytorch_s() -> None:
    torch.manual_seed(0)
    wanted, states, weight = torch.randn(300, 16), torch.randn(300, 16, requires_grad=True), torch.randn(40, 16)
    expected = torch.nn.functional.kl_div(
        (states @ weight.T).log_softmax(-1), (wanted @ weight.T).log_softmax(-1), log_target=True, reduction="batchmean"
    )
    gradient = torch.autograd.grad(3 * expected, states)[0]
    found = Divergence.apply(wanted, states, weight)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(3 * found, states)[0], gradient)
