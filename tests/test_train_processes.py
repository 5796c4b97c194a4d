"""Two processes train as one does: losses, weights, states that either takes back, and what each of them holds."""

import csv
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from puna.checkpoint.source import save
from puna.errors import PunaError
from puna.text.tokenizer import Tokenizer
from puna.train.config import MeshConfig, checked_config
from puna.train.pieces import KEY, Piece, SavedTensors, described
from ranks import run_ranks
from tiny import decoder
from train_processes_worker import run as run_here
from training import lines, make_work, shape, tokenizer

__all__ = ["tokenizer"]  # the fixture

# Sums in another order round otherwise. Measured of losses and of norms, relative: 1e-7 in float32; 4e-4 and 2e-3 where
# weights are bfloat16, or orthogonal updates, which are so inside.
TOLERANCE = {"adamw": 1e-5, "muon": 1e-2, "bfloat16": 1e-2}
TEXTS = [{"length": 96, "sources": [{"file": "texts.jsonl"}]}]
PAIRS = [{"length": 160, "sources": [{"file": "pairs.jsonl"}]}]
LABELLED = [{"length": 160, "sources": [{"file": "labelled.jsonl"}]}]
EVERYTHING = ["attention", "feed_forward", "experts", "router", "output"]
COMMON = {"steps": 5, "batch_tokens": 300, "micro_tokens": 96, "save_every": 2, "evaluate_every": 3, "stages": TEXTS,
          "dtype": "float32", "rate": 3e-3}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "all weights, Muon, experts": {"base": "moe", "within": "muon", "settings": {"method": "pretrain"}},
    "all weights, dense, computed again": {"base": "dense", "settings": {"method": "full", "recompute": True}},
    "LoRA of everything, dropout": {
        "base": "moe",
        "settings": {"method": "lora", "options": {"rank": 3, "dropout": 0.2, "targets": EVERYTHING}},
    },
    "DPO": {"base": "dense", "settings": {"method": "dpo", "stages": PAIRS, "options": {"rank": 2}}},
    "DPO of all weights beside a copy": {
        "base": "moe", "settings": {"method": "dpo", "stages": PAIRS, "options": {"adapter": False}},
    },
    "KTO": {"base": "dense", "settings": {"method": "kto", "stages": LABELLED, "options": {"rank": 2}}},
    "bfloat16": {"base": "dense", "within": "bfloat16", "settings": {"method": "full", "dtype": "bfloat16"}},
}  # fmt: skip
RUNS = {
    name: {"id": name, **case, "settings": {**COMMON, **case["settings"]}, "out": f"two/{name}"}
    for name, case in CASES.items()
}
FIRST, SECOND = "all weights, Muon, experts", "LoRA of everything, dropout"


def table(folder: Path) -> list[dict[str, float]]:
    """A run's steps."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def check_alike(one: Path, two: Path, tolerance: float) -> None:
    """Of two runs, every step's numbers but for the speed's, and which experts tokens choose where much is rounded."""
    left_out = {"tokens_per_second", "roof"} | ({"expert_imbalance"} if tolerance > TOLERANCE["adamw"] else set())
    expected, found = table(one), table(two)
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for theirs, mine in zip(expected, found, strict=True):
        for name in theirs.keys() - left_out:
            assert mine[name] == pytest.approx(theirs[name], rel=tolerance, abs=tolerance), (theirs["step"], name)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> tuple[Path, list[dict[str, Any]]]:
    """Every case's run by one process (in one/) and by two (in two/); runs that one process stopped and two finish, and
    the other way round (the latter half done); what each of the two saw."""
    folder = make_work(tmp_path_factory.mktemp("processes"), tokenizer)
    for name, config in (("moe", shape(tokenizer)), ("dense", shape(tokenizer).with_(moe_layers=()))):
        save(decoder(config), config, tokenizer, folder / name)
    lines(folder / "pairs.jsonl", [{"prompt": f"Does {i} eat?", "chosen": f"Yes, {i} eats.", "rejected": "No!"}
                                   for i in range(10)])  # fmt: skip
    lines(folder / "labelled.jsonl", [{"prompt": f"Does {i} eat?", "completion": f"Yes, {i} eats.", "label": i % 2 == 0}
                                      for i in range(10)])  # fmt: skip
    patch = pytest.MonkeyPatch()
    patch.setenv("PUNA_CACHE", str(folder / "cache"))
    for name, case in RUNS.items():
        run_here(folder, {**case, "out": f"one/{name}"})
    run_here(folder, {**RUNS[FIRST], "out": "one, then two", "stop": True})
    tune = ["tune", str(folder / "dense"), "--data", str(folder / "texts.jsonl"), "--steps", "1"]
    found = run_ranks("train_processes_worker.py", folder, [
        *RUNS.values(),
        {**RUNS[FIRST], "id": "goes on", "out": "one, then two", "resume": True},
        {**RUNS[SECOND], "id": "stops", "out": "two, then one", "stop": True},
        {**RUNS[FIRST], "id": "mesh", "settings": COMMON | {"mesh": {"data": 3}}, "out": "never"},
        {**RUNS[FIRST], "id": "grpo", "settings": COMMON | {"method": "grpo"}, "out": "never"},
        {"id": "command", "typed": [*tune, "--out", str(folder / "typed")]},
        {"id": "mistake", "typed": [*tune, "--out", str(folder / "typed")]},
    ], 2)  # fmt: skip
    yield folder, found
    patch.undo()


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(ran: tuple[Path, list[dict[str, Any]]], name: str) -> None:
    folder, found = ran
    tolerance = TOLERANCE[RUNS[name].get("within", "adamw")]
    check_alike(folder / "one" / name, folder / "two" / name, tolerance)
    file = "adapter_model.safetensors" if (folder / "one" / name / "adapter_config.json").exists() else None
    one, two = (load_file(folder / runs / name / (file or "model.safetensors")) for runs in ("one", "two"))
    assert one.keys() == two.keys()
    for each in one:
        error = (one[each].float() - two[each].float()).norm() / one[each].float().norm().clamp(min=1e-3)
        assert float(error) < tolerance, each
    assert found[0][name]["steps"] == 5, "the first process reports"
    assert found[1][name]["steps"] == 0, "and nobody else"
    assert not found[1][name]["notes"]


@pytest.mark.parametrize("name", [FIRST, "bfloat16"])
def test_each_process_holds_about_half(ran: tuple[Path, list[dict[str, Any]]], name: str) -> None:
    folder, found = ran
    (whole,) = (folder / "one" / name).glob("state-*/*.safetensors")
    parts = sorted((folder / "two" / name).glob("state-*/*.safetensors"))
    assert [part.name for part in parts] == ["optimizer-00000.safetensors", "optimizer-00001.safetensors"]
    for part, seen in zip(parts, found, strict=True):
        assert sum(t.nbytes for t in load_file(part).values()) < 0.51 * sum(t.nbytes for t in load_file(whole).values())
        masters = {n: t for n, t in load_file(whole).items() if n.endswith("/master")}
        assert seen[name]["held"] < 0.51 * sum(t.nbytes for t in masters.values())


def test_what_one_process_saved_two_go_on_with(ran: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, found = ran
    assert "resumed at step 2" in found[0]["goes on"]["notes"]
    check_alike(folder / "one" / FIRST, folder / "one, then two", TOLERANCE["muon"])


def test_what_two_processes_saved_one_goes_on_with(ran: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, _ = ran
    (state,) = (folder / "two, then one").glob("state-*")
    assert json.loads((state / "facts.json").read_text())["processes"] == 2
    seen = run_here(folder, {**RUNS[SECOND], "out": "two, then one", "resume": True})
    assert "resumed at step 2" in seen["notes"]
    check_alike(folder / "one" / SECOND, folder / "two, then one", TOLERANCE["adamw"])


def test_lineage_says_how_many_trained(ran: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, _ = ran
    one, two = (json.loads((folder / runs / FIRST / "lineage.json").read_text()) for runs in ("one", "two"))
    assert two["compute"]["mesh"] == {"data": 2, "tensor": 1, "expert": 1}
    assert "mesh" not in one["compute"]
    assert (one["trained"], one["parameters"]) == (two["trained"], two["parameters"])


def test_mistakes_end_all_processes_with_one_message(ran: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, found = ran
    for rank in (0, 1):
        assert "mesh.data: 3 groups of 1 need 3 processes, but 2 run" in found[rank]["mesh"]["error"]
        assert "grpo generates in one process" in found[rank]["grpo"]["error"]
        assert found[rank]["together"] == "only one of us fails"
        assert found[rank]["command"]["code"] == 0
        assert found[rank]["mistake"]["code"] == 1
    assert "written to" in found[0]["command"]["out"]
    assert "the folder is not empty" in found[0]["mistake"]["error"]
    assert not (found[1]["command"]["out"] + found[1]["mistake"]["out"] + found[1]["mistake"]["error"]).strip()
    assert not (folder / "never").exists()


def test_a_mesh_fits_its_processes() -> None:
    def groups(processes: int, **sizes: int) -> int:
        return MeshConfig.model_validate(sizes).data_groups(processes)

    assert (groups(1), groups(8), groups(8, tensor=4, expert=2), groups(6, data=3, tensor=2)) == (1, 8, 2, 3)
    for name, processes, sizes in (("data", 4, {"data": 2}), ("tensor", 3, {"tensor": 2}),
                                   ("expert", 4, {"tensor": 2, "expert": 4})):  # fmt: skip
        with pytest.raises(PunaError, match=rf"mesh\.{name}: "):
            groups(processes, **sizes)


def test_passes_come_out_even_unless_they_are_given() -> None:
    config = checked_config({"steps": 1, "batch_tokens": 16384, "stages": TEXTS}, "here")
    assert [config.dealt(groups).micro_tokens for groups in (1, 2, 3, 4)] == [6144, 4096, 5462, 4096]
    assert checked_config({**COMMON, "micro_tokens": 6144}, "here").dealt(2).micro_tokens == 6144


@st.composite
def divisions(draw: st.DrawFn) -> tuple[tuple[int, ...], list[list[list[tuple[int, int]]]]]:
    """A shape, and of each axis how two owners divide it: alternating ranges, some of them empty."""
    sizes = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    axes = []
    for size in sizes:
        ends = [0, *sorted(draw(st.lists(st.integers(0, size), max_size=3))), size]
        ranges = [each for each in pairwise(ends) if each[0] < each[1]]
        axes.append([ranges[0::2], ranges[1::2]])
    return sizes, axes


@settings(deadline=None, max_examples=30)
@given(saved=divisions(), data=st.data())
def test_pieces_however_divided_make_the_whole(
    saved: tuple[tuple[int, ...], list[list[list[tuple[int, int]]]]], data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    sizes, axes = saved
    whole = torch.arange(1.0, 1 + int(torch.tensor(sizes).prod())).view(sizes)
    pieces = [Piece.whole(sizes)]
    for axis, owners in enumerate(axes):
        pieces = [Piece(p.shape, (*p.axes[:axis], tuple(own), *p.axes[axis + 1 :])) for p in pieces for own in owners]
    folder = tmp_path_factory.mktemp("pieces")
    for number, piece in enumerate(pieces):
        held = torch.zeros(piece.held)
        for mine, theirs in piece.overlaps(Piece.whole(sizes)):
            held[mine] = whole[theirs]
        save_file({"t": held}, folder / f"{number}.safetensors", {KEY: described({"t": piece})})
    tensors = SavedTensors(sorted(folder.glob("*.safetensors")))
    assert tensors.shapes == {"t": sizes}
    ranges = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in sizes]
    wanted = Piece(sizes, tuple(((a, b),) for a, b in ranges))
    assert torch.equal(tensors.read("t", wanted), whole[tuple(slice(a, b) for a, b in ranges)])
    if pieces[0].held and 0 not in pieces[0].held:
        (folder / "0.safetensors").unlink()
        with pytest.raises(PunaError, match="lacks a part of t"):
            SavedTensors(sorted(folder.glob("*.safetensors"))).read("t", Piece.whole(sizes))
