"""Statements about scenes in the idioms of NLVR's training sentences.

A statement is a text and the test that says of which scenes it is true. A number with no word before it is exact, as
NLVR's people meant it.
"""

import random

from about_things import STREWN
from about_towers import TOWERS
from pictures import Scene, is_tower
from wording import Statement


def statement(chance: random.Random, towers: bool) -> Statement:
    """Some statement about scenes of this kind."""
    return chance.choice(TOWERS if towers else STREWN)(chance)


def state(chance: random.Random, scene: Scene) -> tuple[str, bool]:
    """A statement about a scene, as often true as false, and whether it is."""
    wanted = chance.random() < 0.5
    for _ in range(30):
        text, test = statement(chance, is_tower(scene))
        if test(scene) == wanted:
            break
    if chance.random() < 0.4:
        text = text[0].lower() + text[1:]
    return text + chance.choice((".", "")), test(scene)
