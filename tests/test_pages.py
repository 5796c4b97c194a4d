"""Memory of packed weights: what lies in it stays, whoever is gone is left alone, and large pages really come."""

import gc
import re
from pathlib import Path

import pytest
import torch

from puna.model import pages
from puna.model.pages import LARGE, allocate, enlarge


@pytest.fixture(autouse=True)
def nothing_waits() -> None:
    """What other tests have loaded."""
    pages._waiting.clear()


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
