"""Requests to tokens: `load` a checkpoint, then `Model.generate` or `Model.stream` pieces of a `Reply`."""

from puna.engine.core import DeadlineError
from puna.engine.engine import QueueFullError
from puna.engine.generate import Stream
from puna.engine.loading import load
from puna.engine.model import Model
from puna.engine.reply import ContextLengthError, Inputs, Piece, Reply, TokenLogprob, Usage
from puna.engine.sampling import Options, Sampling
from puna.engine.sizes import CacheSize, cache_size
from puna.engine.stats import Stats

__all__ = [
    "CacheSize", "ContextLengthError", "DeadlineError", "Inputs", "Model", "Options", "Piece", "QueueFullError",
    "Reply", "Sampling", "Stats", "Stream", "TokenLogprob", "Usage", "cache_size", "load",
]
