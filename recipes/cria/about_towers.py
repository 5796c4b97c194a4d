"""What is said of towers of blocks, each statement with its meaning."""

import random
from collections.abc import Callable
from itertools import pairwise

from pictures import COLORS, Box
from wording import EXACT, WORDS, Count, Statement, listed, upper

OfTower = tuple[str, Callable[[Box], bool]]  # words that follow "tower with", and the towers that they fit
NAMES = tuple(COLORS)
ORDER = ("first", "second", "third", "fourth")


def _size(chance: random.Random) -> OfTower:
    count = Count.draw(chance, 4, ("", "", "exactly ", "only ", "at least ", "more than "))
    return count.of(_block(chance)), lambda box: count.test(len(box))


def _end(chance: random.Random) -> OfTower:
    color, top = chance.choice(NAMES), chance.random() < 0.5
    end = "top" if top else "base"
    one = chance.choice(("a", "a", "a", "a", "1"))
    words = [f"{one} {color} block {chance.choice(('at', 'as'))} the {end}", f"{color} block at the {end}"]
    words.append(f"a {color} {_block(chance)} on top" if top else f"a {color} base")
    return chance.choice(words), lambda box: box[-top].color == color


def _over(chance: random.Random) -> OfTower:
    upper, lower, by = chance.choice(NAMES), chance.choice(NAMES), chance.choice(("over", "above", "on top of", "on"))
    return (f"a {upper} block {by} a {lower} block",
            lambda box: any((low.color, up.color) == (lower, upper) for low, up in pairwise(box)))


def _colored(chance: random.Random) -> OfTower:
    color, count = chance.choice(NAMES), Count.draw(chance, 3)
    return count.of(f"{color} {_block(chance)}"), lambda box: count.test(_having(box, color))


def _stacked(chance: random.Random) -> OfTower:
    color = chance.choice(NAMES)
    return (f"{chance.choice(('2', 'two'))} {color} blocks stacked together",
            lambda box: any(low.color == up.color == color for low, up in pairwise(box)))


def _palette(chance: random.Random) -> OfTower:
    kind, some = chance.randrange(5), tuple(chance.sample(NAMES, chance.randint(1, 3)))
    if kind == 0:
        return f"only {listed(some)} blocks", lambda box: {t.color for t in box} <= set(some)
    if kind == 1:
        words = ("only one color", "blocks of only one color", "all blocks of the same color")
        return chance.choice(words), lambda box: len({t.color for t in box}) == 1
    if kind == 2:
        words = ("blocks of all 3 colors", "all three colors", "all 3 colors", "three different colors")
        return chance.choice(words), lambda box: len({t.color for t in box}) == 3
    if kind == 3:
        return f"{listed(some[:1])} blocks", lambda box: _having(box, some[0]) > 0
    return listed([f"a {color} block" for color in some]), lambda box: set(some) <= {t.color for t in box}


def _both(chance: random.Random) -> OfTower:
    if chance.random() < 0.15:
        n, color = chance.randint(1, 3), chance.choice(NAMES)
        return (f"only {WORDS[n]} block{' which is' if n == 1 else 's which are'} {color}",
                lambda box: len(box) == n == _having(box, color))
    (size, fits), (rest, also) = _size(chance), chance.choice((_end, _end, _over, _colored, _palette))(chance)
    return f"{size} {chance.choice(('and', 'with'))} {rest}", lambda box: fits(box) and also(box)


def _block(chance: random.Random) -> str:
    return chance.choice(("block", "block", "block", "item", "square"))


def _having(box: Box, color: str) -> int:
    return sum(thing.color == color for thing in box)


OF_TOWER = (_size, _end, _end, _end, _over, _over, _colored, _colored, _stacked, _palette, _palette, _both)


def _tower(chance: random.Random) -> str:
    return chance.choice(("tower", "tower", "tower", "box"))


def _with(chance: random.Random, one: bool) -> str:
    has = "has" if one else "have"
    return chance.choice(("with", "with", "with", "with", "having", f"that {has}", f"which {has}",
                          "that contains" if one else "that contain"))  # fmt: skip


def _a_tower(chance: random.Random) -> Statement:
    words, fits = chance.choice(OF_TOWER)(chance)
    rest = f"{_tower(chance)} {_with(chance, True)} {words}"
    if chance.random() < 0.15:
        return f"There is no {rest}", lambda scene: not any(map(fits, scene))
    return f"There is {chance.choice(('a', 'a', 'at least one', 'at least 1'))} {rest}", lambda s: any(map(fits, s))


def _towers(chance: random.Random) -> Statement:
    (words, fits), count = chance.choice(OF_TOWER)(chance), Count.draw(chance, 3)
    rest = f" {_with(chance, count.one)} {words}"
    return count.there(_tower(chance), rest), lambda scene: count.test(sum(map(fits, scene)))


def _towers_have(chance: random.Random) -> Statement:
    (words, fits), count = chance.choice(OF_TOWER)(chance), Count.draw(chance, 3)
    if chance.random() < 0.4:
        who = chance.choice(("All towers have", "All 3 towers have", "All the towers have", "Each tower has"))
        return f"{who} {words}", lambda scene: all(map(fits, scene))
    who = f"{count.text} of the towers" if chance.random() < 0.4 else count.of("tower")
    return f"{upper(who)} {'has' if count.one else 'have'} {words}", lambda scene: count.test(sum(map(fits, scene)))


def _the_tower(chance: random.Random) -> Statement:
    n, (words, fits) = chance.randint(1, 4), chance.choice((_end, _end, _over, _colored, _palette))(chance)
    blocks = f"block{'s' * (n > 1)}"
    who = chance.choice((f"The tower with {WORDS[n]} {blocks}", f"The {WORDS[n]} {blocks} tower",
                         f"The {WORDS[n]} block tower", f"There is a {WORDS[n]} {blocks} tower that"))  # fmt: skip
    return f"{who} has {words}", lambda scene: any(len(box) == n and fits(box) for box in scene)


def _is_colored(chance: random.Random) -> Statement:
    n, color, top = chance.randint(1, 4), chance.choice(NAMES), chance.random() < 0.5
    blocks, end = f"{WORDS[n]} block{'s' * (n > 1)}", "top" if top else "base"
    if chance.random() < 0.3:
        return (f"There is a {color} tower",
                lambda scene: any(all(thing.color == color for thing in box) for box in scene))
    if chance.random() < 0.3:
        at = chance.randrange(1, 4)
        where = f"{chance.choice(('where', 'that'))} the {ORDER[at]} block{chance.choice(('', ' from the base'))}"
        count = Count.draw(chance, 2, (*EXACT, "at least "))
        if chance.random() < 0.5:
            count = Count("a", lambda n: n > 0, True)
        return (count.there("tower", f" {where} is {color}"),
                lambda scene: count.test(sum(len(box) > at and box[at].color == color for box in scene)))
    return (f"The {end} of {chance.choice(('a', 'the'))} {blocks} tower is {color}",
            lambda scene: any(len(box) == n and box[-top].color == color for box in scene))


def _blocks_as(chance: random.Random) -> Statement:
    color, count, top = chance.choice(NAMES), Count.draw(chance, 3), chance.random() < 0.5
    end, (words, fits) = ("top" if top else "base"), _size(chance)
    place = f" {chance.choice(('as', 'as', 'at'))} the {end} of a tower"
    if chance.random() < 0.2:
        return f"There is a {color} block{place}", lambda scene: any(box[-top].color == color for box in scene)
    if chance.random() < 0.6:
        return (f"There is a {color} block{place} with {words}",
                lambda scene: any(box[-top].color == color and fits(box) for box in scene))
    return (count.there(f"{color} block", place),
            lambda scene: count.test(sum(box[-top].color == color for box in scene)))


def _any_over(chance: random.Random) -> Statement:
    words, fits = chance.choice((_over, _over, _end))(chance)
    return f"There is {words}", lambda scene: any(map(fits, scene))


def _block_total(chance: random.Random) -> Statement:
    color, count = chance.choice(NAMES), Count.draw(chance, 6)
    if chance.random() < 0.2:
        return (f"There is a {color} {_block(chance)} touching the {chance.choice(('wall', 'edge', 'base'))}",
                lambda scene: any(box[0].color == color for box in scene))
    if chance.random() < 0.3:
        wall = chance.choice((" touching the wall", " touching the base", " touching the edge"))
        return (count.there(f"{color} {_block(chance)}", wall),
                lambda scene: count.test(sum(box[0].color == color for box in scene)))
    return (count.there(f"{color} {_block(chance)}"),
            lambda scene: count.test(sum(_having(box, color) for box in scene)))


def _alike(chance: random.Random) -> Statement:
    top = chance.random() < 0.5
    at = -1 if top else 0
    n = chance.choice((2, 3))
    return (f"There are {chance.choice(('', 'exactly ', 'only '))}{WORDS[n]} towers with the same "
            f"{'top' if top else 'base'} color",
            lambda scene: len({box[at].color for box in scene}) == 4 - n)


TOWERS = (_a_tower, _a_tower, _a_tower, _towers, _towers, _towers, _towers, _towers_have, _the_tower, _is_colored,
          _blocks_as, _blocks_as, _any_over, _block_total, _block_total, _alike)
