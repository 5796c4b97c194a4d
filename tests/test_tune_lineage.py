"""Where a tuned model comes from, what its licence asks, and bases that may not be tuned."""

import json
from pathlib import Path
from typing import Any

import pytest

from puna.checkpoint.lineage import read_record, verify
from puna.errors import PunaError
from puna.train.config import TrainConfig
from puna.train.run import train
from puna.train.terms import check_terms, named, prefix_of, terms_of
from test_tune import configured, no_picture, tokenizer, work

__all__ = ["no_picture", "tokenizer", "work"]  # fixtures


def licensed(base: Path, licence: str, vision: bool = False) -> Path:
    """The base under a licence, as a card's header states it."""
    (base / "README.md").write_text(f"---\nlicense: {licence}\n---\nA model.\n")
    (base / "LICENSE.txt").write_text("The agreement.\n")
    if vision:
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {"vision_config": {}}))
    return base


@pytest.fixture
def base(work: Path, tmp_path: Path) -> Path:
    """A copy of the dense base that a test may change."""
    copy = tmp_path / "base"
    copy.mkdir()
    for file in (work / "dense").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def config_with(method: str = "lora", outputs_of: str | None = None, **changes: Any) -> TrainConfig:
    source = {"file": "chats.jsonl", "outputs_of": outputs_of}
    return configured(method, 2, options={"rank": 2} if method == "lora" else {},
                      stages=[{"length": 128, "sources": [source]}], **changes)  # fmt: skip


def test_a_llama_stays_a_llama(work: Path, base: Path, tmp_path: Path) -> None:
    train(licensed(base, "llama3.2"), config_with(), work, tmp_path / "mine")
    card = (tmp_path / "mine/README.md").read_text()
    assert card.count("\n# Llama-mine\n") == 1
    assert "**Built with Llama**" in card
    assert "license: llama3.2\n" in card
    assert "base_model: base\nbase_model_relation: adapter\n" in card
    assert "library_name: peft" in card
    notice = (tmp_path / "mine/Notice").read_text()
    assert notice == ("Llama 3.2 is licensed under the Llama 3.2 Community License, Copyright © Meta Platforms, Inc. "
                      "All Rights Reserved.\n")  # fmt: skip
    assert (tmp_path / "mine/LICENSE.txt").read_text() == "The agreement.\n"


def test_other_bases_keep_their_names(work: Path, base: Path, tmp_path: Path) -> None:
    train(base, config_with("full"), work, tmp_path / "mine")
    card = (tmp_path / "mine/README.md").read_text()
    assert "\n# mine\n" in card
    assert "Llama" not in card
    assert "base_model_relation: finetune" in card
    assert not (tmp_path / "mine/Notice").exists()
    record = read_record(tmp_path / "mine")
    assert record is not None
    assert record["licence"] == {"id": None, "name_prefix": None}


def test_a_record_is_linked_to_files_and_parents(work: Path, base: Path, tmp_path: Path) -> None:
    train(licensed(base, "llama3.1"), config_with("full"), work, tmp_path / "first")
    first = read_record(tmp_path / "first")
    train(tmp_path / "first", config_with("lora"), work, tmp_path / "second")
    second = read_record(tmp_path / "second")
    assert first is not None
    assert second is not None
    assert second["parents"] == [first]
    assert second["licence"]["id"] == "llama3.1"
    assert second["base"]["files"]["model.safetensors"] == first["files"]["model.safetensors"]
    assert set(second["data"]) == {"chats.jsonl"}
    assert second["kind"] == "adapter"
    assert second["method"]["options"] == {"rank": 2}
    assert second["compute"]["steps"] == 2
    assert second["compute"]["tokens"] > 0
    assert verify(tmp_path / "second") == []
    file = tmp_path / "second/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert verify(tmp_path / "second") == ["adapter_model.safetensors was changed after the record was written"]
    forged = json.loads((tmp_path / "second/lineage.json").read_text())
    forged["parents"][0]["licence"]["id"] = "apache-2.0"
    (tmp_path / "second/lineage.json").write_text(json.dumps(forged))
    with pytest.raises(PunaError, match="not what its hash says"):
        read_record(tmp_path / "second")


def test_a_multimodal_base_may_not_be_tuned_from_the_eu(work: Path, base: Path, tmp_path: Path) -> None:
    terms = terms_of(licensed(base, "llama4", vision=True), "base")
    with pytest.raises(PunaError, match="principal place of business in, the European Union"):
        check_terms(terms, [], "EU")
    assert check_terms(terms, [], "elsewhere") == []
    assert "European Union" in check_terms(terms, [], None)[0]
    assert check_terms(terms_of(licensed(base, "llama3.1"), "base"), [], "EU") == []
    with pytest.raises(PunaError, match="European Union"):
        train(licensed(base, "llama3.2"), config_with(domicile="EU"), work, tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(("author", "licence", "allowed"), [
    ("llama-2-7b", "llama3.1", False), ("llama-2-7b", "llama2", True), ("llama-3-8b", "apache-2.0", False),
    ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3", True), ("llama-3.1-8b", "apache-2.0", True),
    ("another-model", "llama2", True),
])  # fmt: skip
def test_what_a_llama_wrote_trains_only_what_its_licence_allows(author: str, licence: str, allowed: bool, work: Path,
                                                                base: Path, tmp_path: Path) -> None:  # fmt: skip
    terms = terms_of(licensed(base, licence), "base")
    if allowed:
        told = "".join(check_terms(terms, [author], None))
        assert told.startswith("outputs_of: another-model is no Llama known here" if author == "another-model" else "")
        assert bool(told) == (author == "another-model")
        name = named("mine", prefix_of(terms, [author]))
        assert name == {"llama2": "mine", "llama3": "Llama-3-mine", "apache-2.0": "Llama-mine"}[licence]
    else:
        with pytest.raises(PunaError, match=r"section 1\.b\.v .* improve any other large language model"):
            train(base, config_with(outputs_of=author), work, tmp_path / "mine")
        assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(("name", "prefix", "expected"), [
    ("mine", None, "mine"), ("mine", "Llama", "Llama-mine"), ("llama-mine", "Llama", "Llama-mine"),
    ("llama3-mine", "Llama 3", "Llama-3-mine"), ("mine", "Llama 3", "Llama-3-mine"),
])  # fmt: skip
def test_names_begin_as_licences_want(name: str, prefix: str | None, expected: str) -> None:
    assert named(name, prefix) == expected
