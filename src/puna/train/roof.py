"""What a device's matrix product reaches alone, and how many operations a step of training needs."""

import time
from collections.abc import Sequence

import torch

from puna.family.arithmetic import count_parameters
from puna.train.method import Batch
from puna.train.session import Session

_SIZE = {"cpu": 1024, "cuda": 8192}  # of the square matrices: large enough to reach the roof, quick enough to ask


def matrix_roof(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of torch's product of two square matrices, at best."""
    size = _SIZE.get(device.type, 1024)
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(6):  # the first one warms up
        begun = time.perf_counter()
        (left @ right)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


def operations(session: Session, passes: Sequence[Batch]) -> float:
    """Of one step, what the mathematics needs (nothing computed twice): forward 2 per active weight and token, as many
    for the gradient of the states, as many for that of the weights that train; attention over what each token sees."""
    config = session.shape
    parameters = count_parameters(config)
    table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size  # looked up, not multiplied
    active = parameters.active_text - table
    trained = session.trained / parameters.text
    found = 0.0
    for batch in passes:
        found += (4 + 2 * min(1.0, trained)) * active * sum(batch.lengths)
        for layer in range(config.num_layers):
            chunk = config.chunk(layer)
            for length in batch.lengths:
                whole, rest = divmod(length, chunk) if chunk else (0, length)
                pairs = (whole * (chunk or 0) ** 2 + rest**2) / 2
                found += 12 * config.num_heads * config.head_dim * pairs
    return found
