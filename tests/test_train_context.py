"""Extending a context: what is refused, what is told, and that what was trained past the old length is served so."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import puna
from puna.checkpoint.convert import convert_to_gguf, convert_to_safetensors
from puna.checkpoint.merged import open_merged
from puna.checkpoint.source import save
from puna.errors import PunaError
from puna.family.config import AttentionTemperature, ModelConfig, RopeScaling
from puna.train.config import TrainConfig, checked_config
from puna.train.context import ContextConfig, extended
from puna.train.loop import Evaluation
from puna.train.run import train
from test_tune import WORDS, no_picture, tokenizer
from tiny import EXPERTS, LLAMA, LLAMA4, decoder, token_ids

__all__ = ["no_picture", "tokenizer"]  # fixtures
OLD, NEW = 64, 160
DENSE = ModelConfig(**LLAMA | {"context_length": OLD})
SPARSE = ModelConfig(**LLAMA4 | EXPERTS | {"context_length": OLD, "num_layers": 2, "nope_layers": (1,),
                                          "moe_layers": (0, 1), "attention_chunk_size": 16})  # fmt: skip


SCALED = DENSE.with_(rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Bases `dense` and `sparse` that read 64 tokens; long.jsonl, whose documents have 200; short.jsonl."""
    place = tmp_path_factory.mktemp("context")
    ids = {"vocab_size": tokenizer.vocab_size, "bos_token_id": tokenizer.bos_id, "eos_token_ids": tokenizer.eos_ids}
    for name, config in (("dense", DENSE.with_(**ids)), ("sparse", SPARSE.with_(**ids))):
        save(decoder(config), config, tokenizer, place / name)
    long = " ".join(WORDS * 4)
    assert len(tokenizer.encode(long)) > NEW
    (place / "long.jsonl").write_text((json.dumps({"text": long}) + "\n") * 4)
    (place / "short.jsonl").write_text((json.dumps({"text": WORDS[0]}) + "\n") * 4)
    return place


def configured(context: dict[str, Any], method: str = "pretrain", file: str = "long.jsonl", **more: Any) -> TrainConfig:
    return checked_config(
        {"method": method, "steps": 2, "batch_tokens": 256, "dtype": "float32", "rate": 3e-3, "optimizer": "adamw",
         "context": context, "stages": [{"length": NEW, "sources": [{"file": file, "overlong": "split"}]}], **more},
        "test",
    )  # fmt: skip


def test_the_scaling_is_llama_31s_by_as_much_as_the_context_grows() -> None:
    found = extended(DENSE, ContextConfig(length=256))
    assert (found.context_length, found.rope_scaling) == (256, RopeScaling(4.0, 1.0, 4.0, OLD))
    again = extended(found, ContextConfig(length=512))
    assert again.rope_scaling == RopeScaling(8.0, 1.0, 4.0, OLD)
    given = extended(DENSE, ContextConfig(length=256, factor=16, low=2, high=2, original=32))
    assert given.rope_scaling == RopeScaling(16.0, 2.0, 2.0, 32)
    wide = extended(DENSE, ContextConfig(length=256, theta=1e6))
    assert (wide.rope_theta, wide.rope_scaling) == (1e6, None)


def test_chunked_layers_turn_as_before_unless_their_chunks_grow() -> None:
    found = extended(SPARSE, ContextConfig(length=256))
    assert found == SPARSE.with_(context_length=256)
    found = extended(SPARSE, ContextConfig.model_validate(
        {"length": 256, "chunk": 32, "temperature": {"scale": 0.2, "floor": 32}}))  # fmt: skip
    assert (found.attention_chunk_size, found.rope_scaling) == (32, RopeScaling(2.0, 1.0, 4.0, 16))
    assert found.attention_temperature == AttentionTemperature(0.2, 32)


@pytest.mark.parametrize(("config", "context", "said"), [
    (DENSE, {"length": 32}, "context.length: 32 is less than the model's own 64"),
    (DENSE, {"length": 64}, "is the model's own, and nothing else changes"),
    (DENSE, {"length": 128, "theta": 500_000}, "context.theta: 500000 is not above"),
    (DENSE, {"length": 128, "chunk": 16}, "context.chunk: this model's layers have no chunks"),
    (DENSE, {"length": 128, "temperature": {"floor": 8}}, "context.temperature: .*this model has none"),
    (DENSE, {"length": 128, "low": 4, "high": 1}, "context.high: 1 is below context.low, 4"),
    (DENSE, {"length": 128, "original": 256}, "context.original: 256 is longer than the new length 128"),
    (SCALED, {"length": 128, "factor": 4}, "context.factor: 4 is less than the model's own 8"),
    (SPARSE, {"length": 128, "chunk": 8}, "context.chunk: 8 must be from the model's own 16 to the length 128"),
    (SPARSE, {"length": 128, "low": 2}, "context.factor: missing"),
])  # fmt: skip
def test_what_is_no_extension_is_refused(config: ModelConfig, context: dict[str, Any], said: str) -> None:
    with pytest.raises(PunaError, match=said):
        extended(config, ContextConfig.model_validate(context))


@pytest.mark.parametrize(("context", "said"), [
    ({"length": 128, "factor": 1}, "context.factor: input should be greater than 1"),
    ({"length": 128, "kind": "yarn"}, "context.kind: no such field; .* length, factor"),
    ({"length": 128, "temperature": {"roof": 2, "floor": 2}}, "temperature.roof: no such field; .* scale, floor"),
    ({"factor": 2}, "context.length: field required"),
])  # fmt: skip
def test_what_is_no_context_is_refused(context: dict[str, Any], said: str) -> None:
    with pytest.raises(PunaError, match=said):
        configured(context)


def test_rows_that_reach_no_further_are_refused_and_others_told(work: Path, tmp_path: Path) -> None:
    with pytest.raises(PunaError, match=r"longest document of any row has \d+ predictions, none past the 64"):
        train(work / "dense", configured({"length": NEW}, file="short.jsonl"), work, tmp_path / "short")
    said: list[str] = []
    train(work / "dense", configured({"length": 512}), work, tmp_path / "long", note=said.append)
    assert "context: 64 to 512 tokens; positions scaled by 8 (low 1, high 4, original 64)" in said
    assert any(line.endswith("of the data's predictions stand past 64 tokens") for line in said)
    assert "no document of a row is longer than 160 tokens: positions from there to 512 are not trained" in said


def longer(model: puna.Model) -> torch.Tensor:
    """Logits of tokens to past the old length."""
    return model.logits(token_ids(model.config, NEW)[0].tolist())


@pytest.mark.parametrize(("base", "context"), [
    ("dense", {"length": NEW}), ("dense", {"length": NEW, "theta": 2e6}), ("sparse", {"length": NEW, "chunk": 48}),
])  # fmt: skip
def test_transformers_reads_the_longer_context_alike(
    base: str, context: dict[str, Any], work: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    train(work / base, configured(context), work, tmp_path / "out")
    ours = puna.load(tmp_path / "out")
    assert ours.config == extended(puna.load(work / base).config, ContextConfig.model_validate(context))
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    with torch.no_grad():
        theirs = peer(token_ids(ours.config, NEW)).logits[0].float()
    torch.testing.assert_close(longer(ours), theirs, rtol=1e-3, atol=2e-3)
    as_before = puna.load(tmp_path / "out").decoder
    as_before.read_as(puna.load(work / base).config)
    assert (as_before(token_ids(ours.config, NEW))[0].float() - theirs).abs().max() > 0.02


@pytest.mark.parametrize(("base", "context"), [("dense", {"length": NEW}), ("sparse", {"length": NEW, "chunk": 48})])
def test_an_adapter_is_served_in_the_context_it_was_trained_for(
    base: str, context: dict[str, Any], work: Path, tmp_path: Path
) -> None:
    said: list[torch.Tensor] = []

    def keep(model: Any, _: Any) -> dict[str, float]:
        said.append(model(token_ids(model.config, NEW))[0].detach().float())
        return {"kept": 1.0}

    train(work / base, configured(context, "lora", options={"rank": 2}), work, tmp_path / "out",
          evaluations=[Evaluation(("kept",), keep)])  # fmt: skip
    served = puna.load(work / base, adapter=tmp_path / "out")
    assert served.config.context_length == NEW == served.context_length
    torch.testing.assert_close(longer(served), said[-1], rtol=1e-3, atol=1e-3)
    by_name = puna.load(tmp_path / "out", context=NEW)
    assert torch.equal(longer(by_name), longer(served))
    merged = open_merged(tmp_path / "out")
    convert_to_safetensors(merged, tmp_path / "merged")
    convert_to_gguf(merged, tmp_path / "merged.gguf", "F32")
    for place in ("merged", "merged.gguf"):
        found = puna.load(tmp_path / place)
        assert found.config.with_(pad_token_id=None) == served.config.with_(pad_token_id=None)
        torch.testing.assert_close(longer(found), said[-1], rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_peft_reads_the_adapter_and_transformers_its_context(work: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    train(work / "dense", configured({"length": NEW}, "lora", options={"rank": 2}), work, tmp_path / "out")
    changes = json.loads((tmp_path / "out/adapter_config.json").read_text())["base_config"]
    base = AutoModelForCausalLM.from_pretrained(work / "dense", attn_implementation="eager", **changes)
    peer = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    ours = puna.load(work / "dense", adapter=tmp_path / "out")
    with torch.no_grad():
        theirs = peer(token_ids(ours.config, NEW)).logits[0].float()
    torch.testing.assert_close(longer(ours), theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("key", "value", "said"), [
    ("sliding_window", 8, "base_config.sliding_window is no part of a context"),
    ("max_position_embeddings", "long", "base_config.max_position_embeddings must be an integer"),
    ("max_position_embeddings", 0, "context_length must be positive"),
    ("rope_parameters", {"rope_type": "yarn", "factor": 4}, "rope_type is 'yarn'"),
])  # fmt: skip
def test_a_context_that_cant_be_applied_is_refused_by_name(
    key: str, value: Any, said: str, work: Path, tmp_path: Path
) -> None:
    train(work / "dense", configured({"length": NEW}, "lora", options={"rank": 2}), work, tmp_path / "out")
    file = tmp_path / "out/adapter_config.json"
    fields = json.loads(file.read_text())
    fields["base_config"][key] = value
    file.write_text(json.dumps(fields))
    with pytest.raises(PunaError, match=said):
        puna.load(work / "dense", adapter=tmp_path / "out")


def test_a_run_goes_on_in_its_own_context_alone(work: Path, tmp_path: Path) -> None:
    train(work / "dense", configured({"length": NEW}), work, tmp_path / "out")
    with pytest.raises(PunaError, match="was made with other context"):
        train(work / "dense", configured({"length": 2 * NEW}), work, tmp_path / "out", resume=True)
