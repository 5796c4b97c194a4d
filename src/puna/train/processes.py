"""The processes of one training run, as torchrun starts them, and how they keep together.

The mesh is [data, tensor], tensor fastest: rank = data index * tensor + tensor index. Processes of one data index hold
slices of the same matrices and see the same tokens; those of one tensor index train on other passes.
"""

import atexit
import os
from dataclasses import dataclass, field, replace
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from puna.errors import AgreedError, PunaError
from puna.family.config import ModelConfig
from puna.family.sharding import Mesh, Sharding
from puna.model.parallel import Ranks, Share
from puna.train.config import MeshConfig

# A process waits so long for another: the first may be tokenising the data. Whoever dies ends all by torchrun at once.
_PATIENCE = timedelta(hours=12)


@dataclass(frozen=True)
class Processes:
    """This process among those of the run. With one process every operation gives back what it got."""

    rank: int
    size: int
    data: Ranks  # those that hold the same slices and train on other passes
    share: Share | None = None  # the place among those that split matrices and experts; None where nobody splits
    mesh: Any = None  # the torch DeviceMesh of `data`; None for one process
    peers: Ranks = field(default_factory=lambda: Ranks(0, 1))  # those that split what a data group's process would hold

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

    def tell(self, text: str) -> list[str]:
        """Everyone's text, in order of rank."""
        if self.size == 1:
            return [text]
        said = torch.tensor(list(text.encode()), dtype=torch.uint8)
        lengths = [int(each) for each in self.everyone.gather(torch.tensor(len(said)))]
        padded = torch.nn.functional.pad(said, (0, max(lengths) - len(said)))
        told = zip(self.everyone.gather(padded), lengths, strict=True)
        return [each[:length].numpy().tobytes().decode() for each, length in told]

    def split(self, config: ModelConfig, mesh: MeshConfig) -> "Processes":
        """With the place among those that split a model of this shape. Raises PunaError where it can't be split so."""
        if mesh.tensor == 1:
            return self
        sharding = Sharding(config, Mesh(mesh.tensor, mesh.expert))
        return replace(self, share=Share(sharding, self.peers, self.peers))

    def together(self) -> "Together":
        """A part of the run that all processes come out of, or none: see `Together`."""
        return Together(self)


class Together:
    """Where one process raises a PunaError inside, every process raises AgreedError at the end: nobody waits for it.

    Inside, processes must not wait for each other. What is no PunaError ends its process, and torchrun the others.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._processes.size == 1 or (error is not None and not isinstance(error, PunaError)):
            return
        for words in filter(None, self._processes.tell(str(error or ""))):
            raise AgreedError(words) from None


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
    """`start` and `Processes.split` in one."""
    return start(mesh, device).split(config, mesh)


def start(mesh: MeshConfig, device: torch.device) -> Processes:
    """This process's place, made by all of them at once; `Processes.alone()` where only one runs.

    Raises PunaError where the mesh doesn't fit the number of processes, on every process alike.
    """
    size = started()
    groups = mesh.data_groups(size)
    if size == 1:
        return Processes.alone()
    from torch.distributed.device_mesh import init_device_mesh

    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
        atexit.register(_leave)
    rank = dist.get_rank()
    whole = init_device_mesh(device.type, (groups, mesh.tensor), mesh_dim_names=("data", "tensor"))
    return Processes(
        rank,
        size,
        data=Ranks(rank // mesh.tensor, groups, whole.get_group("data")),
        mesh=whole["data"],
        peers=Ranks(rank % mesh.tensor, mesh.tensor, whole.get_group("tensor")),
    )


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
