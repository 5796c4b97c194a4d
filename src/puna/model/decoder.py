"""The decoder: Llama 2, 3, 3.1, 3.2, 3.3 and Llama 4 from one definition; with a tower, where it can see.

Parameter names are Hugging Face's without their prefix, with `feed_forward` for the dense MLP of every generation.
Legend: B batch, S sequence, D model width, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from puna.family.config import ModelConfig
from puna.family.vision import Llama4Vision, Llama32Vision
from puna.model.attention import Attention
from puna.model.cache import Cache, LayerCache, ModelCache
from puna.model.cross_attention import CrossBlock, features_of
from puna.model.feedforward import FeedForward, MixtureOfExperts
from puna.model.layers import Layers
from puna.model.linear import Embedding, Linear
from puna.model.norm import RMSNorm
from puna.model.packed import PackedEmbedding
from puna.model.pictures import (
    CrossFeatures,
    PassPictures,
    PatchFeatures,
    PictureFeatures,
    PlacedCross,
    PlacedPatches,
    SequencePictures,
    check_pictures,
)
from puna.model.ranks import VocabularyPart
from puna.model.rope import Positions, inverse_frequencies
from puna.model.vision_llama4 import Llama4Sight
from puna.model.vision_llama32 import Llama32Sight


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
        self.embed_tokens: Embedding | PackedEmbedding = Embedding(config.input_vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head: nn.Module | None = (
            None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        )
        self.vision: Llama4Sight | Llama32Sight | None = None
        self.cross_layers: nn.ModuleList | None = None  # each stands before a layer of `cross_attention_before`
        if isinstance(config.vision, Llama4Vision):
            self.vision = Llama4Sight(config.vision, config.hidden_size)
        elif isinstance(config.vision, Llama32Vision):
            self.vision = Llama32Sight(config.vision, config.hidden_size)
            self.cross_layers = nn.ModuleList(CrossBlock(config) for _ in config.vision.cross_attention_before)
        self.vocabulary: VocabularyPart | None = None  # of a decoder that holds some rows of embedding and output
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
        """The output matrix [V, D], not packed, with its update; the embedding itself where tied."""
        weight = getattr(self.embed_tokens if self.lm_head is None else self.lm_head, "weight", None)
        assert isinstance(weight, Tensor), "training needs plain weights"
        return weight

    def head(self, x_BSD: Tensor) -> Tensor:
        """Logits [B, S, V] of final states."""
        return self.embed_tokens.project(x_BSD) if self.lm_head is None else self.lm_head(x_BSD)

    def expert_load(self) -> dict[int, list[int]]:
        """Of each layer with experts, by its number: how many tokens every expert has served so far."""
        mixtures = ((at, block.get_submodule("feed_forward")) for at, block in enumerate(self.layers))
        return {at: mixture.load_E.tolist() for at, mixture in mixtures if isinstance(mixture, MixtureOfExperts)}

    def read_as(self, config: ModelConfig) -> None:
        """Read on with another config's context: its positions, chunks and attention temperature. All else is as it
        was: `config` differs in nothing that weights depend on."""
        self.config, self._frequencies = config, None
        for at, block in enumerate(self.layers):
            attention = block.get_submodule("self_attn")
            assert isinstance(attention, Attention)
            attention.read_as(config, at)

    def new_cache(self) -> Cache:
        """An empty cache for one batch of equally long rows."""
        return Cache(self.config)

    def look(self, pixel_values: Tensor, grids: Sequence[tuple[int, int]]) -> list[PictureFeatures]:
        """What there is to know of each picture, whatever text it will stand in; see `puna.model.pictures`.

        pixel_values: normalised tiles [T, 3, side, side] of all pictures in order (Llama 4: each one's global tile
        last, where it has more than one). grids: (rows, columns) of each. Raises PunaError where these don't fit each
        other or the model, and where the model has no tower.
        """
        check_pictures(pixel_values, grids, self.config.vision)
        if not grids:
            return []
        if isinstance(self.vision, Llama4Sight):
            return list(self.vision.look(pixel_values, grids))
        assert isinstance(self.vision, Llama32Sight)
        assert self.cross_layers is not None
        states = self.vision(pixel_values, grids)
        return [features_of(one, grid, self.vision.config, self.cross_layers)
                for one, grid in zip(states, grids, strict=True)]  # fmt: skip

    def place(self, token_ids: Sequence[int], pictures: Sequence[PictureFeatures]) -> SequencePictures:
        """Tie a prompt to its pictures, in their order. Raises PunaError where it has places for more or fewer."""
        vision = self.config.vision
        if isinstance(vision, Llama4Vision):
            patches = [one for one in pictures if isinstance(one, PatchFeatures)]
            return PlacedPatches(token_ids, vision.image_token_id, patches)
        assert vision is not None, "look raises PunaError where there is no tower"
        cross = [one for one in pictures if isinstance(one, CrossFeatures)]
        return PlacedCross(token_ids, vision.image_token_id, cross, before=vision.reference == "transformers")

    def hidden(
        self,
        token_ids_BS: Tensor,
        cache: ModelCache | None = None,
        pictures: PassPictures | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Final normalised states [B, S, D], or [B, R, D] of positions `rows` [R] only; with a cache, the tokens
        continue what it holds."""
        wide, frequencies = torch.promote_types(self.dtype, torch.float32), self._frequencies
        if frequencies is None or (frequencies.device, frequencies.dtype) != (token_ids_BS.device, wide):
            self._frequencies = frequencies = inverse_frequencies(self.config, token_ids_BS.device, wide)
        length, device = token_ids_BS.shape[1], token_ids_BS.device
        positions_S = cache.positions(length, device) if cache else torch.arange(length, device=device)
        positions = Positions.of(positions_S, frequencies, self.config.attention_temperature)
        x_BSD = self.embed_tokens(token_ids_BS)
        if pictures is not None:
            x_BSD = pictures.put_into(x_BSD)
        if pictures is None or not pictures.seen or self.cross_layers is None:
            return self.norm(self._passes.forward(x_BSD, positions, cache, rows=rows))
        assert isinstance(self.config.vision, Llama32Vision)
        done = 0
        for i, (before, cross) in enumerate(zip(self.config.vision.cross_attention_before, self.cross_layers,
                                                strict=True)):  # fmt: skip
            x_BSD = cross(self._passes.forward(x_BSD, positions, cache, done, before), pictures.seen, i)
            done = before
        return self.norm(self._passes.forward(x_BSD, positions, cache, done, rows=rows))

    def forward(
        self,
        token_ids_BS: Tensor,
        cache: ModelCache | None = None,
        rows: Tensor | None = None,
        pictures: PassPictures | None = None,
    ) -> Tensor:
        """Logits [B, S, V] in the weights' dtype, or [B, R, V] of positions `rows` [R] only.

        pictures: what the tokens of this pass have to do with pictures; its positions count the rows of the batch one
        after the other.
        """
        return self.head(self.hidden(token_ids_BS, cache, pictures, rows))
