"""Giving a decoder trainable low-rank updates, by plain names of what they are of, and taking them out again."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from puna.errors import PunaError
from puna.model.attention import Attention
from puna.model.decoder import Block, Decoder
from puna.model.feedforward import Experts, FeedForward, MixtureOfExperts
from puna.model.frozen import FrozenLinear
from puna.model.linear import Embedding, Linear
from puna.model.lora import Dropout, LoRAExperts, LoRALinear, PairedExperts, TiedHead, Update

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
# what a target means: the layers of a decoder by the end of their names
TARGETS: dict[str, tuple[str, ...]] = {
    "attention": ATTENTION,
    "feed_forward": FEED_FORWARD,  # of dense layers, and of the expert that all tokens share
    "experts": ("experts.gate_up_proj", "experts.down_proj"),
    "router": ("router",),
    "output": ("lm_head",),
} | {name: (name,) for name in (*ATTENTION, *FEED_FORWARD)}
DEFAULT = ("attention", "feed_forward", "experts")


@dataclass(frozen=True)
class Lora:
    """Which updates to train. targets: keys of TARGETS; () takes DEFAULT, as far as the model has them.

    alpha: the update is scaled by alpha / rank, with rslora by alpha / sqrt(rank). dora: learn each row's length, too
    (not of experts). dropout: share of a layer's inputs that the update doesn't see (not of experts and router).
    """

    rank: int = 16
    alpha: float = 32.0
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0
    targets: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def attach(decoder: Decoder, lora: Lora, seed: int) -> tuple[str, ...]:
    """Wrap the targeted layers in place; returns their weights' canonical names. Nothing else trains afterwards.

    Raises PunaError for a target that is not known, that this decoder doesn't have, or that DoRA is not defined for.
    """
    wanted = _wanted(decoder, lora)
    generator = torch.Generator().manual_seed(seed)
    decoder.requires_grad_(False)
    names: list[str] = []
    for path, module in list(_layers(decoder)):
        if isinstance(module, Experts | PairedExperts):
            parts = {part: f"experts.{part}_proj" for part in ("gate_up", "down")}
            shapes = {part: _expert_shape(module, part) for part, end in parts.items() if end in wanted}
            if not shapes:
                continue
            layer: LoRALinear | LoRAExperts = LoRAExperts(module, shapes, lora.rank, lora.scale, decoder.dtype)
            names += [f"{path}.{part}_proj" for part in shapes]
        elif path.rpartition(".")[2] in wanted:
            assert isinstance(module, Linear | FrozenLinear | TiedHead), "training takes layers that are not packed"
            # in PEFT a router is a parameter, for which it knows no dropout
            drops = lora.dropout > 0 and not path.endswith(".router")
            dropout = Dropout(lora.dropout, len(names)) if drops else None
            layer = LoRALinear(module, _shape(module), lora.rank, lora.scale, decoder.dtype, dropout, lora.dora)
            names.append(f"{path}.weight")
        else:
            continue
        layer.draw(generator)
        owner, _, name = path.rpartition(".")
        setattr(decoder.get_submodule(owner), name, layer.to(decoder.device))
    return tuple(names)


def updates(decoder: Decoder) -> dict[str, Update]:
    """What was learnt, by the canonical name of the weight that it changes."""
    found: dict[str, Update] = {}
    for path, module in decoder.named_modules():
        if isinstance(module, LoRAExperts):
            found |= {f"{path}.{part}_proj": module.update(part) for part in module.parts}
        elif isinstance(module, LoRALinear):
            found[f"{path}.weight"] = module.update()
    return found


def set_updates(decoder: Decoder, given: Mapping[str, Update]) -> None:
    """Put values into the updates that `attach` made. Raises PunaError where the two don't have the same weights."""
    with torch.no_grad():
        own = updates(decoder)
        if own.keys() != given.keys():
            odd = min(own.keys() ^ given.keys())
            raise PunaError(f"the adapter and the run don't change the same weights: {odd}; give the same targets")
        for name, update in given.items():
            values = zip((own[name].a, own[name].b, own[name].magnitude), (update.a, update.b, update.magnitude),
                         strict=True)  # fmt: skip
            for mine, theirs in values:
                if mine is not None and theirs is not None and mine.shape == theirs.shape:
                    mine.copy_(theirs)
                elif mine is not theirs:
                    raise PunaError(f"the adapter's update of {name} is of another rank or kind than the run's")


def set_dropout(decoder: Decoder, seed: int) -> None:
    """Which inputs the updates' dropout takes out from now on."""
    for module in decoder.modules():
        if isinstance(module, LoRALinear) and module.dropout is not None:
            module.dropout.seed = seed


@contextmanager
def switched_off(decoder: Decoder) -> Iterator[None]:
    """The base model, as long as this lasts."""
    layers = [module for module in decoder.modules() if isinstance(module, LoRALinear | LoRAExperts)]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def kinds(names: Sequence[str]) -> dict[str, list[str]]:
    """Weights' names by the target that they belong to, in the order of TARGETS."""
    groups = {target: TARGETS[target] for target in ("attention", "feed_forward", "experts", "router", "output")}
    found: dict[str, list[str]] = {target: [] for target in groups}
    for name in names:
        path = name.removesuffix(".weight")
        end = next(target for target, ends in groups.items()
                   if path.endswith(ends) and (target == "experts") == (".experts." in path))  # fmt: skip
        found[end].append(name)
    return {target: names for target, names in found.items() if names}


def _wanted(decoder: Decoder, lora: Lora) -> set[str]:
    unknown = [target for target in lora.targets if target not in TARGETS]
    if unknown:
        raise PunaError(f"targets: {unknown[0]!r} is not one; choose from {', '.join(TARGETS)}")
    present = {_end(path) for path, _ in _layers(decoder)}
    if "experts" in present:
        present |= set(TARGETS["experts"])
    for target in lora.targets:
        if not present & set(TARGETS[target]):
            raise PunaError(f"targets: this model has no {target}; leave it out")
        if lora.dora and target in ("experts", "router"):
            raise PunaError(f"targets: DoRA is not defined for {target}; leave it out, or use method lora")
    chosen = lora.targets or [target for target in DEFAULT if not (lora.dora and target == "experts")]
    return {end for target in chosen for end in TARGETS[target]}


def _end(path: str) -> str:
    return path.rpartition(".")[2]


def _layers(decoder: Decoder) -> Iterator[tuple[str, nn.Module]]:
    """Every layer that can have an update, by its path."""
    for at, block in enumerate(decoder.layers):
        if not isinstance(block, Block):
            continue  # a layer that looks at pictures
        assert isinstance(block.self_attn, Attention)
        for name in ATTENTION:
            yield f"layers.{at}.self_attn.{name}", block.self_attn.get_submodule(name)
        path, module = f"layers.{at}.feed_forward", block.feed_forward
        if isinstance(module, MixtureOfExperts):
            yield f"{path}.router", module.router
            yield f"{path}.experts", module.experts
            path, module = f"{path}.shared_expert", module.shared_expert
        assert isinstance(module, FeedForward)
        for name in FEED_FORWARD:
            yield f"{path}.{name}", module.get_submodule(name)
    if decoder.lm_head is not None:
        yield "lm_head", decoder.lm_head
    else:
        assert isinstance(decoder.embed_tokens, Embedding), "training takes layers that are not packed"
        yield "lm_head", TiedHead(decoder.embed_tokens)


def _shape(module: Linear | FrozenLinear | TiedHead) -> tuple[int, int]:
    if isinstance(module, FrozenLinear):
        return module.outputs, module.inputs
    return module.weight.shape[0], module.weight.shape[1]


def _expert_shape(module: Experts | PairedExperts, part: str) -> tuple[int, int, int]:
    """Experts, inputs, outputs."""
    if isinstance(module, Experts):
        fused: Tensor = module.get_parameter(f"{part}_proj")
        return fused.shape[0], fused.shape[1], fused.shape[2]
    layers = module.get_submodule(part)
    assert isinstance(layers, nn.ModuleList)
    first = layers[0]
    assert isinstance(first, FrozenLinear)
    return len(layers), first.inputs, first.outputs
