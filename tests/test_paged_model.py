"""The decoder over the paged cache: the plain forward pass's answers, whatever the pass holds beside them."""

import random

import numpy as np
import pytest
import torch

from puna.model import Decoder, native
from puna.model.packing import pack
from puna.model.paged import Batch, PagedPool, Span, blocks_for
from puna.model.rope import Positions, Rotary, inverse_frequencies
from tiny import CONFIGS, decoder, token_ids

compiled = pytest.mark.skipif(native.kernels() is None, reason="the kernels were not built for this machine")
CPU = torch.device("cpu")


def ragged(model: Decoder, lengths: list[int], kv: str | None = None, seed: int = 1) -> list[torch.Tensor]:
    """Logits of some texts that go through the decoder together, each in pieces of random sizes."""
    chance = random.Random(seed)
    needed = sum(map(blocks_for, lengths))
    pool = PagedPool(model.config, needed, needed, model.dtype, kv)
    ids = np.random.default_rng(2).permutation(needed).astype(np.int32)
    tables = [ids[sum(map(blocks_for, lengths[:i])) :][: blocks_for(n)] for i, n in enumerate(lengths)]
    texts = [token_ids(model.config, n, seed=n)[0] for n in lengths]
    done, out = [0] * len(lengths), [[] for _ in lengths]
    while any(at < n for at, n in zip(done, lengths, strict=True)):
        turn = [i for i, n in enumerate(lengths) if done[i] < n and chance.random() < 0.8]
        spans = [
            Span(done[i], chance.randint(1, min(30, lengths[i] - done[i])), tables[i], tables[i]) for i in turn
        ]
        if not spans:
            continue
        tokens = torch.cat([texts[i][s.start : s.start + s.count] for i, s in zip(turn, spans, strict=True)])
        with torch.no_grad():
            parts = model(tokens[None], Batch(pool, spans))[0].split([s.count for s in spans])
        for i, part in zip(turn, parts, strict=True):
            out[i].append(part)
            done[i] += len(part)
    return [torch.cat(part) for part in out]


@pytest.mark.parametrize("missing", [False, True], ids=["native", "torch"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_ragged_passes_give_the_plain_forward_pass(kind: str, missing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing:
        monkeypatch.setattr(native, "kernels", lambda: None)
    model = decoder(kind)
    lengths = [1, 33, 90, 64, 20]
    for length, logits in zip(lengths, ragged(model, lengths), strict=True):
        with torch.no_grad():
            ids = token_ids(model.config, length, seed=length)
            torch.testing.assert_close(logits, model(ids)[0], atol=3e-5, rtol=3e-5)
            single = model(ids, Batch.single(model.config, length, torch.float32), rows=torch.tensor([length - 1]))
            torch.testing.assert_close(single[0, 0], logits[-1], atol=3e-5, rtol=3e-5)


@compiled
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("kind", ["llama3.2", "scout"])
def test_packed_models_answer_to_the_last_bit_in_any_company(kind: str, bits: int | None) -> None:
    for dtype, kv in ((torch.float32, None), (torch.bfloat16, "int8")):
        model = decoder(kind, dtype=dtype)
        pack(model, bits)
        lengths = [1, 33, 90, 20, 64, 47, 20]
        alone = [ragged(model, [length], kv, seed=3)[0] for length in lengths]
        for seed in (1, 2):
            for logits, expected in zip(ragged(model, lengths, kv, seed), alone, strict=True):
                assert torch.equal(logits, expected)
        if kv is None:
            with torch.no_grad():
                plain = model(token_ids(model.config, 90, seed=90), Batch.single(model.config, 90, dtype))
            assert torch.equal(plain[0], alone[2])


def test_float64_goes_through_pytorch_in_full_precision() -> None:
    model = decoder("scout", dtype=torch.float64)
    with torch.no_grad():
        ids = token_ids(model.config, 40, seed=40)
        torch.testing.assert_close(ragged(model, [40])[0], model(ids)[0], atol=1e-12, rtol=1e-12)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama3.1", "scout", "maverick"])
def test_rotation_is_pytorchs_and_the_same_for_a_row_alone(kind: str, dtype: torch.dtype) -> None:
    config = CONFIGS[kind].with_(head_dim=24)
    positions = torch.tensor([0, 3, 4, 100_000, 7, 9_999_999])
    frequencies = inverse_frequencies(config)
    # queries and keys as slices of one tensor, as a fused projection gives them
    qk = torch.randn(1, 6, 6, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    for layer in range(config.num_layers):
        rotary = Rotary.of(config, layer)
        with torch.no_grad():
            at = Positions.of(positions, frequencies, config.attention_temperature)
            q, k = rotary(*qk.clone().split([4, 2], 2), at)
            for i in range(6):
                one = Positions.of(positions[i : i + 1], frequencies, config.attention_temperature)
                q_one, k_one = rotary(*qk[:, i : i + 1].clone().split([4, 2], 2), one)
                assert torch.equal(q_one[0, 0], q[0, i])
                assert torch.equal(k_one[0, 0], k[0, i])
        with torch.enable_grad():  # PyTorch's path
            at = Positions.of(positions, frequencies, config.attention_temperature)
            expected = rotary(*qk.clone().split([4, 2], 2), at)
        tolerance = 2e-6 if dtype == torch.float32 else 0.02
        for got, want in zip((q, k), expected, strict=True):
            torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def test_positions_continue_what_the_cache_holds() -> None:
    model = decoder("llama2")
    cache = model.new_cache()
    assert cache.positions(3, CPU).tolist() == [0, 1, 2]
    with torch.no_grad():
        model(token_ids(model.config, 5), cache)
    assert cache.positions(2, CPU).tolist() == [5, 6]
