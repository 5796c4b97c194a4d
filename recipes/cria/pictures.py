"""Pictures and questions that teach cria to see: scenes in the manner of NLVR (CC BY 4.0), and Fashion-MNIST (MIT).

A scene is three grey boxes of coloured things. NLVR's own pictures and sentences are split by sentence, one in three
held out by a hash of its number; training adds scenes of our own, drawn in the same way, and statements made from
templates, whose truth is computed from the scene.
"""

import hashlib
import json
import random
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

COLORS = {"yellow": (255, 255, 0), "black": (0, 0, 0), "blue": (0, 153, 255)}
SHAPES = ("square", "circle", "triangle")
SIZES = (10, 20, 30)
WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
CLOTHES = ("a T-shirt", "trousers", "a pullover", "a dress", "a coat", "a sandal", "a shirt", "a sneaker", "a bag",
           "an ankle boot")
ASK_CLOTHES = ("What is this?", "What is in the picture?", "What do you see?", "What kind of clothing is this?")
ASK_TRUE = "Is this true? {}"
ASK_SCENE = "What is in the boxes?"


@dataclass(frozen=True)
class Thing:
    """One thing in a box of 100 x 100: its upper left corner, and the side of the square that holds it."""

    shape: str
    color: str
    x: int
    y: int
    size: int

    def touches(self, side: str = "edge") -> bool:
        """Whether it touches an edge of its box, or the base."""
        base = self.y + self.size >= 99
        return base if side == "base" else base or self.x <= 1 or self.y <= 1 or self.x + self.size >= 99


Box = tuple[Thing, ...]  # a tower from its base upwards, else in no order
Scene = tuple[Box, Box, Box]


@dataclass(frozen=True)
class Sentence:
    """A sentence of NLVR, whether it is true of a scene, and that scene's picture in six orders of its boxes."""

    number: str
    text: str
    true: bool
    scene: Scene
    pictures: tuple[tuple[tuple[int, ...], bytes], ...]  # (order of the scene's boxes, PNG)

    @property
    def held_out(self) -> bool:
        """Decided by a hash of the sentence's number: the same for all its scenes, on every machine."""
        return hashlib.sha256(self.number.encode()).digest()[0] % 3 == 0


def read_nlvr(file: Path) -> list[Sentence]:
    """The sentences of `images/nlvr.tar`."""
    found = []
    with tarfile.open(file) as tar:
        members = {member.name.removeprefix("./"): member for member in tar.getmembers()}

        def content(name: str) -> bytes:
            return tar.extractfile(members[name]).read()  # type: ignore[union-attr]

        for line in content("labels.jsonl").decode().splitlines():
            row: dict[str, Any] = json.loads(line)
            first, second, third = (tuple(Thing(**thing) for thing in box) for box in row["scene"])
            pictures = tuple((tuple(image["boxes"]), content(image["file"])) for image in row["images"])
            number = row["id"].split("-")[1]
            found.append(Sentence(number, row["sentence"], row["label"], (first, second, third), pictures))
    return found


def is_tower(scene: Scene) -> bool:
    """Towers of blocks, as opposed to things strewn about."""
    return all(thing.shape == "square" and thing.size == 20 and thing.x == 40 for box in scene for thing in box)


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene, 400 x 100."""
    image = Image.new("RGB", (400, 100), (128, 128, 128))
    for at, box in enumerate(scene):
        image.paste(_draw_box(box), (150 * at, 0))
    return image


def _draw_box(box: Box) -> Image.Image:
    zoom = 3
    image = Image.new("RGB", (100 * zoom, 100 * zoom), (211, 211, 211))
    pen = ImageDraw.Draw(image)
    for thing in box:
        left, top, side = thing.x * zoom, thing.y * zoom, thing.size * zoom - 1
        fill = COLORS[thing.color]
        if thing.shape == "square":
            pen.rectangle((left, top, left + side, top + side), fill)
        elif thing.shape == "circle":
            pen.ellipse((left, top, left + side, top + side), fill)
        else:
            pen.polygon(((left, top + side), (left + side, top + side), (left + side // 2, top)), fill)
    return image.resize((100, 100), Image.Resampling.BOX)


def invent(chance: random.Random) -> Scene:
    """A scene of our own: seven in ten are towers, as in NLVR."""
    if chance.random() < 0.72:
        return (_tower(chance), _tower(chance), _tower(chance))
    return (_strewn(chance), _strewn(chance), _strewn(chance))


def _tower(chance: random.Random) -> Box:
    colors = [chance.choice(tuple(COLORS)) for _ in range(chance.randint(1, 4))]
    return tuple(Thing("square", color, 40, 80 - 21 * at, 20) for at, color in enumerate(colors))


def _strewn(chance: random.Random) -> Box:
    things: list[Thing] = []
    wanted = chance.randint(1, 7)
    for _ in range(60):
        size = chance.choice(SIZES)
        x, y = (_place(chance, size), _place(chance, size))
        apart = all(abs(x - t.x + (size - t.size) / 2) >= (size + t.size) / 2
                    or abs(y - t.y + (size - t.size) / 2) >= (size + t.size) / 2 for t in things)
        if apart:
            things.append(Thing(chance.choice(SHAPES), chance.choice(tuple(COLORS)), x, y, size))
        if len(things) == wanted:
            break
    return tuple(things)


def _place(chance: random.Random, size: int) -> int:
    return chance.choice((0, 100 - size)) if chance.random() < 0.2 else chance.randint(0, 100 - size)


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


# A template draws its words and gives the statement and its truth.
Template = Callable[[random.Random, Scene], tuple[str, bool]]


def _number(chance: random.Random, most: int) -> tuple[str, Callable[[int], bool], bool]:
    """A number in words or digits with "exactly", "at least"..., its test, and whether it is one."""
    n = chance.randint(1, most)
    text = chance.choice((WORDS[n], str(n)))
    tests: dict[str, Callable[[int], bool]] = {
        "": lambda m: m == n, "exactly ": lambda m: m == n, "only ": lambda m: m == n, "at least ": lambda m: m >= n,
    }
    if n > 1:
        tests["at most "] = lambda m: m <= n
    kind = chance.choice(tuple(tests))
    return f"{kind}{text}", tests[kind], n == 1


def _there(number: tuple[str, Callable[[int], bool], bool], noun: str, rest: str = "") -> str:
    text, _, one = number
    return f"There {'is' if one else 'are'} {text} {noun}{'' if one else 'es' if noun == 'box' else 's'}{rest}"


def _block_count(chance: random.Random, scene: Scene) -> tuple[str, bool]:
    n, heights = chance.randint(1, 4), [len(box) for box in scene]
    blocks = f"{chance.choice(('', 'exactly ')) if n > 1 else ''}{WORDS[n]} block{'s' * (n > 1)}"
    if chance.random() < 0.3:
        return f"There is no tower with {blocks}", n not in heights
    if chance.random() < 0.4:
        number = _number(chance, 3)
        return _there(number, "tower", f" with {blocks}"), number[1](heights.count(n))
    return f"There is a tower with {blocks}", n in heights


def _end_color(chance: random.Random, scene: Scene) -> tuple[str, bool]:
    color, end = chance.choice(tuple(COLORS)), chance.choice(("top", "base"))
    count = sum(box[-1 if end == "top" else 0].color == color for box in scene)
    rest = f" with a {color} block {chance.choice(('at', 'as'))} the {end}"
    if chance.random() < 0.4:
        return f"There is {chance.choice(('a', 'at least one'))} tower{rest}", count >= 1
    number = _number(chance, 3)
    return _there(number, "tower", rest), number[1](count)


def _tall_end_color(chance: random.Random, scene: Scene) -> tuple[str, bool]:
    color, end, n = chance.choice(tuple(COLORS)), chance.choice(("top", "base")), chance.randint(1, 4)
    there = any(len(box) == n and box[-1 if end == "top" else 0].color == color for box in scene)
    blocks = f"{WORDS[n]} block{'s' * (n > 1)}"
    if chance.random() < 0.5:
        return f"The tower with {blocks} has a {color} block at the {end}", there
    return f"There is a tower with {blocks} that has a {color} block at the {end}", there


def _over(chance: random.Random, scene: Scene) -> tuple[str, bool]:
    upper, lower = chance.choice(tuple(COLORS)), chance.choice(tuple(COLORS))
    count = sum(any((b.color, a.color) == (upper, lower) for a, b in pairwise(box)) for box in scene)
    start = chance.choice(("There is a tower", "There is at least one tower"))
    return f"{start} with a {upper} block {chance.choice(('over', 'above'))} a {lower} block", count > 0


def _colors_of_tower(chance: random.Random, scene: Scene) -> tuple[str, bool]:
    color = chance.choice(tuple(COLORS))
    having = [sum(thing.color == color for thing in box) for box in scene]
    kind = chance.randrange(4)
    if kind == 0:
        there = any(n == len(box) for n, box in zip(having, scene, strict=True))
        return f"There is a tower with only {color} blocks", there
    if kind == 1:
        return f"All towers have at least one {color} block", all(having)
    if kind == 2:
        return f"There is a tower without a {color} block", not all(having)
    number = _number(chance, 3)
    text, test, one = number
    return f"There is a tower that has {text} {color} block{'s' * (not one)}", any(map(test, having))


def _block_total(chance: random.Random, scene: Scene) -> tuple[str, bool]:
    color, number = chance.choice(tuple(COLORS)), _number(chance, 6)
    count = sum(thing.color == color for box in scene for thing in box)
    return _there(number, f"{color} block"), number[1](count)


def _kind(chance: random.Random) -> tuple[str, Callable[[Thing], bool]]:
    color = chance.choice((*COLORS, ""))
    shape = chance.choice((*SHAPES, "")) if color else chance.choice(SHAPES)
    noun = shape or chance.choice(("item", "object"))
    return f"{color} {noun}".strip(), lambda t: t.color in (color or t.color) and t.shape in (shape or t.shape)


def _kind_count(chance: random.Random, scene: Scene) -> tuple[str, bool]:
    noun, fits = _kind(chance)
    count = sum(fits(thing) for box in scene for thing in box)
    if chance.random() < 0.35:
        return f"There is a {noun}", count > 0
    number = _number(chance, 6)
    return _there(number, noun), number[1](count)


def _touching(chance: random.Random, scene: Scene) -> tuple[str, bool]:
    noun, fits = _kind(chance)
    side = chance.choice(("edge", "base", "wall"))
    count = sum(fits(thing) and thing.touches(side) for box in scene for thing in box)
    if chance.random() < 0.5:
        return f"There is a {noun} touching the {side}", count > 0
    number = _number(chance, 4)
    if chance.random() < 0.3:
        free = sum(fits(thing) and not thing.touches() for box in scene for thing in box)
        return _there(number, noun, " not touching any edge"), number[1](free)
    return _there(number, noun, f" touching the {side}"), number[1](count)


def _box_with(chance: random.Random, scene: Scene) -> tuple[str, bool]:
    noun, fits = _kind(chance)
    number = _number(chance, 3)
    text, test, one = number
    counts = [sum(map(fits, box)) for box in scene]
    having = f"{text} {noun}{'' if one else 's'}"
    kind = chance.randrange(3)
    if kind == 0:
        return f"There is a box with {having}", any(map(test, counts))
    if kind == 1:
        return f"Each box has {having}", all(map(test, counts))
    outer = _number(chance, 3)
    return _there(outer, "box", f" with {having}"), outer[1](sum(map(test, counts)))


def _box_total(chance: random.Random, scene: Scene) -> tuple[str, bool]:
    n, noun = chance.randint(1, 7), chance.choice(("item", "object"))
    there = any(len(box) == n for box in scene)
    return f"There is a box with {chance.choice(('', 'exactly '))}{WORDS[n]} {noun}{'s' * (n > 1)}", there


def _box_colors(chance: random.Random, scene: Scene) -> tuple[str, bool]:
    colors = set(chance.sample(tuple(COLORS), chance.randint(1, 2)))
    there = any({thing.color for thing in box} == colors for box in scene)
    named = " and ".join(color for color in COLORS if color in colors)
    return f"There is a box with only {named} items", there


TOWERS: tuple[Template, ...] = (_block_count, _end_color, _tall_end_color, _over, _colors_of_tower, _block_total)
STREWN: tuple[Template, ...] = (_kind_count, _kind_count, _touching, _touching, _box_with, _box_total, _box_colors)


def state(chance: random.Random, scene: Scene) -> tuple[str, bool]:
    """A statement about a scene, as often true as false, and whether it is."""
    wanted = chance.random() < 0.5
    templates = TOWERS if is_tower(scene) else STREWN
    for _ in range(30):
        text, true = chance.choice(templates)(chance, scene)
        if true == wanted:
            break
    if chance.random() < 0.3:
        text = text[0].lower() + text[1:]
    return text + chance.choice((".", "")), true


PLACES = ("first", "second", "third")


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
    at, (noun, fits) = chance.randrange(3), _kind(chance)
    things = [thing for box in scene for thing in box]
    kind = chance.randrange(4)
    if kind == 0:
        return f"How many {noun}s are there?", f"{sum(map(fits, things))}."
    if kind == 1:
        return f"How many items are in the {PLACES[at]} box?", f"{len(scene[at])}."
    if kind == 2:
        return f"How many {noun}s are in the {PLACES[at]} box?", f"{sum(map(fits, scene[at]))}."
    return f"How many {noun}s are touching the edge?", f"{sum(fits(thing) and thing.touches() for thing in things)}."


def as_image(png: bytes) -> Image.Image:
    """A picture of NLVR in RGB."""
    return Image.open(BytesIO(png)).convert("RGB")


def reordered(scene: Scene, order: Sequence[int]) -> Scene:
    """The scene with its boxes in the order of a picture."""
    return scene[order[0]], scene[order[1]], scene[order[2]]
