"""What is known about one member of the family, and how sure we are of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from puna.family.config import ModelConfig
from puna.family.vision import Llama4Vision, Llama32Vision

Status = Literal["verified", "secondary", "unverified"]
Kind = Literal["language model", "safety model", "prompt classifier"]


@dataclass(frozen=True)
class Encoder:
    """Shape of a DeBERTa-v2/v3 sequence classifier (Prompt Guard). Widths in elements, lengths in tokens."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    context_length: int
    position_buckets: int
    labels: tuple[str, ...]
    layer_norm_eps: float = 1e-7


@dataclass(frozen=True)
class Note:
    """A remark about one fact: `status` says whether it was read in a primary source, a secondary one, or neither."""

    about: str
    text: str
    status: Status


@dataclass(frozen=True, eq=False)
class Member:
    """One published (or announced) model. None means that the value is not published.

    `config` has the context length of the instruct model, or of the base model where there is no other. Values are
    verified in a primary source unless a note says otherwise.
    """

    name: str
    title: str
    generation: str
    kind: Kind
    licence: str | None  # a key of puna.family.licences.LICENCES
    released: str | None  # ISO date; None: not released
    languages: tuple[str, ...] | None
    inputs: tuple[str, ...] = ("text",)
    knowledge_cutoff: str | None = None  # year and month
    training_tokens: str | None = None
    base_context: int | None = None
    instruct_context: int | None = None
    config: ModelConfig | None = None
    vision: Llama4Vision | Llama32Vision | None = None
    encoder: Encoder | None = None
    hub_ids: Mapping[str, str] = field(default_factory=dict)  # variant -> id, likeliest first
    notes: tuple[Note, ...] = ()

    @property
    def context_length(self) -> int | None:
        """The longest published context of any variant, in tokens."""
        if self.encoder is not None:
            return self.encoder.context_length
        return max((n for n in (self.base_context, self.instruct_context) if n is not None), default=None)
