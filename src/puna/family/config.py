"""The shape of one decoder: everything the architecture needs to know, and nothing about files."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from puna.family.vision import Llama4Vision, Llama32Vision

Architecture = Literal["llama", "llama4"]


@dataclass(frozen=True)
class RopeScaling:
    """Frequency-dependent position scaling of Llama 3.1 and later ("llama3" in Hugging Face configs).

    Wavelengths below `original_context / high_freq_factor` stay, those above `original_context / low_freq_factor` are
    divided by `factor`, those between are blended. Source: llama-models `llama3/model.py`, `apply_scaling`.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class AttentionTemperature:
    """Llama 4's query scale on NoPE layers: `1 + scale * ln(1 + floor((position + 1) / floor))`.

    Source: llama-models `llama4/model.py`; Hugging Face `attn_scale`, `floor_scale`.
    """

    scale: float = 0.1
    floor: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape. `architecture` "llama" covers Llama 2, 3, 3.1, 3.2, 3.3; "llama4" Scout, Maverick, Guard 4.

    Layer indices are 0-based. Widths are in elements, lengths in tokens.
    """

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int  # width of the dense feed-forward layers
    context_length: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    # mixture of experts (Llama 4)
    num_experts: int = 0
    num_experts_per_token: int = 1
    expert_intermediate_size: int = 0  # width of each routed expert and of the shared expert
    moe_layers: tuple[int, ...] = ()
    # attention pattern (Llama 4)
    nope_layers: tuple[int, ...] = ()  # no rotary positions, full causal attention
    attention_chunk_size: int | None = None  # RoPE layers see only their own aligned chunk
    attention_temperature: AttentionTemperature | None = None
    qk_norm: bool = False  # weightless RMS norm of queries and keys on RoPE layers
    # tokens
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    # pictures; None for text alone
    vision: Llama4Vision | Llama32Vision | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
                     "context_length"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, not {self.head_dim}")
        for name in ("moe_layers", "nope_layers"):
            bad = [i for i in getattr(self, name) if not 0 <= i < self.num_layers]
            if bad:
                raise ValueError(f"{name} names layers {bad} of a model with {self.num_layers} layers")
        if self.moe_layers and (self.num_experts < 1 or self.expert_intermediate_size < 1):
            raise ValueError("moe_layers needs num_experts and expert_intermediate_size")
        if self.tie_word_embeddings and isinstance(self.vision, Llama32Vision):
            raise ValueError("Llama 3.2 Vision reads more tokens than it writes: its embeddings can't be tied")
        if not 1 <= self.num_experts_per_token <= max(1, self.num_experts):
            raise ValueError(f"num_experts_per_token {self.num_experts_per_token} of {self.num_experts} experts")
        if self.attention_chunk_size is not None and self.attention_chunk_size < 1:
            raise ValueError(f"attention_chunk_size must be positive, not {self.attention_chunk_size}")

    def is_moe(self, layer: int) -> bool:
        """Whether this layer's feed-forward is a mixture of experts."""
        return layer in self.moe_layers

    def uses_rope(self, layer: int) -> bool:
        """Whether this layer rotates queries and keys."""
        return layer not in self.nope_layers

    def chunk(self, layer: int) -> int | None:
        """The chunk that bounds this layer's attention, or None where it sees all earlier tokens."""
        return self.attention_chunk_size if self.uses_rope(layer) else None

    @property
    def input_vocab_size(self) -> int:
        """Rows of the embedding: Llama 3.2 Vision reads a few token ids beyond those that it can write."""
        extra = self.vision.extra_embeddings if isinstance(self.vision, Llama32Vision) else 0
        return self.vocab_size + extra

    @property
    def rope_pairs(self) -> Literal["halves", "adjacent"]:
        """How rotary pairs lie in a head, as stored on the Hugging Face hub: (j, j + K/2) or (2j, 2j + 1)."""
        return "adjacent" if self.architecture == "llama4" else "halves"

    def with_(self, **changes: Any) -> "ModelConfig":
        """A copy with some fields changed."""
        return replace(self, **changes)
