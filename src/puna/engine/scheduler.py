"""What the next step computes: a plain function over plain data, without a model.

Every step takes one token of each answer in progress, then fills the rest of its budget with pieces of prompts, so
that a long prompt slows answers down by a bounded amount only. Who comes first: the more urgent priority; within it the
key (an API key, a user) that was served least, counted in tokens ("Fairness in Serving Large Language Models",
Sheng et al., OSDI 2024); within that the earlier arrival.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Literal

from puna.engine.blocks import BlockStore, Table

ANSWER_WEIGHT = 2  # a token of an answer counts as much as two of a prompt (the paper's setting)

Reason = Literal["cancelled", "deadline"]


@dataclass(eq=False)
class Sequence:
    """One request as the scheduler sees it. `tokens` grows at its end as the answer does."""

    tokens: list[int]
    wanted: int  # logits are wanted of this position and those after it: so these are always computed
    key: Hashable = None
    priority: int = 0  # the smaller, the more urgent
    deadline: float | None = None  # as `now` counts
    cancelled: bool = False
    paused: bool = False  # its reader is behind, so its answer waits
    table: Table = field(default_factory=Table)
    computed: int = 0  # leading tokens whose keys and values are in the cache
    cached: int | None = None  # tokens found in the cache when it first began
    running: bool = False  # holds blocks
    arrival: int = -1  # set on arrival
    stepped: int = -1  # the last step that it took part in
    guesses_wanted: int = 0  # guessed tokens that the next step should confirm or refute
    ready: int | None = None  # tokens from here on can't be computed yet: they show a picture not looked at so far

    @property
    def remaining(self) -> int:
        """Tokens not computed yet: 1 amid an answer, more amid a prompt."""
        return len(self.tokens) - self.computed

    @property
    def rank(self) -> tuple[int, int]:
        """Urgency that doesn't change while it waits or runs: the smallest is never preempted, so it gets done."""
        return self.priority, self.arrival


@dataclass
class State:
    """All requests, and the blocks that they share. `most`: how many may run at once."""

    blocks: BlockStore
    most: int = 64
    waiting: list[Sequence] = field(default_factory=list)
    running: list[Sequence] = field(default_factory=list)
    served: dict[Hashable, float] = field(default_factory=dict)  # tokens each active key got
    computing: dict[bytes, Sequence] = field(default_factory=dict)  # named blocks of prompts, and who works on them
    arrivals: int = 0
    step: int = 0

    def add(self, sequence: Sequence) -> None:
        """Take a request in. A key that was away is not owed anything for that time."""
        active = {other.key for other in (*self.waiting, *self.running)}
        self.served = {key: count for key, count in self.served.items() if key in active}
        self.served.setdefault(sequence.key, min(self.served.values(), default=0.0))
        sequence.arrival, self.arrivals = self.arrivals, self.arrivals + 1
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a request, done or not, and free its blocks."""
        (self.running if sequence.running else self.waiting).remove(sequence)
        self._free(sequence)

    def begin(self, sequence: Sequence, known: int) -> None:
        """A waiting request that has its blocks runs from now on; its first `known` tokens are in them already."""
        self.waiting.remove(sequence)
        self.running.append(sequence)
        sequence.running, sequence.computed, sequence.stepped = True, known, self.step
        blocks = self.blocks
        if sequence.cached is None:
            sequence.cached = known
            blocks.asked_tokens += sequence.wanted
            blocks.hit_tokens += known
        if blocks.share:
            for at in range(known // blocks.size, len(sequence.tokens) // blocks.size):
                name, _ = sequence.table.name(at, sequence.tokens, blocks.size)
                self.computing.setdefault(name, sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Take its blocks away: it waits again, and computes its tokens again, with those it has drawn so far."""
        self.running.remove(sequence)
        self.waiting.append(sequence)
        self._free(sequence)

    def advance(self, sequence: Sequence, count: int) -> None:
        """A step computed `count` more of its tokens."""
        sequence.computed += count
        before = sequence.table.named
        self.blocks.computed(sequence.table, sequence.tokens, sequence.computed)
        self._done(sequence, sequence.table.names[before : sequence.table.named])

    def _free(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.table)
        sequence.running, sequence.computed = False, 0
        self._done(sequence, sequence.table.names)

    def _done(self, sequence: Sequence, names: list[bytes]) -> None:
        for name in names:  # nobody needs to wait for these any more
            if self.computing.get(name) is sequence:
                del self.computing[name]


@dataclass
class Plan:
    """One step: how many tokens of which sequences, and how many guesses behind them; who was preempted; who left
    without having finished."""

    pieces: dict[Sequence, int] = field(default_factory=dict)
    guesses: dict[Sequence, int] = field(default_factory=dict)
    preempted: list[Sequence] = field(default_factory=list)
    ended: list[tuple[Sequence, Reason]] = field(default_factory=list)

    @property
    def answers(self) -> int:
        """Sequences that compute their last known token only."""
        return sum(s.remaining == 1 for s in self.pieces)

    @property
    def tokens(self) -> int:
        """Tokens to compute, without guesses."""
        return sum(self.pieces.values())


def schedule(state: State, budget: int, now: float) -> Plan:
    """Plan one step of at most `budget` tokens (at least 1), and give it its blocks."""
    return _Planner(state, budget).plan(now)


class _Planner:
    """The work of `schedule`: a plan in the making."""

    def __init__(self, state: State, budget: int) -> None:
        self.state, self.left = state, budget
        self.made = Plan()
        self._open = False  # whether waiting sequences may begin

    def plan(self, now: float) -> Plan:
        state = self.state
        state.step += 1
        self._end(now)
        answers = [s for s in state.running if s.remaining == 1 and not s.paused]
        for sequence in sorted(answers, key=lambda s: (s.priority, s.stepped, s.arrival)):
            if sequence.running:  # not preempted meanwhile
                self._give(sequence, 1)
        self._prompts()
        for sequence, count in self.made.pieces.items():
            sequence.stepped = state.step
            weight = ANSWER_WEIGHT if sequence.remaining == 1 else 1
            guesses = self._guesses(sequence) if sequence.remaining == 1 else 0
            state.served[sequence.key] = state.served.get(sequence.key, 0.0) + weight * count + guesses
        return self.made

    def _end(self, now: float) -> None:
        for sequence in (*self.state.waiting, *self.state.running):
            late = sequence.deadline is not None and now >= sequence.deadline
            if sequence.cancelled or late:
                self.state.remove(sequence)
                self.made.ended.append((sequence, "cancelled" if sequence.cancelled else "deadline"))

    def _prompts(self) -> None:
        """Half of what is left goes to whoever is first, the other half to the shortest, the rest to the first again.

        So a long prompt neither holds up short ones nor is held up by them for ever.
        """
        state = self.state
        waiting = sorted((s for s in state.waiting if not s.paused), key=self._order)
        ready = sorted((*(s for s in state.running if s.remaining > 1), *waiting), key=self._order)
        if not ready or not self.left:
            return
        # Nobody begins before the first who waits can, nor in a step in which blocks were already too few.
        may = bool(waiting) and not self.made.preempted and self._admit(waiting[0])
        self._open = may and not self.made.preempted
        first, *others = ready
        self._continue(first, -(-self.left // 2) if others else self.left)
        for sequence in sorted(others, key=lambda s: (s.priority, s.remaining, s.arrival)):
            if not self.left:
                return
            self._continue(sequence, self.left)
        self._continue(first, self.left)

    def _order(self, sequence: Sequence) -> tuple[int, float, int]:
        return sequence.priority, self.state.served[sequence.key], sequence.arrival

    def _continue(self, sequence: Sequence, count: int) -> None:
        """A piece of a prompt, which begins now if it can."""
        if not sequence.running and self._open:
            self._open = self._admit(sequence) and not self.made.preempted
        if sequence.running:
            self._give(sequence, count)

    def _admit(self, sequence: Sequence) -> bool:
        """Let a waiting sequence run if it finds blocks for all of its tokens. False: nobody behind it may begin."""
        state, blocks = self.state, self.state.blocks
        known = blocks.attach(sequence.table, sequence.tokens, sequence.wanted)
        if self._comes_soon(sequence, known):
            blocks.release(sequence.table)
            return True
        while len(state.running) >= state.most or not blocks.reserve(
            sequence.table, len(sequence.tokens), known, spare=len(state.running)  # an answer each may soon need one
        ):
            if not self._preempt_one(lambda other: other.priority > sequence.priority):
                blocks.release(sequence.table)
                return False
        state.begin(sequence, known)
        return True

    def _comes_soon(self, sequence: Sequence, known: int) -> bool:
        """Whether another prompt is computing the very block that this one would begin with: then it is shared soon."""
        state, size = self.state, self.state.blocks.size
        if not state.blocks.share or known + size > sequence.wanted:
            return False
        name, _ = sequence.table.name(known // size, sequence.tokens, size)
        other = state.computing.get(name)
        making_progress = other is not None and other.stepped >= state.step - 1
        return other is not None and making_progress and other.priority <= sequence.priority

    def _give(self, sequence: Sequence, count: int) -> None:
        """Up to `count` more tokens in this step, as far as budget, chunk and blocks go."""
        blocks, made = self.state.blocks, self.made
        given = made.pieces.get(sequence, 0)
        start = sequence.computed + given
        end = len(sequence.tokens) if sequence.ready is None else sequence.ready
        count = min(count, self.left, end - start)
        if blocks.chunk is not None:  # a piece never crosses the edge of a chunk
            begun = sequence.computed // blocks.chunk * blocks.chunk
            count = min(count, begun + blocks.chunk - start)
        if count <= 0:
            return
        while not blocks.reserve(sequence.table, start + count):
            if not self._preempt_one(lambda other: other.rank > sequence.rank):
                if sequence.remaining == 1:
                    self._preempt(sequence)  # those before it can go on with its blocks
                return
        made.pieces[sequence] = given + count
        self.left -= count

    def _guesses(self, sequence: Sequence) -> int:
        """Room for guesses, in what nobody else needs: of the budget, the chunk and the blocks."""
        blocks, start = self.state.blocks, sequence.computed + 1
        count = min(sequence.guesses_wanted, self.left)
        if blocks.chunk is not None:  # what is refuted is computed again, and then its chunk must still be there
            count = min(count, -start % blocks.chunk)
        if count > 0 and not blocks.reserve(sequence.table, start + count, spare=len(self.state.running)):
            count = min(count, blocks.room(sequence.table) - start)
        if count > 0:
            self.made.guesses[sequence] = count
            self.left -= count
        return count

    def _preempt_one(self, may: Callable[[Sequence], bool]) -> bool:
        """Preempt the least urgent of the running sequences that `may` be, or one whose reader is behind."""
        found = [s for s in self.state.running if s.paused or may(s)]
        if found:
            self._preempt(max(found, key=lambda s: (s.paused, s.rank)))
        return bool(found)

    def _preempt(self, sequence: Sequence) -> None:
        self.left += self.made.pieces.pop(sequence, 0)
        self.state.preempt(sequence)
        self.made.preempted.append(sequence)
        self._open = False  # nobody begins where blocks are too few
