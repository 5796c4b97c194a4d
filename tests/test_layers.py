"""Layers in one call of the kernels give the bits of layers computed step by step."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from puna.model import layers
from puna.model.decoder import Block, Decoder
from puna.model.native import kernels
from puna.model.packing import pack
from puna.model.paged import Batch, PagedPool, Span
from tiny import CONFIGS, decoder

pytestmark = pytest.mark.skipif(kernels() is None, reason="the compiled kernels are not there")
KINDS = sorted(CONFIGS)
BITS = [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, 8), (torch.bfloat16, 4), (torch.float32, 4)]


def packed(kind: str, dtype: torch.dtype, bits: int | None) -> Decoder:
    model = decoder(kind).to(dtype)
    pack(model, bits)
    return model


def passes(model: Decoder, dtype: torch.dtype, kv: str | None, rows: list[list[int]] | None = None) -> list[Tensor]:
    """Two sequences: 40 and 3 tokens, then 1 and 30, then 1 and 1. rows: the only ones that are asked for."""
    pool = PagedPool(model.config, 8, 8, dtype, kv)
    tables = [np.array(each, np.int32) for each in ([0, 3, 5], [1, 2, 7])]
    random, starts, found = torch.Generator().manual_seed(3), [0, 0], []
    for at, counts in enumerate(((40, 3), (1, 30), (1, 1))):
        spans = [Span(*each, table, table) for *each, table in zip(starts, counts, tables, strict=True)]
        ids = torch.randint(model.config.vocab_size, (1, sum(counts)), generator=random)
        wanted = None if rows is None else torch.tensor(rows[at], dtype=torch.long)
        found.append(model.hidden(ids, Batch(pool, spans), rows=wanted))
        starts = [start + count for start, count in zip(starts, counts, strict=True)]
    return found


@torch.no_grad()
@pytest.mark.parametrize("kv", [None, "int8"])
@pytest.mark.parametrize(("dtype", "bits"), BITS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_bits_are_those_of_the_blocks(kind: str, dtype: torch.dtype, bits: int | None, kv: str | None,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed(kind, dtype, bits)
    called: list[int] = []
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *a: called.append(1) or forward(self, *a))
    together = passes(model, dtype, kv)
    config = model.config
    assert not called
    monkeypatch.setattr(layers.Dense, "of", lambda *_: None)
    model._passes = layers.Layers(model.layers)
    called.clear()
    one_by_one = passes(model, dtype, kv)
    assert len(called) == 3 * config.num_layers
    assert all(map(torch.equal, together, one_by_one))


ROWS = (
    [[], [], [0]],  # of a piece of a prompt nobody reads anything
    [[39, 42], [0, 30], [0, 1]],
    [[3, 4, 5, 6, 7, 8, 38, 39, 40, 41], [1, 2, 3, 30], [1]],  # guesses; runs that end and begin at a sequence's edge
    [[42, 0, 7], [5, 5], [1, 0]],  # in no order, or twice
    [[-1], [-2, 3], [0]],  # from the end
)


@torch.no_grad()
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("kv", [None, "int8"])
@pytest.mark.parametrize(("dtype", "bits"), BITS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_nobody_reads_change_nothing(kind: str, dtype: torch.dtype, bits: int | None, kv: str | None,
                                               rows: list[list[int]]) -> None:
    model = packed(kind, dtype, bits)
    everything = passes(model, dtype, kv)
    for some, whole, wanted in zip(passes(model, dtype, kv, rows), everything, rows, strict=True):
        assert torch.equal(some, whole[:, wanted])


@torch.no_grad()
def test_rows_that_are_not_there_are_refused() -> None:
    model = packed("llama3.2", torch.float32, None)
    for rows in ([43], [0, 43], [-44]):
        with pytest.raises(IndexError):
            passes(model, torch.float32, None, [rows, [], []])


@torch.no_grad()
def test_rows_that_nobody_reads_are_not_computed() -> None:
    model = packed("maverick", torch.bfloat16, 4)
    last = max(at for at in model.expert_load())
    before = model.expert_load()
    passes(model, torch.bfloat16, None, [[42], [], [0, 1]])
    served = {at: sum(after) - sum(before[at]) for at, after in model.expert_load().items()}
    choices = model.config.num_experts_per_token
    assert last == model.config.num_layers - 1
    assert served == {at: choices * (3 if at == last else 43 + 31 + 2) for at in served}


@torch.no_grad()
def test_an_exchanged_part_is_seen() -> None:
    model = packed("llama3.2", torch.float32, None)
    before = passes(model, torch.float32, None)[0]
    attention: Any = model.layers[1].self_attn
    product, attention.o_proj = attention.o_proj, torch.nn.Identity()
    changed = passes(model, torch.float32, None)[0]
    assert not torch.equal(changed, before)
    attention.o_proj = product
    assert torch.equal(passes(model, torch.float32, None)[0], before)


def test_threads_are_released_and_come_back() -> None:
    script = (
        "import os, time, torch\n"
        "from puna.model.native import release_threads\n"
        "torch.set_num_threads(2)\n"
        "work = lambda: torch.ones(1 << 20).exp().sum()\n"
        "count = lambda: len(os.listdir('/proc/self/task'))\n"
        "expected, busy = work(), count()\n"
        "release_threads()\n"
        "end = time.monotonic() + 60\n"
        "while count() >= busy and time.monotonic() < end: time.sleep(0.01)\n"
        "assert count() < busy, (count(), busy)\n"
        "assert work() == expected and count() == busy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
