"""A run's state on disk: written whole or not at all, and locked while a run uses the folder."""

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from puna.errors import PunaError
from puna.train.pieces import KEY, Piece, SavedTensors, described
from puna.train.processes import Processes

FIRST = ("metrics.csv", "experts.csv", "events.out.tfevents.puna", "*.new")  # what a run leaves before it saves


class RunFolder:
    """The output folder of one run: lock, resumable state, metrics. The first of several processes holds the lock."""

    def __init__(self, path: Path, resume: bool, processes: Processes | None = None) -> None:
        self.path, self.resume = path, resume
        self._made = not path.exists()
        self._processes = processes or Processes.alone()
        self._lock: TextIO | None = None
        with self._processes.together():
            if self._processes.first:
                self._lock = self._locked(path)
                others = sorted(p.name for p in path.iterdir() if p.name != ".lock")
                if others and not resume:
                    self.close()
                    raise PunaError(
                        f"{path}: the folder is not empty ({others[0]}); add --resume to go on, or name another"
                    )
                strange = [name for name in others if not any(map(Path(name).match, FIRST))]
                if strange and not self.states():
                    self.close()
                    raise PunaError(
                        f"{path}: no run has saved in this folder, which holds {strange[0]}; name another"
                    )

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
        if self._lock is not None:
            (self.path / ".lock").unlink(missing_ok=True)  # while the lock is held, so that it is ours
            self._lock.close()
            if self._made and not any(self.path.iterdir()):  # a run that was refused leaves nothing
                self.path.rmdir()

    def save(
        self, tensors: Mapping[str, Tensor], facts: dict[str, Any], pieces: Mapping[str, Piece] | None = None
    ) -> None:
        """Replace the saved state, of which each process writes its pieces (None: one has all). A kill at any moment
        leaves the old state or the new one."""
        processes = self._processes
        new, old = self.path / f"state-{facts['step']:08d}.new", self.path / f"state-{facts['step']:08d}"
        with processes.together():
            if processes.first:
                for unfinished in self.path.glob("state-*.new"):
                    shutil.rmtree(unfinished)
                new.mkdir()
        with processes.together():
            file, known = new / "optimizer.safetensors", None
            if processes.size > 1 and pieces is not None:
                file, known = new / f"optimizer-{processes.rank:05d}.safetensors", {KEY: described(pieces)}
            save_file(dict(tensors), file, known)
            _reach_disk(file)
        if processes.first:
            (new / "facts.json").write_text(json.dumps(facts | {"processes": processes.size}))
            _reach_disk(new / "facts.json")
            shutil.rmtree(old, ignore_errors=True)
            new.rename(old)
            _reach_disk(self.path)  # the new name reaches the disk before the old state goes
            for other in self.states()[:-1]:
                shutil.rmtree(other)

    def states(self) -> list[Path]:
        """Whole saved states, oldest first."""
        return sorted(p for p in self.path.glob("state-*") if not p.name.endswith(".new"))

    def load(self) -> tuple[SavedTensors, dict[str, Any]] | None:
        """The newest state, or None in a fresh folder. Any number of processes may have saved it."""
        states = self.states()
        if not states:
            return None
        try:
            facts: dict[str, Any] = json.loads((states[-1] / "facts.json").read_text())
            if lacking := {"step", "tokens", "order"} - set(facts):
                raise ValueError(f"facts.json doesn't say {min(lacking)}")
            files = sorted(states[-1].glob("optimizer*.safetensors"))
            if len(files) != facts.get("processes", 1):
                raise ValueError(f"{len(files)} files of {facts.get('processes', 1)} processes")
            return SavedTensors(files), facts
        except (OSError, ValueError, SafetensorError) as error:
            raise PunaError(
                f"{states[-1]}: the saved state is damaged ({error}); begin anew in another folder"
            ) from None


def _reach_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
