"""What a run will train, need and take, said before it begins. Legend: N predictions of a pass, V vocabulary."""

import os
import time
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from puna.errors import PunaError
from puna.model.memory import available_bytes
from puna.train.loop import gradients
from puna.train.loss import ROWS, row_bytes
from puna.train.mesh_plan import gathered_bytes
from puna.train.method import Batch, Example
from puna.train.session import Session
from puna.train.sharded import held
from puna.train.slices import Slices

PROBE = 256  # predictions of the pass in which activations are counted
KINDS = (  # what a parameter's name ends in or holds, in the order of asking
    ("adapters", ("lora", "adapter", "magnitude")),
    ("routers", (".router.",)),
    ("experts", (".experts.",)),
    ("shared experts", (".shared_expert.",)),
    ("feed-forward", (".feed_forward.",)),
    ("attention", (".self_attn.", ".cross_attn")),
    ("norms", ("norm",)),
    ("embedding", ("embed_tokens",)),
    ("output", ("lm_head",)),
    ("vision", ("vision", "projector")),
)


@dataclass(frozen=True)
class Memory:
    """Bytes of this process. gradients: of a step, with the sums over its passes. work: logits, what the backward part
    holds at once, and weights of other processes. process: interpreter, libraries and data; 0 where a GPU's memory is
    meant."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    work: int
    process: int

    @property
    def total(self) -> int:
        """The most at once, forecast: gradients come as activations go, unless sums of earlier passes stay."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Plan:
    """A run that has not begun."""

    method: str
    trainable: dict[str, int]  # parameters by kind, of the whole model
    frozen: dict[str, int]
    optimizers: dict[str, int]  # parameters by who steps them
    memory: Memory
    available: int  # bytes, for each process of this machine
    steps: int
    tokens: int  # predictions of the whole run
    counted: int  # of the first step: those that carry loss (or pairs)
    passes: int  # of the first step
    seconds: float  # of the whole run
    basis: str

    def as_dict(self) -> dict[str, Any]:
        """For scripts."""
        return asdict(self) | {"memory_total": self.memory.total}


def make_plan(session: Session) -> Plan:
    """Count, forecast, and measure the first step: the session's model is not to be trained on afterwards. Raises
    PunaError where the forecast doesn't fit."""
    config, optimizer = session.config, session.optimizer
    trainable, frozen = kinds(session)
    pieces = optimizer.pieces()
    owned = {who: sum(prod(pieces[name].shape) for name in names) for who, names in optimizer.groups.items()}
    assert sum(trainable.values()) == sum(owned.values()), "every trainable parameter has one optimizer"
    passes = session.passes(0)
    memory = forecast(session, passes)
    alone = session.processes.size == 1 or session.model.device.type != "cpu"
    available = available_bytes(session.model.device) // (1 if alone else int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    with session.processes.together():
        if memory.gradients + memory.activations + memory.work > available:  # the rest is there already
            raise PunaError(
                f"needs {memory.total / 1e9:.1f} GB, {available / 1e9:.1f} GB are left: lower micro_tokens, or set "
                "`recompute: true`, or train adapters"
            )
    session.model.train()
    begun = time.perf_counter()
    gradients(session, passes, config.schedule(0))
    optimizer.step(config.schedule(0))
    seconds = time.perf_counter() - begun
    predictions = sum(sum(batch.lengths) for batch in passes)
    where = f"{torch.get_num_threads()} threads" if session.model.device.type == "cpu" else "the GPU"
    if session.processes.size > 1:
        where += f" of each of {session.processes.size} processes"
    return Plan(
        session.method.name, trainable, frozen, owned, memory, available, config.steps, predictions * config.steps,
        sum(session.method.count(batch) for batch in passes), len(passes), seconds * config.steps,
        f"the first step took {seconds:.2f} s on {where} for {predictions:,} tokens; the first is the slowest",
    )  # fmt: skip


def kinds(session: Session) -> tuple[dict[str, int], dict[str, int]]:
    """Parameters of the whole model by kind: those that train, and those that don't."""
    share = session.processes.share
    found: tuple[dict[str, int], dict[str, int]] = {}, {}
    for name, parameter in session.model.named_parameters():
        kind = next((kind for kind, marks in KINDS if any(mark in name for mark in marks)), "other")
        into = found[0 if parameter.requires_grad else 1]
        shape = parameter.shape if share is None else Slices(share).whole_shape(name, parameter.shape)
        into[kind] = into.get(kind, 0) + prod(shape)
    return found


def forecast(session: Session, passes: list[Batch]) -> Memory:
    """Bytes by part. Weights and optimizer are counted, activations too: in a small pass, scaled to the largest."""
    model, optimizer = session.model, session.optimizer
    parameters = [held(parameter) for parameter in model.parameters()]
    buffers = [tensor for tensor in model.buffers() if tensor.numel()]
    trained = list(optimizer.parameters.values())
    largest = max(sum(batch.lengths) for batch in passes)
    probe = _probe(passes[0])
    each = saved_bytes(session, probe) / sum(probe.lengths)
    config, width = model.config, model.dtype.itemsize
    activations = round(each * largest)
    if session.config.recompute:
        inputs = config.num_layers * config.hidden_size * width * largest
        activations = inputs + activations // config.num_layers
    widest = max(config.intermediate_size, config.expert_intermediate_size, config.hidden_size)
    logits = min(ROWS, largest) * row_bytes(model.head_weight)
    head = config.vocab_size * config.hidden_size * (4 + 2 * width)
    gathered = gathered_bytes(model, getattr(torch, session.config.dtype)) if session.processes.data.size > 1 else 0
    summed = 4 * sum(p.numel() for p in trained) if len(passes) > 1 else 0
    own = _size(trained)
    weights = _size(parameters) + _size(buffers)
    states = sum(_size(list(kinds.values())) for kinds in optimizer.state.values())
    return Memory(
        weights=weights,
        gradients=summed + (max(own - activations, 0) if not summed else 0),
        optimizer=states,
        activations=activations,
        work=logits + head + 6 * largest * widest * width + gathered,
        process=_process_bytes(weights + states) if model.device.type == "cpu" else 0,
    )


def _probe(batch: Batch) -> Batch:
    chosen: list[Example] = []
    for example in batch.examples:
        chosen.append(example)
        if sum(each.predictions for each in chosen) >= PROBE:
            break
    return Batch.of(chosen, batch.tokens_N.device)


def saved_bytes(session: Session, batch: Batch) -> int:
    """What the forward part of a pass keeps for the backward part and grows with the pass: not weights, nor what has
    a weight's shape (the output matrix's gradient)."""
    model = session.model
    shapes = {p.shape for p in model.parameters()}
    weights = {held(p).untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.shape not in shapes:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = session.method.loss(model, batch)  # alive until here, so that no address comes twice
    del loss
    return sum(kept.values())


def _size(tensors: list[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _process_bytes(held: int) -> int:
    """Interpreter, libraries and what else is there now beside `held` bytes of the run's."""
    try:
        with open("/proc/self/statm") as file:
            return max(0, int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") - held)
    except OSError:  # not Linux
        return 300_000_000
