"""One process of several that train one decoder in slices, started by test_train_tensor_parallel.py.

Most cases are computed whole, too, and what differs is written for the parent to judge; some are runs, and what a
process holds in them.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from puna.family.config import ModelConfig
from puna.family.sharding import Mesh, Sharding
from puna.model import Decoder
from puna.model.adapt import Lora, attach, set_dropout
from puna.model.parallel import join, local_decoder
from puna.model.ranks import Ranks
from puna.train import loss as loss_module
from puna.train.base import open_base, shape_of
from puna.train.config import checked_config
from puna.train.loop import gradients as gradients_of
from puna.train.loop import recomputing
from puna.train.loss import linear_cross_entropy, token_losses
from puna.train.method import Batch, Document, Example
from puna.train.pieces import Piece
from puna.train.plan import make_plan, saved_bytes
from puna.train.processes import start
from puna.train.routing import Routing
from puna.train.session import Session
from puna.train.sharded import held
from puna.train.slices import Slices
from puna.train.tensor_parallel import connect_training
from tiny import CONFIGS, decoder
from train_processes_worker import run

SHAPES: dict[str, ModelConfig] = CONFIGS | {
    "odd vocabulary": CONFIGS["llama3.2"].with_(vocab_size=97),
    "one head": CONFIGS["llama3.1"].with_(num_kv_heads=1),  # which both hold
    # more experts than some passes choose
    "many experts": CONFIGS["maverick"].with_(num_experts=16),
}
SEED = 11


def batches(config: ModelConfig) -> list[Batch]:
    """Passes of documents of several lengths, up to two blocks of logits; some tokens don't count."""
    draw = np.random.default_rng(3)
    lengths = [[41, 17, 41], [2], [23, 5, 60, 9]]
    return [
        Batch.of(
            [Example((Document(draw.integers(config.vocab_size, size=n, dtype=np.uint32), draw.random(n) < 0.8),))
             for n in each], torch.device("cpu"),
        ) for each in lengths
    ]  # fmt: skip


def gradients(model: Decoder, batch: Batch, kind: str, recompute: bool) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one pass: plain, or of tokens that weigh differently; with the balancing term."""
    routing = Routing(model, "auxiliary", 0.1)
    routing.begin(1.0)
    routing.open(sum(batch.lengths))
    set_dropout(model, SEED)
    with recomputing(model, recompute):
        states = batch.states(model)
        if kind == "sum":
            loss = linear_cross_entropy(states, model.head_weight, batch.targets_N, model.vocabulary)
        else:
            losses = token_losses(states, model.head_weight, batch.targets_N, model.vocabulary)
            loss = (losses * torch.linspace(-1, 2, len(losses))).sum()
        balance = routing.close()
        (loss if balance is None else loss + 10 * balance).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert not routing.mixtures or sum(map(int, routing.loads[max(routing.loads)])) == sum(batch.lengths)
    return loss.item(), found


def split(whole: Decoder, sharding: Sharding, lora: Lora | None) -> tuple[Decoder, Slices]:
    """This process's part of a decoder, connected."""
    share = join(sharding)
    slices = Slices(share)
    local = local_decoder(sharding, share.rank)
    local.load_state_dict({name: slices.mine(name, w) for name, w in whole.state_dict().items()}, assign=True)
    local.requires_grad_(True)
    if lora is not None:
        attach(whole, lora, SEED)
        attach(local, lora, SEED)
        slices.draw(local, SEED)
        for name, p in whole.named_parameters():
            p.requires_grad_("lora_" in name or name.endswith("magnitude"))
        for name, p in local.named_parameters():
            p.requires_grad_("lora_" in name or name.endswith("magnitude"))
    connect_training(local, share)
    if lora is not None:
        stir(whole, local, slices)
    return local, slices


def stir(whole: Decoder, local: Decoder, slices: Slices) -> None:
    """Updates begin alike on both; then B, which is zero at first, gets values, and so do lengths."""
    generator = torch.Generator().manual_seed(7)
    mine = dict(local.named_parameters())
    with torch.no_grad():
        for name, p in whole.named_parameters():
            if p.requires_grad:
                assert torch.allclose(mine[name], slices.mine(name, p), rtol=1e-6), name
                p += 0.1 * torch.randn(p.shape, generator=generator)
                mine[name].copy_(slices.mine(name, p))


def put_together(slices: Slices, name: str, mine: Tensor) -> Tensor:
    """A whole parameter's gradient from everyone's slices."""
    peers, whole = slices.share.peers, Piece.whole(slices.whole_shape(name, mine.shape))
    pieces = [whole.cut(slices.cuts(name, rank)) for rank in range(peers.size)]
    longest = max(prod(piece.held) for piece in pieces)
    out = mine.new_full(whole.shape, float("nan"))
    for piece, flat in zip(pieces, peers.gather(F.pad(mine.flatten(), (0, longest - mine.numel()))), strict=True):
        for there, here in whole.overlaps(piece):
            out[there] = flat[: prod(piece.held)].view(piece.held)[here]
    return out


def compared(_: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Of one case, the largest relative differences of losses and of gradients."""
    config = SHAPES[case["shape"]]
    whole = decoder(config)
    whole.requires_grad_(True)
    lora = Lora(**case["lora"]) if "lora" in case else None
    local, slices = split(whole, Sharding(config, Mesh(dist.get_world_size(), case["expert"])), lora)
    worst = {"loss": 0.0, "gradient": 0.0, "alike": 0.0, "missing": 0.0, "where": ""}
    for batch in batches(config)[: case.get("passes")]:
        expected_loss, expected = gradients(whole, batch, case["loss"], False)
        loss, found = gradients(local, batch, case["loss"], case.get("recompute", False))
        slices.finish(found)
        norm = torch.stack([g.norm() for g in expected.values()]).norm()
        worst["loss"] = max(worst["loss"], abs(loss - expected_loss) / max(1.0, abs(expected_loss)))
        worst["missing"] += len(found.keys() ^ expected.keys())
        for name in sorted(found.keys() & expected.keys()):
            mine = found[name].contiguous()
            got = put_together(slices, name, mine)
            error = float((got - expected[name]).norm() / norm)
            if error > worst["gradient"]:
                worst["gradient"], worst["where"] = error, name
            if len(slices.holders(name)) == dist.get_world_size():
                worst["alike"] += sum(not torch.equal(mine, each) for each in slices.share.peers.gather(mine))
    return worst


@contextmanager
def without(what: str) -> Iterator[None]:
    """Take one of the ways in which processes work together away: all of a kind, or of `share` the call number n."""
    kind, _, number = what.partition(" ")
    owner: Any = Slices if kind == "finish" else Ranks
    kept, calls = getattr(owner, kind), count()

    def spoilt(self: Any, x: Any) -> Any:
        return kept(self, x) if number and next(calls) != int(number) else x

    setattr(owner, kind, spoilt)
    try:
        yield
    finally:
        setattr(owner, kind, kept)


def holds(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Bytes of this process before and after the gradients of a step; what a pass keeps, where it has weights whole."""
    config, base = checked_config(case["settings"], case["id"]), folder / case["base"]
    processes = start(config.mesh, torch.device("cpu")).split(shape_of(base), config.mesh)
    model, tokenizer, _ = open_base(base, config, processes)
    session = Session.of(model, tokenizer, config, folder, None, processes)
    states = session.optimizer.state.values()
    lows = sum(kinds["low"].nbytes for kinds in states if "low" in kinds)
    passes = session.passes(0)
    model.train()
    kept = saved_bytes(session, passes[0]) if processes.data.size == 1 else None
    gradients_of(session, passes, 1.0)
    found = {
        "weights": sum(map(nbytes, model.parameters())) + sum(map(nbytes, model.buffers())) + lows,
        "optimizer": sum(tensor.nbytes for kinds in states for tensor in kinds.values()) - lows,
        "gradients": sum(map(nbytes, session.optimizer.gradients().values())),
        "kept": kept,
        "tokens": sum(passes[0].lengths),
    }
    plan = make_plan(session)
    return found | {"whole": sum(plan.trainable.values()), "planned": plan.memory.weights + plan.memory.optimizer}


KINDS: dict[str, Callable[[Path, dict[str, Any]], dict[str, Any]]] = {"compare": compared, "hold": holds, "run": run}


def nbytes(tensor: Tensor) -> int:
    return held(tensor).nbytes


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    os.environ["PUNA_CACHE"] = str(folder / "cache")
    loss_module.ROWS = 64
    results = {}
    for case in json.loads((folder / "cases.json").read_text()):
        with without(case["without"]) if "without" in case else nullcontext():
            results[case["id"]] = KINDS[case["kind"]](folder, case)
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
