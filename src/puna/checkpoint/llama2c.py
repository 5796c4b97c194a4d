"""Checkpoints of karpathy/llama2.c, the `.bin` of its first version ("v0"): seven int32, then float32 throughout.

Layout: `export.py` `legacy_export` and `run.c` `memory_map_weights`: embedding, each kind of weight for all layers, the
final norm, two rotary tables that nobody reads, and the classifier unless it is shared. Rotary pairs are adjacent.
"""

import math
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from puna.checkpoint.rotary import to_halves
from puna.checkpoint.source import GenerationDefaults
from puna.errors import PunaError
from puna.family.config import ModelConfig
from puna.text.tokenizer import Tokenizer

_HEADER = struct.Struct("<7i")
_VERSIONED = 0x616B3432  # "ak42" opens versions 1 and 2


class Llama2cSource:
    """One `.bin` file (see `Source`). Raises PunaError if header and length do not belong together."""

    format = "llama2.c"
    notes: tuple[str, ...] = ()
    packed_notes: tuple[str, ...] = ()

    def __init__(self, path: Path) -> None:
        self.path = path
        size = path.stat().st_size
        with path.open("rb") as file:
            raw = file.read(_HEADER.size)
        if len(raw) < _HEADER.size:
            raise PunaError(f"{path} is truncated: {size} bytes are too few for a llama2.c checkpoint. Fetch it again.")
        if struct.unpack("<I", raw[:4])[0] == _VERSIONED:
            raise PunaError(
                f"{path} is a llama2.c checkpoint of version 1 or 2; only version 0 is read. Export it anew."
            )
        dim, hidden, layers, heads, kv_heads, vocabulary, context = _HEADER.unpack(raw)
        if min(dim, hidden, layers, heads, kv_heads, context, abs(vocabulary)) < 1 or dim % heads or layers > size:
            raise PunaError(f"{path} is no llama2.c checkpoint: its header reads {_HEADER.unpack(raw)}.")
        try:
            self.config = ModelConfig(
                architecture="llama",
                vocab_size=abs(vocabulary),
                hidden_size=dim,
                num_layers=layers,
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=dim // heads,
                intermediate_size=hidden,
                context_length=context,
                rms_norm_eps=1e-5,
                rope_theta=10_000.0,
                tie_word_embeddings=vocabulary > 0,  # a negative size marks a classifier of its own
                bos_token_id=1,
                eos_token_ids=(2,),
            )
        except ValueError as error:
            raise PunaError(f"{path} is no llama2.c checkpoint: {error}.") from None
        self.generation = GenerationDefaults(eos_token_ids=self.config.eos_token_ids)
        self._places = self._lay_out(size)

    def _lay_out(self, size: int) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Decoder's name -> first byte and shape."""
        c = self.config
        width, kv_width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        places: dict[str, tuple[int, tuple[int, ...]]] = {}
        at = _HEADER.size

        def take(name: str, *shape: int) -> None:
            nonlocal at
            places[name] = (at, shape)
            at += 4 * math.prod(shape)

        def take_layers(name: str, *shape: int) -> None:
            for layer in range(c.num_layers):
                take(f"layers.{layer}.{name}.weight", *shape)

        take("embed_tokens.weight", c.vocab_size, c.hidden_size)
        take_layers("input_layernorm", c.hidden_size)
        take_layers("self_attn.q_proj", width, c.hidden_size)
        take_layers("self_attn.k_proj", kv_width, c.hidden_size)
        take_layers("self_attn.v_proj", kv_width, c.hidden_size)
        take_layers("self_attn.o_proj", c.hidden_size, width)
        take_layers("post_attention_layernorm", c.hidden_size)
        take_layers("feed_forward.gate_proj", c.intermediate_size, c.hidden_size)
        take_layers("feed_forward.down_proj", c.hidden_size, c.intermediate_size)
        take_layers("feed_forward.up_proj", c.intermediate_size, c.hidden_size)
        take("norm.weight", c.hidden_size)
        at += 4 * c.context_length * c.head_dim  # cosines and sines
        if not c.tie_word_embeddings:
            take("lm_head.weight", c.vocab_size, c.hidden_size)
        if size != at:
            state = "truncated" if size < at else "no llama2.c checkpoint, or has data after its end"
            raise PunaError(f"{self.path} is {state}: its header asks for {at} bytes, it has {size}. Fetch it again.")
        return places

    def tokenizer(self) -> Tokenizer | None:
        """A tokenizer lying beside the file, if it has just this vocabulary; the file itself holds none."""
        from puna.text import load_tokenizer

        found = load_tokenizer(self.path.parent)
        return found if found is not None and found.vocab_size == self.config.vocab_size else None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Source.shapes`."""
        return {name: shape for name, (_, shape) in self._places.items()}

    def where(self, name: str) -> str:
        """See `Source.where`."""
        return f"{self.path}, tensor {name} at byte {self._places[name][0]}"

    def read(self, name: str) -> Tensor:
        """See `Source.read`."""
        start, shape = self._places[name]
        weight = torch.empty(shape)
        if not weight.is_meta:
            values = np.fromfile(self.path, np.dtype("<f4"), math.prod(shape), offset=start)
            weight = torch.from_numpy(values.astype(np.float32, copy=False)).view(shape)
        if name.endswith("q_proj.weight"):
            return to_halves(weight, self.config.num_heads)
        return to_halves(weight, self.config.num_kv_heads) if name.endswith("k_proj.weight") else weight

    def read_packed(self, name: str) -> Tensor:
        """See `Source.read_packed`; the format has no few bits."""
        return self.read(name)

    def read_expert(self, name: str, expert: int, packed: bool) -> Tensor:  # noqa: ARG002
        """See `Source.read_expert`; this format holds dense models only."""
        raise KeyError(name)
