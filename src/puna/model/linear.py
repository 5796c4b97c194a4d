"""Linear layers and embeddings that cost nothing to make on the meta device."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """x @ weight.T without a bias: no layer of the family has one."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """PyTorch's own first values; none on the meta device, where drawing them imports its compiler (1.4 s)."""
        if not self.weight.is_meta:
            super().reset_parameters()


class Embedding(nn.Embedding):
    """One row a token id."""

    def reset_parameters(self) -> None:
        """PyTorch's own first values; none on the meta device."""
        if not self.weight.is_meta:
            super().reset_parameters()

    @property
    def device(self) -> torch.device:
        """Where the table is."""
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The rows' dtype."""
        return self.weight.dtype

    def project(self, x: Tensor) -> Tensor:
        """Logits [..., V] of states [..., D], where the table is the output matrix too."""
        return F.linear(x, self.weight)
