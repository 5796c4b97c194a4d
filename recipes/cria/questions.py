"""What cria is asked about pictures in training, and the right answers."""

import random

from about_things import kind_of_thing
from pictures import COLORS, SHAPES, Box, Scene, is_tower
from wording import WORDS

CLOTHES = ("a T-shirt", "trousers", "a pullover", "a dress", "a coat", "a sandal", "a shirt", "a sneaker", "a bag",
           "an ankle boot")
ASK_CLOTHES = ("What is this?", "What is in the picture?", "What do you see?", "What kind of clothing is this?")
ASK_TRUE = "Is this true? {}"
ASK_SCENE = "What is in the boxes?"
PLACES = ("first", "second", "third")


def describe(scene: Scene) -> str:
    """What is in each box, in words."""
    return " ".join(f"{name} box: {_describe(box, is_tower(scene))}."
                    for name, box in zip(("First", "Second", "Third"), scene, strict=True))


def _describe(box: Box, tower: bool) -> str:
    if tower:
        return "from the base " + ", ".join(thing.color for thing in box)
    kinds = [(color, shape) for color in COLORS for shape in SHAPES]
    counted = [(sum((t.color, t.shape) == kind for t in box), *kind) for kind in kinds]
    return ", ".join(f"{WORDS[n]} {color} {shape}{'s' * (n > 1)}" for n, color, shape in counted if n)


def ask(chance: random.Random, scene: Scene) -> tuple[str, str]:
    """A question about a scene, and its answer: a number or a colour."""
    return (_ask_towers if is_tower(scene) else _ask_strewn)(chance, scene)


def _ask_towers(chance: random.Random, scene: Scene) -> tuple[str, str]:
    at, color, end = chance.randrange(3), chance.choice(tuple(COLORS)), chance.choice(("top", "base"))
    ends = [box[-1 if end == "top" else 0].color for box in scene]
    kind = chance.randrange(5)
    if kind == 0:
        return f"How many blocks has the {PLACES[at]} tower?", f"{len(scene[at])}."
    if kind == 1:
        return f"What color is the block at the {end} of the {PLACES[at]} tower?", f"{ends[at].capitalize()}."
    if kind == 2:
        return f"How many {color} blocks are there?", f"{sum(t.color == color for box in scene for t in box)}."
    if kind == 3:
        return f"How many towers have a {color} block at the {end}?", f"{ends.count(color)}."
    return (f"How many {color} blocks are in the {PLACES[at]} tower?",
            f"{sum(thing.color == color for thing in scene[at])}.")


def _ask_strewn(chance: random.Random, scene: Scene) -> tuple[str, str]:
    at, (noun, fits) = chance.randrange(3), kind_of_thing(chance)
    things = [thing for box in scene for thing in box]
    kind = chance.randrange(4)
    if kind == 0:
        return f"How many {noun}s are there?", f"{sum(map(fits, things))}."
    if kind == 1:
        return f"How many items are in the {PLACES[at]} box?", f"{len(scene[at])}."
    if kind == 2:
        return f"How many {noun}s are in the {PLACES[at]} box?", f"{sum(map(fits, scene[at]))}."
    return f"How many {noun}s are touching the edge?", f"{sum(fits(thing) and thing.touches() for thing in things)}."
