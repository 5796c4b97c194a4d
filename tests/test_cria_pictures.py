"""The scenes and statements that cria learns to see from."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "recipes" / "cria"))

import pictures  # noqa: E402
from pictures import Thing, ask, describe, draw, invent, is_tower, read_nlvr, reordered, state  # noqa: E402

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
             "There is no tower with three blocks", "The tower with two blocks has a blue block at the top",
             "There is a tower with a yellow block over a blue block", "There are 2 blue blocks",
             "There is a tower with only yellow blocks", "There is a tower without a black block",
             "There is at least one tower with a black block above a black block"},
    STREWN: {"There are exactly three circles", "There is a blue circle touching the wall", "There is a yellow circle",
             "There is a box with only black items", "There is a triangle touching the base",
             "There are at least two items not touching any edge", "Each box has at least 1 item",
             "There is one blue circle touching the edge", "There is a box with exactly one item"},
}  # fmt: skip
FALSE = {
    TOWERS: {"There are exactly two towers with four blocks", "All towers have at least one black block",
             "There is a tower with a blue block over a black block at the base", "There is one yellow block",
             "There is a tower with three blocks", "There is a tower with a black block at the top"},
    STREWN: {"There are exactly two circles", "There is a black square", "There is a blue circle touching the base",
             "There is a box with only black and blue items", "Each box has one circle",
             "There is a box with three items"},
}  # fmt: skip


@pytest.mark.parametrize("scene", [TOWERS, STREWN], ids=["towers", "strewn"])
def test_statements_are_judged_as_a_reader_would(scene: pictures.Scene) -> None:
    chance = random.Random(0)
    said: dict[str, bool] = {}
    for _ in range(20_000):
        text, true = state(chance, scene)
        text = text[0].upper() + text[1:].rstrip(".")
        assert said.setdefault(text, true) == true, text
    for expected, sentences in ((True, TRUE[scene]), (False, FALSE[scene])):
        found = sentences & said.keys()
        assert len(found) >= len(sentences) - 2
        assert {said[text] for text in found} == {expected}


def test_half_of_all_statements_are_true() -> None:
    chance = random.Random(1)
    truths = [state(chance, invent(chance))[1] for _ in range(4000)]
    assert 0.47 < np.mean(truths) < 0.53


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
