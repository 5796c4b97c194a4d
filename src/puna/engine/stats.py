"""Numbers of a running engine, for people and for monitoring."""

import time
from collections import deque
from dataclasses import dataclass

from puna.engine.scheduler import State
from puna.engine.speculation import Speculation
from puna.model.on_demand import ExpertCache

WINDOW = 10.0  # seconds that rates look back


@dataclass(frozen=True)
class Stats:
    """running, waiting: requests now. preemptions: how often one gave its blocks up, so far. hit_rate: share of prompt
    tokens that were found in the cache. tokens_per_second: drawn and computed ones, over the last 10 seconds.
    step_seconds: mean over these. blocks: of the full layers, held by requests, kept for reuse, and in all.
    proposed, accepted: guessed tokens so far, and how many of them were right. expert_hits, expert_misses: how often an
    expert that is read on demand was in memory, and how often it had to be read; 0 where all are in memory."""

    running: int
    waiting: int
    preemptions: int
    hit_rate: float
    answer_tokens_per_second: float
    tokens_per_second: float
    step_seconds: float
    steps: int
    used_blocks: int
    kept_blocks: int
    blocks: int
    proposed: int = 0
    accepted: int = 0
    expert_hits: int = 0
    expert_misses: int = 0


class Meter:
    """Counts what the steps did."""

    def __init__(self) -> None:
        self.preemptions = self.steps = 0
        self._recent: deque[tuple[float, int, int, float]] = deque()  # end, answers, tokens, seconds

    def record(self, answers: int, tokens: int, seconds: float) -> None:
        """One step: so many tokens of answers came, of so many tokens computed."""
        self.steps += 1
        now = time.monotonic()
        self._recent.append((now, answers, tokens, seconds))
        self._forget(now)

    def _forget(self, now: float) -> None:
        while self._recent and self._recent[0][0] < now - WINDOW:
            self._recent.popleft()

    def stats(
        self, state: State, arriving: int, speculation: Speculation | None, experts: ExpertCache | None = None
    ) -> Stats:
        """The numbers now. May be called beside a step: they are then those of a moment ago."""
        now = time.monotonic()
        recent = [one for one in tuple(self._recent) if one[0] >= now - WINDOW]
        blocks, steps = state.blocks, len(recent)
        return Stats(
            running=len(state.running), waiting=len(state.waiting) + arriving, preemptions=self.preemptions,
            hit_rate=blocks.hit_tokens / blocks.asked_tokens if blocks.asked_tokens else 0.0,
            answer_tokens_per_second=sum(one[1] for one in recent) / WINDOW,
            tokens_per_second=sum(one[2] for one in recent) / WINDOW,
            step_seconds=sum(one[3] for one in recent) / steps if steps else 0.0, steps=self.steps,
            used_blocks=blocks.full.used, kept_blocks=blocks.full.kept, blocks=blocks.full.count,
            proposed=speculation.proposed if speculation else 0, accepted=speculation.accepted if speculation else 0,
            expert_hits=experts.hits if experts else 0, expert_misses=experts.misses if experts else 0,
        )
