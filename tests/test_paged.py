"""The paged cache and its attention: equal to the definition, and the same bits however the work is cut."""

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from puna.family.config import ModelConfig
from puna.model import native
from puna.model.causal import attend
from puna.model.paged import BLOCK, Batch, PagedPool, Span, blocks_for
from tiny import LLAMA

compiled = pytest.mark.skipif(native.kernels() is None, reason="the kernels were not built for this machine")


def config(heads: int = 4, kv_heads: int = 2, head_dim: int = 16, chunk: int | None = None) -> ModelConfig:
    """Layer 0 chunked where a chunk is given, else full; layer 1 full."""
    shape = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim, "attention_chunk_size": chunk}
    return ModelConfig(**LLAMA | shape, nope_layers=(1,))


@dataclass
class Text:
    """One sequence's queries, keys and values, and its blocks in the pool."""

    q: Tensor
    k: Tensor
    v: Tensor
    blocks: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))

    def __len__(self) -> int:
        return len(self.q)


def texts(shape: ModelConfig, lengths: list[int], seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Text]:
    random = torch.Generator().manual_seed(seed)
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    return [
        Text(*(torch.randn(length, h, shape.head_dim, generator=random).to(dtype) for h in heads)) for length in lengths
    ]


def pool_for(shape: ModelConfig, sequences: list[Text], kv: str | None = None, seed: int = 0) -> PagedPool:
    """A pool whose blocks the sequences share out among them at random, full of NaN as a bad model may leave behind."""
    needed = [blocks_for(len(text)) for text in sequences]
    pool = PagedPool(shape, sum(needed) + 2, sum(needed) + 2, sequences[0].q.dtype, kv)
    pool.full.memory.fill_(255)
    pool.local.memory.fill_(255)
    ids = np.random.default_rng(seed).permutation(sum(needed) + 2).astype(np.int32)
    for text, count in zip(sequences, needed, strict=True):
        text.blocks, ids = ids[:count], ids[count:]
    return pool


def run(pool: PagedPool, steps: list[list[tuple[Text, int, int]]], layer: int = 0) -> list[Tensor]:
    """Each step is one pass over pieces (sequence, start, count); returns what each piece got, in order."""
    out = []
    for step in steps:
        batch = Batch(pool, [Span(start, count, text.blocks, text.blocks) for text, start, count in step])
        parts = [torch.cat([getattr(t, name)[i : i + n] for t, i, n in step])[None] for name in ("q", "k", "v")]
        out += batch.layers[layer].attend(*parts)[0].split([count for _, _, count in step])
    return out


def whole(pool: PagedPool, text: Text, layer: int = 0) -> Tensor:
    return run(pool, [[(text, 0, len(text))]], layer)[0]


def pieces(text: Text, cuts: list[int]) -> list[tuple[Text, int, int]]:
    edges = [0, *sorted({cut for cut in cuts if 0 < cut < len(text)}), len(text)]
    return [(text, a, b - a) for a, b in itertools.pairwise(edges)]


SHAPES = st.builds(
    lambda group, kv_heads, head_dim, chunk: config(group * kv_heads, kv_heads, head_dim, chunk),
    st.sampled_from([1, 2, 3, 4, 5, 9]),
    st.integers(1, 2),
    st.sampled_from([2, 8, 16, 24, 64, 80, 128, 256]),
    st.sampled_from([None, 1, 8, 20, 64]),
)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(1, 150), st.integers(0, 9), st.lists(st.integers(1, 149), max_size=4))
def test_attention_equals_its_definition(shape: ModelConfig, length: int, seed: int, cuts: list[int]) -> None:
    text = texts(shape, [length], seed)[0]
    for layer in (0, 1):
        pool = pool_for(shape, [text])
        got = torch.cat(run(pool, [[piece] for piece in pieces(text, cuts)], layer))
        expected = attend(text.q[None], text.k[None], text.v[None], 0, 0, shape.chunk(layer))[0]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@compiled
@settings(max_examples=60, deadline=None)
@given(
    SHAPES,
    st.integers(1, 150),
    st.lists(st.integers(1, 149), max_size=6),
    st.sampled_from([None, "int8"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_pieces_change_no_bit(
    shape: ModelConfig, length: int, cuts: list[int], kv: str | None, dtype: torch.dtype
) -> None:
    text = texts(shape, [length], 3, dtype)[0]
    expected = whole(pool_for(shape, [text], kv), text)
    assert expected.isfinite().all()
    assert torch.equal(torch.cat(run(pool_for(shape, [text], kv, 1), [[p] for p in pieces(text, cuts)])), expected)
    one_by_one = run(pool_for(shape, [text], kv, 2), [[(text, i, 1)] for i in range(length)])
    assert torch.equal(torch.cat(one_by_one), expected)


@compiled
@settings(max_examples=15, deadline=None)
@given(SHAPES, st.lists(st.integers(1, 120), min_size=32, max_size=32), st.sampled_from([None, "int8"]), st.data())
def test_neighbours_change_no_bit(shape: ModelConfig, lengths: list[int], kv: str | None, data: st.DataObject) -> None:
    together = texts(shape, lengths, 5)
    new = [data.draw(st.sampled_from([1, length])) for length in lengths]
    pool = pool_for(shape, together, kv)
    steps = [[(t, 0, len(t) - n) for t, n in zip(together, new, strict=True) if len(t) > n]]
    steps = [*filter(None, steps), [(t, len(t) - n, n) for t, n in zip(together, new, strict=True)]]
    got = run(pool, steps)[-32:]
    for text, n, out in zip(together, new, got, strict=True):
        assert torch.equal(out, whole(pool_for(shape, [text], kv, 9), text)[-n:])


@compiled
@pytest.mark.parametrize("chunk", [None, 8192 + 20])
@pytest.mark.parametrize("kv", [None, "int8"])
def test_long_contexts_and_threads_change_no_bit(chunk: int | None, kv: str | None) -> None:
    shape = config(3, 1, 8, chunk)
    text = texts(shape, [13_000], 7)[0]  # float32: in bfloat16 most wrong orders of addition would not show
    expected = whole(pool_for(shape, [text], kv), text)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            pool = pool_for(shape, [text], kv, threads)
            cuts = [4095, 4096, 4097, 8191, 8193, 8212, 8214, 12_290, 12_990, *range(12_991, 13_000)]
            assert torch.equal(torch.cat(run(pool, [[piece] for piece in pieces(text, cuts)])), expected)
    finally:
        torch.set_num_threads(before)
    reference = attend(text.q[None], text.k[None], text.v[None], 0, 0, chunk)[0]
    tolerance = 0.02 if kv else 1e-5
    torch.testing.assert_close(expected, reference, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eight_bits_are_close_and_a_quarter_of_float32(dtype: torch.dtype) -> None:
    shape = config(8, 2, 64)
    text = texts(shape, [100], 2, dtype)[0]
    pool = pool_for(shape, [text], "int8")
    got = run(pool, [[(text, 0, 70)], [(text, 70, 30)]], 1)
    expected = attend(text.q[None], text.k[None], text.v[None], 0, 0, None)[0]
    assert (torch.cat(got) - expected).norm() < 0.01 * expected.norm()
    assert PagedPool.block_bytes(shape, dtype, "int8")[0] < 0.27 * PagedPool.block_bytes(shape, torch.float32)[0]


@compiled
def test_without_kernels_the_same_answer_and_the_same_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = config(4, 2, 24, 20)
    for kv in (None, "int8"):
        text = texts(shape, [90], 4)[0]
        pools, answers = [], []
        for missing in (False, True):
            with monkeypatch.context() as patch:
                if missing:
                    patch.setattr(native, "kernels", lambda: None)
                pool = pool_for(shape, [text], kv)
                answers.append(torch.cat(run(pool, [[p] for p in pieces(text, [7, 40, 41])])))
                pools.append(pool.local.memory)
        torch.testing.assert_close(*answers, atol=2e-6, rtol=2e-6)
        assert torch.equal(*pools)


def test_a_local_layer_never_reads_before_its_chunk() -> None:
    shape = config(chunk=64)
    text = texts(shape, [70], 6)[0]
    pool = pool_for(shape, [text])
    expected = whole(pool, text)[-1]
    freed = text.blocks.copy()
    freed[:2] = -1
    last = tuple(x[None, -1:] for x in (text.q, text.k, text.v))
    found = Batch(pool, [Span(69, 1, text.blocks, freed)]).layers[0].attend(*last)[0, 0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    if native.kernels() is not None:  # the PyTorch fallback promises no bits
        assert torch.equal(found, expected)


def test_what_cannot_be_served_is_refused() -> None:
    shape = config(chunk=64)
    pool = PagedPool(shape, 4, 4, torch.float32)
    table = np.arange(4, dtype=np.int32)
    with pytest.raises(ValueError, match="at least one token"):
        Batch(pool, [Span(3, 0, table, table)])
    with pytest.raises(ValueError, match="has 4 blocks"):
        Batch(pool, [Span(4 * BLOCK, 1, table, table)])
    with pytest.raises(ValueError, match="a pool of 4"):
        Batch(pool, [Span(0, 1, table + 4, table)])
    with pytest.raises(ValueError, match="a pool of 4"):
        Batch(pool, [Span(70, 1, table, np.array([0, 1, -1], np.int32))])
    batch = Batch(pool, [Span(5, 2, table, table), Span(70, 3, table, table)])
    assert batch.positions(5, torch.device("cpu")).tolist() == [5, 6, 70, 71, 72]
    with pytest.raises(ValueError, match="4 tokens for spans of 5"):
        batch.positions(4, torch.device("cpu"))
    with pytest.raises(ValueError, match="int4"):
        PagedPool(shape, 4, 4, torch.float32, "int4")


def test_bytes_are_those_promised_and_taken_up_block_by_block() -> None:
    import psutil

    shape = config(8, 8, 128, 64)
    full, local = PagedPool.block_bytes(shape, torch.bfloat16)
    assert full == local == 2 * 8 * 128 * BLOCK * 2
    before = psutil.Process().memory_info().rss
    pool = PagedPool(shape, 8192, 10, torch.bfloat16)
    assert pool.bytes() == 8192 * full + 10 * local
    assert psutil.Process().memory_info().rss - before < pool.bytes() / 20
