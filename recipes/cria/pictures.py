"""Pictures and questions that teach cria to see: scenes in the manner of NLVR (CC BY 4.0), and Fashion-MNIST (MIT).

A scene is three grey boxes of coloured things. NLVR's own pictures and sentences are split by sentence, one in three
held out by a hash of its number; training adds scenes of our own, drawn in the same way. What is said of them, and
whether it is true, stands in statements.py.
"""

import hashlib
import json
import random
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

COLORS = {"yellow": (255, 255, 0), "black": (0, 0, 0), "blue": (0, 153, 255)}
SHAPES = ("square", "circle", "triangle")
SIZES = (10, 20, 30)
NAMED_SIZES = dict(zip(("small", "medium", "big"), SIZES, strict=True))
SIDES = ("edge", "edge", "edge", "wall", "wall", "wall", "side", "base", "base", "bottom", "corner", "left", "right",
         "top")


@dataclass(frozen=True)
class Thing:
    """One thing in a box of 100 x 100: its upper left corner, and the side of the square that holds it."""

    shape: str
    color: str
    x: int
    y: int
    size: int

    def touches(self, side: str = "edge") -> bool:
        """Whether it touches one of `SIDES` of its box."""
        ends = {"left": self.x <= 1, "right": self.x + self.size >= 99, "top": self.y <= 1,
                "bottom": self.y + self.size >= 99}  # fmt: skip
        if side == "corner":
            return (ends["left"] or ends["right"]) and (ends["top"] or ends["bottom"])
        return ends["bottom" if side == "base" else side] if side in (*ends, "base") else any(ends.values())


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


def as_image(png: bytes) -> Image.Image:
    """A picture of NLVR in RGB."""
    return Image.open(BytesIO(png)).convert("RGB")


def reordered(scene: Scene, order: Sequence[int]) -> Scene:
    """The scene with its boxes in the order of a picture."""
    return scene[order[0]], scene[order[1]], scene[order[2]]
