"""Accounting of cache blocks: what is shared, what is free, and that no block is ever in two hands by mistake."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.engine import blocks as module
from puna.engine.blocks import FREED, BlockPool, BlockStore, Table


def test_a_pool_gives_each_block_once_and_then_the_one_unused_for_longest() -> None:
    pool = BlockPool(3)
    taken = [pool.take() for _ in range(3)]
    assert (sorted(taken), pool.available, pool.used) == ([0, 1, 2], 0, 3)
    for block, name in zip(taken, (b"a", b"b", b"c"), strict=True):
        pool.name(block, name, b"t")
    for block in (taken[1], taken[0], taken[2]):
        pool.release(block)
    assert (pool.available, pool.used, pool.kept) == (3, 0, 3)
    pool.share(taken[1])  # used again: no longer the oldest
    pool.release(taken[1])
    assert [pool.take(), pool.take()] == [taken[0], taken[2]]
    assert [pool.find(name, b"t") for name in (b"a", b"b", b"c")] == [None, taken[1], None]


def test_a_colliding_name_gives_no_wrong_block(monkeypatch: pytest.MonkeyPatch) -> None:
    class Same:
        def __init__(self, *_: object, **__: object) -> None: ...
        def digest(self) -> bytes:
            return b"same"

    monkeypatch.setattr(module, "blake2b", Same)
    store = BlockStore(8, size=4)
    fill(store, [1] * 8)
    assert store.attach(Table(), [1] * 4 + [9] * 4, 8) == 4  # the hash says 8


def fill(store: BlockStore, tokens: list[int], salt: bytes = b"", keep: bool = False) -> Table:
    """Run a sequence as the engine does, in pieces of 3 tokens at most, cut at chunk edges."""
    table = Table(salt)
    at = store.attach(table, tokens, len(tokens) - 1)
    while at < len(tokens):
        end = min(at + 3, len(tokens))
        if store.chunk:
            end = min(end, (at // store.chunk + 1) * store.chunk)
        assert store.reserve(table, end)
        at = end
        store.computed(table, tokens, at)
    if not keep:
        store.release(table)
    return table


def test_equal_prefixes_are_shared_up_to_a_whole_block_before_the_last_token() -> None:
    store = BlockStore(32, size=4)
    first = fill(store, list(range(12)), keep=True)
    for tokens, limit, hit in (
        (list(range(12)), 11, 8),  # the last token is always computed
        (list(range(13)), 12, 12),
        ([*range(6), 99, 7, *range(8, 20)], 19, 4),
        ([99, *range(1, 12)], 11, 0),
        (list(range(4, 12)), 7, 0),  # the same tokens elsewhere are another prefix
        (list(range(12)), 0, 0),
    ):
        table = Table()
        assert store.attach(table, tokens, limit) == hit
        assert table.full[: hit // 4].tolist() == first.full[: hit // 4].tolist()
        store.release(table)
    assert store.attach(Table(b"other adapter"), list(range(12)), 11) == 0
    assert BlockStore(8, share=False).attach(Table(), [1] * 40, 39) == 0
    store.release(first)
    assert (store.full.used, store.full.available, store.full.kept) == (0, 32, 3)


def test_local_layers_hold_one_chunk_and_a_hit_needs_the_whole_of_it() -> None:
    store = BlockStore(64, 64, chunk=16, size=4)
    tokens = list(range(40))
    table = fill(store, tokens, keep=True)
    assert table.local[:10].tolist()[:8] == [FREED] * 8  # chunks 0 and 1 are over
    assert (store.full.used, store.local.used) == (10, 2)
    store.release(table)
    again = Table()
    assert store.attach(again, tokens, 39) == 36
    assert [again.local[j] != FREED for j in range(9)] == [False] * 8 + [True]
    store.release(again)

    small = BlockStore(64, 5, chunk=16, size=4)  # too few local blocks to remember all chunks
    fill(small, tokens)
    fill(small, [7] * 20)  # pushes out all of the local blocks
    at_edge = Table()
    hit = small.attach(at_edge, tokens, 39)
    assert hit == 32, "at a chunk's edge no local block is needed"
    assert small.local.used == 0


def test_a_reservation_that_fails_changes_nothing() -> None:
    store = BlockStore(4, 2, chunk=8, size=4)
    table = Table()
    assert not store.reserve(table, 17)
    assert not store.reserve(table, 12)  # three local blocks
    assert store.reserve(table, 16, 8)
    assert not store.reserve(Table(), 1)
    assert (store.full.used, store.local.used) == (4, 2)
    assert not store.reserve(Table(), 0, spare=1)
    store.release(table)
    assert (store.full.available, store.local.available) == (4, 2)


@pytest.mark.parametrize(("full", "local", "chunk", "longest"), [
    (10, 0, None, 320), (10, 9, 64, 320), (10, 1, 64, 32), (10, 3, 80, 96), (10, 4, 80, 320)])
def test_the_longest_sequence(full: int, local: int, chunk: int | None, longest: int) -> None:
    store = BlockStore(full, local, chunk)
    assert store.longest == longest
    table = Table()
    for at in range(store.longest):
        assert store.reserve(table, at + 1)
        store.computed(table, [0] * (at + 1), at + 1)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_block_holds_what_its_tables_say(data: st.DataObject) -> None:
    """A model of the memory: each position written is looked up again by everybody who may look at it."""
    chunk = data.draw(st.sampled_from([None, 4, 6, 8, 12]))
    store = BlockStore(data.draw(st.integers(6, 14)), data.draw(st.integers(5, 10)), chunk, size=4)
    full_memory: dict[tuple[int, int], tuple[int, ...]] = {}  # (block, place) -> everything up to that token
    local_memory: dict[tuple[int, int], tuple[int, ...]] = {}
    live: list[tuple[list[int], Table, int]] = []
    for _ in range(data.draw(st.integers(1, 16))):
        if live and data.draw(st.booleans()):
            _, table, _ = live.pop(data.draw(st.integers(0, len(live) - 1)))
            store.release(table)
            continue
        tokens = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=20))
        table = Table()
        at = store.attach(table, tokens, len(tokens) - 1)
        assert at < len(tokens)
        assert at % 4 == 0
        while at < len(tokens):
            end = min(at + data.draw(st.integers(1, 9)), len(tokens))
            end = end if chunk is None else min(end, (at // chunk + 1) * chunk)
            if not store.reserve(table, end):
                break
            for p in range(at, end):
                full_memory[int(table.full[p // 4]), p % 4] = tuple(tokens[: p + 1])
                local_memory[int(table.local[p // 4]), p % 4] = tuple(tokens[: p + 1])
            for p in range(end):
                assert full_memory[int(table.full[p // 4]), p % 4] == tuple(tokens[: p + 1])
            for p in range((end - 1) // chunk * chunk if chunk else 0, end if chunk else 0):
                assert local_memory[int(table.local[p // 4]), p % 4] == tuple(tokens[: p + 1])
            at = end
            store.computed(table, tokens, at)
        live.append((tokens, table, at))
        for tokens, table, at in live:  # nobody else wrote into a block that is still held
            for p in range(at):
                assert full_memory[int(table.full[p // 4]), p % 4] == tuple(tokens[: p + 1])
    for _, table, _ in live:
        store.release(table)
    for pool in (store.full, store.local):
        assert (pool.used, pool.available) == (0, pool.count)
