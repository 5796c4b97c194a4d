"""Starting a worker in several processes of this machine, as torchrun would."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_ranks(worker: str, folder: Path, cases: list[dict[str, Any]], ranks: int) -> list[dict[str, Any]]:
    """What each rank's worker, a file beside this one, wrote about the cases."""
    (folder / "cases.json").write_text(json.dumps(cases))
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    command = [sys.executable, str(Path(__file__).parent / worker), str(folder)]
    started = [
        subprocess.Popen(command, env=os.environ | where | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
                         stderr=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(process.returncode for process in started), errors
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]
