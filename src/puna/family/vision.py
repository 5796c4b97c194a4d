"""The vision towers of Llama 3.2 Vision and Llama 4: shapes as data."""

from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True)
class Llama4Vision:
    """Llama 4's tower (Scout, Maverick, Guard 4): its outputs replace the embeddings of image tokens.

    Source: llama-models `llama4/vision`, transformers `modeling_llama4.py`. Sides are in pixels.
    """

    channel_means: ClassVar[tuple[float, float, float]] = (0.5, 0.5, 0.5)  # of red, green, blue from 0 to 1
    channel_deviations: ClassVar[tuple[float, float, float]] = (0.5, 0.5, 0.5)
    hidden_size: int = 1408
    num_layers: int = 34
    num_heads: int = 16
    intermediate_size: int = 5632
    tile_side: int = 336
    patch_side: int = 14
    pixel_shuffle: int = 2  # this many patches a side become one output token
    adapter_size: int = 4096
    max_tiles: int = 16
    rope_theta: float = 10_000.0
    layer_norm_eps: float = 1e-5
    image_token_id: int = 200_092  # `<|patch|>`: each one's embedding is replaced by one output of the tower

    def __post_init__(self) -> None:
        _check(self)
        side = self.tile_side // self.patch_side
        if self.pixel_shuffle < 1 or side % self.pixel_shuffle:
            raise ValueError(f"{side} patches a side of a tile can't be put together by {self.pixel_shuffle}")
        if self.hidden_size // self.num_heads % 4:
            raise ValueError(f"a tower's heads of {self.hidden_size // self.num_heads} can't turn by row and column")

    @property
    def patches(self) -> int:
        """Patches in one tile, without the class token."""
        return (self.tile_side // self.patch_side) ** 2

    @property
    def tokens_per_tile(self) -> int:
        """Text positions that one tile takes, without its separators."""
        return self.patches // self.pixel_shuffle**2

    def tiles(self, grid: tuple[int, int]) -> int:
        """Tiles of a picture of rows x columns: more than one are followed by a global tile."""
        count = grid[0] * grid[1]
        return count + (count > 1)


@dataclass(frozen=True)
class Llama32Vision:
    """Llama 3.2 Vision's tower, read by cross-attention layers that are added to a frozen Llama 3.1 text model.

    `cross_attention_before` has the 0-based text layers that a cross-attention layer precedes (Meta's numbering).
    Source: llama-models `llama3/multimodal/model.py`, transformers `modeling_mllama.py`.
    """

    channel_means: ClassVar[tuple[float, float, float]] = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
    channel_deviations: ClassVar[tuple[float, float, float]] = (0.26862954, 0.26130258, 0.27577711)
    cross_attention_before: tuple[int, ...]
    tile_side: int = 560
    hidden_size: int = 1280
    num_layers: int = 32
    num_global_layers: int = 8
    num_heads: int = 16
    intermediate_size: int = 5120
    patch_side: int = 14
    max_tiles: int = 4
    intermediate_layers: tuple[int, ...] = (3, 7, 15, 23, 30)  # their inputs (see `reference`) join the final output
    extra_embeddings: int = 8  # learnable input rows behind the vocabulary; row 0 stands at image positions
    image_token_id: int = 128_256  # `<|image|>` as the model is fed it: the first of the extra rows
    layer_norm_eps: float = 1e-5
    # Whose arithmetic the weights were made for. transformers differs from Meta's code in two places: since 4.57 at the
    # latest its towers take the outputs of the intermediate layers, not their inputs, and in all versions tokens before
    # the first picture read all pictures, padding tiles included (its issue 39379).
    reference: Literal["meta", "transformers"] = "meta"

    def __post_init__(self) -> None:
        _check(self)
        last = self.num_layers - (self.reference == "transformers")
        if any(not 0 <= layer <= last for layer in self.intermediate_layers):
            raise ValueError(f"intermediate layers {self.intermediate_layers} of a tower with {self.num_layers} layers")

    @property
    def patches(self) -> int:
        """Patches in one tile, without the class token."""
        return (self.tile_side // self.patch_side) ** 2

    @property
    def output_size(self) -> int:
        """Width of the tower's output: the final channels and those of the intermediate outputs."""
        return self.hidden_size * (1 + len(self.intermediate_layers))

    @property
    def aspect_ratios(self) -> tuple[tuple[int, int], ...]:
        """Grids of tiles (rows, columns) that a picture may have. The id of one is its place here, counted from 1."""
        sides = range(1, self.max_tiles + 1)
        return tuple((rows, columns) for rows in sides for columns in sides if rows * columns <= self.max_tiles)

    def tiles(self, grid: tuple[int, int]) -> int:
        """Tiles of a picture of rows x columns."""
        return grid[0] * grid[1]

    def cross_attention_layers(self) -> tuple[int, ...]:
        """Positions of the cross-attention layers in Hugging Face's numbering, which counts them among the layers."""
        return tuple(layer + i for i, layer in enumerate(self.cross_attention_before))


def _check(vision: Llama4Vision | Llama32Vision) -> None:
    for name in ("hidden_size", "num_layers", "num_heads", "intermediate_size", "tile_side", "patch_side", "max_tiles"):
        if getattr(vision, name) < 1:
            raise ValueError(f"the tower's {name} must be positive, not {getattr(vision, name)}")
    if vision.hidden_size % vision.num_heads:
        raise ValueError(f"the tower's width {vision.hidden_size} is not a multiple of its {vision.num_heads} heads")
    if vision.tile_side % vision.patch_side:
        raise ValueError(f"tiles of {vision.tile_side} pixels don't divide into patches of {vision.patch_side}")


LLAMA_4_VISION = Llama4Vision()
