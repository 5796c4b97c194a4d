"""Exports of tuned models: trained, served, merged and GGUF are one; what differs from the record is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import puna
from puna.checkpoint.lineage import read_record, verify
from puna.checkpoint.recorded import FILE, distance, read_recorded
from puna.cli.export import Bits, Format
from puna.cli.export import export as command
from puna.errors import PunaError
from puna.train.run import train
from test_tune import CHAT, configured, no_picture, tokenizer, work

__all__ = ["no_picture", "tokenizer", "work"]  # fixtures
LORA = {"rank": 4, "alpha": 16, "targets": ["attention", "feed_forward", "output"]}


@pytest.fixture(scope="module", params=["dense", "sparse"])
def tuned(request: pytest.FixtureRequest, work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter that has learnt something, and its base's card."""
    place = tmp_path_factory.mktemp("tuned") / "mine"
    targets = [*LORA["targets"], *(["experts", "router"] if request.param == "sparse" else [])]
    train(work / request.param, configured("lora", 12, options={**LORA, "targets": targets}), work, place)
    return place


def export(tuned: Path, out: Path, format: str = "safetensors", type: str | None = None,
           quantize: str | None = None) -> None:  # fmt: skip
    """`puna export`, in this process."""
    command(str(tuned), out=out, format=Format(format), type=type, quantize=quantize and Bits(quantize), revision=None)


def test_every_form_says_the_same(tuned: Path, work: Path, tmp_path: Path) -> None:
    export(tuned, tmp_path / "merged")
    export(tuned, tmp_path / "whole.gguf", "gguf", "F32")
    base = json.loads((tuned / "adapter_config.json").read_text())["base_model_name_or_path"]
    forms = [puna.load(base, adapter=tuned), puna.load(tmp_path / "merged"), puna.load(tmp_path / "whole.gguf")]
    prompts = [[*forms[0].prepare(CHAT[:1]).token_ids, n] for n in range(20)]
    answers = [[form.generate(ids, max_tokens=10, temperature=0, ignore_eos=True).token_ids for ids in prompts]
               for form in forms]  # fmt: skip
    assert answers[0] == answers[1] == answers[2]
    assert answers[0] != [puna.load(base).generate(ids, max_tokens=10, temperature=0, ignore_eos=True).token_ids
                          for ids in prompts]  # fmt: skip


@pytest.mark.parametrize("options", [("gguf", "F16"), ("gguf", "Q8_0"), ("safetensors", "BF16"),
                                     ("safetensors", None, "int8")], ids=str)  # fmt: skip
def test_an_export_is_compared_with_what_was_recorded(
    options: tuple[str, ...], tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(tuned, tmp_path / "out", *options)
    assert "Loaded again, its logits are" in capsys.readouterr().out


def test_an_export_that_differs_is_refused(tuned: Path, tmp_path: Path) -> None:
    recorded = read_recorded(tuned)
    assert recorded is not None
    before = (tuned / FILE).read_bytes()
    with np.load(tuned / FILE) as found:
        arrays = {name: found[name] for name in found.files}
    try:
        with (tuned / FILE).open("wb") as file:
            np.savez(file, **arrays | {"logits": arrays["logits"] * np.linspace(0.9, 1.1, arrays["logits"].shape[1])})
        with pytest.raises(PunaError, match="it was removed"):
            export(tuned, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    finally:
        (tuned / FILE).write_bytes(before)


def test_an_export_is_linked_to_the_run(tuned: Path, tmp_path: Path) -> None:
    export(tuned, tmp_path / "merged")
    record, run = read_record(tmp_path / "merged"), read_record(tuned)
    assert record is not None
    assert record["parents"] == [run]
    assert record["kind"] == "export"
    assert verify(tmp_path / "merged") == []
    assert "base_model_relation: merge" in (tmp_path / "merged/README.md").read_text()


def test_the_distance_of_logits() -> None:
    logits = torch.randn(3, 50)
    assert distance(logits + 5, logits) < 1e-6
    assert distance(-logits, logits) == pytest.approx(2, rel=1e-3)
