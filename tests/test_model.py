"""The decoder by itself: caches, chunks, sparse experts."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.model.cache import Cache, ChunkCache, FullCache
from puna.model.causal import attend
from puna.model.feedforward import MixtureOfExperts
from tiny import CONFIGS, decoder, randomise, token_ids


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, first: int, chunk: int | None):
    """The definition, one query at a time: [B, S, H, K]."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    out = torch.empty_like(q)
    for s in range(q.shape[1]):
        position = start + s
        low = 0 if chunk is None else position // chunk * chunk
        seen = [t for t in range(k.shape[1]) if low <= first + t <= position]
        scores = torch.einsum("bhk,bthk->bht", q[:, s], k[:, seen]) / q.shape[-1] ** 0.5
        out[:, s] = torch.einsum("bht,bthk->bhk", scores.softmax(-1), v[:, seen])
    return out


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 20), st.integers(1, 30), st.sampled_from([None, 1, 4, 7]), st.integers(0, 9999))
def test_attention_is_its_definition(past: int, new: int, chunk: int | None, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first = 0 if chunk is None else past // chunk * chunk
    q = torch.randn(2, new, 4, 8, generator=generator)
    k, v = (torch.randn(2, past - first + new, 2, 8, generator=generator) for _ in range(2))
    expected = plain_attention(q, k, v, past, first, chunk)
    torch.testing.assert_close(attend(q, k, v, past, first, chunk), expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 25), min_size=1, max_size=8), st.integers(1, 9))
def test_a_chunk_cache_shows_its_chunk_and_holds_no_more(pieces: list[int], chunk: int) -> None:
    total = sum(pieces)
    keys = torch.arange(total).float().view(1, total, 1, 1)
    cache, start = ChunkCache(chunk), 0
    for new in pieces:
        k, v, first = cache.append(keys[:, start : start + new], -keys[:, start : start + new])
        assert first == start // chunk * chunk
        assert k.flatten().tolist() == list(range(first, start + new))
        assert torch.equal(v, -k)
        start += new
        assert cache.length == start
        assert cache.bytes() <= 2 * chunk * 4


def test_a_full_cache_keeps_everything_as_it_grows() -> None:
    cache, keys = FullCache(), torch.randn(1, 200, 2, 4)
    for start in range(0, 200, 8):
        k, v, first = cache.append(keys[:, start : start + 8], keys[:, start : start + 8])
    assert first == 0
    assert torch.equal(k, keys)
    assert torch.equal(v, keys)


def test_local_layers_of_a_long_text_hold_one_chunk() -> None:
    model = decoder("scout")
    cache = Cache(model.config)
    with torch.no_grad():
        model(token_ids(model.config, 203), cache)
    one = 2 * 2 * 8 * 4  # keys and values, heads, width, bytes
    assert [layer.bytes() <= 8 * one for layer in cache.layers] == [True, True, True, False]


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("pieces", [(1,) * 40, (3, 1, 20, 1, 15), (8, 8, 24), (39, 1)])
def test_any_pieces_equal_the_whole(kind: str, pieces: tuple[int, ...]) -> None:
    model = decoder(kind)
    ids = token_ids(model.config, sum(pieces), batch=2)
    cache = model.new_cache()
    with torch.no_grad():
        whole = model(ids)
        parts = [model(part, cache) for part in ids.split(list(pieces), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_a_row_does_not_depend_on_its_batch(kind: str) -> None:
    model = decoder(kind)
    ids = token_ids(model.config, batch=5)
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[3:4], model(ids[3:4]), atol=2e-5, rtol=1e-4)


def test_no_token_sees_the_future_or_an_earlier_chunk() -> None:
    """Change one early token: later logits change through the NoPE layer alone, earlier ones never."""
    config = CONFIGS["scout"].with_(nope_layers=())
    model = decoder(config)
    ids = token_ids(config)
    changed = ids.clone()
    changed[0, 10] = (changed[0, 10] + 1) % config.vocab_size
    with torch.no_grad():
        differs = (model(ids) != model(changed)).any(-1)[0].tolist()
    assert differs[10:16] == [True] * 6  # its own chunk, from itself on
    assert not any(differs[:10] + differs[16:])


@pytest.mark.parametrize("top_k", [1, 2])
def test_sparse_experts_equal_the_dense_sum(top_k: int) -> None:
    """Against Meta's formulation: every expert runs on inputs scaled by its gate, zero where not chosen."""
    config = CONFIGS["scout"].with_(num_experts_per_token=top_k)
    moe = MixtureOfExperts(config)
    randomise(moe)
    x = torch.randn(3, 7, config.hidden_size, requires_grad=True)
    logits = moe.router(x)
    chosen = torch.full_like(logits, -torch.inf).scatter(-1, logits.topk(top_k).indices, logits.topk(top_k).values)
    scaled = torch.einsum("bse,bsd->ebsd", chosen.sigmoid(), x)
    gate, up = torch.einsum("ebsd,edf->ebsf", scaled, moe.experts.gate_up_proj).chunk(2, -1)
    routed = torch.einsum("ebsf,efd->bsd", F.silu(gate) * up, moe.experts.down_proj)
    dense = moe.shared_expert(x) + routed
    weights = torch.randn_like(dense)
    expected = torch.autograd.grad((dense * weights).sum(), [x, *moe.parameters()])
    ours = torch.autograd.grad((moe(x) * weights).sum(), [x, *moe.parameters()])
    torch.testing.assert_close(moe(x), dense, atol=1e-5, rtol=1e-5)
    for got, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_only_chosen_experts_are_computed() -> None:
    """An expert that no token chose may hold anything, even NaN."""
    moe = MixtureOfExperts(CONFIGS["scout"])
    randomise(moe)
    x = torch.randn(1, 1, CONFIGS["scout"].hidden_size)
    chosen = int(moe.route(x[0])[1])
    with torch.no_grad():
        for expert in set(range(4)) - {chosen}:
            moe.experts.gate_up_proj[expert] = torch.nan
        assert moe(x).isfinite().all()
        moe.experts.gate_up_proj[chosen] = torch.nan
        assert moe(x).isnan().all()
