"""Many requests at once, ours against llama.cpp's server and transformers: `python benchmarks/serving.py`.

Three parts: a burst of requests of mixed lengths (all services); time between tokens, quiet and while long prompts
arrive (ours); time to the first token of a prompt whose long beginning was seen before, against one that is new (ours).
"""

import json
import random
import statistics
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import shapes
from contenders import LLAMA_CPP_TYPES
from rows import machine, parser, write_rows
from services import (
    Answered,
    Asked,
    InProcess,
    Service,
    find_llama_server,
    llama_server,
    puna_server,
    puna_threads,
    transformers_batching,
)

QUIET, ARRIVALS, PREFIXES = 8, 4, 3  # running requests, long prompts that arrive among them, prefixes tried
PARTS = ("burst", "flow", "prefix")
OWN = 32  # tokens of a prompt after its shared beginning
NOTES = (
    "Burst: {requests} requests at once, prompts evenly spread from {short} to {long} random token ids, answers of "
    "{answer} tokens; tokens/s = answer tokens / seconds from the first request to the last token. ttft: time to the "
    "first token, median; tbt: time between tokens, median and 99th percentile. Ours is asked {door}; llama-server is "
    "built from the sources in llama-cpp-python 0.3.36 over that package's libraries (AMX off), one slot a request; "
    "transformers runs `generate_batch` in steps of at most 512 tokens."
)


@dataclass(frozen=True)
class Summary:
    """One run of several requests. Times in seconds."""

    tokens_per_second: float
    first: float
    between: float
    between_p99: float

    @classmethod
    def of(cls, answers: Iterable[Answered]) -> "Summary":
        """From when each token came."""
        answers = list(answers)
        wall = max(a.arrivals[-1] for a in answers) - min(a.sent for a in answers)
        gaps = sorted(gap for a in answers for gap in a.gaps)
        return cls(sum(len(a.arrivals) for a in answers) / wall, statistics.median(a.first for a in answers),
                   statistics.median(gaps), gaps[int(0.99 * (len(gaps) - 1))])  # fmt: skip

    def __str__(self) -> str:
        return (f"{self.tokens_per_second:.1f} tok/s, ttft {self.first:.1f} s, tbt {self.between * 1e3:.0f}/"
                f"{self.between_p99 * 1e3:.0f} ms")  # fmt: skip


def burst(shape: str, requests: int, short: int, long: int, answer: int) -> list[Asked]:
    """All at once: lengths evenly spread, in a seeded random order."""
    lengths = [short + (long - short) * i // max(1, requests - 1) for i in range(requests)]
    random.Random(shapes.SEED).shuffle(lengths)
    return [Asked(shapes.random_ids(shape, length, seed=100 + i), answer) for i, length in enumerate(lengths)]


def disturbed(service: Service, shape: str, short: int, long: int, answer: int) -> tuple[Summary, Summary]:
    """`QUIET` short requests alone, then the same while `ARRIVALS` long prompts come in, one after the other."""
    running = [Asked(shapes.random_ids(shape, short, seed=200 + i), answer) for i in range(QUIET)]
    alone = service.run(running)
    begin = max(a.arrivals[0] for a in alone) - min(a.sent for a in alone)
    step = (max(a.arrivals[-1] for a in alone) - min(a.sent for a in alone) - begin) / (ARRIVALS + 1)
    again = [Asked(shapes.random_ids(shape, short, seed=300 + i), answer) for i in range(QUIET)]
    late = [Asked(shapes.random_ids(shape, long, seed=400 + i), 2, begin + step * i) for i in range(ARRIVALS)]
    return Summary.of(alone), Summary.of(service.run([*again, *late])[:QUIET])


def shared_prefix(service: Service, shape: str, length: int) -> tuple[Summary, Summary]:
    """Of prompts with a new beginning, and of others with the same one right afterwards: medians."""
    prefixes = [shapes.random_ids(shape, length, seed=500 + number) for number in range(PREFIXES)]
    answers: tuple[list[Answered], list[Answered]] = [], []
    for number, prefix in enumerate(prefixes):
        for i, kind in enumerate(answers):
            own = shapes.random_ids(shape, OWN, seed=600 + 2 * number + i)
            kind += service.run([Asked(prefix + own, 2)])
    return Summary.of(answers[0]), Summary.of(answers[1])


class Measured:
    """What has been measured, by name; kept in a file where there is one, so that a run can go on from there."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._found: dict[str, list[list[float]]] = {}
        if file and file.exists():
            self._found = json.loads(file.read_text())

    def get(self, name: str, measure: Callable[[], Iterable[Summary]]) -> list[Summary]:
        """By `measure`, unless it is known."""
        if name not in self._found:
            self._found[name] = [list(astuple(summary)) for summary in measure()]
            if self._file:
                self._file.write_text(json.dumps(self._found))
        found = [Summary(*values) for values in self._found[name]]
        print(f"{name}: {'; '.join(map(str, found))}", flush=True)
        return found


class Late:
    """A service that starts, and answers one request to be warm, when it is first needed."""

    def __init__(self, start: Callable[[], Service], warming: Asked) -> None:
        self._start, self._warming = start, warming
        self._service: Service | None = None
        self.name = ""

    def run(self, asked: list[Asked]) -> list[Answered]:
        """See `Service`."""
        if self._service is None:
            self._service = self._start()
            self._service.run([self._warming])
        return self._service.run(asked)

    def close(self) -> None:
        """See `Service`."""
        if self._service is not None:
            self._service.close()


def main() -> None:
    """Measure, print and record."""
    arguments = parser("Many requests at once")
    arguments.add_argument("--shape", default="1b", choices=shapes.SHAPES)
    arguments.add_argument("--bits", nargs="+", default=["int4", "bf16"], choices=["int4", "int8", "bf16"])
    for name, value in (("requests", 16), ("short", 128), ("long", 1024), ("answer", 128), ("prefix", 2000)):
        arguments.add_argument(f"--{name}", type=int, default=value)
    arguments.add_argument("--llama-server", help="the binary; default: the one in PATH")
    arguments.add_argument("--peers", nargs="*", default=["llama-server", "transformers"],
                           choices=["llama-server", "transformers"])  # fmt: skip
    arguments.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="what to measure of ours")
    arguments.add_argument("--http", action="store_true", help="ask ours through `puna serve`, not from threads")
    arguments.add_argument("--resume", type=Path, help="keeps what was measured in this file, and goes on from there")
    args = arguments.parse_args()
    path, asked = shapes.checkpoint(args.shape), burst(args.shape, args.requests, args.short, args.long, args.answer)
    measured, rows, peers = Measured(args.resume), [], {}

    def late(start: Callable[..., Service], *arguments: Any) -> closing[Late]:
        return closing(Late(partial(start, *arguments), Asked(asked[0].ids[: args.short], 4)))

    binary = find_llama_server(args.llama_server)
    if "llama-server" in args.peers and binary is None:
        print("llama-server: not in PATH and not given by --llama-server, so it is left out")
    for bits in args.bits if binary and "llama-server" in args.peers else ():
        kind = LLAMA_CPP_TYPES[bits]
        name, file, slot = f"llama-server {kind}", shapes.gguf(args.shape, kind), args.long + args.answer
        with late(llama_server, binary, file, args.threads, args.requests, slot) as service:
            peers[bits, name] = measured.get(name, lambda: [Summary.of(service.run(asked))])[0]
    if "transformers" in args.peers:
        name, tokens = "transformers bf16", sum(len(one.ids) + one.count for one in asked)
        with late(InProcess, name, transformers_batching, args.threads, path, tokens) as service:
            found = measured.get(name, lambda: [Summary.of(service.run(asked))])[0]
        peers |= {(bits, name): found for bits in args.bits}
    for bits in args.bits:
        name = f"puna {bits}"
        start = (puna_server, path, bits) if args.http else (InProcess, name, puna_threads, args.threads, path, bits)
        with late(*start) as service:
            if "burst" in args.parts:
                ours = measured.get(name, lambda: [Summary.of(service.run(asked))])[0]
                rows += [f"| burst, {bits} | {ours} | {peer} {theirs} | "
                         f"{ours.tokens_per_second / theirs.tokens_per_second:.2f}x |"
                         for (width, peer), theirs in peers.items() if width == bits]  # fmt: skip
            if bits != args.bits[0]:
                continue
            if "flow" in args.parts:
                quiet, busy = measured.get(f"{name}, quiet and while prompts arrive", lambda: disturbed(
                    service, args.shape, args.short, args.long, args.answer))
                rows.append(f"| tbt p99 of {QUIET} requests while {ARRIVALS} prompts of {args.long} arrive, {bits} | "
                            f"{busy.between_p99 * 1e3:.0f} ms (median {busy.between * 1e3:.0f}) | quiet: "
                            f"{quiet.between_p99 * 1e3:.0f} ms (median {quiet.between * 1e3:.0f}) | "
                            f"{busy.between_p99 / quiet.between_p99:.2f}x |")
            if "prefix" in args.parts:
                new, seen = measured.get(f"{name}, prefix new and seen", lambda: shared_prefix(
                    service, args.shape, args.prefix))
                rows.append(f"| ttft with a shared prefix of {args.prefix}, {bits} | {seen.first * 1e3:.0f} ms | "
                            f"prefix new: {new.first * 1e3:.0f} ms | {new.first / seen.first:.1f}x |")
    notes = NOTES.format(requests=args.requests, short=args.short, long=args.long, answer=args.answer,
                         door="through `puna serve`" if args.http else "by one thread a request in its own process")
    print(*rows, sep="\n")
    write_rows(Path(__file__), f"{args.requests} requests at once, shape {args.shape}", rows,
               f"{machine()}; one run each", notes=notes,
               columns=("what", "ours", "peer", "ratio"), document=args.document)  # fmt: skip


if __name__ == "__main__":
    main()
