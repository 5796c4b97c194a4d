"""The scheduler without a model: whatever arrives, everybody gets done, in order, within budget and blocks."""

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.engine.blocks import BlockStore
from puna.engine.scheduler import Plan, Sequence, State, schedule

SIZE = 4


@dataclass
class World:
    """Runs plans as an engine would: a sequence ends when it has drawn its number of tokens."""

    state: State
    budget: int = 16
    now: float = 0.0
    limits: dict[Sequence, int] = field(default_factory=dict)
    finished: dict[Sequence, int] = field(default_factory=dict)  # and in which step
    first: dict[Sequence, int] = field(default_factory=dict)  # the step of its first token
    tokens: dict[object, int] = field(default_factory=dict)  # computed, by key
    ended: list[tuple[Sequence, str]] = field(default_factory=list)
    preempted: int = 0

    def add(self, prompt: list[int], answer: int, **settings: object) -> Sequence:
        sequence = Sequence(list(prompt), len(prompt) - 1, **settings)  # type: ignore[arg-type]
        self.limits[sequence] = len(prompt) + answer
        self.state.add(sequence)
        return sequence

    def step(self) -> Plan:
        state = self.state
        plan = schedule(state, self.budget, self.now)
        self.now += 1
        self.ended += plan.ended
        self.preempted += len(plan.preempted)
        assert plan.tokens <= self.budget
        assert len(state.running) <= state.most
        for pool in (state.blocks.full, state.blocks.local):
            assert 0 <= pool.used <= pool.count
        assert set(plan.pieces) <= set(state.running)
        assert not {s for s in plan.preempted if s.running}, "not again in the same step"
        assert not set(state.running) & set(state.waiting)
        assert all(s.running for s in state.running)
        assert not any(s.running or s.table.count for s in state.waiting)
        for sequence, count in plan.pieces.items():
            end = sequence.computed + count
            assert 0 < count <= sequence.remaining
            assert sequence.table.count * SIZE >= end
            if chunk := state.blocks.chunk:
                assert sequence.computed // chunk == (end - 1) // chunk
                assert sequence.table.local_end * SIZE >= end
            self.tokens[sequence.key] = self.tokens.get(sequence.key, 0) + count
            state.advance(sequence, count)
            if sequence.remaining == 0:
                self.first.setdefault(sequence, state.step)
                sequence.tokens.append(hash((len(sequence.tokens), sequence.tokens[0])) % 7)
                if len(sequence.tokens) >= self.limits[sequence]:
                    self.finished[sequence] = state.step
                    state.remove(sequence)
        return plan

    def run(self, most: int = 20_000) -> None:
        steps = 0
        while self.state.running or self.state.waiting:
            self.step()
            steps += 1
            assert steps < most, "somebody starves"
        for pool in (self.state.blocks.full, self.state.blocks.local):
            assert (pool.used, pool.available) == (0, pool.count)
        assert not self.state.computing


def world(blocks: int = 64, local: int = 0, chunk: int | None = None, share: bool = True, most: int = 8,
          budget: int = 16) -> World:
    return World(State(BlockStore(blocks, local, chunk, SIZE, share), most), budget)


def prompt(length: int, first: int = 0) -> list[int]:
    return [first, *range(length - 1)] if length else []


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_everything_finishes_whatever_arrives(data: st.DataObject) -> None:
    chunk = data.draw(st.sampled_from([None, 6, 8, 16]))
    it = world(data.draw(st.integers(10, 30)), data.draw(st.integers(8, 20)), chunk, data.draw(st.booleans()),
               data.draw(st.integers(1, 6)), data.draw(st.integers(1, 24)))
    sequences = []
    for _ in range(data.draw(st.integers(1, 20))):
        length = data.draw(st.integers(1, 30))
        settings = {"key": data.draw(st.sampled_from("ab")), "priority": data.draw(st.integers(0, 1))}
        one = it.add(prompt(length, data.draw(st.integers(0, 2))), data.draw(st.integers(1, 10)), **settings)
        if data.draw(st.booleans()):
            one.wanted = 0  # a request for the prompt's own logits
        sequences.append(one)
        for _ in range(data.draw(st.integers(0, 4))):
            it.step()
        if data.draw(st.integers(0, 5)) == 0:
            data.draw(st.sampled_from(sequences)).cancelled = True
        one.paused = data.draw(st.integers(0, 5)) == 0 and len(one.tokens) > length
    for one in sequences:
        one.paused = False
    it.run()
    gone = {sequence for sequence, _ in it.ended}
    assert set(it.finished) | gone == set(sequences)
    assert all(s.cancelled for s in gone)


def test_answers_come_first_and_a_long_prompt_takes_what_is_left() -> None:
    it = world(budget=10)
    talkers = [it.add(prompt(3, i), 50) for i in range(3)]
    it.step()
    long = it.add(prompt(40, 9), 1)
    for _ in range(5):
        plan = it.step()
        assert [plan.pieces[t] for t in talkers] == [1, 1, 1]
        assert plan.pieces[long] == 7
        assert (plan.answers, plan.tokens) == (3, 10)


def test_short_prompts_pass_a_long_one_which_still_goes_on() -> None:
    it = world(blocks=200, budget=16, share=False)
    long = it.add(prompt(300, 9), 1)
    it.step()
    for first in range(15):
        short = it.add(prompt(6, first), 1)
        it.step()
        assert short in it.finished
    assert long.computed >= 16 + 15 * 8


def test_who_shares_a_prompt_waits_for_its_blocks() -> None:
    it = world(blocks=100, budget=16)
    same = [it.add([*range(40), 50 + i], 2) for i in range(4)]
    it.run()
    assert sum(it.tokens.values()) == 41 + 3 * 1 + 4  # the prefix once, then one token each, and one of each answer
    assert [s.cached for s in same] == [0, 40, 40, 40]
    assert it.state.blocks.hit_tokens == 120
    assert max(it.first.values()) <= 4


def test_no_one_waits_for_blocks_of_somebody_without_progress() -> None:
    it = world(blocks=100, budget=1)
    held = it.add(prompt(40), 2, key="heavy")
    it.step()
    it.add(prompt(80, 1), 2, key="light")
    it.state.served["heavy"] = 1000
    for _ in range(3):
        it.step()
    same = it.add(prompt(40), 2, key="light")
    it.step()
    assert (held.running, held.computed, same.running) == (True, 1, True)


def test_a_prompt_does_not_begin_where_answers_will_soon_need_its_blocks() -> None:
    it = world(blocks=4, share=False)
    it.add(prompt(8), 4)
    it.step()
    it.add(prompt(8, 1), 4)
    it.run()
    assert it.preempted == 0


@pytest.mark.parametrize("share", [True, False])
def test_preempted_answers_keep_their_tokens(share: bool) -> None:
    it = world(blocks=10, share=share)
    sequences = [it.add(prompt(8, i), 24) for i in range(4)]  # 8 blocks each
    it.run()
    assert it.preempted > 0
    alone = world(blocks=10)
    for i, one in enumerate(sequences):
        other = alone.add(prompt(8, i), 24)
        alone.run()
        assert one.tokens == other.tokens
    assert [it.finished[s] for s in sequences] == sorted(it.finished[s] for s in sequences), "the earliest gets done"


def test_priorities_are_honoured() -> None:
    it = world(blocks=40, most=2, share=False)
    low = [it.add(prompt(12, i), 20, priority=1) for i in range(4)]
    it.step()
    high = [it.add(prompt(12, 10 + i), 20, priority=0) for i in range(3)]
    it.run()
    assert max(it.finished[s] for s in high) <= min(it.finished[s] for s in low)
    assert it.preempted == 2, "those that ran made room"


def test_keys_get_equal_shares_however_many_requests_they_send() -> None:
    it = world(blocks=60, most=4, budget=8, share=False)
    for i in range(60):
        it.add(prompt(10, i), 6, key="many")
    for _ in range(10):
        it.step()
    few = [it.add(prompt(10, i), 6, key="few") for i in range(10)]
    before = dict(it.tokens)
    while few[-1] not in it.finished:
        it.step()
        gap = it.state.served["many"] - it.state.served["few"]
        assert abs(gap) <= 4 * (10 + 2 * 6), "at most what is running at once"
    assert it.tokens["many"] - before["many"] <= it.tokens["few"] + 4 * 16


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 4), st.integers(1, 5))
def test_the_fairness_bound_holds_for_keys_that_always_ask(seed: int, keys: int, most: int) -> None:
    rng = random.Random(seed)
    it = world(blocks=80, most=most, budget=rng.randint(2, 20), share=False)
    biggest = 20 + 2 * 10
    for _ in range(150):
        for key in range(keys):
            while sum(s.key == key for s in it.state.waiting) < 2:
                it.add(prompt(rng.randint(1, 20), key), rng.randint(1, 10), key=key)
        it.step()
        served = [it.state.served[key] for key in range(keys)]
        assert max(served) - min(served) <= 2 * biggest * most


def test_a_key_that_was_away_is_owed_nothing() -> None:
    it = world(blocks=60, most=2, share=False)
    for i in range(20):
        it.add(prompt(8, i), 4, key="busy")
    it.add(prompt(8, 30), 4, key="other")
    for _ in range(20):
        it.step()
    it.add(prompt(8, 31), 4, key="new")
    assert it.state.served["new"] == it.state.served["busy"] > 0
    assert "other" not in it.state.served, "counters of who is gone don't pile up"


def test_deadlines_and_cancellation_free_everything() -> None:
    it = world(blocks=20, most=1)
    running = it.add(prompt(8), 50, deadline=5.0)
    waiting = it.add(prompt(8, 1), 50, deadline=3.0)
    third = it.add(prompt(8, 2), 50)
    for _ in range(8):
        it.step()
    assert it.ended == [(waiting, "deadline"), (running, "deadline")]
    assert third.running
    third.cancelled = True
    it.step()
    assert it.ended[-1] == (third, "cancelled")
    assert it.state.blocks.full.used == 0


def test_a_reader_that_is_behind_holds_up_nobody() -> None:
    it = world(blocks=10, share=False)
    slow = it.add(prompt(16), 12)
    it.step()
    slow.paused = True
    computed = slow.computed
    plan = it.step()
    assert (plan.pieces, slow.computed) == ({}, computed)
    other = it.add(prompt(30, 1), 4)
    for _ in range(12):
        it.step()
    assert other in it.finished
    assert not slow.running, "its blocks were needed"
    slow.paused = False
    it.run()
    assert slow in it.finished
