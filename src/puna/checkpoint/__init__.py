"""Files to weights and back: safetensors, Meta, GGUF, llama2.c, and the hub they come from."""

from puna.checkpoint.source import GenerationDefaults, Loaded, Source, load, load_source, open_source, save

__all__ = ["GenerationDefaults", "Loaded", "Source", "load", "load_source", "open_source", "save"]
