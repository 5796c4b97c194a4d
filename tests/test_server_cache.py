"""What a client sees of the prefix cache, and who shares the machine with whom."""

from collections.abc import Iterator

import openai
import pytest
import torch

from puna.engine import Model, Sampling
from puna.server.app import LOOPBACK, create_app
from serving import NAME, serving
from tiny import decoder

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(decoder("llama3.2"), defaults=Sampling(temperature=0))


@pytest.fixture(scope="module")
def client(model: Model) -> Iterator[openai.OpenAI]:
    with serving(create_app(model, NAME, hosts=LOOPBACK)) as url, \
            openai.OpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0) as client:
        yield client


def test_usage_tells_what_was_found_in_the_cache(client: openai.OpenAI) -> None:
    prompt = [i % 96 for i in range(70)]

    def cached(prompt: list[int], n: int = 1) -> int | None:
        usage = client.completions.create(model=NAME, prompt=prompt, max_tokens=4, n=n, temperature=1).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        return usage.prompt_tokens_details.cached_tokens

    assert cached(prompt, n=3) == 0, "told once a prompt, however many answers share it"
    assert cached(prompt) == 64
    assert cached(prompt[:64]) == 32, "the last token is always computed"
    assert cached([*prompt[:40], 95, *prompt[41:]]) == 32
    chunks = client.completions.create(model=NAME, prompt=prompt, stream=True, stream_options={"include_usage": True})
    *_, last = chunks
    assert last.usage is not None
    assert last.usage.prompt_tokens_details is not None
    assert last.usage.prompt_tokens_details.cached_tokens == 64


def test_api_key_and_user_are_whom_the_engine_is_fair_to(client: openai.OpenAI, model: Model,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[str] = []
    stream = model.stream
    monkeypatch.setattr(model, "stream", lambda *a, **k: keys.append(k["key"]) or stream(*a, **k))
    for user in ("ann", "ann", "bob"):
        client.completions.create(model=NAME, prompt=[1], max_tokens=1, user=user)
    client.with_options(api_key="another").completions.create(model=NAME, prompt=[1], max_tokens=1, user="ann")
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
