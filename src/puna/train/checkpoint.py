"""A run's state on disk: written whole or not at all, and locked while a run uses the folder."""

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from puna.errors import PunaError


class RunFolder:
    """The output folder of one run: lock, resumable state, metrics."""

    def __init__(self, path: Path, resume: bool) -> None:
        self.path, self.resume = path, resume
        self._lock = self._locked(path)
        others = sorted(p.name for p in path.iterdir() if p.name != ".lock")
        if others and not resume:
            self.close()
            raise PunaError(f"{path}: the folder is not empty ({others[0]}); add --resume to go on, or name another")

    @staticmethod
    def _locked(path: Path) -> TextIO:
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = (path / ".lock").open("w")
        except OSError as error:
            raise PunaError(f"{path}: can't write into this folder: {error.strerror}; name another") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(lock.fileno()), os.stat(path / ".lock")):
                raise FileNotFoundError  # its owner removed it between our opening and locking it
        except OSError:
            lock.close()
            raise PunaError(f"{path}: another run is using this folder; wait for it or name another") from None
        return lock

    def close(self) -> None:
        """Release the folder."""
        (self.path / ".lock").unlink(missing_ok=True)  # while the lock is held, so that it is ours
        self._lock.close()

    def save(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Replace the saved state. A kill at any moment leaves the old state or the new one."""
        new, old = self.path / f"state-{facts['step']:08d}.new", self.path / f"state-{facts['step']:08d}"
        for unfinished in self.path.glob("state-*.new"):
            shutil.rmtree(unfinished)
        new.mkdir()
        save_file(tensors, new / "optimizer.safetensors")
        (new / "facts.json").write_text(json.dumps(facts))
        for file in new.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        shutil.rmtree(old, ignore_errors=True)
        new.rename(old)
        folder = os.open(self.path, os.O_RDONLY)
        os.fsync(folder)  # the new name reaches the disk before the old state goes
        os.close(folder)
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
        try:
            facts: dict[str, Any] = json.loads((states[-1] / "facts.json").read_text())
            return load_file(states[-1] / "optimizer.safetensors"), facts
        except (OSError, ValueError, SafetensorError) as error:
            raise PunaError(
                f"{states[-1]}: the saved state is damaged ({error}); begin anew in another folder"
            ) from None
