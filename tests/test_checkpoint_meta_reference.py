"""Meta's own model code, fed the same `consolidated.*.pth` by its own resharding and load hooks, against our reader."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from checkpoint_writers import write_meta
from puna.checkpoint import load_source, open_source

pytest.importorskip("llama_models", reason="needs the package llama-models 0.3.0")
torch.set_num_threads(1)


class Linear(nn.Linear):
    """fairscale's parallel linear on one rank."""

    def __init__(self, width: int, out: int, bias: bool = False, **_: Any) -> None:
        super().__init__(width, out, bias=bias)


class Embedding(nn.Embedding):
    """fairscale's parallel embedding on one rank."""

    def __init__(self, count: int, width: int, **_: Any) -> None:
        super().__init__(count, width)


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for fairscale and for the one `.cuda()` in the reference."""
    contents: dict[str, dict[str, Any]] = {
        "fairscale": {},
        "fairscale.nn": {},
        "fairscale.nn.model_parallel": {},
        "fairscale.nn.model_parallel.initialize": {
            "get_model_parallel_world_size": lambda: 1,
            "get_model_parallel_rank": lambda: 0,
        },
        "fairscale.nn.model_parallel.layers": {
            "ColumnParallelLinear": Linear,
            "RowParallelLinear": Linear,
            "VocabParallelEmbedding": Embedding,
        },
        "fairscale.nn.model_parallel.mappings": {"reduce_from_model_parallel_region": lambda x: x},
    }
    modules = {name: ModuleType(name) for name in contents}
    for name, module in modules.items():
        module.__dict__.update(contents[name])
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, module)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *_, **__: self)


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("kind", ["llama3.1", "scout", "maverick", "guard4"])
@pytest.mark.usefixtures("one_rank")
def test_logits_equal_the_reference(kind: str, ranks: int, tmp_path: Path) -> None:
    from llama_models.checkpoint import convert_moe_weights, reshard_mp

    config = tiny.CONFIGS[kind].with_(num_kv_heads=4)
    if config.rope_scaling:  # the reference has 8192 in its code
        config = config.with_(rope_scaling=replace(config.rope_scaling, original_context=8192))
    write_meta(tmp_path, tiny.decoder(config), ranks)
    ours = load_source(open_source(tmp_path)).model
    states = [torch.load(path, weights_only=True) for path in sorted(tmp_path.glob("*.pth"))]
    if ranks > 1:
        if config.moe_layers:
            states = [convert_moe_weights(state, config.num_experts) for state in states]
        states = [reshard_mp(states, size=1, rank=0)]
    params = json.loads((tmp_path / "params.json").read_text())
    params |= {"vocab_size": config.vocab_size, "max_batch_size": 1, "max_seq_len": 64}
    ids = tiny.token_ids(config)
    if config.architecture == "llama4":
        from llama_models.llama4.args import ModelArgs
        from llama_models.llama4.datatypes import TransformerInput
        from llama_models.llama4.model import Transformer

        reference, given = Transformer(ModelArgs(**params)), (TransformerInput(tokens=ids, tokens_position=0),)
    else:
        from llama_models.llama3.args import ModelArgs
        from llama_models.llama3.model import Transformer

        reference, given = Transformer(ModelArgs(**params)), (ids, 0)
    assert not reference.load_state_dict(states[0], strict=False).missing_keys
    out = reference(*given)
    with torch.no_grad():
        logits = ours(ids)
    assert (getattr(out, "logits", out) - logits).abs().max() < 1e-4
    assert logits.std() > 0.5
