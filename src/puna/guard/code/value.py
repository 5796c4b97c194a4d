"""What the flow analysis knows of an expression."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from puna.guard.code.view import Node


class _Missing:
    def __repr__(self) -> str:
        return "unknown"


UNKNOWN = _Missing()  # the value isn't a known constant
HOLE = "\0"  # stands in a composed text where something that isn't constant goes
GIVEN = frozenset({"input", "local"})  # labels of what somebody else chose
MAX_PATHS = 5
MAX_ATOMS = 8
MAX_TEXT = 4000


class Atom(NamedTuple):
    """One thing that isn't constant and went into a value.

    `label` says where it comes from (a label of `libraries/`, or `parameter`, `unknown`), `clean` which purposes it
    was made safe for (`all`: every one; `checked`: a condition
    tested it), `parameter` the index of the function's parameter that it is.
    """

    label: str
    text: str
    at: int
    clean: frozenset[str] = frozenset()
    parameter: int = -1

    def cleaned(self, purpose: str) -> "Atom":
        return self._replace(clean=self.clean | {purpose})


@dataclass(slots=True)
class Value:
    """`paths`: names for it (as written, with imports resolved, by type); `const`: its constant value or UNKNOWN;
    `text`: its text with HOLEs, if it is or starts as text;
    `built`: text was composed with something that isn't constant; `items`, `keys`: of a literal list or map."""

    paths: tuple[str, ...] = ()
    const: Any = UNKNOWN
    text: str | None = None
    built: bool = False
    atoms: tuple[Atom, ...] = ()
    items: "list[Value] | None" = None
    keys: list[str | None] | None = None
    function: Node | None = None
    node: Node | None = field(default=None, repr=False)

    def known(self) -> bool:
        return self.const is not UNKNOWN

    def item(self, key: str) -> "Value | None":
        """The value under a key of a literal map."""
        if self.keys is None or self.items is None:
            return None
        return next((v for k, v in zip(self.keys, self.items, strict=False) if k == key), None)


def constant(value: Any, node: Node | None = None) -> Value:
    return Value(const=value, text=value if isinstance(value, str) else None, node=node)


def join_atoms(values: "list[Value]") -> tuple[Atom, ...]:
    found: dict[Atom, None] = {}
    for value in values:
        for atom in value.atoms:
            found.setdefault(atom)
    return tuple(found)[:MAX_ATOMS]


def either(values: list[Value]) -> Value:
    """One of several (branches, operands of `or`): a composed text wins over foreign input, and that over a plain text;
    constant only where all agree."""
    values = [v for v in values if v is not None]
    if len(values) == 1:
        return values[0]
    first = values[0]
    if all(v is first for v in values):
        return first
    same = all(v.known() and type(v.const) is type(first.const) and v.const == first.const for v in values)
    foreign = next((v for v in values if v.text is None and any(a.label in GIVEN for a in v.atoms)), None)
    if any(v.known() and v.const for v in values):
        foreign = None  # a default with a text of its own says what such a value looks like
    best = next((v for v in values if v.built), foreign) or next((v for v in values if v.text is not None), first)
    paths = tuple(dict.fromkeys(p for v in values for p in v.paths))[:MAX_PATHS]
    items = next((v for v in values if v.items is not None), None)
    return Value(
        paths=paths,
        const=first.const if same else UNKNOWN,
        text=best.text,
        built=best.built,
        atoms=join_atoms(values),
        items=items.items if items else None,
        keys=items.keys if items else None,
        function=next((v.function for v in values if v.function is not None), None),
        node=best.node,
    )


def merge(one: dict[str, Value], other: dict[str, Value]) -> dict[str, Value]:
    """What names hold where two ways meet."""
    merged = dict(other)
    for name, value in one.items():
        there = other.get(name)
        merged[name] = value if there is None or there is value else either([value, there])
    return merged


def compose(values: list[Value], node: Node | None = None) -> Value:
    """Text made of parts in order: constants are written out, everything else is a HOLE."""
    text = ""
    built = False
    for value in values:
        if len(text) > MAX_TEXT:
            text = text[:MAX_TEXT] + HOLE
            break
        if value.known():
            text += value.const if isinstance(value.const, str) else str(value.const)
        elif value.text is not None:
            other = bool(value.atoms) and not value.built  # this text, or something else: `name ?: ""`
            text += value.text + HOLE * other
            built = built or value.built or other
        else:
            text += HOLE
            built = built or bool(value.atoms)
    if all(v.known() for v in values):
        return Value(const=text, text=text, node=node)
    return Value(text=text, built=built, atoms=join_atoms(values), node=node)


def cleaned(value: Value, purpose: str) -> Value:
    """The same value, made safe for a purpose."""
    if purpose == "all":
        kept = tuple(a for a in value.atoms if a.label == "weak-random")  # a number is as easy to guess as its text
        return Value(paths=value.paths, const=value.const, text=value.text, atoms=kept, node=value.node)
    return Value(
        value.paths,
        value.const,
        value.text,
        value.built,
        tuple(a.cleaned(purpose) for a in value.atoms),
        value.items,
        value.keys,
        value.function,
        value.node,
    )
