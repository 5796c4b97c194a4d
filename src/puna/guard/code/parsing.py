"""Source to the uniform view, also where it is broken: what the grammar couldn't read is read again line by line."""

import re
import threading
import time
from collections.abc import Iterable, Iterator
from functools import cache

from tree_sitter import Node as Syntax
from tree_sitter import Parser, Tree

from puna.guard.code.budget import Budget
from puna.guard.code.languages import LANGUAGES, grammar, table, variant
from puna.guard.code.lowering import Lowering
from puna.guard.code.view import Node

MAX_LINE = 2000  # bytes of a line that is read again by itself
RUNAWAY = 0.04  # seconds for MAX_LINE bytes, which take well under a millisecond in code that people write
_END = re.compile(rb"[;)}\]]")
MAX_AGAIN = 2000  # lines read again in one source
_local = threading.local()
_UNTYPED = re.compile(rb"\s*+(?!(?:if|for|while|switch|return|sizeof)\b)[A-Za-z_]\w*+\s*+\([^;{]{0,2000}\)\s*+\{")


def _parser(name: str) -> Parser:
    """This thread's parser of a grammar; a parser keeps state, so threads don't share one."""
    parsers = _local.__dict__.setdefault("parsers", {})
    if name not in parsers:
        parsers[name] = Parser(grammar(name))
    return parsers[name]


def parse(source: bytes, name: str, budget: Budget) -> Tree | None:
    """The syntax tree; None if the budget ends before it is built."""
    parser = _parser(name)

    def read(offset: int, _point: object) -> bytes:
        return source[offset : offset + 65536]

    if _runs_away(parser, _endless(source)):
        budget.spent = True
        return None
    try:
        tree = parser.parse(read, progress_callback=lambda *_: budget.check())
    except ValueError:  # ended by the callback
        tree = None
    if tree is None or budget.spent:
        budget.spent = True
        parser.reset()
        return None
    return tree


def _endless(source: bytes) -> Iterator[bytes]:
    """Stretches of more than MAX_LINE bytes in which no line ends, or nothing that was opened."""
    lines = source.split(b"\n")
    yield from (line for line in lines if len(line) > MAX_LINE)
    rest = b"\n".join(line for line in lines if len(line) <= MAX_LINE)
    yield from (stretch for stretch in _END.split(rest) if len(stretch) > MAX_LINE)


def _runs_away(parser: Parser, stretches: Iterable[bytes]) -> bool:
    """Whether a part of these takes the parser so long that the whole would take it minutes: its recovery from endless
    nesting is quadratic or worse, and seldom looks at the clock."""
    total = 0.0
    for stretch in stretches:
        for start in range(0, len(stretch), MAX_LINE):
            part = stretch[start : start + MAX_LINE]
            spent = _seconds(parser, part)
            total += spent
            if spent > RUNAWAY or total > 10 * RUNAWAY:
                return True
            quadratic = spent > RUNAWAY / 10 and spent > 3 * _seconds(parser, part[: len(part) // 2])
            if quadratic and spent * (len(stretch) / MAX_LINE) ** 2 > 10 * RUNAWAY:
                return True
    return False


def _seconds(parser: Parser, part: bytes) -> float:
    """Processor time that a parse takes; it is ended soon after RUNAWAY."""
    before = time.thread_time()
    try:
        parser.parse(
            lambda offset, _point: part[offset:],
            progress_callback=lambda *_: time.thread_time() - before > RUNAWAY,
        )
    except ValueError:  # ended by the callback
        parser.reset()
    return time.thread_time() - before


def view(source: bytes, name: str, budget: Budget | None = None) -> Node:
    """The uniform view of `source` in a language of `languages.LANGUAGES`; the root's value is a list of its functions.
    Broken code gives what could be read of it; where the budget ends, the rest is left out."""
    budget = budget or Budget(10.0)
    name = variant(name, source)
    lead = _lead(source) if name in ("c", "cpp") else b""
    source = lead + source
    tree = parse(source, name, budget)
    if tree is None:
        return Node("block", 0, len(source), "")
    lowering = Reader(name, source, budget)
    lowering.shift = -len(lead)
    root = lowering.lower(tree.root_node) or Node("block", 0, len(source), "")
    root.value = sorted(lowering.functions, key=lambda function: function.start)
    return root


def _lead(source: bytes) -> bytes:
    """What a piece of C cut out of its file lacks in front: the type of its function, or the start of its comment."""
    if source.lstrip().startswith(b"*/"):
        return b"/*"
    return b"int " if _UNTYPED.match(source) else b""


class Reader(Lowering):
    """Lowers a tree and, where the grammar found an error that spans lines, reads those lines again one by one."""

    def __init__(self, name: str, source: bytes, budget: Budget) -> None:
        super().__init__(_with_errors(LANGUAGES[name].table), source, budget=budget)
        self.name = name
        self.look_for_marks(name)
        self.again = 0
        self.inside = False  # whether a line is being read by itself

    def broken(self, error: Syntax) -> Node:
        """What an ERROR node holds: its whole parts as they are, every other line parsed by itself."""
        first, last = error.start_point[0], error.end_point[0]
        if first == last or self.inside:
            return self.node("other", error, args=self.all(error.named_children))
        whole = [c for c in error.named_children if c.end_point[0] > c.start_point[0] and c.type != "ERROR"]
        found: list[Node] = []
        at = error.start_byte
        at = self.source.rfind(b"\n", 0, at) + 1
        for child in [*whole, None]:
            end = error.end_byte if child is None else child.start_byte
            found.extend(self.lines(at, end))
            if child is not None:
                found.extend(self.all([child]))
                at = child.end_byte
        return self.node("other", error, args=self.bodies(found))

    def bodies(self, nodes: list[Node]) -> list[Node]:
        """Statements after the head of a function whose body was lost become its body, until the next function, or in
        Python until the margin moves back."""
        kept: list[Node] = []
        head: Node | None = None
        for node in nodes:
            if head is not None:
                back = self.column(node) <= self.column(head)
                if back and (node.kind in ("function", "class") or self.name == "python"):
                    head = None
            if head is None:
                kept.append(node)
            else:
                head.body = [*head.body, node]
            if head is None and node.kind == "function" and not node.body:
                head = node
        return kept

    def column(self, node: Node) -> int:
        at = node.start - self.shift
        return at - (self.source.rfind(b"\n", 0, at) + 1)

    def lines(self, start: int, end: int) -> list[Node]:
        """The lines of a stretch of the source, each read by itself."""
        found: list[Node] = []
        for line in self.source[start:end].split(b"\n"):
            plain = line.strip()
            if 2 < len(plain) <= MAX_LINE and self.again < MAX_AGAIN and not self.budget.spent:
                self.again += 1
                tree = parse(plain, self.name, self.budget)
                if tree is not None:
                    found.extend(self.shifted(tree.root_node, start + line.index(plain)))
            start += len(line) + 1
        return found

    def shifted(self, root: Syntax, at: int) -> list[Node]:
        """The statements of a piece that was parsed by itself, at their place in the whole source."""
        source, before = self.source, self.shift
        self.read(source[at : at + root.end_byte])
        self.shift, self.inside = before + at, True
        try:
            return self.block(root)
        finally:
            self.read(source)
            self.shift, self.inside = before, False


def _broken(low: Lowering, syntax: Syntax) -> Node:
    assert isinstance(low, Reader)
    return low.broken(syntax)


@cache
def _with_errors(name: str) -> dict:
    return {**table(name), "ERROR": _broken}
