"""Parts of both vision towers: affine layers, layer norms, transformer layers without a mask.

Parameter names are Hugging Face's. Legend: T tiles or pictures, S positions, D tower width, H heads, K head width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna.model.native_vision import bias_add, bias_gelu, layer_norm
from puna.model.packed import PackedLinear
from puna.model.unpacked import BlockwiseLinear

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries, keys, values, each [T, S, H, K] -> [T, S, H, K]


class Affine(nn.Linear):
    """x @ weight.T + bias."""

    def reset_parameters(self) -> None:
        """PyTorch's own first values; none on the meta device."""
        if not self.weight.is_meta:
            super().reset_parameters()


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps), with a learned weight and bias [D]."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class PackedAffine(nn.Module):
    """x @ weight.T + bias of a weight that is packed for our kernels, or in few bits where they aren't."""

    def __init__(self, linear: PackedLinear | BlockwiseLinear, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.linear = linear
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        return out if self.bias is None else out.add_(self.bias)


def gelu_of(affine: nn.Module, x: Tensor) -> Tensor:
    """gelu(affine(x))."""
    if isinstance(affine, PackedAffine) and affine.bias is not None:
        return bias_gelu(affine.linear(x), affine.bias)
    return F.gelu(affine(x))


def added_to(stream: Tensor, affine: nn.Module, x: Tensor) -> Tensor:
    """stream + affine(x)."""
    if isinstance(affine, PackedAffine) and affine.bias is not None:
        return bias_add(affine.linear(x), affine.bias, stream)
    return stream + affine(x)


class TowerAttention(nn.Module):
    """Multi-head attention of a tile's or picture's own patches; the caller says who sees whom."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.q_proj: nn.Module = Affine(width, width, bias)
        self.k_proj: nn.Module = Affine(width, width, bias)
        self.v_proj: nn.Module = Affine(width, width, bias)
        self.o_proj: nn.Module = Affine(width, width, bias)

    def forward(self, x_TSD: Tensor, attend: Attend) -> Tensor:
        """What there is for `o_proj`, which the layer applies."""
        q, k, v = (
            project(x_TSD).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return attend(q, k, v).flatten(2)


class TowerMLP(nn.Module):
    """fc2(gelu(fc1(x))), the exact GELU; the layer applies fc2."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1: nn.Module = Affine(width, hidden)
        self.fc2: nn.Module = Affine(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return gelu_of(self.fc1, x)


class TowerLayer(nn.Module):
    """Attention, then MLP, each normalised before and added to the stream; gated layers (the global ones of Llama 3.2)
    scale what is added by tanh of a learned number."""

    def __init__(self, width: int, heads: int, hidden: int, eps: float, *, bias: bool, gated: bool = False) -> None:
        super().__init__()
        self.input_layernorm = LayerNorm(width, eps)
        self.self_attn = TowerAttention(width, heads, bias)
        self.post_attention_layernorm = LayerNorm(width, eps)
        self.mlp = TowerMLP(width, hidden)
        self.gated = gated
        if gated:
            self.gate_attn = nn.Parameter(torch.full((1,), 0.1))
            self.gate_ffn = nn.Parameter(torch.full((1,), 0.1))

    def forward(self, x_TSD: Tensor, attend: Attend) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x_TSD), attend)
        if self.gated:
            x_TSD = x_TSD + self.gate_attn.tanh() * self.self_attn.o_proj(attended)
            inner = self.mlp(self.post_attention_layernorm(x_TSD))
            return x_TSD + self.gate_ffn.tanh() * self.mlp.fc2(inner)
        x_TSD = added_to(x_TSD, self.self_attn.o_proj, attended)
        return added_to(x_TSD, self.mlp.fc2, self.mlp(self.post_attention_layernorm(x_TSD)))


def patches_of(pixels_T3SS: Tensor, side: int) -> Tensor:
    """A tile's patches row by row, each channel by channel [T, P, 3 * side**2], as `nn.Unfold` orders them."""
    rows = pixels_T3SS.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # [T, 3, rows, side, columns, side]
    return rows.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
