"""A run's state on disk: written whole or not at all, and locked while a run uses the folder."""

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any, TextIO

from safetensors.torch import load_file, save_file
from torch import Tensor

from puna.errors import PunaError


class RunFolder:
    """The output folder of one run: lock, resumable state, metrics."""

    def __init__(self, path: Path, resume: bool) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._lock = self._locked(path)
        others = [p.name for p in path.iterdir() if p.name != ".lock"]
        if others and not resume:
            raise PunaError(f"{path}: the folder is not empty ({others[0]}); add --resume to go on, or name another")

    @staticmethod
    def _locked(path: Path) -> TextIO:
        lock = (path / ".lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise PunaError(f"{path}: another run is using this folder; wait for it or name another") from None
        return lock

    def close(self) -> None:
        """Release the folder."""
        self._lock.close()
        (self.path / ".lock").unlink(missing_ok=True)

    def save(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Replace the saved state. A kill at any moment leaves the old state or the new one."""
        new, old = self.path / f"state-{facts['step']:08d}.new", self.path / f"state-{facts['step']:08d}"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        save_file(tensors, new / "optimizer.safetensors")
        (new / "facts.json").write_text(json.dumps(facts))
        for file in new.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        shutil.rmtree(old, ignore_errors=True)
        new.rename(old)
        for other in self.states()[:-1]:
            shutil.rmtree(other)

    def states(self) -> list[Path]:
        """Whole saved states, oldest first."""
        return sorted(p for p in self.path.glob("state-*") if not p.name.endswith(".new"))

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest state, or None in a fresh folder."""
        states = self.states()
        if not states:
            return None
        facts: dict[str, Any] = json.loads((states[-1] / "facts.json").read_text())
        return load_file(states[-1] / "optimizer.safetensors"), facts
