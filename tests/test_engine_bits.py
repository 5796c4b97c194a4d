"""With the compiled kernels a request's logits are the same bits alone, among others, preempted, cached or cut."""

import random
import threading

import pytest
import torch

from puna.engine import CacheSize, Model, Reply, pace
from puna.model.native import kernels
from puna.model.packing import pack
from tiny import decoder

torch.set_num_threads(1)
pytestmark = pytest.mark.skipif(kernels() is None, reason="the compiled kernels were not built")

REQUESTS = 24


def packed(kind: str, dtype: torch.dtype, bits: int | None, **settings: object) -> Model:
    plain = decoder(kind, dtype=dtype)
    pack(plain, bits)
    return Model(plain, **settings)  # type: ignore[arg-type]


def asked() -> list[list[int]]:
    rng = random.Random(0)
    common = [rng.randrange(96) for _ in range(33)]
    return [common + [rng.randrange(96) for _ in range(rng.randint(1, 30))] for _ in range(REQUESTS)]


def answer(model: Model, prompt: list[int], seed: int) -> Reply:
    return model.generate(prompt, max_tokens=12, temperature=1.0, top_p=1.0, seed=seed, logprobs=2, ignore_eos=True)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, 8),
                                             (torch.bfloat16, 4)])
@pytest.mark.parametrize(("kind", "size"), [("llama3.2", CacheSize(8)), ("scout", CacheSize(12, 6))])
def test_replies_are_equal_to_the_last_bit(kind: str, size: CacheSize, dtype: torch.dtype, bits: int | None) -> None:
    prompts = asked()
    alone = packed(kind, dtype, bits, prefix_cache=False)
    expected = [answer(alone, prompt, seed) for seed, prompt in enumerate(prompts)]
    model = packed(kind, dtype, bits, cache=size)
    found: dict[int, Reply] = {}

    def ask(at: int) -> None:
        found[at] = answer(model, prompts[at], at)

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(REQUESTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[at] for at in range(REQUESTS)] == expected  # tokens, and log-probabilities as exact floats
    assert model.stats().hit_rate > 0
    assert [answer(model, prompt, at) for at, prompt in enumerate(prompts)] == expected


@pytest.mark.parametrize("kv", [None, "int8"])
def test_logits_are_the_same_bits_however_the_prompt_is_cut(kv: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = asked()[0]
    whole = packed("scout", torch.bfloat16, None, kv=kv).logits(ids)
    for pieces in (1, 5, 32):
        monkeypatch.setattr(pace, "LARGEST", pieces)
        assert torch.equal(packed("scout", torch.bfloat16, None, kv=kv).logits(ids), whole)
    assert torch.equal(packed("scout", torch.bfloat16, None, kv=kv).logits(ids[:20]), whole[:20])
