"""The architecture in PyTorch: one decoder for every text model of the family, used by training and inference alike."""

from puna.model.cache import Cache
from puna.model.decoder import Decoder

__all__ = ["Cache", "Decoder"]
