"""A decoder's weights under their canonical names, however it holds them: `puna.model.packing.Packer` the other way."""

from collections.abc import Iterator, Sequence
from operator import itemgetter

import torch
from torch import Tensor, nn

from puna.model import Decoder
from puna.model.decoder import Block
from puna.model.feedforward import Experts, MixtureOfExperts
from puna.model.on_demand import OnDemandExperts
from puna.model.packed import PackedEmbedding, PackedExperts, PackedFeedForward, PackedLinear
from puna.model.quantized import Float8, Quantized, Weight, by_rows
from puna.model.unpacked import BlockwiseExperts, BlockwiseLinear
from puna.model.vision_packing import tower_modules

Named = Iterator[tuple[str, Weight | list[Weight]]]


def named_weights(decoder: Decoder) -> Named:
    """Every weight, one by one: floats as they are, few bits as `Quantized` or `Float8`, their experts as lists."""
    config = decoder.config
    keys = config.num_kv_heads * config.head_dim
    yield "embed_tokens.weight", weight_of(decoder.embed_tokens)
    for at, block in enumerate(decoder.layers):
        assert isinstance(block, Block)
        name = f"layers.{at}."
        yield f"{name}input_layernorm.weight", weight_of(block.input_layernorm)
        yield from _attention(block.self_attn, [config.num_heads * config.head_dim, keys, keys], f"{name}self_attn.")
        yield f"{name}post_attention_layernorm.weight", weight_of(block.post_attention_layernorm)
        mixture = block.feed_forward
        if not isinstance(mixture, MixtureOfExperts):
            yield from _feed_forward(mixture, f"{name}feed_forward.")
            continue
        yield f"{name}feed_forward.router.weight", weight_of(mixture.router)
        for part, weight in zip(("gate_up", "down"), _experts(mixture.experts), strict=True):
            yield f"{name}feed_forward.experts.{part}_proj", weight
        yield from _feed_forward(mixture.shared_expert, f"{name}feed_forward.shared_expert.")
    yield "norm.weight", weight_of(decoder.norm)
    if decoder.lm_head is not None:
        yield "lm_head.weight", weight_of(decoder.lm_head)
    for at, cross in enumerate(decoder.cross_layers or ()):
        yield from _cross(cross, f"cross_layers.{at}.")
    if decoder.vision is not None:
        for name, holder in tower_modules(decoder.vision):
            yield name, holder if isinstance(holder, Tensor) else weight_of(holder)


def _cross(block: nn.Module, name: str) -> Named:
    for part, weight in block.named_parameters():
        if weight.ndim == 1:  # norms and gates
            yield f"{name}{part}", weight.detach()
    for part in "qkvo":
        yield f"{name}cross_attn.{part}_proj.weight", weight_of(block.get_submodule(f"cross_attn.{part}_proj"))
    yield from _feed_forward(block.get_submodule("feed_forward"), f"{name}feed_forward.")


def weight_of(module: nn.Module) -> Weight:
    """A layer's or embedding's weight, however it is held."""
    if isinstance(module, PackedLinear | PackedEmbedding):
        return module.packed.unpack()
    if isinstance(module, BlockwiseLinear):
        return _blockwise(module)
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _blockwise(module: BlockwiseLinear) -> Weight:
    values = module.values
    if values.dtype == torch.float8_e4m3fn:
        return Float8(values, module.scales)
    if module.halved:  # the low half of a byte comes first
        values = torch.stack(((values << 4) >> 4, values >> 4), -1).flatten(1)[:, : module.inputs]
    return Quantized(module.bits, values, module.scales, module.group)


def _attention(attention: nn.Module, rows: Sequence[int], name: str) -> Named:
    fused = attention.qkv_proj
    if isinstance(fused, nn.Module):
        for part, weight in zip("qkv", _split(weight_of(fused), rows), strict=True):
            yield f"{name}{part}_proj.weight", weight
    for part in "o" if fused is not None else "qkvo":
        yield f"{name}{part}_proj.weight", weight_of(attention.get_submodule(f"{part}_proj"))


def _feed_forward(module: nn.Module, name: str) -> Named:
    if isinstance(module, PackedFeedForward):
        both = weight_of(module.gate_up_proj)
        for part, weight in zip(("gate", "up"), _split(both, [both.shape[0] // 2] * 2), strict=True):
            yield f"{name}{part}_proj.weight", weight
    else:
        for part in ("gate", "up"):
            yield f"{name}{part}_proj.weight", weight_of(module.get_submodule(f"{part}_proj"))
    yield f"{name}down_proj.weight", weight_of(module.get_submodule("down_proj"))


def _experts(module: nn.Module) -> tuple[Weight | list[Weight], Weight | list[Weight]]:
    """gate_up and down: floats as fused tensors [E, inputs, outputs], others as matrices [outputs, inputs]."""
    if isinstance(module, Experts):
        return module.gate_up_proj.detach(), module.down_proj.detach()
    if isinstance(module, BlockwiseExperts):
        return list(map(weight_of, module.gate_up)), list(map(weight_of, module.down))
    if isinstance(module, OnDemandExperts):
        parts = zip(*(_experts(module.make(expert)) for expert in range(module.count)), strict=True)
        gate_up, down = (_fused([one.T if isinstance(one, Tensor) else one for (one,) in ones]) for ones in parts)
        return gate_up, down
    assert isinstance(module, PackedExperts)
    pairs = [one for one in module.experts.children() if isinstance(one, PackedFeedForward)]
    return _fused([weight_of(one.gate_up_proj) for one in pairs]), _fused([weight_of(one.down_proj) for one in pairs])


def _fused(experts: list[Weight]) -> Weight | list[Weight]:
    floats = [one for one in experts if isinstance(one, Tensor)]
    return torch.stack([one.T for one in floats]) if len(floats) == len(experts) else experts


def _split(weight: Weight, rows: Sequence[int]) -> list[Weight]:
    if isinstance(weight, Tensor):
        return list(weight.split(list(rows)))
    assert isinstance(weight, Quantized | Float8)
    ends = [sum(rows[: i + 1]) for i in range(len(rows))]
    return [by_rows(weight, itemgetter(slice(end - count, end))) for end, count in zip(ends, rows, strict=True)]
