"""Llama 3.2 Vision's eyes: a tower over all tiles of a picture at once, with gated global layers, and the projection of
its last and intermediate states to the text's width.

The reference pads every picture to `max_tiles` tiles and every tile to a multiple of eight rows, and blocks only
padding from seeing padding: what is real sees the padding too, so it must be computed. Here real rows come first and
padding behind them, which makes two products without a mask of one with it.

Sources: llama-models `llama3/multimodal/model.py`, `encoder_utils.py`; transformers `modeling_mllama.py`.
Legend: T tiles of a picture, P patches of a tile, N all rows of a picture, D tower width.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna.family.vision import Llama32Vision
from puna.model.linear import Embedding
from puna.model.native_vision import attend_all
from puna.model.vision_tower import Affine, LayerNorm, TowerLayer, patches_of

_MULTIPLE = 8  # the reference pads a tile's rows to a multiple of it


class PatchConvolution(nn.Module):
    """A convolution whose windows don't overlap: one linear map of each patch's pixels. weight [D, 3, side, side]."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.side = side
        self.weight = nn.Parameter(torch.zeros(width, 3, side, side))

    def forward(self, pixels_T3SS: Tensor) -> Tensor:
        return F.linear(patches_of(pixels_T3SS, self.side), self.weight.flatten(1))


class TileEmbedding(nn.Module):
    """What tells a tile its place in the grid: a row of `max_tiles` vectors for each aspect ratio (0: none), gated."""

    def __init__(self, vision: Llama32Vision) -> None:
        super().__init__()
        self.embedding = Embedding(len(vision.aspect_ratios) + 1, vision.max_tiles * vision.hidden_size)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x_TPD: Tensor, ratio_id: int) -> Tensor:
        return x_TPD + self.embedding.weight[ratio_id].unflatten(0, (x_TPD.shape[0], 1, -1)) * self.gate.tanh()


class PositionEmbedding(nn.Module):
    """A vector for each patch of any tile, and one for each patch of each tile by aspect ratio; a gate shares between
    the two."""

    def __init__(self, vision: Llama32Vision) -> None:
        super().__init__()
        rows = vision.patches + 1
        self.gate = nn.Parameter(torch.zeros(1))
        self.embedding = nn.Parameter(torch.zeros(rows, vision.hidden_size))
        self.tile_embedding = Embedding(
            len(vision.aspect_ratios) + 1, vision.max_tiles * rows * vision.hidden_size
        )

    def forward(self, x_TPD: Tensor, ratio_id: int) -> Tensor:
        gate = self.gate.tanh()
        of_tiles = self.tile_embedding.weight[ratio_id].view_as(x_TPD)
        return x_TPD + (1 - gate) * self.embedding + gate * of_tiles


class Stack(nn.Module):
    """Layers under the name that Hugging Face gives them."""

    def __init__(self, vision: Llama32Vision, layers: int, gated: bool) -> None:
        super().__init__()
        one = partial(TowerLayer, vision.hidden_size, vision.num_heads, vision.intermediate_size,
                      vision.layer_norm_eps, bias=False, gated=gated)  # fmt: skip
        self.layers = nn.ModuleList(one() for _ in range(layers))


class Llama32Sight(nn.Module):
    """Normalised tiles to states of the text's width, picture by picture."""

    def __init__(self, vision: Llama32Vision, text_width: int) -> None:
        super().__init__()
        self.config = vision
        width = vision.hidden_size
        self.patch_embedding = PatchConvolution(vision.patch_side, width)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.gated_positional_embedding = PositionEmbedding(vision)
        self.pre_tile_positional_embedding = TileEmbedding(vision)
        self.post_tile_positional_embedding = TileEmbedding(vision)
        self.layernorm_pre = LayerNorm(width, vision.layer_norm_eps)
        self.layernorm_post = LayerNorm(width, vision.layer_norm_eps)
        self.transformer = Stack(vision, vision.num_layers, gated=False)
        self.global_transformer = Stack(vision, vision.num_global_layers, gated=True)
        self.multi_modal_projector: nn.Module = Affine(vision.output_size, text_width)

    def forward(self, pixel_values: Tensor, grids: Sequence[tuple[int, int]]) -> list[Tensor]:
        """States [max_tiles * (P + 1), text width] of each picture, the real tiles' first, of tiles [T, 3, side, side]
        of all pictures in order."""
        weight = self.class_embedding
        tiles = pixel_values.to(weight.device, weight.dtype)
        pictures = tiles.split([self.config.tiles(grid) for grid in grids])
        return [self._states(picture, grid) for picture, grid in zip(pictures, grids, strict=True)]

    def _states(self, tiles_T3SS: Tensor, grid: tuple[int, int]) -> Tensor:
        vision = self.config
        ratio_id = vision.aspect_ratios.index(tuple(grid)) + 1
        x_TPD = self.patch_embedding(tiles_T3SS)
        x_TPD = F.pad(x_TPD, (0, 0, 0, 0, 0, vision.max_tiles - len(x_TPD)))  # an empty tile: black, without a bias
        x_TPD = self.pre_tile_positional_embedding(x_TPD, ratio_id)
        x_TPD = torch.cat((self.class_embedding.expand(len(x_TPD), 1, -1), x_TPD), 1)
        x_TPD = self.layernorm_pre(self.gated_positional_embedding(x_TPD, ratio_id))
        rows = x_TPD.shape[1]
        tiles, spare = len(x_TPD), -rows % _MULTIPLE
        attend = partial(_attend, len(tiles_T3SS) * rows)
        x_1ND = F.pad(x_TPD.flatten(0, 1)[None], (0, 0, 0, tiles * spare))
        kept = []
        for i, layer in enumerate(self.transformer.layers):
            if i in self._inputs_kept:
                kept.append(x_1ND)
            x_1ND = layer(x_1ND, attend)
        if vision.num_layers in self._inputs_kept:
            kept.append(x_1ND)
        x_1ND = self.layernorm_post(x_1ND)
        patches, padding = x_1ND[0].split([tiles * rows, tiles * spare])
        parts = [part.unflatten(0, (tiles, -1)) for part in (patches, padding) if len(part)]
        parts = [self.post_tile_positional_embedding(part, ratio_id).flatten(0, 1) for part in parts]
        x_1ND = torch.cat(parts)[None]
        for layer in self.global_transformer.layers:
            x_1ND = layer(x_1ND, attend)
        return self.multi_modal_projector(_beside(*(state[0, : tiles * rows] for state in (x_1ND, *kept))))

    @property
    def _inputs_kept(self) -> tuple[int, ...]:
        """Layers whose inputs join the output; their number itself stands for what the last one gives."""
        later = self.config.reference == "transformers"
        return tuple(layer + later for layer in self.config.intermediate_layers)


def _beside(last_ND: Tensor, *inner: Tensor) -> Tensor:
    """The last states, then channel by channel the values that each had in the `inner` ones; with one copy of each,
    since these are the largest tensors of all."""
    width = last_ND.shape[1]
    joined = last_ND.new_empty(len(last_ND), width * (1 + len(inner)))
    joined[:, :width] = last_ND
    for i, state_ND in enumerate(inner):
        joined[:, width + i :: len(inner)] = state_ND
    return joined


def _attend(real: int, q_1NHK: Tensor, k_1NHK: Tensor, v_1NHK: Tensor) -> Tensor:
    """The first `real` rows see all rows; the padding behind them sees only those."""
    out = attend_all(q_1NHK[:, :real], k_1NHK, v_1NHK)
    if real == q_1NHK.shape[1]:
        return out
    return torch.cat((out, attend_all(q_1NHK[:, real:], k_1NHK[:, :real], v_1NHK[:, :real])), 1)
