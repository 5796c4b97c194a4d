"""Many requests at once: each gets what it would have got alone, whatever happens around it."""

import gc
import random
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from puna.engine import CacheSize, DeadlineError, Model, QueueFullError, Reply
from puna.engine.core import Core
from puna.engine.pace import Pace
from puna.errors import PunaError
from puna.model import Decoder
from tiny import CONFIGS, decoder

torch.set_num_threads(1)

LENGTHS = range(6, 20)
KINDS = ["llama3.2", "scout"]


def prompts(count: int, shared: int = 0, seed: int = 0, most: int = 40) -> list[list[int]]:
    """Random prompts of 1 to `most` tokens after `shared` common ones."""
    rng = random.Random(seed)
    common = [rng.randrange(96) for _ in range(shared)]
    return [common + [rng.randrange(96) for _ in range(rng.randint(1, most))] for _ in range(count)]


def options(at: int) -> dict[str, Any]:
    return {"max_tokens": LENGTHS[at % len(LENGTHS)], "temperature": [0.0, 1.0][at % 2], "top_p": 1.0, "seed": at,
            "logprobs": 1, "ignore_eos": True}


def alone(kind: str, asked: list[list[int]], **settings: Any) -> list[Reply]:
    model = Model(decoder(kind), prefix_cache=False, **settings)
    return [model.generate(prompt, **options(at)) for at, prompt in enumerate(asked)]


def gather(model: Model, count: int) -> None:
    """The engine's next step begins when so many more requests wait for it."""
    core = model._engine.core
    take_in = core.take_in

    def wait() -> None:
        assert until(lambda: len(core.inbox) >= count)
        core.take_in = take_in  # type: ignore[method-assign]
        take_in()

    core.take_in = wait  # type: ignore[method-assign]


def together(model: Model, asked: list[list[int]], seconds: float = 0.1) -> list[Reply]:
    """One thread a request, which begin at random moments within so many seconds; the first half is waited for."""
    found: dict[int, Reply] = {}
    gather(model, len(asked) if not seconds else len(asked) // 2)
    rng = random.Random(len(asked))

    def ask(at: int, wait: float) -> None:
        time.sleep(wait)
        found[at] = model.generate(asked[at], **options(at), key=str(at % 3))

    threads = [threading.Thread(target=ask, args=(at, rng.random() * seconds)) for at in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    return [found[at] for at in range(len(asked))]


def check_equal(found: list[Reply], expected: list[Reply]) -> None:
    assert [reply.token_ids for reply in found] == [reply.token_ids for reply in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs is not None
        assert other.logprobs is not None
        assert [e.logprob for e in one.logprobs] == pytest.approx([e.logprob for e in other.logprobs], abs=1e-4)


def idle(model: Model) -> bool:
    stats = model.stats()
    return (stats.running, stats.waiting, stats.used_blocks) == (0, 0, 0)


def until(condition: Any, seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    return bool(condition())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_an_answer_is_the_same_alone_and_among_32(kind: str, prefix_cache: bool, monkeypatch: pytest.MonkeyPatch
                                                  ) -> None:
    asked = prompts(32, shared=33)
    expected = alone(kind, asked)
    widths = []
    run = Core._run
    monkeypatch.setattr(Core, "_run", lambda core, pieces: widths.append(len(pieces)) or run(core, pieces))
    model = Model(decoder(kind), prefix_cache=prefix_cache)
    check_equal(together(model, asked), expected)
    assert max(widths) > 8, "else nothing was together"
    assert until(lambda: idle(model))
    assert (model.stats().hit_rate > 0.3) == prefix_cache
    again = [model.generate(prompt, **options(at)) for at, prompt in enumerate(asked)]
    check_equal(again, expected)
    # whole blocks of 32 before the last token; blocks of answers can be found again as well
    assert [r.usage.cached_tokens >= (len(p) - 1) // 32 * 32 and prefix_cache for r, p in zip(again, asked, strict=True)
            ] == [prefix_cache] * 32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_an_answer_is_the_same_when_it_was_preempted(kind: str, prefix_cache: bool, monkeypatch: pytest.MonkeyPatch
                                                     ) -> None:
    asked = prompts(10, seed=1, most=20)
    monkeypatch.setattr(sys.modules[__name__], "LENGTHS", range(70, 71))
    expected = alone(kind, asked)
    for size in (CacheSize(6, 6), CacheSize(8, 3)):
        chunked = CONFIGS[kind].attention_chunk_size is not None
        model = Model(decoder(kind), cache=CacheSize(size.blocks, size.local_blocks if chunked else 0),
                      prefix_cache=prefix_cache)
        model._engine.core.pace = Pace(fixed=True)  # all prompts in the first step, whatever the time
        check_equal(together(model, asked, seconds=0.0), expected)
        assert model.stats().preemptions > 0
        assert until(lambda: idle(model))  # noqa: B023 - called here


def test_logits_and_scores_are_computed_among_answers_and_preempted_too() -> None:
    model = Model(decoder("scout"), cache=CacheSize(8, 8))
    plain = decoder("scout")
    asked = prompts(8, seed=3, most=70)
    found: dict[int, Any] = {}

    def ask(at: int) -> None:
        found[at] = model.logits(asked[at]) if at % 2 else model.score(asked[at])

    answers = [model.stream([at, 2, 3], max_tokens=60, temperature=0, key="answers") for at in range(4)]
    threads = [threading.Thread(target=ask, args=(at,)) for at in range(len(asked))]
    for thread in threads:
        thread.start()
    for answer in answers:
        assert sum(len(piece.token_ids) for piece in answer) == 60
    for thread in threads:
        thread.join(60)
    for at, ids in enumerate(asked):
        with torch.no_grad():
            logits = plain(torch.tensor([ids]))[0]
        if at % 2:
            torch.testing.assert_close(found[at], logits, atol=1e-4, rtol=1e-4)
        else:
            expected = torch.log_softmax(logits, -1)
            assert found[at][0] is None
            assert [s.logprob for s in found[at][1:]] == pytest.approx(
                [expected[i, token].item() for i, token in enumerate(ids[1:])], abs=1e-4)
    assert until(lambda: idle(model))


def test_cancelling_frees_every_block_at_any_time() -> None:
    model = Model(decoder("scout"), cache=CacheSize(12, 8))
    asked = prompts(30, seed=4, most=70)
    rng = random.Random(5)
    streams = [model.stream(prompt, max_tokens=100) for prompt in asked]
    for stream in streams:
        for _ in range(rng.choice([0, 0, 1, 3])):
            next(stream)
        stream.close()
        assert list(stream) == []
    scores = model.scores(asked[0])
    next(scores)
    scores.close()
    assert until(lambda: idle(model))


def test_a_failing_request_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = prompts(6, seed=6)
    expected = alone("llama3.2", asked)
    forward = Decoder.forward

    def cursed(self: Decoder, ids: torch.Tensor, *args: Any, **settings: Any) -> torch.Tensor:
        if (ids == 95).sum() >= 8:
            raise ZeroDivisionError("95 eight times")
        return forward(self, ids, *args, **settings)

    monkeypatch.setattr(Decoder, "forward", cursed)
    model = Model(decoder("llama3.2"))
    bad = model.stream([95] * 200)
    check_equal(together(model, asked), expected)
    with pytest.raises(ZeroDivisionError, match="eight times"):
        list(bad)
    assert until(lambda: idle(model))


def test_a_deadline_ends_a_request_with_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(decoder("scout"))
    clock = SimpleNamespace(monotonic=lambda: float(model.stats().steps), perf_counter=time.perf_counter)
    for module in ("core", "engine"):
        monkeypatch.setattr(f"puna.engine.{module}.time", clock)  # a second a step
    with pytest.raises(DeadlineError, match=r"longer than its 2\.5 seconds, in which 3 tokens came; allow more"):
        model.generate([1, 2], max_tokens=200, timeout=2.5)
    assert model.generate([1, 2], max_tokens=2, timeout=60).finish_reason == "length"
    for wrong, words in (({"timeout": 0}, "timeout must be"), ({"priority": 1.5}, "priority must be")):
        with pytest.raises(PunaError, match=words):
            model.stream([1], **wrong)  # type: ignore[arg-type]
    assert until(lambda: idle(model))


def test_the_queue_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    proceed = threading.Event()
    forward = Decoder.forward
    monkeypatch.setattr(Decoder, "forward", lambda *a, **k: proceed.wait(10) and forward(*a, **k))
    model = Model(decoder("scout"))
    model._engine.queue = 3
    streams = [model.stream([1, 2], max_tokens=2)]
    assert until(lambda: model.stats().running == 1)
    streams += [model.stream([1, 2], max_tokens=2) for _ in range(3)]
    with pytest.raises(QueueFullError, match="3 requests wait already"):
        model.stream([1, 2])
    proceed.set()
    assert [len(list(stream)) for stream in streams] == [3] * 4


def test_what_the_cache_can_never_hold_is_refused_with_numbers() -> None:
    model = Model(decoder("llama3.2"), cache=CacheSize(3))
    assert model.context_length == 96
    with pytest.raises(PunaError, match=r"97 tokens.*96 tokens here, because the cache .* could take 256\)"):
        model.generate([1] * 97)
    assert len(model.generate([1] * 90, ignore_eos=True).token_ids) == 6
    with pytest.raises(PunaError, match=r"context 200 needs 7 blocks of 32 tokens, but .* given 3, which hold 96"):
        Model(decoder("llama3.2"), cache=CacheSize(3), context=200)


def test_keys_and_values_in_eight_bits_give_nearly_the_same_logits() -> None:
    ids = prompts(1, shared=60)[0]
    exact, rough = (Model(decoder("llama3.2"), kv=kv).logits(ids) for kv in (None, "int8"))
    assert not torch.equal(exact, rough)
    torch.testing.assert_close(rough, exact, atol=0.15, rtol=0)


def test_without_a_thread_steps_are_taken_by_whoever_waits() -> None:
    class Stepped(Model):
        _threaded = False

    model = Stepped(decoder("scout"))
    asked = prompts(4, seed=7)
    assert model._engine._thread is None
    streams = [model.stream(prompt, **options(at)) for at, prompt in enumerate(asked)]
    replies = [[piece.reply for piece in stream][-1] for stream in streams]
    check_equal(replies, alone("scout", asked))  # type: ignore[arg-type]
    assert model._engine._thread is None
    model.stream([1, 2, 3]).close()
    assert idle(model)


def test_the_thread_starts_with_the_first_request_and_ends_with_the_model() -> None:
    model = Model(decoder("scout"))
    assert model._engine._thread is None
    stream = model.stream([1, 2], max_tokens=20)
    thread = model._engine._thread
    assert thread is not None
    del model
    gc.collect()
    assert len(list(stream)) == 21, "a stream keeps the engine going"
    del stream
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_the_interpreter_ends_amid_work() -> None:
    code = ("import sys; sys.path.insert(0, 'tests'); from tiny import decoder; from puna.engine import Model; "
            "m = Model(decoder('scout')); s = m.stream([1, 2], max_tokens=200); next(s); print('begun')")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (0, "begun\n", "")


def test_the_number_of_threads_follows_the_callers_wish() -> None:
    model = Model(decoder("scout"))
    seen = []
    forward = model.decoder.forward
    model.decoder.forward = lambda *a, **k: seen.append(torch.get_num_threads()) or forward(*a, **k)  # type: ignore
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            model.generate([1], max_tokens=2)
            assert seen[-1] == count
    finally:
        torch.set_num_threads(1)


def test_stats_count() -> None:
    model = Model(decoder("llama3.2"))
    model.generate([1] * 40, max_tokens=10, ignore_eos=True)
    model.generate([1] * 40, max_tokens=10, ignore_eos=True)
    computed = 40 + 9 + 8 + 9
    assert until(lambda: model.stats().tokens_per_second == pytest.approx(computed / 10))
    stats = model.stats()
    assert (stats.running, stats.waiting, stats.preemptions, stats.used_blocks) == (0, 0, 0, 0)
    assert stats.hit_rate == pytest.approx(32 / (2 * 39))
    assert stats.step_seconds > 0
    assert stats.kept_blocks >= 1
    assert stats.blocks == 512
