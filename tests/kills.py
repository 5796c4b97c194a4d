"""Kill a training run at random moments until it has died so many times, then let it end: `python tests/kills.py 20`,
or another method's than pretraining, `python tests/kills.py 20 lora`.

The run begins in a child of its own each time (forked, so that a start costs nothing) and is ended by SIGKILL anywhere
between its first line and its last: while reading, stepping, saving, writing the result. Twenty take about a minute.
"""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from puna.train.config import TrainConfig, read_config
from puna.train.run import train


def one_run(work: Path, config: TrainConfig, out: Path) -> int:
    """Start a run in a child; its process id."""
    child = os.fork()
    if child == 0:
        try:
            train(work / "shape", config, work, out, resume=True)
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(f"{error}\n")
            os._exit(1)
    return child


def killed_and_whole(work: Path, config: TrainConfig, kills: int, seed: int) -> tuple[Path, Path, int]:
    """A folder of a run killed so many times, one of a run that was not, and how often the kill found it running."""
    torch.set_num_threads(1)
    chance = random.Random(seed)
    whole, killed = work / "undisturbed", work / "disturbed"
    begun = time.monotonic()
    _, status = os.waitpid(one_run(work, config, whole), 0)
    assert status == 0
    seconds = time.monotonic() - begun
    died = 0
    while died < kills:
        if (killed / "curves.png").exists():  # it has reached the end: begin another
            shutil.rmtree(killed)
        child = one_run(work, config, killed)
        time.sleep(chance.uniform(0, 0.7 * seconds))
        os.kill(child, signal.SIGKILL)
        died += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    _, status = os.waitpid(one_run(work, config, killed), 0)
    assert status == 0
    return killed, whole, died


def differences(killed: Path, whole: Path) -> list[str]:
    """What the two runs left that is not the same to the last bit: weights, state, every step's numbers."""
    kept = ("model.safetensors", "adapter_model.safetensors", "config.json", "adapter_config.json", "experts.csv")
    found = [name for name in kept if (whole / name).exists() or (killed / name).exists()]
    found = [name for name in found if (killed / name).read_bytes() != (whole / name).read_bytes()]
    (state,) = whole.glob("state-*")
    if (killed / state.name / "optimizer.safetensors").read_bytes() != (state / "optimizer.safetensors").read_bytes():
        found.append(state.name)
    timed = ("tokens_per_second", "roof")
    tables = [[line.split(",") for line in (run / "metrics.csv").read_text().splitlines()] for run in (killed, whole)]
    columns = [i for i, name in enumerate(tables[0][0]) if name not in timed]
    rows = [[[line[i] for i in columns] for line in table] for table in tables]
    return found + (["metrics.csv"] if rows[0] != rows[1] else [])


if __name__ == "__main__":
    from training import make_work, new_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        os.environ["PUNA_CACHE"] = f"{folder}/cache"
        here = make_work(Path(folder), new_tokenizer())
        changes: dict[str, Any] = {}
        if sys.argv[2:]:
            sources = [{"file": file, "overlong": "split"} for file in ("texts.jsonl", "chats.jsonl")]
            changes = {"method": sys.argv[2], "stages": [{"length": 64, "sources": sources}]}
        if sys.argv[2:] == ["lora"]:  # all of a mixture of experts, and what is dropped is repeated, too
            changes["options"] = {"rank": 2, "dropout": 0.1,
                                  "targets": ["attention", "feed_forward", "experts", "router", "output"]}  # fmt: skip
        *runs, died = killed_and_whole(here, read_config(here / "run.yaml", **changes), int(sys.argv[1]), seed=0)
        wrong = differences(*runs)
        print(f"killed {died} times: " + (f"different: {', '.join(wrong)}" if wrong else "equal bit for bit"))
        sys.exit(bool(wrong))
