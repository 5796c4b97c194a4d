"""The decoder: Llama 2, 3, 3.1, 3.2, 3.3 and Llama 4 (text) from one definition.

Parameter names are Hugging Face's without their prefix, with `feed_forward` for the dense MLP of every generation.
Legend: B batch, S sequence, D model width, V vocabulary.
"""

import torch
from torch import Tensor, nn

from puna.family.config import ModelConfig
from puna.model.attention import Attention
from puna.model.cache import Cache, LayerCache, ModelCache
from puna.model.feedforward import FeedForward, MixtureOfExperts
from puna.model.layers import Layers
from puna.model.linear import Embedding, Linear
from puna.model.norm import RMSNorm
from puna.model.packed import PackedEmbedding
from puna.model.rope import Positions, inverse_frequencies


class Block(nn.Module):
    """Attention, then feed-forward, each normalised before and added to the stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward: nn.Module = (
            MixtureOfExperts(config)
            if config.is_moe(layer)
            else FeedForward(config.hidden_size, config.intermediate_size)
        )

    def forward(self, x_BSD: Tensor, positions: Positions, cache: LayerCache | None) -> Tensor:
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), positions, cache)
        return x_BSD + self.feed_forward(self.post_attention_layernorm(x_BSD))


class Decoder(nn.Module):
    """Token ids to logits. Works on the meta device (nothing is allocated) and in any floating dtype."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens: Embedding | PackedEmbedding = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head: nn.Module | None = (
            None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        )
        self._passes = Layers(self.layers)
        self._frequencies: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed_tokens.device

    @property
    def dtype(self) -> torch.dtype:
        """The embedding's dtype, which is the stream's."""
        return self.embed_tokens.dtype

    @property
    def head_weight(self) -> Tensor:
        """The output matrix [V, D], not packed: the embedding itself where tied."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        assert isinstance(head, Embedding | Linear), "training needs plain weights"
        return head.weight

    def head(self, x_BSD: Tensor) -> Tensor:
        """Logits [B, S, V] of final states."""
        return self.embed_tokens.project(x_BSD) if self.lm_head is None else self.lm_head(x_BSD)

    def expert_load(self) -> dict[int, list[int]]:
        """Of each layer with experts, by its number: how many tokens every expert has served so far."""
        mixtures = ((at, block.get_submodule("feed_forward")) for at, block in enumerate(self.layers))
        return {at: mixture.load_E.tolist() for at, mixture in mixtures if isinstance(mixture, MixtureOfExperts)}

    def new_cache(self) -> Cache:
        """An empty cache for one batch of equally long rows."""
        return Cache(self.config)

    def hidden(self, token_ids_BS: Tensor, cache: ModelCache | None = None) -> Tensor:
        """Final normalised states [B, S, D]; with a cache, the tokens continue what it holds."""
        wide, frequencies = torch.promote_types(self.dtype, torch.float32), self._frequencies
        if frequencies is None or (frequencies.device, frequencies.dtype) != (token_ids_BS.device, wide):
            self._frequencies = frequencies = inverse_frequencies(self.config, token_ids_BS.device, wide)
        length, device = token_ids_BS.shape[1], token_ids_BS.device
        positions_S = cache.positions(length, device) if cache else torch.arange(length, device=device)
        positions = Positions.of(positions_S, frequencies, self.config.attention_temperature)
        x_BSD = self.embed_tokens(token_ids_BS)
        return self.norm(self._passes.forward(x_BSD, positions, cache))

    def forward(
        self,
        token_ids_BS: Tensor,
        cache: ModelCache | None = None,
        last_only: bool = False,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, S, V] in the weights' dtype; of the last position [B, 1, V], or of positions `rows` [B, R, V]."""
        x_BSD = self.hidden(token_ids_BS, cache)
        if rows is not None:
            x_BSD = x_BSD[:, rows]
        return self.head(x_BSD[:, -1:] if last_only else x_BSD)
