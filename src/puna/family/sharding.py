"""Which part of each tensor a rank holds when several processes share one decoder, as plain data.

Column-parallel matrices (q, k, v, gate, up) are split by rows, row-parallel ones (o, down) by columns, so that a layer
needs one sum over the ranks after attention and one after the feed-forward (Shoeybi et al., Megatron-LM, 2019).
Legend: D model width, F feed-forward width, E experts, H query heads, G key/value heads, V vocabulary.
"""

import re
from dataclasses import dataclass
from functools import cached_property

from puna.errors import PunaError
from puna.family.arithmetic import Shapes, decoder_shapes
from puna.family.config import ModelConfig

Range = tuple[int, int]


@dataclass(frozen=True)
class Mesh:
    """How many ways the matrices and the experts are split.

    The same ranks do both: with `expert` <= `tensor`, each of `expert` groups holds E / expert experts and splits their
    width over its tensor / expert ranks. With `expert` > `tensor`, all else is held by expert / tensor replicas.
    """

    tensor: int = 1
    expert: int = 1

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return max(self.tensor, self.expert)

    @property
    def replicas(self) -> int:
        """How many times everything but the experts is held."""
        return self.ranks // self.tensor

    @property
    def expert_slices(self) -> int:
        """How many ranks share the width of one expert."""
        return self.ranks // self.expert

    def tensor_rank(self, rank: int) -> int:
        """Which slice of the matrices this rank holds."""
        return rank % self.tensor

    def replica(self, rank: int) -> int:
        """Which copy of everything but the experts this rank belongs to."""
        return rank // self.tensor


@dataclass(frozen=True)
class Cut:
    """The ranges of one axis that a rank holds, joined in order."""

    axis: int
    ranges: tuple[Range, ...]

    @property
    def length(self) -> int:
        return sum(stop - start for start, stop in self.ranges)


@dataclass(frozen=True)
class Rule:
    """How one kind of tensor is split: what is divided, or why nothing is."""

    pattern: str
    kind: str
    text: str


_RULES = (
    Rule(r"(embed_tokens|lm_head)\.weight", "vocabulary", "rows by vocabulary; embeddings summed, logits gathered"),
    Rule(r".*\.self_attn\.q_proj\.weight", "heads", "rows by query heads"),
    Rule(r".*\.self_attn\.[kv]_proj\.weight", "kv_heads", "rows by key/value heads"),
    Rule(r".*\.self_attn\.o_proj\.weight", "head_columns", "columns by query heads; outputs summed"),
    Rule(r".*\.(gate|up)_proj\.weight", "width", "rows by feed-forward width"),
    Rule(r".*\.down_proj\.weight", "width_columns", "columns by feed-forward width; outputs summed"),
    Rule(r".*\.experts\.(gate_up|down)_proj", "experts", "by experts, then by their width; outputs summed"),
    Rule(r".*\.router\.weight", "whole", "whole on every rank: small, and every rank needs every choice"),
    Rule(r".*norm\.weight", "whole", "whole on every rank: one number a channel"),
)


@dataclass(frozen=True)
class Sharding:
    """A decoder split over a mesh. Raises PunaError, naming what would fit, where the shape can't be split so."""

    config: ModelConfig
    mesh: Mesh

    def __post_init__(self) -> None:
        if problem := _problem(self.config, self.mesh):
            raise PunaError(f"{problem} {_what_fits(self.config)}")

    @cached_property
    def shapes(self) -> Shapes:
        """The whole decoder's tensors."""
        return decoder_shapes(self.config)

    @property
    def kv_copies(self) -> int:
        """How many ranks hold the same key/value head, where there are fewer heads than ranks."""
        return max(1, self.mesh.tensor // self.config.num_kv_heads)

    def rule(self, name: str) -> Rule:
        """How the tensor `name` is split."""
        return next(rule for rule in _RULES if re.fullmatch(rule.pattern, name))

    def cuts(self, name: str, rank: int) -> tuple[Cut, ...]:
        """What `rank` holds of the tensor `name`, one cut an axis that is split; () is all of it."""
        shape, kind, mesh = self.shapes[name], self.rule(name).kind, self.mesh
        at = mesh.tensor_rank(rank)
        if kind == "whole" or mesh.ranks == 1:
            return ()
        if kind == "experts":
            return self._expert_cuts(shape, rank, fused_halves=name.endswith("gate_up_proj"))
        if kind == "kv_heads":
            return _unless_whole(Cut(0, (part(shape[0], mesh.tensor // self.kv_copies, at // self.kv_copies),)), shape)
        axis = 1 if kind.endswith("columns") else 0
        return _unless_whole(Cut(axis, (part(shape[axis], mesh.tensor, at),)), shape)

    def _expert_cuts(self, shape: tuple[int, ...], rank: int, fused_halves: bool) -> tuple[Cut, ...]:
        slices, width = self.mesh.expert_slices, self.config.expert_intermediate_size
        experts = Cut(0, (self.experts(rank),))
        start, stop = part(width, slices, rank % slices)
        inner = Cut(2, ((start, stop), (width + start, width + stop))) if fused_halves else Cut(1, ((start, stop),))
        return _unless_whole(experts, shape) + (() if slices == 1 else (inner,))

    def experts(self, rank: int) -> Range:
        """First and last+1 of the routed experts that `rank` holds (all or part of the width of each)."""
        return part(self.config.num_experts, self.mesh.expert, rank // self.mesh.expert_slices)

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        """Shape of what `rank` holds of the tensor `name`."""
        lengths = {cut.axis: cut.length for cut in self.cuts(name, rank)}
        return tuple(lengths.get(axis, size) for axis, size in enumerate(self.shapes[name]))

    def local_config(self) -> ModelConfig:
        """The shape that one rank computes and caches with: its heads and widths; vocabulary and experts stay whole."""
        config, tensor = self.config, self.mesh.tensor
        return config.with_(
            num_heads=config.num_heads // tensor,
            num_kv_heads=max(1, config.num_kv_heads // tensor),
            intermediate_size=config.intermediate_size // tensor,
            expert_intermediate_size=config.expert_intermediate_size // tensor,
        )


def part(total: int, parts: int, index: int) -> Range:
    """Range number `index` of `total` things in `parts` parts that differ by one at most."""
    return total * index // parts, total * (index + 1) // parts


def _unless_whole(cut: Cut, shape: tuple[int, ...]) -> tuple[Cut, ...]:
    return () if cut.length == shape[cut.axis] else (cut,)


def _problem(config: ModelConfig, mesh: Mesh) -> str | None:
    """Why the mesh does not fit, as a sentence; None where it does."""
    tensor, expert = mesh.tensor, mesh.expert
    if min(tensor, expert) < 1:
        return f"Numbers of ranks start at 1, not {min(tensor, expert)}."
    if expert > 1 and not config.moe_layers:
        return f"This model has no experts to split {expert} ways."
    if max(tensor, expert) % min(tensor, expert):
        return f"Of {tensor} (tensor) and {expert} (expert) ranks, one must be a multiple of the other."
    if config.num_heads % tensor:
        return f"{config.num_heads} query heads can't be split over {tensor} ranks."
    if config.num_kv_heads % tensor and tensor % config.num_kv_heads:
        return f"{config.num_kv_heads} key/value heads can neither be split over {tensor} ranks nor copied evenly."
    widths = {"Feed-forward": config.intermediate_size} if len(set(config.moe_layers)) < config.num_layers else {}
    if config.moe_layers:
        widths["Expert"] = config.expert_intermediate_size  # the shared expert is split like a dense layer
    for what, width in widths.items():
        if width % tensor:
            return f"{what} width {width} can't be split over {tensor} ranks."
    if config.num_experts and config.num_experts % expert:
        return f"{config.num_experts} experts can't be split over {expert} ranks."
    if config.vocab_size < tensor:
        return f"A vocabulary of {config.vocab_size} can't be split over {tensor} ranks."
    return None


def fitting(config: ModelConfig) -> tuple[int, ...]:
    """Every number of tensor-parallel ranks that this shape can be split over, ascending."""
    return tuple(n for n in range(1, config.num_heads + 1) if _problem(config, Mesh(n)) is None)


def _what_fits(config: ModelConfig) -> str:
    text = f"Tensor-parallel ranks that fit: {', '.join(map(str, fitting(config)))}."
    if config.moe_layers:
        divisors = [n for n in range(1, config.num_experts + 1) if config.num_experts % n == 0]
        text += f" Expert-parallel ranks: {', '.join(map(str, divisors))}."
    return text


def mesh_for(config: ModelConfig, ranks: int, expert: int | None = None) -> Mesh:
    """The mesh for that many processes: tensor-parallel throughout where the shape allows it.

    Where heads can't be split so far, experts are, and the rest is held several times. `expert` None chooses: 1 where
    it fits, since then every rank works on every token. Raises PunaError where nothing fits.
    """
    candidates = [n for n in range(ranks, 0, -1) if ranks % n == 0]
    choices = (
        [Mesh(ranks, expert)] + [Mesh(n, ranks) for n in candidates if expert == ranks]
        if expert is not None
        else [Mesh(ranks), Mesh(ranks, ranks)] + [Mesh(n, ranks) for n in candidates]
    )
    for mesh in choices:
        if mesh.ranks == ranks and _problem(config, mesh) is None:
            return mesh
    return Sharding(config, choices[0]).mesh  # raises, with the reason
