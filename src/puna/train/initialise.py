"""Weights to begin pretraining with."""

import torch
from torch import nn


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Fill a decoder's weights in place, the same for the same seed.

    Embedding and router are small; matrices that write into the stream are zero, so that every block starts as the
    identity; other matrices are normal with standard deviation 1 / sqrt(inputs).
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        elif name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
            parameter.zero_()
        else:
            inputs = parameter.shape[-2] if name.endswith("experts.gate_up_proj") else parameter.shape[-1]
            small = name.startswith(("embed_tokens", "lm_head")) or ".router." in name
            values = torch.randn(parameter.shape, generator=generator) * (0.02 if small else inputs**-0.5)
            parameter.copy_(values)
