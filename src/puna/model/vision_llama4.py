"""Llama 4's eyes: a tower over single tiles, pixel shuffle, an adapter, and the projection to the text's width.

Sources: llama-models `llama4/vision/encoder.py`, `embedding.py`; transformers `modeling_llama4.py`.
Legend: T tiles, P patches of a tile, D tower width, R rows of features a tile, K head width.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna.family.vision import Llama4Vision
from puna.model.linear import Linear
from puna.model.native_vision import attend_all
from puna.model.pictures import PatchFeatures
from puna.model.rope import Positions, Rotary
from puna.model.vision_tower import Affine, LayerNorm, TowerLayer, gelu_of, patches_of

_ROTARY = Rotary(rotates=True, adjacent=True, norm_eps=None, scales=False)


class PatchEmbedding(nn.Module):
    """One linear map of each patch's pixels; patches don't overlap, so this is the reference's unfold and product."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.side = side
        self.linear = Linear(3 * side**2, width)

    def forward(self, pixels_T3SS: Tensor) -> Tensor:
        return self.linear(patches_of(pixels_T3SS, self.side))


class Layers(nn.Module):
    """The tower's layers, under the name that Hugging Face gives them."""

    def __init__(self, vision: Llama4Vision) -> None:
        super().__init__()
        one = partial(TowerLayer, vision.hidden_size, vision.num_heads, vision.intermediate_size,
                      vision.layer_norm_eps, bias=True)  # fmt: skip
        self.layers = nn.ModuleList(one() for _ in range(vision.num_layers))


class AdapterMLP(nn.Module):
    """gelu(fc2(gelu(fc1(x)))): the second activation is the reference's too."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.fc1: nn.Module = Affine(inputs, width, bias=False)
        self.fc2: nn.Module = Affine(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return gelu_of(self.fc2, gelu_of(self.fc1, x))


class Adapter(nn.Module):
    """Pixel shuffle and MLP."""

    def __init__(self, vision: Llama4Vision) -> None:
        super().__init__()
        self.shuffle = vision.pixel_shuffle
        self.mlp = AdapterMLP(vision.hidden_size * vision.pixel_shuffle**2, vision.adapter_size)

    def forward(self, x_TPD: Tensor) -> Tensor:
        return self.mlp(pixel_shuffle(x_TPD, self.shuffle))


class Projector(nn.Module):
    """To the text's width."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear_1: nn.Module = Affine(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_1(x)


class Llama4Sight(nn.Module):
    """Normalised tiles to features of the text's width. Tiles know nothing of each other."""

    def __init__(self, vision: Llama4Vision, text_width: int) -> None:
        super().__init__()
        self.config = vision
        width = vision.hidden_size
        self.patch_embedding = PatchEmbedding(vision.patch_side, width)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding_vlm = nn.Parameter(torch.zeros(vision.patches + 1, width))
        self.layernorm_pre = LayerNorm(width, vision.layer_norm_eps)
        self.model = Layers(vision)
        self.layernorm_post = LayerNorm(width, vision.layer_norm_eps)
        self.vision_adapter = Adapter(vision)
        self.multi_modal_projector = Projector(vision.adapter_size, text_width)
        self._turns: tuple[Tensor, Tensor] | None = None

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features [T, R, text width] of tiles [T, 3, side, side].

        Without gradients tiles go one by one: a tile's bits don't depend on its neighbours, and its activations stay in
        the processor's cache.
        """
        weight = self.class_embedding
        tiles = pixel_values.to(weight.device, weight.dtype)
        if torch.is_grad_enabled() or weight.device.type != "cpu":
            return self._features(tiles)
        return torch.cat([self._features(tile[None]) for tile in tiles])

    def look(self, pixel_values: Tensor, grids: Sequence[tuple[int, int]]) -> list[PatchFeatures]:
        """Each picture's features, its tiles' rows one after the other; see `pictures.PatchFeatures`."""
        counts = [self.config.tiles(grid) for grid in grids]
        return [PatchFeatures(rows.flatten(0, 1)) for rows in self(pixel_values).split(counts)]

    def _features(self, tiles_T3SS: Tensor) -> Tensor:
        x_TPD = self.patch_embedding(tiles_T3SS)
        x_TPD = torch.cat((x_TPD, self.class_embedding.expand(len(x_TPD), 1, -1)), 1)
        x_TPD = self.layernorm_pre(x_TPD + self.positional_embedding_vlm)
        attend = partial(_attend, Positions(self._angles(tiles_T3SS.device), None))
        for layer in self.model.layers:
            x_TPD = layer(x_TPD, attend)
        return self.multi_modal_projector(self.vision_adapter(self.layernorm_post(x_TPD)[:, :-1]))

    def _angles(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._turns is None or self._turns[0].device != device:
            angles = rotary_angles(self.config).to(device)
            self._turns = angles.cos(), angles.sin()
        return self._turns


def rotary_angles(vision: Llama4Vision) -> Tensor:
    """Rotations [P + 1, K/2] of a tile's positions, in radians: the first half of the pairs turns by column, the second
    by row, both counted from 1. The class token, which is last, is not turned."""
    side = vision.tile_side // vision.patch_side
    quarter = vision.hidden_size // vision.num_heads // 2
    frequencies = 1.0 / vision.rope_theta ** (torch.arange(0, quarter, 2).float() / quarter)
    places = torch.arange(side**2)
    angles = torch.cat([(places + 1)[:, None] * frequencies for places in (places % side, places // side)], -1)
    return F.pad(angles, (0, 0, 0, 1))


def pixel_shuffle(x_TPD: Tensor, ratio: int) -> Tensor:
    """Squares of ratio x ratio patches as one row each [T, P / ratio**2, D * ratio**2]: row by row, each square's
    patches row by row."""
    side = int(x_TPD.shape[1] ** 0.5)
    squares = x_TPD.unflatten(1, (side // ratio, ratio, side // ratio, ratio))  # [T, rows, y, columns, x, D]
    return squares.transpose(2, 3).flatten(3).flatten(1, 2)


def _attend(positions: Positions, q_TSHK: Tensor, k_TSHK: Tensor, v_TSHK: Tensor) -> Tensor:
    return attend_all(*_ROTARY(q_TSHK, k_TSHK, positions), v_TSHK)
