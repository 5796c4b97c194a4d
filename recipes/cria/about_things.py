"""What is said of things strewn about in boxes, each statement with its meaning."""

import random
from collections.abc import Callable

from pictures import COLORS, NAMED_SIZES, SHAPES, SIDES, Box, Scene, Thing
from wording import EXACT, WORDS, Count, Statement, a, listed, plural, upper

OfBox = tuple[str, Callable[[Box], bool]]  # words that follow "box with", and the boxes that they fit
OfThing = tuple[str, Callable[[Thing], bool]]  # a noun or what follows it, and the things that it fits
NAMES = tuple(COLORS)


def kind_of_thing(chance: random.Random) -> OfThing:
    color = chance.choice((*NAMES, *NAMES, ""))
    shape = chance.choice((*SHAPES, *SHAPES, "", "")) if color else chance.choice(SHAPES)
    size = chance.choice(tuple(NAMED_SIZES)) if chance.random() < 0.08 else ""
    also = chance.choice(NAMES) if color and chance.random() < 0.08 else color
    noun = shape or chance.choice(("item", "object"))
    colors = color if also == color else f"{color} or {also}"
    return (" ".join(word for word in (size, colors, noun) if word),
            lambda t: (not color or t.color in (color, also)) and t.shape in (shape or t.shape)
            and t.size == NAMED_SIZES.get(size, t.size))


def _touch(chance: random.Random) -> OfThing:
    closely, side = chance.choice(("", "", "closely ")), chance.choice(SIDES)
    if side in ("edge", "wall", "side") and chance.random() < 0.3:
        return f"not touching {chance.choice(('any', 'the'))} {side}", lambda t: not t.touches(side)
    words = {"bottom": "the bottom of a box", "corner": chance.choice(("a corner of a box", "the corner")),
             "left": "the left wall of a box", "right": "right wall of a box", "top": "the top of a box"}  # fmt: skip
    return f"{closely}touching {words.get(side, f'the {side}')}", lambda t: t.touches(side)


def _what(chance: random.Random, touching: float) -> tuple[str, str, Callable[[Thing], bool]]:
    """A noun, words after it, and which things fit both."""
    noun, fits = kind_of_thing(chance)
    if chance.random() > touching:
        return noun, "", fits
    words, touches = _touch(chance)
    color = chance.choice(NAMES)
    if chance.random() < 0.06:
        return noun, f" {words} that is not {color}", lambda t: fits(t) and touches(t) and t.color != color
    return noun, f"{chance.choice(('', '', '', '', ' that is'))} {words}", lambda t: fits(t) and touches(t)


def _total(scene: Scene, fits: Callable[[Thing], bool]) -> int:
    return sum(fits(thing) for box in scene for thing in box)


def _a_thing(chance: random.Random) -> Statement:
    noun, rest, fits = _what(chance, 0.7)
    if chance.random() < 0.2:
        return f"There is no {noun}{rest}", lambda scene: not _total(scene, fits)
    start = chance.choice((a(noun), a(noun), f"at least one {noun}", f"at least 1 {noun}"))
    return f"There is {start}{rest}", lambda scene: _total(scene, fits) > 0


def _things(chance: random.Random) -> Statement:
    (noun, rest, fits), count = _what(chance, 0.6), Count.draw(chance, 5)
    return count.there(noun, rest), lambda scene: count.test(_total(scene, fits))


def _each_touches(chance: random.Random) -> Statement:
    (noun, fits), (words, touches) = kind_of_thing(chance), _touch(chance)
    if words.startswith("not") or chance.random() < 0.4:
        who = chance.choice(("All the ", "All ", ""))
        return (upper(f"{who}{plural(noun)} are {words}"),
                lambda scene: all(touches(t) for box in scene for t in box if fits(t)))
    return (f"None of the {plural(noun)} are {words}",
            lambda scene: not _total(scene, lambda t: fits(t) and touches(t)))


def _in_box(chance: random.Random) -> OfBox:
    kind = chance.randrange(8)
    (noun, rest, fits), count = _what(chance, 0.25), Count.draw(chance, 3)
    if kind < 2:
        return f"{count.of(noun)}{rest}", lambda box: count.test(sum(map(fits, box)))
    if kind == 2:
        size = Count.draw(chance, 7, EXACT)
        return size.of(chance.choice(("item", "object"))), lambda box: size.test(len(box))
    if kind == 3:
        nouns = [kind_of_thing(chance) for _ in range(chance.randint(2, 3))]
        return (listed([a(noun) for noun, _ in nouns]),
                lambda box: all(any(map(fits, box)) for _, fits in nouns))
    if kind == 4:
        some = tuple(chance.sample(NAMES, chance.randint(1, 2)))
        words = (f"only {listed(some)} items", f"items of only {listed(some)} color")
        return chance.choice(words), lambda box: {t.color for t in box} == set(some)
    if kind == 5:
        n = chance.choice((1, 3))
        words = ("items of only one color", "items of all 3 different colors", "items of all three colors")
        return words[0] if n == 1 else chance.choice(words[1:]), lambda box: len({t.color for t in box}) == n
    if kind == 6:
        n, some = chance.randint(2, 6), tuple(chance.sample(NAMES, chance.randint(1, 3)))
        colors = f"only {listed(some)}" if len(some) < 3 else chance.choice(("all 3 different", "all three"))
        number = f"{chance.choice(('', 'only ', 'exactly '))}{chance.choice((WORDS[n], str(n)))}"
        return f"{number} items of {colors} color{'s' * (len(some) > 2)}", lambda box: (
            len(box) == n and {t.color for t in box} == set(some))
    other, also = kind_of_thing(chance)
    return (f"{a(noun)}{rest} and {count.of(other)}",
            lambda box: any(map(fits, box)) and count.test(sum(map(also, box))))


def _boxes(chance: random.Random) -> Statement:
    (words, fits), count = _in_box(chance), Count.draw(chance, 3)
    noun = chance.choice(("box", "box", "box", "grey box", "grey square"))
    kind = chance.randrange(4)
    if kind < 2:
        rest = f"{noun} {chance.choice(('with', 'with', 'with', 'that has', 'which has', 'containing'))} {words}"
        return f"There is {chance.choice(('a', 'a', 'at least one'))} {rest}", lambda scene: any(map(fits, scene))
    if kind == 2:
        return count.there(noun, f" with {words}"), lambda scene: count.test(sum(map(fits, scene)))
    if chance.random() < 0.5:
        rest = f"{chance.choice((plural(noun), noun))} {chance.choice(('has', 'contains'))} {words}"
        return f"One of the {rest}", lambda scene: any(map(fits, scene))
    return f"{chance.choice(('Each', 'Every'))} {noun} has {words}", lambda scene: all(map(fits, scene))


def _in_each(chance: random.Random) -> Statement:
    (noun, fits), count = kind_of_thing(chance), Count.draw(chance, 3, ("exactly ", "at least ", "at least "))
    return (count.there(noun, f" in {chance.choice(('each', 'every'))} box"),
            lambda scene: all(count.test(sum(map(fits, box))) for box in scene))


STREWN = (_a_thing, _a_thing, _a_thing, _things, _things, _things, _things, _each_touches, _boxes, _boxes, _boxes,
          _in_each)
