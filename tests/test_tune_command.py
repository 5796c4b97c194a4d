"""`puna tune` and adapters at the command line: what it prints, resumes, plans and refuses."""

import json
from pathlib import Path

import pytest

from test_cli_generate import Puna, run
from test_tune import no_picture, tokenizer, work

__all__ = ["no_picture", "run", "tokenizer", "work"]  # fixtures


def test_one_command_tunes_and_another_serves(work: Path, tmp_path: Path, run: Puna) -> None:
    command = ("tune", work / "dense", "--data", work / "chats.jsonl", "--out", tmp_path / "mine", "--seed", 3)
    first = run(*command, "--steps", 2, "--resume").stdout
    assert "resumed at step 0" in first
    assert f"written to {tmp_path / 'mine'}" in first.replace("\n", "")
    again = run(*command, "--steps", 2, "--resume").stdout
    assert "resumed at step 2" in again
    refused = run(*command, "--steps", 2, code=1).stderr
    assert "is not empty" in refused
    asked = ("generate", work / "dense", "--ids", "1,2,3", "--max-tokens", 4, "--temperature", 0, "--json")
    with_adapter = json.loads(run(*asked, "--adapter", tmp_path / "mine").stdout)
    by_name = json.loads(run("generate", tmp_path / "mine", *asked[2:]).stdout)
    assert with_adapter["token_ids"] == by_name["token_ids"]
    assert "no adapter" in run(*asked, "--adapter", work / "dense", code=1).stderr


def test_the_plan_says_what_trains(work: Path, run: Puna) -> None:
    plan = json.loads(run("tune", work / "sparse", "--data", work / "chats.jsonl", "--dry-run", "--json").stdout)
    assert plan["method"] == "lora"
    assert set(plan["trainable"]) == {"adapters"}
    assert plan["trainable"]["adapters"] > 0
    assert plan["frozen"]["experts"] > 0


@pytest.mark.parametrize(("options", "words"), [
    (("--method", "full"), "says method: dora, the command full"), ((), None),
])  # fmt: skip
def test_the_command_and_the_file_agree(options: tuple[str, ...], words: str | None, work: Path, tmp_path: Path,
                                        run: Puna) -> None:  # fmt: skip
    file = tmp_path / "run.yaml"
    file.write_text("method: dora\noptions: {rank: 2}\nsteps: 1\nstages: [{sources: [{file: chats.jsonl}]}]\n")
    command = ("tune", work / "dense", "--data", work, "--config", file, "--out", tmp_path / "out", *options)
    done = run(*command, code=1 if words else 0)
    if words:
        assert words in done.stderr.replace("\n", " ")
    else:
        assert json.loads((tmp_path / "out/adapter_config.json").read_text())["use_dora"]


def test_wrong_words_are_told(work: Path, tmp_path: Path, run: Puna) -> None:
    command = ("tune", work / "dense", "--data", work / "chats.jsonl")
    assert "--out" in run(*command, code=2).stderr
    assert "lora" in run(*command, "--out", tmp_path / "out", "--method", "rola", code=2).stderr
    missing = run("tune", work / "dense", "--data", work / "no.jsonl", "--out", tmp_path / "out", code=1).stderr
    assert "no such data file" in missing.replace("\n", " ")
