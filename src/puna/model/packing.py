"""Filling a decoder for use: each weight read once, brought to the wanted bits, and packed as our kernels read it.

What can't be packed (another device, float16, float64, no compiled kernels) stays as PyTorch computes it.
Legend: D model width, F feed-forward width.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from puna.errors import PunaError
from puna.model import pages
from puna.model.attention import Attention
from puna.model.cross_attention import CrossBlock
from puna.model.decoder import Block, Decoder
from puna.model.feedforward import Experts, FeedForward, MixtureOfExperts
from puna.model.linear import Embedding, Linear
from puna.model.on_demand import ExpertCache, OnDemand, OnDemandExperts, held_bytes
from puna.model.packed import PLACES, PackedEmbedding, PackedExperts, PackedFeedForward, PackedLinear, packable
from puna.model.quantized import Float8, Quantized, Weight, Words, plain, quantize, stacked
from puna.model.unpacked import BlockwiseExperts, BlockwiseLinear
from puna.model.vision_packing import TOWER_BITS, fill_tower

Read = Callable[[str], Weight | Sequence[Weight]]

HEAD_BITS = {4: 6, 8: 8}  # of embedding and output layer: errors there cost most (docs/lab.md)


class Packer:
    """Fills a decoder made on the meta device, part by part: memory peaks one part above the packed model.

    read: a weight by its canonical name; of experts the fused tensor, or one [outputs, inputs] matrix an expert.
    bits: None keeps each weight's own; 4 or 8 quantises the linear layers (the router, which decides, is left).
    dtype: of activations, and of the weights that stay floating.
    on_demand: routed experts that don't fit into the memory that it names are read when they are needed.
    """

    def __init__(
        self,
        decoder: Decoder,
        read: Read,
        bits: int | None,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        on_demand: OnDemand | None = None,
    ) -> None:
        self.decoder = decoder
        self.bits = bits
        self.dtype = dtype
        self.device = torch.device(device)
        self._read = read
        self._on_demand = on_demand

    def fill(self) -> None:
        """Everything, the embedding first and routed experts last.

        Raises PunaError where experts are to be read on demand and not one fits into memory.
        """
        decoder = self.decoder
        embedding = self._weight("embed_tokens.weight", self.bits and HEAD_BITS[self.bits])
        tied = decoder.lm_head is None
        if packable(embedding, self.dtype) and (tied or not isinstance(embedding, Tensor)):
            decoder.embed_tokens = PackedEmbedding(embedding, self.dtype)
        else:
            self._assign(decoder.embed_tokens, embedding)
        del embedding  # as stored it is the largest of all
        if not tied:
            decoder.lm_head = self._linear(self._weight("lm_head.weight", self.bits and HEAD_BITS[self.bits]))
        mixtures: dict[int, MixtureOfExperts] = {}
        for at, block in enumerate(decoder.layers):
            assert isinstance(block, Block)
            name = f"layers.{at}."
            for norm in ("input_layernorm", "post_attention_layernorm"):
                self._assign(getattr(block, norm), self._weight(f"{name}{norm}.weight", None))
            self._attention(block.self_attn, f"{name}self_attn.")
            if isinstance(block.feed_forward, MixtureOfExperts):
                mixtures[at] = block.feed_forward
                self._mixture(block.feed_forward, f"{name}feed_forward.")
            elif isinstance(block.feed_forward, FeedForward):
                block.feed_forward = self._feed_forward(block.feed_forward, f"{name}feed_forward.")
        self._assign(decoder.norm, self._weight("norm.weight", None))
        for at, cross in enumerate(decoder.cross_layers or ()):
            assert isinstance(cross, CrossBlock)
            self._cross(cross, f"cross_layers.{at}.")
        if decoder.vision is not None:
            fill_tower(decoder.vision, self._weight, self.dtype, self.bits and TOWER_BITS)
        self._routed(mixtures)

    def _cross(self, block: CrossBlock, name: str) -> None:
        for part in [part for part, weight in block.named_parameters() if weight.ndim == 1]:  # norms and gates
            owner, _, own = part.rpartition(".")
            weight = self._weight(f"{name}{part}", None)
            setattr(block.get_submodule(owner), own, _constant(plain(weight).to(self.dtype)))
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weight = self._weight(f"{name}cross_attn.{projection}.weight", self.bits)
            setattr(block.cross_attn, projection, self._linear(weight))
        assert isinstance(block.feed_forward, FeedForward)
        block.feed_forward = self._feed_forward(block.feed_forward, f"{name}feed_forward.")

    def _attention(self, attention: Attention, name: str) -> None:
        parts = [self._weight(f"{name}{part}_proj.weight", self.bits) for part in "qkv"]
        joined = _joined(parts, self.dtype)
        if joined is not None:
            attention.fuse(PackedLinear(joined), [part.shape[0] for part in parts])
        else:
            attention.q_proj, attention.k_proj, attention.v_proj = map(self._linear, parts)
        attention.o_proj = self._linear(self._weight(f"{name}o_proj.weight", self.bits))

    def _feed_forward(self, module: FeedForward, name: str) -> nn.Module:
        gate, up, down = (self._weight(f"{name}{part}_proj.weight", self.bits) for part in ("gate", "up", "down"))
        joined = _joined([gate, up], self.dtype)
        if joined is not None and packable(down, self.dtype):
            return PackedFeedForward(joined, down)
        module.gate_proj, module.up_proj, module.down_proj = map(self._linear, (gate, up, down))
        return module

    def _mixture(self, module: MixtureOfExperts, name: str) -> None:
        module.router = self._linear(self._weight(f"{name}router.weight", None))
        assert isinstance(module.shared_expert, FeedForward)
        module.shared_expert = self._feed_forward(module.shared_expert, f"{name}shared_expert.")

    def _routed(self, mixtures: dict[int, MixtureOfExperts]) -> None:
        cache = self._cache(mixtures)
        for layer, mixture in mixtures.items():
            name = _experts_of(layer)
            if cache is None:
                gate_up, down = (self._experts(f"{name}{part}_proj") for part in ("gate_up", "down"))
                with pages.side_by_side():
                    mixture.experts = self._together(gate_up, down)
            else:
                count = len(mixture.experts.get_parameter("down_proj"))
                mixture.experts = OnDemandExperts(cache, layer, count, partial(self.one, layer))

    def _cache(self, mixtures: dict[int, MixtureOfExperts]) -> ExpertCache | None:
        """Where the experts don't fit: what holds some of them."""
        if self._on_demand is None or not mixtures:
            return None
        room = self._on_demand.room()
        fused = [mixture.experts.get_parameter("gate_up_proj") for mixture in mixtures.values()]
        if sum(1.5 * part.numel() for part in fused) * self.dtype.itemsize <= room:
            return None
        ones = [held_bytes(self.one(layer, 0)) for layer in mixtures]
        if sum(one * len(part) for one, part in zip(ones, fused, strict=True)) <= room:
            return None
        if max(ones) > room:
            raise PunaError(
                f"too little memory: a single expert takes {max(ones):,} bytes, and beside the other weights there are "
                f"{max(0, room):,}; give the model more memory, or load it in fewer bits"
            )
        return ExpertCache(room)

    def one(self, layer: int, expert: int) -> nn.Module:
        """One expert of a layer, packed as it would be beside the others."""
        assert self._on_demand is not None
        read, name = self._on_demand.read, _experts_of(layer)
        gate_up, down = ([self._brought(read(f"{name}{part}_proj", expert), self.bits)] for part in ("gate_up", "down"))
        return self._together(gate_up, down)

    def _together(self, gate_up: list[Weight], down: list[Weight]) -> nn.Module:
        """Experts as one module."""
        if packable(gate_up[0], self.dtype):
            return PackedExperts(zip(gate_up, down, strict=True))
        if not isinstance(gate_up[0], Tensor):
            return BlockwiseExperts(gate_up, down)
        with torch.device("meta"):
            fused = Experts(1, 1, 1)
        fused.gate_up_proj, fused.down_proj = (
            _constant(torch.stack([plain(part).T for part in parts])) for parts in (gate_up, down)
        )
        return fused

    def _experts(self, name: str) -> list[Weight]:
        """One [outputs, inputs] matrix an expert."""
        stored = self._read(name)
        parts = stored.transpose(1, 2).unbind() if isinstance(stored, Tensor) else stored
        assert not isinstance(parts, Quantized | Float8), "experts come one by one or in one tensor"
        return [self._brought(part, self.bits) for part in parts]

    def _weight(self, name: str, bits: int | None) -> Weight:
        stored = self._read(name)
        assert isinstance(stored, Tensor | Quantized | Float8)
        return self._brought(stored, bits)

    def _brought(self, weight: Weight, bits: int | None) -> Weight:
        """To the wanted bits, dtype and device."""
        if bits is not None:
            weight = requantized(weight, bits)
        if isinstance(weight, Tensor):
            return weight.to(self.device, self.dtype)
        if isinstance(weight, Words) and self.device.type in PLACES:
            return weight
        values, scales = weight.values.to(self.device), weight.scales.to(self.device)
        if isinstance(weight, Float8):
            return Float8(values, scales)
        return Quantized(weight.bits, values, scales, weight.group)

    def _linear(self, weight: Weight) -> nn.Module:
        if packable(weight, self.dtype):
            return PackedLinear(weight)
        if not isinstance(weight, Tensor):
            return BlockwiseLinear(weight)
        with torch.device("meta"):
            module = Linear(weight.shape[1], weight.shape[0])
        self._assign(module, weight)
        return module

    def _assign(self, module: nn.Module, weight: Weight) -> None:
        module.weight = _constant(plain(weight).to(self.dtype))
        if isinstance(module, Embedding):
            module.num_embeddings, module.embedding_dim = weight.shape


def pack(decoder: Decoder, bits: int | None = None) -> None:
    """Pack a filled decoder in place: see `Packer`."""
    Packer(decoder, lambda name: decoder.get_parameter(name).detach(), bits, decoder.dtype, decoder.device).fill()


def requantized(weight: Weight, bits: int) -> Quantized:
    """In so many bits: integers that fit are kept as they are, anything else is quantised from its values."""
    if isinstance(weight, Quantized) and weight.bits == bits:
        return weight
    if isinstance(weight, Quantized) and weight.bits < bits:
        return Quantized(bits, weight.values, weight.scales, weight.group)
    return quantize(plain(weight), bits)


def _experts_of(layer: int) -> str:
    return f"layers.{layer}.feed_forward.experts."


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.contiguous(), requires_grad=False)


def _joined(parts: list[Weight], activations: torch.dtype) -> Weight | None:
    """Row by row in one matrix, where our kernels take it and nothing changes by it."""
    if not all(packable(part, activations) for part in parts) or len({type(part) for part in parts}) > 1:
        return None
    integers = [part for part in parts if isinstance(part, Quantized)]
    alike = len({(part.bits, part.group, part.scales.dtype) for part in integers}) <= 1
    return stacked(parts) if alike else None
