"""What each process of a training run holds, for any shape and mesh: counted on the meta device, nothing is loaded.

Weights, gradients and optimizer state are those of the very decoder and optimizer that a run makes, without memory
behind them. What a pass keeps is counted by a formula.
Legend: D model width, H query heads, G key/value heads, K head width, F feed-forward width, V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from math import prod

import torch
from torch import Tensor, nn

from puna.family.config import ModelConfig
from puna.family.sharding import Mesh, Sharding
from puna.model import Decoder
from puna.model.adapt import Lora, attach
from puna.model.differentiable import FILL
from puna.model.feedforward import Experts
from puna.model.frozen import FrozenLinear
from puna.model.linear import Linear
from puna.model.lora import PairedExperts
from puna.model.packing import requantized
from puna.model.parallel import local_decoder
from puna.train.loss import ROWS, row_bytes
from puna.train.methods import METHODS
from puna.train.optimizer import Optimizer
from puna.train.sharded import dealt_axis

PLANNED = ("full", "pretrain", "lora", "qlora")  # methods


@dataclass(frozen=True)
class Layout:
    """A run to plan: its processes, and what one pass is."""

    data: int = 1
    mesh: Mesh = field(default_factory=Mesh)
    method: str = "full"
    tokens: int = 6144  # of one pass of a data group
    dtype: torch.dtype = torch.bfloat16
    rank: int = 16  # of updates

    @property
    def processes(self) -> int:
        """All of them."""
        return self.data * self.mesh.ranks


@dataclass(frozen=True)
class RankBytes:
    """Bytes of the process that holds most.

    weights: with their float32 masters. gradients: float32, as summed over a step's passes. kept: for the backward part
    of a pass; recomputed: in its place with `recompute`. gathered: of other processes' weights at once, and gradients
    on their way to them. logits: of a block of rows, and the output matrix's gradient.
    """

    weights: int
    gradients: int
    optimizer: int
    kept: int
    recomputed: int
    gathered: int
    logits: int

    @property
    def total(self) -> int:
        """Of all parts at once."""
        return sum(asdict(self).values()) - self.recomputed

    @property
    def total_recomputed(self) -> int:
        """The same with `recompute`."""
        return self.total - self.kept + self.recomputed


def rank_bytes(config: ModelConfig, layout: Layout) -> RankBytes:
    """Count. Raises PunaError for a mesh that the shape can't be split over. Towers are not counted."""
    sharding = Sharding(config.with_(vision=None), layout.mesh)
    decoder = local_decoder(sharding, layout.mesh.ranks - 1).to(layout.dtype)  # the last holds most of the vocabulary
    _choose(decoder, layout)
    dealt = {name: _dealt(p, layout) for name, p in decoder.named_parameters()}
    optimizer = Optimizer(dealt, muon=METHODS[layout.method].optimizer == "muon", rate=1.0)  # type: ignore[attr-defined]
    moments = sum(_size(kinds.values()) for kinds in optimizer.state.values())
    lows = sum(_size([kinds["low"]]) for kinds in optimizer.state.values() if "low" in kinds)
    kept, recomputed = activations(sharding, layout)
    return RankBytes(
        weights=_size(dealt.values()) + _size(each for _, each in decoder.named_buffers(remove_duplicate=False)) + lows,
        gradients=sum(4 * p.numel() for p in optimizer.parameters.values()),
        optimizer=moments - lows,
        kept=kept,
        recomputed=recomputed,
        gathered=gathered_bytes(decoder, layout.dtype) if layout.data > 1 else 0,
        logits=min(ROWS, layout.tokens) * row_bytes(decoder.head_weight.detach()) + _head_gradient(decoder),
    )


def _choose(decoder: Decoder, layout: Layout) -> None:
    """Make the decoder what the method trains."""
    if layout.method == "qlora":
        _in_few_bits(decoder)
    if layout.method in ("lora", "qlora"):
        with torch.device("meta"):
            attach(decoder, Lora(layout.rank), 0)
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_("lora_" in name or layout.method in ("full", "pretrain"))


def _in_few_bits(decoder: Decoder) -> None:
    """As `puna.checkpoint.frozen.load_frozen` does."""
    for path, module in list(decoder.named_modules()):
        layer: nn.Module
        if isinstance(module, Experts):
            fused = module.gate_up_proj.detach(), module.down_proj.detach()
            layer = PairedExperts(*([FrozenLinear(requantized(part[0].T, 4))] * len(part) for part in fused))  # alike
        elif isinstance(module, Linear) and path.startswith("layers.") and path.endswith("_proj"):
            layer = FrozenLinear(requantized(module.weight.detach(), 4))
        else:
            continue
        owner, _, name = path.rpartition(".")
        setattr(decoder.get_submodule(owner), name, layer)


def _dealt(parameter: nn.Parameter, layout: Layout) -> nn.Parameter:
    """What one process of a data group keeps: even chunks, in float32 where they train (FSDP2)."""
    if layout.data == 1:
        return parameter
    shape, axis = list(parameter.shape), dealt_axis(parameter.shape, layout.data)
    shape[axis] = -(-shape[axis] // layout.data)
    dtype = torch.float32 if parameter.requires_grad else parameter.dtype
    return nn.Parameter(parameter.new_empty(shape, dtype=dtype), parameter.requires_grad)


def gathered_bytes(decoder: Decoder, dtype: torch.dtype) -> int:
    """Of weights dealt to data groups, what is put together at once, in `dtype`: the outer ones, which stay from the
    forward to the backward part; two blocks', since the next is on its way while one computes; and one block's
    gradients, as they come and in float32."""
    inner = [list(block.parameters()) for block in decoder.layers]
    blocks = [sum(prod(p.shape) for p in block) for block in inner]
    outer = sum(prod(p.shape) for p in decoder.parameters()) - sum(blocks)
    trained = max(sum(prod(p.shape) for p in block if p.requires_grad) for block in inner)
    return (outer + 2 * max(blocks) + trained) * dtype.itemsize + 4 * trained


def _head_gradient(decoder: Decoder) -> int:
    """A float32 sum, and a block's share of it."""
    weight = decoder.head_weight
    return weight.numel() * (4 + weight.itemsize) if weight.requires_grad else 0


def activations(sharding: Sharding, layout: Layout) -> tuple[int, int]:
    """Bytes that a pass keeps for its backward part on one process: of every layer, and with `recompute`.

    Rows of the experts are counted as if all were chosen alike, and filled up as `Experts` does it.
    """
    config = sharding.config
    layers = [_layer_bytes(sharding, layout, layer) for layer in range(config.num_layers)]
    stream = layout.tokens * config.hidden_size * layout.dtype.itemsize
    ends = 2 * stream  # the last norm's input, and the states' gradient
    return sum(layers) + ends, config.num_layers * stream + max(layers) + ends


def _layer_bytes(sharding: Sharding, layout: Layout, layer: int) -> int:
    """What one layer keeps. D: norms and what they give. Attention: queries, repeated keys and values, the result twice
    (PyTorch's, and in the tokens' order), and a number a head. Feed-forward: gate, up, and their product."""
    config, local, size = sharding.config, sharding.local_config(), layout.dtype.itemsize
    D, HK = config.hidden_size, local.num_heads * config.head_dim
    adapted = layout.method in ("lora", "qlora")
    values = 4 * D + 4 * HK
    others = 4 * local.num_heads  # bytes
    if config.qk_norm and config.uses_rope(layer):
        others += 4 * (HK + local.num_kv_heads * config.head_dim)  # in float32
    fixed = 0
    if config.is_moe(layer):
        count, inner, _ = sharding.shape(f"layers.{layer}.feed_forward.experts.down_proj", 0)
        row = D + 3 * inner  # an expert's input, gate, up, product
        share = count / config.num_experts * config.num_experts_per_token
        fixed = count * (FILL // 2) * row * size
        values += 3 * local.expert_intermediate_size + round(share * row)
        others += 8 * config.num_experts + 40  # the router's logits; indices
        if size < 4 and not adapted:
            others += 4 * D  # the router's input in float32, where it is trained
    else:
        values += 3 * local.intermediate_size
    if adapted:
        values += 7 * layout.rank
    return fixed + layout.tokens * (values * size + others)


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(prod(tensor.shape) * tensor.element_size() for tensor in tensors)
