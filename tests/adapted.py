"""A decoder with adapters on it, as training leaves it: what the tests of adapters share."""

import torch

from puna.model import Decoder
from puna.model.adapt import Lora, attach
from tiny import decoder


def adapted(kind: str, lora: Lora) -> Decoder:
    """A decoder with updates that are not zero."""
    model = decoder(kind)
    attach(model, lora, seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("lora_B"):
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
            elif name.endswith("magnitude"):
                weight.mul_(1 + 0.1 * torch.randn(weight.shape, generator=generator))
    return model
