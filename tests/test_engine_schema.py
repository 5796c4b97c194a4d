"""Answers that follow a JSON schema, from a random model that would never write JSON by itself."""

import json
from typing import Any

import pytest
import torch

from puna.engine import Model
from puna.errors import PunaError
from puna.family.config import ModelConfig
from puna.model import Decoder
from puna.text.train import train_tokenizer

pytest.importorskip("llguidance", reason="the grammar engine is not installed")
torch.set_num_threads(1)

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"enum": ["cria", "Grüße \"🦙\""]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=["with end token", "without"])
def model(request: pytest.FixtureRequest) -> Model:
    tokenizer = train_tokenizer(['{"name": "cria", "age": 1}', "The llama eats grass."] * 4, 330)
    torch.manual_seed(0)
    # the logits are wider than the tokenizer, as with padded embeddings
    decoder = Decoder(ModelConfig("llama", tokenizer.vocab_size + 5, 16, 1, 2, 1, 8, 16, 512))
    if request.param == "without":
        tokenizer.eos_ids = ()
    return Model(decoder, tokenizer)


def test_every_answer_follows_the_schema(model: Model) -> None:
    answers = []
    for seed in range(6):
        reply = model.generate("x", schema=SCHEMA, temperature=1.5, top_p=1.0, seed=seed)
        assert reply.finish_reason == "stop"
        answer = json.loads(reply.text)
        assert list(answer) == ["name", "age", "tags"]
        assert answer["name"] in SCHEMA["properties"]["name"]["enum"]
        assert 0 <= answer["age"] <= 99
        assert len(answer["tags"]) <= 3
        assert all(isinstance(tag, bool) for tag in answer["tags"])
        answers.append(reply.text)
    assert len(set(answers)) > 1
    greedy = model.generate("x", schema=SCHEMA, temperature=0)
    assert json.loads(greedy.text).keys() == {"name", "age", "tags"}


def test_without_a_schema_the_same_model_writes_no_json(model: Model) -> None:
    with pytest.raises(json.JSONDecodeError):
        json.loads(model.generate("x", max_tokens=30, temperature=1.5, seed=0).text)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("object", "schema must be a JSON schema as a dict, not str"),
        ({"type": "objekt"}, "the schema can't be followed"),
        ({"const": {1, 2}}, "schema is not JSON"),
    ],
)
def test_bad_schemas_are_named(model: Model, schema: Any, message: str) -> None:
    with pytest.raises(PunaError, match=message):
        model.stream("x", schema=schema)
