"""One model over several processes, as torchrun starts them: every process loads its share and makes the same calls."""

import atexit
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

import torch
import torch.distributed as dist

from puna.engine.generate import Stream
from puna.engine.model import Model, Prompt
from puna.engine.sampling import Options
from puna.engine.sizes import CacheSize, cache_size
from puna.errors import PunaError
from puna.family.config import ModelConfig
from puna.family.sharding import Sharding, mesh_for
from puna.model import Decoder
from puna.model.parallel import Share, connect, join, local_decoder
from puna.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from puna.checkpoint import Loaded


def processes() -> int:
    """How many processes share the work: torch.distributed's where it is initialised, else torchrun's, else 1."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ and "MASTER_ADDR" in os.environ else 1


def load_share(
    path: Path,
    device: torch.device,
    dtype: torch.dtype | None,
    quantize: str | None,
    expert_parallel: int | None,
) -> tuple["Loaded", Share]:
    """This process's part of a checkpoint, packed, to be made a `ShardedModel`.

    Joins the other processes first, through torchrun's environment where torch.distributed is not initialised.
    Raises PunaError: a shape that can't be split over so many processes, or what loading itself raises.
    """
    from puna.checkpoint import open_source
    from puna.checkpoint.ready import load_ready
    from puna.checkpoint.shard import ShardSource

    source = open_source(path, text_only=True)
    sharding = Sharding(source.config, mesh_for(source.config, processes(), expert_parallel))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(_leave)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    share = join(sharding)
    local = local_decoder(sharding, share.rank)
    return load_ready(ShardSource(source, sharding, share.rank), device, dtype, quantize, local), share


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


class ShardedModel(Model):
    """One process's part of a model. Answers are the whole model's, if every process makes the same calls in order."""

    _threaded = False  # all processes must take the same steps

    def __init__(
        self, share: Share, local: Decoder, tokenizer: Tokenizer | None = None, *, context: int | None = None,
        kv: str | None = None, cache: CacheSize | None = None, **options: Any,
    ) -> None:  # fmt: skip
        """`local`: this process's share, filled and packed, not yet connected; the rest as for `Model`."""
        connect(local, share)
        self.share = share
        seed = random.getrandbits(62)
        size = cache or cache_size(local.config, local.dtype, kv, context, local.device)
        told = share.everyone.gather(torch.tensor([seed, size.blocks, size.local_blocks], device=local.device))
        self._seeds = random.Random(int(told[0][0]))
        least = CacheSize(*(min(int(each[at]) for each in told) for at in (1, 2)))  # memory may differ, steps must not
        super().__init__(local, tokenizer, context=context, kv=kv, cache=least, **options)

    @property
    def config(self) -> ModelConfig:
        """The whole model's shape."""
        return self.share.sharding.config

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Stream:
        """See `Model.stream`. Without a seed, the processes draw the same one. No timeout: clocks differ."""
        if options.get("timeout") is not None:
            raise PunaError("a model over several processes takes no timeout, since their clocks differ; leave it out")
        seed = self._seeds.getrandbits(62)
        if options.get("seed") is None and self.defaults.seed is None:
            options["seed"] = seed
        return super().stream(prompt, **options)

    def save(self, path: str | Path, format: Literal["safetensors", "gguf"] = "safetensors") -> None:  # noqa: ARG002
        """Refused: no process holds the whole model."""
        raise PunaError("a model that is split over processes can't be saved; load it in one process to save it")
