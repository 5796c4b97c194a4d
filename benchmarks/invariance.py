"""The same request gives the same bits: alone, among 32, after a shared prefix, after preemption, with speculation.

Every case is a random prompt with a random seed at temperature 1. It is answered alone first, by a model that keeps no
prefixes; then again in each way. Compared are the tokens and the log-probabilities of the four likeliest at every step,
for equality, not nearness.
"""

import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rows import machine, parser, write_rows

import puna
from puna.engine.model import Model
from puna.engine.sizes import CacheSize

BITS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bfloat16"}, "int8": {"quantize": "int8"}, "int4": {"quantize": "int4"},
}  # fmt: skip
TOGETHER = 32


@dataclass(frozen=True)
class Case:
    """One request."""

    prompt: list[int]
    seed: int
    length: int


@dataclass(frozen=True)
class Answer:
    """What must not change."""

    tokens: list[int]
    scores: list[list[tuple[int, float]]]


def cases(count: int, vocabulary: int, seed: int) -> list[Case]:
    """Random prompts of 1 to 160 tokens; two in three begin like an earlier one, one in ten repeats itself."""
    draw = random.Random(seed)
    made: list[Case] = []
    for i in range(count):
        prompt = [draw.randrange(vocabulary) for _ in range(draw.randint(1, 160))]
        if made and draw.random() < 0.66:
            earlier = draw.choice(made[-200:]).prompt
            prompt = (earlier[: draw.randint(1, len(earlier))] + prompt)[:160]
        if draw.random() < 0.1:
            prompt = prompt[:20] * 4
        made.append(Case(prompt, seed=i, length=draw.randint(2, 16)))
    return made


def answer(llama: Model, case: Case) -> Answer:
    """One request's answer."""
    reply = llama.generate(case.prompt, max_tokens=case.length, temperature=1.0, top_p=1.0, seed=case.seed,
                           ignore_eos=True, logprobs=4)  # fmt: skip
    assert reply.logprobs is not None
    return Answer(reply.token_ids, [[(top.id, top.logprob) for top in step.top] for step in reply.logprobs])


def together(llama: Model, work: Sequence[Case]) -> list[Answer]:
    """All answers, `TOGETHER` requests at a time."""
    with ThreadPoolExecutor(TOGETHER) as pool:
        return list(pool.map(lambda case: answer(llama, case), work))


def differing(expected: Sequence[Answer], found: Sequence[Answer]) -> int:
    """How many cases differ in any bit."""
    return sum(a != b for a, b in zip(expected, found, strict=True))


def eager(llama: Model) -> Model:
    """Guesses in every step, whether that pays or not: else such short answers would have hardly any."""
    speculation = llama._engine.core.speculation
    assert speculation is not None
    speculation.wish = lambda _sequence, room, _price: min(4, room)  # type: ignore[method-assign]
    return llama


def guessed(llama: Model) -> str:
    """How many guesses there were so far."""
    stats = llama.stats()
    return f"{stats.accepted:,} of {stats.proposed:,} guesses right so far"


def measure(name: str, count: int, model: str) -> list[str]:
    """The rows of one width."""
    options = BITS[name]
    plain = puna.load(model, context=512, prefix_cache=False, **options)
    work = cases(count, plain.config.vocab_size, seed=len(name))
    begin = time.perf_counter()
    expected = [answer(plain, case) for case in work]
    alone = time.perf_counter() - begin
    rows = []

    def row(what: str, found: Sequence[Answer], note: str = "") -> None:
        rows.append(f"| {name} | {what} | {len(found):,} | {differing(expected, found)} | {note} |")
        print(rows[-1], flush=True)

    begin = time.perf_counter()
    row("32 at once", together(plain, work), f"alone {alone:.0f} s, at once {time.perf_counter() - begin:.0f} s")
    cached = puna.load(model, context=512, **options)
    found = [answer(cached, case) for case in work]
    row("prefix cached, one by one", found, f"{cached.stats().hit_rate:.0%} of prompt tokens found")
    found = together(cached, work)
    row("prefix cached, 32 at once", found, f"{cached.stats().hit_rate:.0%} found so far")
    config = plain.config
    blocks = 14  # of 32 tokens, for 32 requests of up to 6 each
    tight = Model(plain.decoder, plain.tokenizer,
                  cache=CacheSize(blocks, blocks if config.attention_chunk_size else 0))  # fmt: skip
    found = together(tight, work)
    row("preempted, 32 at once", found, f"{tight.stats().preemptions:,} preemptions")
    guessing = eager(puna.load(model, context=512, speculate="ngram", **options))
    row("n-gram speculation, 32 at once", together(guessing, work), guessed(guessing))
    row("n-gram speculation, one by one", [answer(guessing, case) for case in work], guessed(guessing))
    drafted = eager(puna.load(model, context=512, speculate=puna.load(model, context=512, quantize="int4"), **options))
    row("draft model (its own int4 form)", [answer(drafted, case) for case in work], guessed(drafted))
    return rows


def main() -> None:
    """Measure, print and record."""
    arguments = parser("Bit equality of answers")
    arguments.add_argument("--model", default="cria", help="anything that puna.load takes")
    arguments.add_argument("--cases", type=int, default=1000)
    arguments.add_argument("--bits", nargs="+", default=list(BITS), choices=list(BITS))
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    rows = [row for name in args.bits for row in measure(name, args.cases, args.model)]
    write_rows(Path(__file__), f"Bit equality, {args.model}", rows, machine(), notes=(__doc__ or "").strip(),
               columns=("bits", "way", "cases", "differing", "beside"), document=args.document)  # fmt: skip


if __name__ == "__main__":
    main()
