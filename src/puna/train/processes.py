"""The processes of one training run, as torchrun starts them, and how they keep together.

The mesh is [data, tensor], tensor fastest: rank = data index * tensor + tensor index. Processes of one data index hold
slices of the same matrices and see the same tokens; those of one tensor index train on other passes.
"""

import atexit
import os
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from puna.errors import PunaError
from puna.family.config import ModelConfig
from puna.family.sharding import Mesh, Sharding
from puna.model.parallel import Ranks, Share
from puna.train.config import MeshConfig

_SAID = 4000  # bytes of an error that one process tells the others


@dataclass(frozen=True)
class Processes:
    """This process among those of the run. With one process every operation gives back what it got."""

    rank: int
    size: int
    data: Ranks  # those that hold the same slices and train on other passes
    share: Share | None = None  # the place among those that split matrices and experts; None where nobody splits
    mesh: Any = None  # the torch DeviceMesh of `data`; None for one process

    @staticmethod
    def alone() -> "Processes":
        """One process."""
        return Processes(0, 1, Ranks(0, 1))

    @property
    def first(self) -> bool:
        """Whether this process prints and writes what is written once."""
        return self.rank == 0

    @property
    def everyone(self) -> Ranks:
        """All processes."""
        return Ranks(self.rank, self.size)

    def most(self, number: int) -> int:
        """The largest of the data groups' numbers."""
        if self.data.size == 1:
            return number
        return max(int(each) for each in self.data.gather(torch.tensor(number)))

    def sums(self, values: Tensor) -> Tensor:
        """The sum of the data groups' CPU tensors, alike in shape, added in order of rank."""
        return self.data.sum(values) if self.data.size > 1 else values

    def together(self) -> "Together":
        """A part of the run that all processes come out of, or none: see `Together`."""
        return Together(self)


class Together:
    """Where one process raises a PunaError inside, every process raises it at the end, so that nobody waits for it.

    Inside, processes must not wait for each other. What is no PunaError ends its process, and torchrun the others.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._processes.size == 1 or (error is not None and not isinstance(error, PunaError)):
            return
        said = str(error or "").encode()[:_SAID]
        own = torch.zeros(_SAID, dtype=torch.uint8)
        own[: len(said)] = torch.frombuffer(bytearray(said), dtype=torch.uint8) if said else own[:0]
        for told in self._processes.everyone.gather(own):
            words = bytes(told.tolist()).rstrip(b"\0").decode(errors="replace")
            if words:
                raise PunaError(words) from None


def started() -> int:
    """How many processes torchrun started, or torch.distributed was initialised with; 1 without either."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ and "MASTER_ADDR" in os.environ else 1


def device_of(name: str | None) -> torch.device:
    """The device that a configuration names (None: a GPU where there is one); each process of a machine its own GPU."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None and started() > 1:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


def join(mesh: MeshConfig, config: ModelConfig, device: torch.device) -> Processes:
    """This process's place, made by all of them at once; `Processes.alone()` where only one runs.

    Raises PunaError where the mesh doesn't fit the number of processes or the model's shape, on every process alike.
    """
    size = started()
    groups = mesh.data_groups(size)
    sharding = Sharding(config, Mesh(mesh.tensor, mesh.expert)) if mesh.tensor > 1 else None
    if size == 1:
        return Processes.alone()
    from torch.distributed.device_mesh import init_device_mesh

    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        atexit.register(_leave)
    rank = dist.get_rank()
    whole = init_device_mesh(device.type, (groups, mesh.tensor), mesh_dim_names=("data", "tensor"))
    data = Ranks(rank // mesh.tensor, groups, whole.get_group("data"))
    share = None
    if sharding is not None:
        peers = Ranks(rank % mesh.tensor, mesh.tensor, whole.get_group("tensor"))
        share = Share(sharding, peers, peers)
    return Processes(rank, size, data, share, whole["data"])


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
