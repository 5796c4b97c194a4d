"""A scripted model behind the real engine and server, one a test module."""

from collections.abc import Iterator

import openai
import pytest

from puna.server.app import LOOPBACK, create_app
from puna.text.tokenizer import Tokenizer
from puna.text.train import train_tokenizer
from serving import NAME, SAID, TEXTS, Scripted, model, serving


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 330)


@pytest.fixture(scope="module")
def decoder(tokenizer: Tokenizer) -> Scripted:
    return Scripted(tokenizer)


@pytest.fixture(scope="module")
def url(decoder: Scripted, tokenizer: Tokenizer) -> Iterator[str]:
    with serving(create_app(model(decoder, tokenizer), NAME, hosts=LOOPBACK)) as address:
        yield address


@pytest.fixture
def client(url: str, decoder: Scripted) -> Iterator[openai.OpenAI]:
    decoder.say(SAID)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client
