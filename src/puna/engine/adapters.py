"""Serving an adapter: its updates stand beside the weights, which stay as they are packed, in their bits.

The factors go through the same kernels as the weights, so a row's bits don't depend on who else is asking.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from puna.checkpoint.hub import resolve
from puna.checkpoint.merged import MergedSource, open_merged
from puna.checkpoint.named import weight_of
from puna.checkpoint.peft import is_adapter
from puna.errors import PunaError
from puna.model import Decoder
from puna.model.attention import Attention
from puna.model.decoder import Block
from puna.model.feedforward import Experts, FeedForward, MixtureOfExperts
from puna.model.linear import Linear
from puna.model.lora import BesideLinear, PairedExperts, TiedHead, Update
from puna.model.on_demand import OnDemandExperts
from puna.model.packed import PackedExperts, PackedFeedForward, PackedLinear, packable
from puna.model.quantized import plain
from puna.model.unpacked import BlockwiseExperts

Part = tuple[Update | None, int]  # of rows that lie one below the other in a matrix: their update, and how many


def open_adapted(path: Path, adapter: str | Path | None) -> MergedSource | None:
    """An adapter with the base at `path`, None without one; `path` may be an adapter's that names its base.

    Raises PunaError for an adapter that isn't one of this base, for two of them, and over several processes.
    """
    if is_adapter(path):
        if adapter is not None:
            raise PunaError(f"{path} is an adapter itself; give its base as the model, and one adapter")
        merged = open_merged(path)
    elif adapter is None:
        return None
    else:
        merged = open_merged(resolve(str(adapter)), path)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise PunaError("an adapter isn't served over several processes yet; merge it with `puna export`")
    return merged


def put_beside(decoder: Decoder, updates: Mapping[str, Update]) -> None:
    """Give a decoder that is ready for use (`puna.checkpoint.ready`) an adapter's updates, in place.

    Updates are checked against the model before (`puna.checkpoint.merged.checked`). Raises PunaError where this model's
    layers can't take them.
    """
    Beside(decoder, updates).put()


def has_adapter(decoder: Decoder) -> bool:
    """Whether there are updates beside the weights."""
    return any(isinstance(module, BesideLinear) for module in decoder.modules())


class Beside:
    """One adapter and the decoder that gets it."""

    def __init__(self, decoder: Decoder, updates: Mapping[str, Update]) -> None:
        self.decoder, self.left = decoder, dict(updates)
        self.dtype, self.device = decoder.dtype, decoder.device

    def put(self) -> None:
        """Every update where it belongs."""
        config = self.decoder.config
        keys = config.num_kv_heads * config.head_dim
        rows = [config.num_heads * config.head_dim, keys, keys]
        for at, block in enumerate(self.decoder.layers):
            assert isinstance(block, Block)
            self._attention(block.self_attn, f"layers.{at}.self_attn.", rows)
            path, module = f"layers.{at}.feed_forward.", block.feed_forward
            if isinstance(module, MixtureOfExperts):
                self._single(module, "router", path)
                module.experts = self._experts(module.experts, f"{path}experts.")
                path, module = f"{path}shared_expert.", module.shared_expert
            self._feed_forward(module, path)
        if (update := self.left.pop("lm_head.weight", None)) is not None:
            head = self.decoder.lm_head
            base = TiedHead(self.decoder.embed_tokens) if head is None else head
            self.decoder.lm_head = self._beside(base, [(update, update.shape[0])])
        if self.left:
            raise PunaError(f"the adapter changes {min(self.left)}, which can't be served beside this model; merge it "
                            "with `puna export`")  # fmt: skip

    def _attention(self, attention: Attention, path: str, rows: Sequence[int]) -> None:
        if attention.qkv_proj is not None:
            self._fused(attention, "qkv_proj", [f"{path}{part}_proj" for part in "qkv"], rows)
        else:
            for part in "qkv":
                self._single(attention, f"{part}_proj", path)
        self._single(attention, "o_proj", path)

    def _feed_forward(self, module: nn.Module, path: str) -> None:
        if isinstance(module, PackedFeedForward):
            hidden = module.gate_up_proj.packed.outputs // 2
            self._fused(module, "gate_up_proj", [f"{path}gate_proj", f"{path}up_proj"], [hidden, hidden])
            self._single(module, "down_proj", path)
            return
        assert isinstance(module, FeedForward)
        for name in ("gate_proj", "up_proj", "down_proj"):
            self._single(module, name, path)

    def _single(self, owner: nn.Module, name: str, path: str) -> None:
        update = self.left.pop(f"{path}{name}.weight", None)
        if update is not None:
            setattr(owner, name, self._beside(owner.get_submodule(name), [(update, update.shape[0])]))

    def _fused(self, owner: nn.Module, name: str, parts: Sequence[str], rows: Sequence[int]) -> None:
        found = [self.left.pop(f"{part}.weight", None) for part in parts]
        if any(update is not None for update in found):
            base = owner.get_submodule(name)
            setattr(owner, name, self._beside(base, list(zip(found, rows, strict=True))))

    def _experts(self, module: nn.Module, path: str) -> nn.Module:
        gate_up, down = (self.left.pop(f"{path}{part}_proj", None) for part in ("gate_up", "down"))
        if gate_up is None and down is None:
            return module
        if isinstance(module, OnDemandExperts):
            make = module.make
            module.make = lambda expert: self._paired(make(expert), [_of(gate_up, expert)], [_of(down, expert)])
            return module
        count = self.decoder.config.num_experts
        return self._paired(module, *([_of(update, e) for e in range(count)] for update in (gate_up, down)))

    def _paired(self, module: nn.Module, gate_up: Sequence[Update | None], down: Sequence[Update | None]) -> nn.Module:
        firsts, seconds = _pairs(module)
        return PairedExperts(list(map(self._maybe, firsts, gate_up)), list(map(self._maybe, seconds, down)))

    def _maybe(self, base: nn.Module, update: Update | None) -> nn.Module:
        return base if update is None else self._beside(base, [(update, update.shape[0])])

    def _beside(self, base: nn.Module, parts: Sequence[Part]) -> BesideLinear:
        """The base with its parts' updates: A's one below the other, B's on the diagonal, scaled."""
        a = torch.cat([update.a.float() for update, _ in parts if update is not None])
        b = torch.zeros(sum(rows for _, rows in parts), a.shape[0])
        lengths = torch.ones(len(b)) if any(update and update.magnitude is not None for update, _ in parts) else None
        row = column = 0
        for update, rows in parts:
            if update is not None:
                rank = update.a.shape[0]
                b[row : row + rows, column : column + rank] = update.scale * update.b.float()
                column += rank
                if lengths is not None and update.magnitude is not None:
                    weight = plain(weight_of(base)).float()[row : row + rows].cpu()
                    lengths[row : row + rows] = update.magnitude / torch.linalg.norm(update.changed(weight), dim=1)
            row += rows
        if lengths is not None:
            lengths = lengths.to(self.device, self.dtype)
        return BesideLinear(base, self._layer(a), self._layer(b), lengths).requires_grad_(False).eval()

    def _layer(self, weight: Tensor) -> nn.Module:
        weight = weight.to(self.device, self.dtype)
        return PackedLinear(weight) if packable(weight, self.dtype) else _linear(weight)


def _of(update: Update | None, expert: int) -> Update | None:
    return None if update is None else Update(update.a[expert], update.b[expert], update.scale)


def _linear(weight: Tensor) -> Linear:
    with torch.device("meta"):
        module = Linear(weight.shape[1], weight.shape[0])
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def _pairs(module: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Each expert's two layers, however the module holds them."""
    if isinstance(module, PackedExperts):
        each = [one for one in module.experts if isinstance(one, PackedFeedForward)]
        return [one.gate_up_proj for one in each], [one.down_proj for one in each]
    if isinstance(module, Experts):
        weights = (module.get_parameter(f"{part}_proj").detach().unbind() for part in ("gate_up", "down"))
        first, second = ([_linear(weight.T) for weight in part] for part in weights)
        return list(first), list(second)
    assert isinstance(module, BlockwiseExperts | PairedExperts)
    return list(module.gate_up), list(module.down)
