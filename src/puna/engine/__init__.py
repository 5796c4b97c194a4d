"""Requests to tokens: `load` a checkpoint, then `Model.generate` or `Model.stream` pieces of a `Reply`."""

from puna.engine.generate import Stream
from puna.engine.model import Model, load
from puna.engine.reply import ContextLengthError, Inputs, Piece, Reply, TokenLogprob, Usage
from puna.engine.sampling import Options, Sampling

__all__ = [
    "ContextLengthError", "Inputs", "Model", "Options", "Piece", "Reply", "Sampling", "Stream", "TokenLogprob",
    "Usage", "load",
]
