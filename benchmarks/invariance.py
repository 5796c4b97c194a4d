"""The same request gives the same bits: alone, among 32, after a shared prefix, after preemption, with speculation.

Prompts are cut from what the model itself wrote, from random tokens and from earlier prompts; some repeat themselves,
and some are longer than a chunk of Llama 4's local layers. Every case is answered alone first, at temperature 1 with a
seed of its own, by an engine that keeps no prefixes; then again in each way, with prompts cut at random places.
Compared are the tokens and every row of logits that a token was drawn from, bit for bit. A case counts for a way only
if the thing really happened to it: 32 sequences in one of its passes, a prefix found, blocks taken away and computed
again, guesses of which some were right and some wrong. `--resume FILE` keeps the counts after every batch and goes on
from there.
"""

import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha1
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from rows import machine, parser, write_rows
from torch import Tensor

import puna
from puna.engine.core import Core, Task
from puna.engine.pace import Pace
from puna.engine.sampling import Sampling
from puna.engine.sizes import CacheSize
from puna.engine.speculation import Drafter, Speculation, drafter_for

BITS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bfloat16"}, "int8": {"quantize": "int8"}, "int4": {"quantize": "int4"},
}  # fmt: skip
TOGETHER = 32
PLENTY = 1024  # blocks of 32 tokens: enough for a batch
TIGHT = 24  # blocks in which 32 requests of about 4 each get into each other's way; the longest has 21
URGENT = 22 * 32  # tokens of a prompt that takes nearly all of them
EAGER = 4  # guesses in every step, whether they pay or not
CONTEXT = 800
BIAS = 12.0  # lifts a few tokens above all others


@dataclass(frozen=True)
class Case:
    """One request."""

    prompt: list[int]
    seed: int
    length: int
    priority: int
    favoured: tuple[int, ...] = ()  # tokens whose logits are raised, so that an answer keeps to them

    def task(self) -> Task:
        """As the engine wants it, with the logits of every token."""
        sampling = Sampling(temperature=1.0, top_p=1.0, seed=self.seed, ignore_eos=True, logprobs=0,
                            logit_bias=dict.fromkeys(self.favoured, BIAS))  # fmt: skip
        return Task(list(self.prompt), len(self.prompt) - 1, prompt=self.prompt, limit=self.length, sampling=sampling,
                    priority=self.priority)  # fmt: skip


@dataclass
class Outcome:
    """What must not change, and what happened meanwhile."""

    tokens: list[int]
    logits: str  # a digest of all rows that tokens were drawn from
    beside: int = 0  # sequences in the fullest pass that it took part in
    cached: int = 0
    preempted: int = 0
    right: int = 0  # guesses
    wrong: int = 0

    def same(self, other: "Outcome") -> bool:
        """Bit for bit."""
        return (self.tokens, self.logits) == (other.tokens, other.logits)


class Cut(Pace):
    """Steps of random sizes: prompts are cut anywhere, and a run can be repeated."""

    def __init__(self, seed: int, sizes: Sequence[int]) -> None:
        super().__init__()
        self._draw, self._sizes = random.Random(seed), sizes

    def budget(self, answers: int, prompts: int = 0) -> int:  # noqa: ARG002
        """Any room for prompts."""
        return answers + self._draw.choice(self._sizes)


class Eager(Speculation):
    """Guesses in every step, and what came of each request's."""

    def __init__(self, drafter: Drafter) -> None:
        super().__init__(drafter)
        self.fared: dict[Any, tuple[int, int]] = {}

    def wish(self, sequence: Any, room: int, price: float | None) -> int:  # noqa: ARG002
        """As many as there is room for."""
        return max(0, min(EAGER, room))

    def learn(self, sequence: Any, guessed: int, right: int) -> None:
        """Count."""
        super().learn(sequence, guessed, right)
        before = self.fared.get(sequence, (0, 0))
        self.fared[sequence] = before[0] + right, before[1] + guessed - right


@dataclass
class Way:
    """A way to answer. make: an engine for one batch, which has this number. happened: whether it did to a case.

    times: how often, of which the last counts. crowd: all arrive at once, so that all run together. urgent: now and
    then comes a request that is more urgent, and takes the others' blocks.
    """

    name: str
    make: Callable[[int], Core]
    happened: Callable[[Outcome], bool]
    together: int | None = None  # at once; None: `TOGETHER`
    times: int = 1
    crowd: bool = False
    urgent: bool = False


def alone(model: puna.Model) -> Way:
    """What the others are compared with."""
    return Way("alone", lambda _: Core(model.decoder, size(model, PLENTY), prefix_cache=False), lambda _: True, 1)


def ways(model: puna.Model, draft: puna.Model) -> list[Way]:
    """All of them for one model."""

    def core(batch: int, blocks: int = PLENTY, prefix_cache: bool = False, speculate: object = None,
             sizes: Sequence[int] = (1, 7, 33, 64, 200, 512)) -> Core:  # fmt: skip
        made = Core(model.decoder, size(model, blocks), prefix_cache=prefix_cache)
        made.pace = Cut(batch, sizes)
        drafter = drafter_for(speculate, model.config.vocab_size, size(model, PLENTY))
        if drafter is not None:
            made.speculation = Eager(drafter)
        return made

    def guessed(outcome: Outcome) -> bool:
        return outcome.right > 0 and outcome.wrong > 0

    many = f"{TOGETHER} at once"
    prefixes = partial(core, prefix_cache=True)
    return [
        Way(many, partial(core, sizes=(350, 512)), lambda o: o.beside >= TOGETHER, crowd=True),
        Way("prefix cached, one by one", prefixes, lambda o: o.cached > 0, together=1),
        Way(f"prefix cached, {many}", prefixes, lambda o: o.cached > 0, times=2),
        Way(f"preempted, {many}", partial(core, blocks=TIGHT), lambda o: o.preempted > 0, urgent=True),
        Way(f"n-gram guesses, {many}", partial(core, speculate="ngram"), guessed),
        Way(f"a draft model's guesses (its own int4 form), {many}", partial(core, speculate=draft), guessed),
    ]


def size(model: puna.Model, blocks: int) -> CacheSize:
    """As many blocks in both groups of layers."""
    return CacheSize(blocks, blocks if model.config.attention_chunk_size else 0)


def run(core: Core, work: Sequence[Case], way: Way, seed: int) -> list[Outcome]:
    """Answers, so many at a time; they arrive one by one while others run already."""
    outcomes: list[Outcome] = []
    many = way.together or TOGETHER
    for first in range(0, len(work), many):
        outcomes += _wave(core, work[first : first + many], way, random.Random(seed + first))
    return outcomes


def _wave(core: Core, work: Sequence[Case], way: Way, draw: random.Random) -> list[Outcome]:
    tasks = [case.task() for case in work]
    outcomes = [Outcome([], "") for _ in work]
    digests = [sha1(usedforsecurity=False) for _ in work]
    late, urgent = list(tasks), []
    core.threads = torch.get_num_threads()
    with torch.no_grad():
        while not all(task.finished for task in tasks):
            for _ in range(min(len(late), len(tasks) if way.crowd else draw.choice((0, 1, 2, 8)))):
                core.inbox.append(late.pop(draw.randrange(len(late))))
            if way.urgent and draw.random() < 0.07 and all(task.finished for task in urgent):
                urgent.append(Case([1 + draw.randrange(9) for _ in range(URGENT)], 0, 1, -1).task())
                core.inbox.append(urgent[-1])
            core.take_in()
            ran = [task for task in tasks if task.running]
            core.step()
            beside = sum(task.stepped == core.state.step for task in tasks)
            for task, outcome, digest in zip(tasks, outcomes, digests, strict=True):
                outcome.preempted += task in ran and not task.running and not task.finished
                if task.stepped == core.state.step:
                    outcome.beside = max(outcome.beside, beside)
                for token, logits_V in _delivered(task):
                    outcome.tokens.append(token)
                    digest.update(logits_V.numpy().data)
    for task, outcome, digest in zip(tasks, outcomes, digests, strict=True):
        outcome.logits, outcome.cached = digest.hexdigest(), task.cached or 0
        if isinstance(core.speculation, Eager):
            outcome.right, outcome.wrong = core.speculation.fared.get(task, (0, 0))
    return outcomes


def _delivered(task: Task) -> Iterator[tuple[int, Tensor]]:
    """Tokens that have come, each with the logits that it was drawn from. Raises what the request failed with."""
    while not task.outbox.empty():
        item = task.outbox.get()
        if isinstance(item, BaseException):
            raise item
        if isinstance(item, tuple) and item[1] is not None:
            yield item[0], item[1]


def written(model: puna.Model, seed: int, texts: int = 12, length: int = 160) -> list[list[int]]:
    """What the model writes by itself, from random beginnings."""
    draw = random.Random(seed)
    begin = [] if model.config.bos_token_id is None else [model.config.bos_token_id]
    work = [[*begin, draw.randrange(model.config.vocab_size)] for _ in range(texts)]
    core = Core(model.decoder, size(model, PLENTY))
    tasks = [Task(list(ids), len(ids) - 1, prompt=ids, limit=length, sampling=Sampling(0.7, seed=seed, ignore_eos=True))
             for ids in work]  # fmt: skip
    core.threads = torch.get_num_threads()
    core.inbox.extend(tasks)
    with torch.no_grad():
        core.take_in()
        while not all(task.finished for task in tasks):
            core.step()
            for task in tasks:
                task.outbox = SimpleQueue()  # unread: else it would wait for its reader
                task.paused = False
    return [task.tokens for task in tasks]


def cases(model: puna.Model, batch: int, many: int) -> list[Case]:
    """A batch's requests: one in six random tokens, two in three a few tokens again and again, with an answer that
    mostly keeps to them, the rest text; five in six begin like an earlier one, one in sixteen is long."""
    draw, texts, made = random.Random(batch), written(model, batch), []
    chunk = model.config.attention_chunk_size or 256
    for number in range(many):
        text = draw.choice(texts)
        begin = draw.randrange(len(text) - 60)
        prompt = text[begin : begin + draw.randint(1, 120)]
        kind, favoured = draw.randrange(6), ()
        if kind == 0:
            prompt = [draw.randrange(model.config.vocab_size) for _ in range(draw.randint(1, 120))]
        elif kind < 5:
            favoured = tuple(prompt[: draw.randint(2, 5)])
            prompt = [*favoured] * draw.randint(5, 12)
        if made and draw.randrange(6):
            earlier = draw.choice(made[-64:]).prompt
            prompt = earlier[: draw.randint(min(40, len(earlier)), len(earlier))][:100] + prompt[:80]
        if draw.randrange(16) == 0:
            prompt = (prompt * (2 * chunk))[: draw.randint(chunk - 40, chunk + 100)]
        made.append(Case(prompt, batch * many + number, draw.randint(16, 32), draw.randrange(3), favoured))
    return made


@dataclass
class Counts:
    """Of one way at one width."""

    cases: int = 0
    happened: int = 0
    differing: int = 0  # of those that it happened to
    others: int = 0  # differing ones of the rest
    beside: dict[str, int] = field(default_factory=dict)

    def add(self, expected: Sequence[Outcome], found: Sequence[Outcome],
            happened: Callable[[Outcome], bool]) -> list[int]:  # fmt: skip
        """Take a batch in. Numbers of the cases that differ."""
        wrong = [i for i, (one, other) in enumerate(zip(expected, found, strict=True)) if not one.same(other)]
        real = [happened(outcome) for outcome in found]
        self.cases += len(found)
        self.happened += sum(real)
        self.differing += sum(real[i] for i in wrong)
        self.others += sum(not real[i] for i in wrong)
        for name in ("cached", "preempted", "right", "wrong"):
            if total := sum(getattr(outcome, name) for outcome in found):
                self.beside[name] = self.beside.get(name, 0) + total
        return wrong

    @property
    def note(self) -> str:
        """What happened, in numbers."""
        words = {"cached": "tokens found", "preempted": "preemptions", "right": "right guesses", "wrong": "wrong ones"}
        return ", ".join(f"{self.beside[name]:,} {word}" for name, word in words.items() if name in self.beside)


def measure(name: str, wanted: int, many: int, model: str, kept: dict[str, Any], save: Callable[[], None]) -> None:
    """Batch after batch until every way has really happened to so many cases. kept: where the counts are."""
    plain = puna.load(model, context=CONTEXT, prefix_cache=False, **BITS[name])
    draft = puna.load(model, context=CONTEXT, quantize="int4")
    todo = ways(plain, draft)
    counts = {way.name: Counts(**kept["ways"].get(way.name, {})) for way in todo}
    for batch in count(kept["batches"]):
        open = [way for way in todo if counts[way.name].happened < wanted]
        if not open:
            return
        begin = time.perf_counter()
        work = cases(plain, batch, many)
        expected = run(alone(plain).make(batch), work, alone(plain), batch)
        for way in open:
            core = way.make(batch)
            for _ in range(way.times):
                found = run(core, work, way, batch)
            for i in counts[way.name].add(expected, found, way.happened):
                print(f"DIFFERENT: {name}, {way.name}, batch {batch}, case {i}", file=sys.stderr, flush=True)
        kept["batches"] = batch + 1
        kept["ways"] = {name: asdict(each) for name, each in counts.items()}
        save()
        real = ", ".join(str(counts[way.name].happened) for way in todo)
        print(f"{name}: {len(work)} cases in {time.perf_counter() - begin:.0f} s; so far {real}", flush=True)


def main() -> None:
    """Measure, print and record. Ends with 1 where something differed."""
    arguments = parser("Bit equality of answers")
    arguments.add_argument("--model", default="cria", help="anything that puna.load takes")
    arguments.add_argument("--cases", type=int, default=1000, help="to which it really happened, of each way and width")
    arguments.add_argument("--batch", type=int, default=128, help="cases that share an engine")
    arguments.add_argument("--bits", nargs="+", default=list(BITS), choices=list(BITS))
    arguments.add_argument("--resume", type=Path, help="keeps the counts in this file, and goes on from them")
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    kept: dict[str, Any] = {}
    if args.resume and args.resume.exists():
        kept = json.loads(args.resume.read_text())

    def save() -> None:
        if args.resume:
            args.resume.write_text(json.dumps(kept))

    for name in args.bits:
        measure(name, args.cases, args.batch, args.model, kept.setdefault(name, {"batches": 0, "ways": {}}), save)
    found = [(name, way, Counts(**each)) for name in args.bits for way, each in kept[name]["ways"].items()]
    rows = [f"| {name} | {way} | {each.happened:,} of {each.cases:,} | {each.differing + each.others} | {each.note} |"
            for name, way, each in found]  # fmt: skip
    print(*rows, sep="\n")
    write_rows(Path(__file__), f"Bit equality, {args.model}", rows, machine(), notes=(__doc__ or "").strip(),
               columns=("bits", "way", "cases to which it happened", "differing", "beside"),
               document=args.document)  # fmt: skip
    sys.exit(any(each.differing + each.others for *_, each in found))


if __name__ == "__main__":
    main()
