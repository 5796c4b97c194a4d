"""How well a model sees what cria was taught to see: `python recipes/cria/judge.py DATA_FOLDER [MODEL] [CLOTHES]`.

Four questions, none of whose pictures or sentences were trained on: NLVR's held-out sentences about their pictures;
statements from our templates about the same pictures, half of those true that say the same; what is in the boxes of
these pictures; Fashion-MNIST's test part (the first CLOTHES pieces, 1,000). An answer is right where it begins with the
right one. Beside each share stand its 95 % interval and what always giving the most frequent answer would reach.
Pictures whose sentences share a number share things, so for them the interval is a bootstrap over numbers.
"""

import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pictures import as_image, is_tower, read_nlvr, reordered
from PIL import Image
from questions import ASK_CLOTHES, ASK_SCENE, ASK_TRUE, describe
from see import NO, YES, clothes_answer
from statements import state

import puna
from puna.evaluate.intervals import wilson


@dataclass(frozen=True)
class Question:
    """A picture, what is asked, the right answer, and what it shares with other questions."""

    image: Image.Image
    text: str
    answer: str
    number: str = ""


def sentences(data: Path) -> list[Question]:
    """NLVR's held-out sentences, each with one of its six pictures."""
    chance = random.Random(0)
    return [Question(as_image(chance.choice(one.pictures)[1]), ASK_TRUE.format(one.text), YES if one.true else NO,
                     one.number) for one in read_nlvr(data / "images/nlvr.tar") if one.held_out]  # fmt: skip


def statements(data: Path) -> list[Question]:
    """Statements from templates, two about each picture of NLVR's held-out sentences."""
    chance, found = random.Random(1), []
    unseen = [one for one in read_nlvr(data / "images/nlvr.tar") if one.held_out]
    others = {towers: [one.scene for one in unseen if is_tower(one.scene) == towers] for towers in (True, False)}
    for one in unseen:
        for _ in range(2):
            order, png = chance.choice(one.pictures)
            text, true = state(chance, reordered(one.scene, order), others[is_tower(one.scene)])
            found.append(Question(as_image(png), ASK_TRUE.format(text), YES if true else NO, one.number))
    return found


def boxes(data: Path) -> list[Question]:
    """What is in the boxes of one picture of each of NLVR's held-out sentences: all three have to be right."""
    chance, found = random.Random(2), []
    for one in (one for one in read_nlvr(data / "images/nlvr.tar") if one.held_out):
        order, png = chance.choice(one.pictures)
        found.append(Question(as_image(png), ASK_SCENE, describe(reordered(one.scene, order)), one.number))
    return found


def clothes(data: Path, count: int) -> list[Question]:
    """The first pieces of Fashion-MNIST's test part."""
    fashion = np.load(data / "images/fashion-mnist.npz")
    pieces = zip(fashion["test_images"][:count], fashion["test_labels"][:count].tolist(), strict=True)
    return [Question(Image.fromarray(image).convert("RGB"), ASK_CLOTHES[0], clothes_answer(label))
            for image, label in pieces]  # fmt: skip


def right(model: Any, question: Question) -> bool:
    """Whether the model's most likely answer begins with the right one."""
    content = [{"type": "image", "image": question.image}, {"type": "text", "text": question.text}]
    reply = model.generate([{"role": "user", "content": content}], max_tokens=120, temperature=0)
    return reply.text.strip().startswith(question.answer)


def interval(questions: Sequence[Question], hits: Sequence[bool]) -> tuple[float, float]:
    """Of the share of hits: Wilson's, or over groups that share a number."""
    groups: dict[str, list[bool]] = {}
    for question, hit in zip(questions, hits, strict=True):
        groups.setdefault(question.number, []).append(hit)
    if len(groups) == 1:
        return wilson(sum(hits), len(hits))
    sizes, sums = (np.array([size(group) for group in groups.values()]) for size in (len, sum))
    drawn = np.random.default_rng(0).integers(0, len(groups), (5000, len(groups)))
    low, high = np.quantile(sums[drawn].sum(1) / sizes[drawn].sum(1), (0.025, 0.975))
    return float(low), float(high)


def main(data: Path, name: str = "cria", count: int = 1000) -> None:
    """Print the four shares."""
    model = puna.load(name)
    for title, questions in (("NLVR sentences", sentences(data)), ("NLVR-style statements", statements(data)),
                             ("boxes described", boxes(data)), ("Fashion-MNIST", clothes(data, count))):  # fmt: skip
        hits = [right(model, question) for question in questions]
        low, high = interval(questions, hits)
        most = Counter(question.answer for question in questions).most_common(1)[0][1]
        print(f"{title}: {np.mean(hits):.1%} right ({low:.1%} to {high:.1%}) of {len(hits):,}; "
              f"always the most frequent answer: {most / len(hits):.1%}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:3], *map(int, sys.argv[3:4]))
