"""Low-rank updates of frozen weights: the layers that train them (LoRA, DoRA), and those that serve them.

Formulas are PEFT's (`peft/tuners/lora`): y = W x + s B A dropout(x), s = alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv
2312.03732); DoRA (arXiv 2402.09353) brings each row of W + s B A to a learnt length, its present length a constant.
Legend: N rows, R rank, E experts, C (token, expert) choices, K inputs, O outputs.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna.model.differentiable import low_rank
from puna.model.elementwise import silu_mul
from puna.model.feedforward import Experts
from puna.model.frozen import FrozenLinear
from puna.model.linear import Embedding, Linear
from puna.model.packed import PackedEmbedding
from puna.model.ranks import Ranks


@dataclass(frozen=True)
class Update:
    """One weight's change: weight + scale * b @ a; with a magnitude, each of its rows at that length."""

    a: Tensor  # [R, K], of experts [E, R, K]
    b: Tensor  # [O, R], of experts [E, O, R]
    scale: float
    magnitude: Tensor | None = None  # [O]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight: [O, K], of experts [E, K, O] as the decoder holds them."""
        if self.a.dim() == 3:
            return self.a.shape[0], self.a.shape[2], self.b.shape[1]
        return self.b.shape[0], self.a.shape[1]

    def changed(self, weight: Tensor) -> Tensor:
        """weight + scale * b @ a, in float32."""
        change = self.scale * (self.b.float() @ self.a.float())
        return weight.float() + (change.mT if change.dim() == 3 else change)

    def merged(self, weight: Tensor) -> Tensor:
        """The weight as the adapter has it, in float32."""
        whole = self.changed(weight)
        if self.magnitude is None:
            return whole
        return whole * (self.magnitude.float() / torch.linalg.norm(whole, dim=1))[:, None]


class TiedHead(nn.Module):
    """The embedding as the output layer, so that the one can have an update and the other not."""

    def __init__(self, embedding: Embedding | PackedEmbedding) -> None:
        super().__init__()
        self._embedding = (embedding,)  # not a submodule: its weight has its name already

    @property
    def weight(self) -> Tensor:
        """[V, D], where it is not packed."""
        return self._embedding[0].get_parameter("weight")

    def forward(self, x: Tensor) -> Tensor:
        return self._embedding[0].project(x)


Layers = Iterable[Callable[[Tensor], Tensor]]
Base = Linear | FrozenLinear | TiedHead


@dataclass
class Dropout:
    """Zeroes a share of the inputs, the same ones whenever the seed is the same: a pass that is computed again, and a
    run that is resumed, drop what was dropped. The seed is set for each pass; `layer` tells layers apart."""

    share: float
    layer: int
    seed: int = 0
    columns: tuple[int, int, int] | None = None  # first, last+1 and number of all, where the inputs are a part of them

    def __call__(self, x: Tensor) -> Tensor:
        generator = torch.Generator(x.device).manual_seed((self.seed * 1_000_003 + self.layer) % 2**63)
        first, last, inputs = self.columns or (0, x.shape[-1], x.shape[-1])
        kept = torch.rand((*x.shape[:-1], inputs), generator=generator, device=x.device) >= self.share
        return x * kept[..., first:last] / (1 - self.share)


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable update. `enabled` False: the base alone."""

    def __init__(self, base: Base, shape: tuple[int, int], rank: int, scale: float, dtype: torch.dtype,
                 dropout: Dropout | None = None, dora: bool = False) -> None:  # fmt: skip
        super().__init__()
        outputs, inputs = shape
        self.base, self.scale, self.dropout, self.enabled = base, scale, dropout, True
        self.ranks: Ranks | None = None  # who hold the other inputs' columns, where processes share them
        self.lora_A = nn.Parameter(torch.zeros(rank, inputs, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank, dtype=dtype))
        self.magnitude: nn.Parameter | None = None
        if dora:
            self.register_buffer("squares", row_squares(base), persistent=False)
            self.magnitude = nn.Parameter(cast(Tensor, self.squares).sqrt().to(dtype))

    def draw(self, generator: torch.Generator) -> None:
        """The first values: A uniform within 1 / sqrt(K), B zero, so that nothing changes yet."""
        draw(self.lora_A, generator)

    def join(self, ranks: Ranks, columns: tuple[int, int, int]) -> None:
        """This layer has some columns of the weight (first, last+1, number of all), others have the rest."""
        self.ranks = ranks
        if self.dropout is not None:
            self.dropout.columns = columns
        if self.magnitude is not None:
            with torch.no_grad():
                self.magnitude.copy_(ranks.sum(cast(Tensor, self.squares)).sqrt())

    def update(self) -> Update:
        """What was learnt, detached."""
        magnitude = None if self.magnitude is None else self.magnitude.detach()
        return Update(self.lora_A.detach(), self.lora_B.detach(), self.scale, magnitude)

    @property
    def weight(self) -> Tensor:
        """The changed weight [O, K], differentiable in the update, where the base has a plain one."""
        base = self.base.weight
        assert isinstance(base, Tensor)
        if not self.enabled:
            return base
        whole = base + self.scale * (self.lora_B @ self.lora_A)
        return whole if self.magnitude is None else whole * self._lengths()[:, None]

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return cast(Tensor, self.base(x))
        dropped = self.dropout(x) if self.dropout and self.training else x
        if self.magnitude is None and dropped is x and isinstance(self.base, Linear):
            return low_rank(x, self.base.weight, self.lora_A, self.lora_B, self.scale)
        result: Tensor = self.base(x)
        inner = F.linear(dropped, self.lora_A) * self.scale
        if self.magnitude is None:
            return added(result, inner, self.lora_B)
        lengths = self._lengths()
        if dropped is x:
            return lengths * added(result, inner, self.lora_B)
        return result + (lengths - 1) * self.base(dropped) + lengths * F.linear(inner, self.lora_B)

    def _lengths(self) -> Tensor:
        """Each row's learnt length over its present one [O]; the present one counts as a constant.

        |w + s b A|^2 = |w|^2 + 2 s b (A w) + s^2 b (A A^T) b, so that no matrix of the weight's size is made.
        """
        assert self.magnitude is not None
        with torch.no_grad():
            A, B = self.lora_A.float(), self.lora_B.float()
            crossed = self.base(self.lora_A).float().T
            added = B * (2 * self.scale * crossed + self.scale**2 * B @ (A @ A.T))
            square = cast(Tensor, self.squares) + added.sum(1)
            square = self.ranks.sum(square) if self.ranks else square
            present = square.clamp_(min=0).sqrt_().to(self.magnitude.dtype)
        return self.magnitude / present


class LoRAExperts(nn.Module):
    """Frozen routed experts, each with trainable updates of its own of some `parts`: "gate_up", "down"."""

    def __init__(self, base: "Experts | PairedExperts", shapes: Mapping[str, tuple[int, int, int]], rank: int,
                 scale: float, dtype: torch.dtype) -> None:  # fmt: skip
        super().__init__()
        self.base, self.scale, self.enabled, self.parts = base, scale, True, tuple(shapes)
        for part, (experts, inputs, outputs) in shapes.items():
            self.register_parameter(f"{part}_lora_A", nn.Parameter(torch.zeros(experts, rank, inputs, dtype=dtype)))
            self.register_parameter(f"{part}_lora_B", nn.Parameter(torch.zeros(experts, outputs, rank, dtype=dtype)))

    def draw(self, generator: torch.Generator) -> None:
        """As `LoRALinear.draw`."""
        for part in self.parts:
            draw(self.get_parameter(f"{part}_lora_A"), generator)

    def update(self, part: str) -> Update:
        """What was learnt of one of the parts, detached."""
        a, b = (self.get_parameter(f"{part}_lora_{factor}").detach() for factor in "AB")
        return Update(a, b, self.scale)

    def forward(self, x_CD: Tensor, counts: list[int]) -> Tensor:
        """Rows sorted by expert, `counts[e]` of them for expert e -> [C, D]. Other experts are not touched."""
        if not self.enabled:
            return cast(Tensor, self.base(x_CD, counts))
        base = self.base
        gate_up: Layers
        down: Layers
        if isinstance(base, PairedExperts):
            gate_up, down = base.gate_up, base.down
        else:
            gate_up, down = products(base.gate_up_proj), products(base.down_proj)
        return through(x_CD, counts, self._changed("gate_up", gate_up), self._changed("down", down))

    def _changed(self, part: str, layers: Layers) -> Layers:
        """Each expert's layer with its update."""
        if part not in self.parts:
            return layers
        factors = zip(*(self.get_parameter(f"{part}_lora_{factor}").unbind() for factor in "AB"), strict=True)
        return [partial(self._sum, layer, a, b) for layer, (a, b) in zip(layers, factors, strict=True)]

    def _sum(self, layer: Callable[[Tensor], Tensor], a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        return added(layer(x), F.linear(x, a) * self.scale, b)


class BesideLinear(nn.Module):
    """y = lengths * (base(x) + b(a(x))): an update served beside a weight that stays as it is packed."""

    def __init__(self, base: nn.Module, a: nn.Module, b: nn.Module, lengths_O: Tensor | None) -> None:
        super().__init__()
        self.base, self.a, self.b = base, a, b
        self.lengths: Tensor | None
        self.register_buffer("lengths", lengths_O, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.b(self.a(x))
        return y if self.lengths is None else y * self.lengths


class PairedExperts(nn.Module):
    """Routed experts as pairs of layers: in few bits, or with updates beside them."""

    def __init__(self, gate_up: Sequence[nn.Module], down: Sequence[nn.Module]) -> None:
        super().__init__()
        self.gate_up, self.down = nn.ModuleList(gate_up), nn.ModuleList(down)

    def forward(self, x_CD: Tensor, counts: list[int]) -> Tensor:
        """Rows sorted by expert, `counts[e]` of them for expert e -> [C, D]."""
        return through(x_CD, counts, self.gate_up, self.down)


def through(x_CD: Tensor, counts: list[int], gate_up: Layers, down: Layers) -> Tensor:
    """Each expert's rows through its two layers; experts without rows are not called."""
    work = zip(x_CD.split(counts), gate_up, down, strict=True)
    return torch.cat([second(silu_mul(first(x))) for x, first, second in work if len(x)])


def products(weights_EKO: Tensor) -> Layers:
    """Fused experts as one layer each; the gradients of their weights are gathered once."""
    return [partial(F.linear, weight=weight.T) for weight in weights_EKO.unbind()]


def added(y: Tensor, inner: Tensor, b: Tensor) -> Tensor:
    """y [..., O] + inner [..., R] @ b.T in one pass over y."""
    return torch.addmm(y.flatten(0, -2), inner.flatten(0, -2), b.T).view_as(y)


@torch.no_grad()
def draw(a: Tensor, generator: torch.Generator) -> None:
    """Fill an A, if it has memory, with its first values."""
    if not a.is_meta:
        a.copy_(uniform(a.shape, generator))


def uniform(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """PEFT's first values of A: Kaiming's with a = sqrt(5), which is uniform within 1 / sqrt(inputs)."""
    bound = shape[-1] ** -0.5
    return torch.rand(tuple(shape), generator=generator) * (2 * bound) - bound


def row_squares(base: Base) -> Tensor:
    """The squared length of each row of a layer's weight [O], float32."""
    if isinstance(base, FrozenLinear):
        return torch.cat([part.square().sum(1) for part in base.parts(torch.float32)])
    return torch.cat([part.float().square().sum(1) for part in base.weight.detach().split(4096)])
