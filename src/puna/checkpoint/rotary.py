"""The two orders in which the rows of q and k are stored, for the architecture `llama`."""

from torch import Tensor


def to_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k from adjacent rotary pairs (Meta, llama2.c, GGUF) to halves (Hugging Face): [H*K, ...] -> same."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def to_adjacent(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `to_halves`."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)
