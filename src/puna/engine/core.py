"""One step of the engine: plan it, run the model once over all sequences in it, draw each one's next token."""

import time
from collections import deque
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from queue import SimpleQueue

import torch
from torch import Tensor

from puna.engine.blocks import BlockStore
from puna.engine.gallery import Gallery, gallery_bytes
from puna.engine.grammar import Grammar
from puna.engine.pace import Pace
from puna.engine.pictures import Looker, TaskPictures
from puna.engine.sampling import Sampling, choose
from puna.engine.scheduler import Plan, Reason, Sequence, State, schedule
from puna.engine.sizes import CacheSize
from puna.engine.speculation import Drafter, Speculation
from puna.engine.stats import Meter, Stats
from puna.errors import PunaError
from puna.model import Decoder, pages
from puna.model.on_demand import expert_cache
from puna.model.paged import BLOCK, Batch, PagedPool, Span
from puna.model.pictures import PassPictures

RUN_AHEAD = 64  # tokens that may lie unread before an answer waits for its reader


@dataclass(eq=False, kw_only=True)
class Task(Sequence):
    """One request in the engine. What comes of it goes into `outbox`: tokens or rows, then None or an error.

    A task without `sampling` draws nothing: it delivers the logits of all of its tokens.
    """

    prompt: Tokens[int]
    sampling: Sampling | None = None
    limit: int = 0  # most tokens to draw
    stop_ids: frozenset[int] = frozenset()
    grammar: Grammar | None = None
    seconds: float | None = None  # may take so long in all
    finished: bool = False  # nothing more will come of it
    answer: list[int] = field(default_factory=list)
    guesses: list[int] = field(default_factory=list)  # what may follow, computed in this step's pass
    random: torch.Generator | None = None
    pictures: TaskPictures | None = None
    outbox: "SimpleQueue[Delivery]" = field(default_factory=SimpleQueue)


Delivery = tuple[int, Tensor | None] | Tensor | BaseException | None


class DeadlineError(PunaError):
    """A request that took longer than its caller would wait."""


class Core:
    """Requests, cache and model. Its methods are called by one thread at a time; only `inbox` is anybody's.

    size: blocks of the cache. most: how many requests may run at once. fixed_steps: see `Pace`. drafter: who guesses.
    """

    def __init__(self, decoder: Decoder, size: CacheSize, *, kv: str | None = None, prefix_cache: bool = True,
                 most: int = 64, fixed_steps: bool = False, drafter: Drafter | None = None) -> None:
        self.decoder, self.kv = decoder, kv
        chunk = decoder.config.attention_chunk_size if size.local_blocks else None
        self.state = State(BlockStore(size.blocks, size.local_blocks, chunk, BLOCK, prefix_cache), most)
        self.size = size
        self.inbox: deque[Task] = deque()
        self.threads = torch.get_num_threads()  # of whoever asked last
        self.stopping = False  # nobody wants anything any more
        self.pace = Pace(fixed_steps)
        self.meter, self.experts = Meter(), expert_cache(decoder)
        self.speculation = Speculation(drafter) if drafter else None
        self.looker = Looker(decoder, Gallery(gallery_bytes(decoder.config, decoder.dtype.itemsize)), fixed_steps)
        self._pool: PagedPool | None = None

    def tasks(self) -> list[Task]:
        """All requests that are not done."""
        return [*self.state.running, *self.state.waiting]  # type: ignore[list-item]  # nothing else is ever added

    def take_in(self) -> None:
        """Move newcomers to the scheduler, and note whose reader is behind."""
        if self.threads != torch.get_num_threads():  # PyTorch keeps the number for each thread
            torch.set_num_threads(self.threads)
        while self.inbox:
            task = self.inbox.popleft()
            if not task.cancelled:
                self.state.add(task)
        for task in self.tasks():
            task.paused = task.outbox.qsize() >= RUN_AHEAD

    def step(self) -> bool:
        """Compute something for somebody. False: there is nothing to do, or nothing possible before time passes."""
        state = self.state
        going: list[Task] = [s for s in state.running if s.remaining == 1 and not s.paused]  # type: ignore[misc]
        looked = self._look(bool(going))
        start = time.perf_counter()
        if self.speculation:
            price = self.pace.price(len(going))
            for task in going:
                room = task.limit - len(task.answer) - 1 if task.sampling else 0
                task.guesses_wanted = self.speculation.wish(task, room, price)
        prompts = len(state.running) + len(state.waiting) - len(going)
        plan = schedule(state, self.pace.budget(len(going), prompts), time.monotonic())
        for task in going:
            task.guesses_wanted = 0
        for sequence, reason in plan.ended:
            self._tell(sequence, reason)  # type: ignore[arg-type]
        self.meter.preemptions += len(plan.preempted)
        for sequence in plan.preempted:
            self._let_go(sequence)  # type: ignore[arg-type]
        if not plan.pieces:  # whoever has just begun may have to look first
            return looked or any(task.ready is not None and task.stepped == state.step for task in state.running)
        begin = time.perf_counter()
        guesses = self._guess(plan)
        drafting = time.perf_counter() - begin
        pieces: list[tuple[Task, int]] = list(plan.pieces.items())  # type: ignore[arg-type]
        answers, tokens, confirmed = plan.answers, plan.tokens, 0
        for (task, count), rows in zip(pieces, self._run(pieces), strict=True):
            if isinstance(rows, Tensor):
                confirmed += self._advance(task, count, rows)
            else:
                self.finish(task, rows)
        seconds = time.perf_counter() - start
        self.looker.worked(seconds)
        self.pace.record(answers, tokens - answers, seconds - drafting, guesses, drafting)
        self.meter.record(answers + confirmed, tokens + guesses, seconds)
        if answers:
            pages.enlarge()  # behind the first token: a load takes what memory comes quickly
        return True

    def drop_cancelled(self) -> None:
        """Forget cancelled requests now, not with the next step."""
        self.take_in()
        for task in self.tasks():
            if task.cancelled:
                self.state.remove(task)
                self._forget(task)

    def finish(self, task: Task, error: BaseException | None = None) -> None:
        """End a task, free its blocks and tell its reader."""
        self.state.remove(task)
        self._forget(task)
        task.finished = True
        task.outbox.put(error)

    def stats(self) -> Stats:
        """How the engine is doing."""
        return self.meter.stats(self.state, len(self.inbox), self.speculation, self.experts)

    def _tell(self, task: Task, reason: Reason) -> None:
        error = None if reason == "cancelled" else DeadlineError(
            f"the request took longer than its {task.seconds:g} seconds, in which {len(task.answer)} tokens came; "
            "allow more time, ask for fewer tokens, or try again when fewer requests run")  # fmt: skip
        self._forget(task)
        task.finished = True
        task.outbox.put(error)

    def _forget(self, task: Task) -> None:
        if self.speculation:
            self.speculation.forget(task)
        self._let_go(task)

    def _let_go(self, task: Task) -> None:
        """It doesn't run any more, so it holds no pictures."""
        if task.pictures:
            self.looker.leave(task.pictures)
            task.ready = task.pictures.ready(0)

    def _look(self, answers: bool) -> bool:
        """Look at some of the pictures that running requests wait for. False: there was nothing to look at."""
        shows = [task for task in self.state.running if task.pictures]  # type: ignore[attr-defined]  # all are tasks
        tasks: list[Task] = sorted(shows, key=lambda task: task.rank)  # type: ignore[arg-type]
        if not tasks:
            return False
        waiting = self._unsettled(tasks)
        try:
            looked = self.looker.look([task.pictures for task in waiting if task.pictures], answers)
        except Exception as error:
            for task in waiting:
                self.finish(task, error)
            return True
        if looked:
            self._unsettled(waiting)
        return looked

    def _unsettled(self, tasks: list[Task]) -> list[Task]:
        """Those of these tasks whose next pictures are not known yet. Nobody is given room before an earlier one."""
        found, may_hold = [], True
        for task in tasks:
            assert task.pictures is not None
            if not self.looker.settle(task.pictures, task.computed, may_hold):
                found.append(task)
                may_hold = may_hold and bool(task.pictures.held)
                task.stepped = self.state.step  # it takes part in this step
            task.ready = task.pictures.ready(task.computed)
        return found

    def _guess(self, plan: Plan) -> int:
        """Let the drafter fill what was planned for guesses. How many there are."""
        if not self.speculation or not plan.guesses:
            return 0
        found = self.speculation.drafter.guess(plan.guesses)
        for task, guesses in found.items():
            task.guesses = guesses  # type: ignore[attr-defined]  # all of them are tasks
        return sum(map(len, found.values()))

    def _run(self, pieces: list[tuple[Task, int]]) -> list[Tensor | BaseException]:
        """Each piece's wanted logits. If the pass fails, each piece is run alone, so that only the guilty fail."""
        try:
            return list(self._forward(pieces))
        except Exception as error:
            if len(pieces) == 1:
                return [error]
            return [rows for piece in pieces for rows in self._run([piece])]

    def _forward(self, pieces: list[tuple[Task, int]]) -> tuple[Tensor, ...]:
        """Float32 logits on the CPU of the wanted positions [R, V] of each piece."""
        if self._pool is None:
            self._pool = PagedPool(self.decoder.config, self.size.blocks, self.size.local_blocks, self.decoder.dtype,
                                   self.kv, self.decoder.device)
        ids: list[int] = []
        rows: list[int] = []
        spans, counts, shares = [], [], []
        for task, count in pieces:
            start = task.computed
            skipped = min(max(task.wanted - start, 0), count)
            new = [*task.tokens[start : start + count], *task.guesses]
            count = len(new)
            rows += range(len(ids) + skipped, len(ids) + count)
            counts.append(count - skipped)
            if task.pictures:
                shares.append(task.pictures.share(start, count, len(ids)))
            ids += new
            spans.append(Span(start, count, task.table.full, task.table.local))
        device = self.decoder.device
        pictures = PassPictures.joined(shares)
        logits_1RV = self.decoder(torch.tensor([ids], device=device), cache=Batch(self._pool, spans),
                                  rows=torch.tensor(rows, dtype=torch.long, device=device),
                                  **({"pictures": pictures} if pictures else {}))  # fmt: skip
        return logits_1RV[0].to("cpu", torch.float32).split(counts)

    def _advance(self, task: Task, count: int, rows_RV: Tensor) -> int:
        """Take in what a step computed of a task: its next token, and further ones (returned: how many) as far as its
        guesses were right. Positions after the first wrong guess count as never computed."""
        guesses, task.guesses = task.guesses, []
        self.state.advance(task, count)
        task.wanted = max(task.wanted, task.computed)
        if not guesses:
            self._deliver(task, rows_RV)
            return 0
        right = 0
        for logits_V, guess in zip(rows_RV, [*guesses, None], strict=True):
            self._deliver(task, logits_V[None])
            if task.finished or task.tokens[-1] != guess:
                break
            right += 1
            self.state.advance(task, 1)
            task.wanted = task.computed
        if self.speculation:
            self.speculation.learn(task, len(guesses), right)
        return right

    def _deliver(self, task: Task, rows_RV: Tensor) -> None:
        if task.sampling is None:
            task.outbox.put(rows_RV)
            if not task.remaining:
                self.finish(task)
        elif not task.remaining:
            try:
                self._draw(task, task.sampling, rows_RV[-1])
            except Exception as error:
                self.finish(task, error)

    def _draw(self, task: Task, sampling: Sampling, logits_V: Tensor) -> None:
        """Draw the next token, and end the task after its last."""
        if task.random is None:
            task.random = sampling.generator()
        grammar = task.grammar
        allowed_V = grammar.allowed() if grammar else None
        token = choose(logits_V, sampling, task.prompt, task.answer, task.random, allowed_V)
        if grammar:
            grammar.accept(token)
        task.answer.append(token)
        task.tokens.append(token)
        task.outbox.put((token, None if sampling.logprobs is None else logits_V.clone()))
        ended = token in task.stop_ids and not sampling.ignore_eos
        if ended or len(task.answer) >= task.limit or (grammar is not None and grammar.finished):
            self.finish(task)
