"""Meta's own model code, fed the same `consolidated.*.pth` by its own resharding and load hooks, against our reader."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from checkpoint_writers import write_meta
from meta_reference import one_rank
from puna.checkpoint import load_source, open_source

pytest.importorskip("llama_models", reason="needs the package llama-models 0.3.0")
torch.set_num_threads(1)


__all__ = ["one_rank"]  # the fixture


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
