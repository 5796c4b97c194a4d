"""What Meta's own model code needs to run on one process without a GPU: stand-ins for fairscale and torchvision."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn


class Linear(nn.Linear):
    """fairscale's parallel linear on one rank."""

    def __init__(self, width: int, out: int, bias: bool = True, **_: Any) -> None:
        super().__init__(width, out, bias=bias)


class Embedding(nn.Embedding):
    """fairscale's parallel embedding on one rank."""

    def __init__(self, count: int, width: int, **_: Any) -> None:
        super().__init__(count, width)


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for fairscale, for what needs torchvision and for `.cuda()` in the reference."""
    contents: dict[str, dict[str, Any]] = {
        "fairscale": {},
        "fairscale.nn": {},
        "fairscale.nn.model_parallel": {},
        "fairscale.nn.model_parallel.initialize": {
            "get_model_parallel_world_size": lambda: 1,
            "get_model_parallel_rank": lambda: 0,
        },
        "fairscale.nn.model_parallel.layers": {
            "ColumnParallelLinear": Linear, "RowParallelLinear": Linear, "VocabParallelEmbedding": Embedding,
        },
        "fairscale.nn.model_parallel.mappings": {"reduce_from_model_parallel_region": lambda x: x},
    }  # fmt: skip
    modules = {name: ModuleType(name) for name in contents}
    for name, module in modules.items():
        module.__dict__.update(contents[name])
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, module)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *_, **__: self)
    for name in [name for name in sys.modules if name.startswith("llama_models.llama")]:
        monkeypatch.delitem(sys.modules, name)  # an earlier test's, with stand-ins of its own
    transform = ModuleType("llama_models.llama3.multimodal.image_transform")  # needs torchvision
    transform.__dict__["VariableSizeImageTransform"] = lambda **_: print
    monkeypatch.setitem(sys.modules, transform.__name__, transform)
