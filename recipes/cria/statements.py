"""Statements about scenes in the idioms of NLVR's training sentences.

A statement is a text and the test that says of which scenes it is true. A number with no word before it is exact, as
NLVR's people meant it.
"""

import random
from collections.abc import Sequence
from functools import cache

from about_things import STREWN
from about_towers import TOWERS
from pictures import Scene, invent, is_tower
from wording import Statement

OTHERS = 60  # scenes that a statement is tried on


def statement(chance: random.Random, towers: bool) -> Statement:
    """Some statement about scenes of this kind."""
    return chance.choice(TOWERS if towers else STREWN)(chance)


def state(chance: random.Random, scene: Scene, others: Sequence[Scene] | None = None) -> tuple[str, bool]:
    """A statement about a scene, and whether it is true, which its words don't tell.

    What is true of a share p of scenes (of `others`, of the same kind; by default of our own) is kept with probability
    1 - p where it is true of this one, and with p where it is not: then half of those who say the same thing are right.
    """
    others = others or _some(is_tower(scene))
    while True:
        text, test = statement(chance, is_tower(scene))
        true = test(scene)
        share = sum(map(test, others)) / len(others)
        if chance.random() < (1 - share if true else share):
            break
    if chance.random() < 0.4:
        text = text[0].lower() + text[1:]
    return text + chance.choice((".", "")), true


@cache
def _some(towers: bool) -> tuple[Scene, ...]:
    chance, found = random.Random(0), []
    while len(found) < OTHERS:
        scene = invent(chance)
        if is_tower(scene) == towers:
            found.append(scene)
    return tuple(found)
