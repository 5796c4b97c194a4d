"""One process of training runs over several, started by test_train_processes.py with torchrun's environment."""

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from puna.cli.main import main as command
from puna.errors import PunaError
from puna.train.config import MeshConfig, checked_config
from puna.train.loop import Evaluation
from puna.train.processes import start
from puna.train.run import train


class Stopped(Exception):
    """What ends a run before its last step, on every process."""


def run(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Train as the case says; what this process was told, and how many weights it held."""
    seen: dict[str, Any] = {"notes": [], "steps": 0, "held": 0}

    def score(model: torch.nn.Module, _: object) -> dict[str, float]:
        seen["held"] = sum(getattr(p, "_local_tensor", p).nbytes for p in model.parameters())
        if case.get("stop"):
            raise Stopped
        return {"rank": float(os.environ.get("RANK", "0"))}

    def count(_: object) -> None:
        seen["steps"] += 1

    try:
        config = checked_config(case["settings"], "case")
        # what takes most of the time here
        with patch("puna.train.loop.matrix_roof", return_value=1e9), patch("puna.train.run.draw_curves"):
            train(folder / case["base"], config, folder, folder / case["out"], resume=case.get("resume", False),
                  report=count, note=seen["notes"].append, evaluations=[Evaluation(("rank",), score)])  # fmt: skip
    except PunaError as error:
        seen["error"] = str(error)
    except Stopped:
        pass
    return seen


def typed(arguments: list[str]) -> dict[str, Any]:
    """What a command said, and its exit code."""
    out, errors = io.StringIO(), io.StringIO()
    sys.argv = ["puna", *arguments]
    code: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            command()
        except SystemExit as left:
            code = left.code
    return {"code": code or 0, "out": out.getvalue(), "error": errors.getvalue()}


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    rank = os.environ["LOCAL_RANK"] = os.environ["RANK"]
    results: dict[str, Any] = {}
    for case in json.loads((folder / "cases.json").read_text()):
        results[case["id"]] = typed(case["typed"]) if "typed" in case else run(folder, case)
    try:
        with start(MeshConfig.model_validate({}), torch.device("cpu")).together():
            if rank == "1":
                raise PunaError("only one of us fails")
    except PunaError as error:
        results["together"] = str(error)
    (folder / f"rank{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
