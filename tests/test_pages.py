"""Memory of packed weights: what lies in it stays, whoever is gone is left alone, and large pages really come."""

import gc
import re
from pathlib import Path

import pytest
import torch

from puna.model import pages
from puna.model.pages import LARGE, allocate, enlarge, side_by_side


@pytest.fixture(autouse=True)
def nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests have loaded; and pieces as large as they get."""
    pages._waiting.clear()
    monkeypatch.setattr(pages, "_TAKING", 1e6)


def in_large_pages(address: int) -> int:
    """Bytes of the mapping at an address that the system has in large pages."""
    found = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            found = int(match[1], 16) <= address < int(match[2], 16)
        elif found and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    return 0


def test_contents_stay_and_every_piece_is_moved_once() -> None:
    memory = allocate(20 * LARGE + 5)
    assert memory.data_ptr() % LARGE == 0
    memory[:] = torch.arange(len(memory)) % 251
    pieces = 0
    while enlarge():
        pieces += 1
    assert pieces == 3
    assert not enlarge()
    assert torch.equal(memory, (torch.arange(len(memory)) % 251).to(torch.uint8))
    if not in_large_pages(memory.data_ptr()):
        pytest.skip("this system has no large pages to give")


def test_memory_that_is_gone_is_left_alone() -> None:
    memory = allocate(4 * LARGE)
    del memory
    gc.collect()
    assert not enlarge()


def test_little_memory_has_nothing_to_move() -> None:
    memory = allocate(100)
    assert not enlarge()
    assert len(memory) == 100


def test_small_pieces_lie_side_by_side_and_move_together() -> None:
    with side_by_side():
        pieces = [allocate(size) for size in (3 * LARGE // 2, 100, LARGE, 31 * LARGE, 33 * LARGE)]
        for number, piece in enumerate(pieces):
            piece.fill_(number)
    assert [piece.data_ptr() % 64 for piece in pieces] == [0] * 5
    assert pieces[1].data_ptr() == pieces[0].data_ptr() + len(pieces[0])
    assert pieces[2].data_ptr() == pieces[1].data_ptr() + 128
    assert pieces[3].data_ptr() % LARGE == 0  # the first shelf is full
    moved = 0
    while enlarge():
        moved += 1
    assert moved == 5 + 1 + 4  # 33 large pages by themselves, 2 on the first shelf, 31 on the second, 8 at a time
    assert all(bool((piece == number).all()) for number, piece in enumerate(pieces))


def test_a_shelf_lives_as_long_as_any_piece() -> None:
    with side_by_side():
        first, second = allocate(LARGE), allocate(LARGE)
    del first
    gc.collect()
    second.fill_(7)
    assert enlarge()
    assert bool((second == 7).all())
    allocate(LARGE)
    with side_by_side():
        allocate(LARGE)
    gc.collect()
    assert not enlarge()


def test_pieces_are_as_large_as_time_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = allocate(20 * LARGE)
    sizes = []
    monkeypatch.setattr(pages, "_TAKING", 0.005)
    for pace in (0.0, 3.9 * LARGE / 0.005, 1e12):
        monkeypatch.setattr(pages, "_pace", pace)
        before = pages._waiting[0].address
        assert enlarge()
        sizes.append((pages._waiting[0].address - before) // LARGE)
    assert sizes == [1, 3, 8]
    assert pages._pace != 1e12  # measured anew
    del memory
