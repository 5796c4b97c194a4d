"""The decoder's layers, one after the other; runs of packed ones by one call of the compiled kernels (native/layers.c).

The steps of such a call, their order and their roundings are those of `Block.forward`, so the bits are the same; what
it saves is the time between the products, a sixth of a decoded token's for a model of a billion parameters.
Legend: S tokens of a pass, D model width.
"""

import ctypes
from dataclasses import dataclass
from itertools import pairwise
from operator import is_

import torch
from torch import Tensor, nn

from puna.model import native
from puna.model.attention import Attention
from puna.model.cache import ModelCache
from puna.model.elementwise import fast
from puna.model.feedforward import MixtureOfExperts
from puna.model.mixture import MixtureCall, hooked
from puna.model.native import Kernels
from puna.model.native_attention import KINDS, WIDEST
from puna.model.packed import PackedFeedForward, PackedLinear
from puna.model.paged import Batch
from puna.model.rope import Positions

_pointer, _long, _int, _float = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
LINE = 64  # bytes: where each buffer begins


class _Layer(ctypes.Structure):
    """`Layer` of native/layers.c."""

    _fields_ = (
        ("qkv", _pointer), ("out", _pointer), ("gate_up", _pointer), ("down", _pointer),
        ("before", _pointer), ("after", _pointer), ("pool", _pointer), ("attention", _pointer),
        ("hidden", _long), ("rotates", _int), ("scales", _int), ("adjacent", _int), ("norm_eps", _float),
        ("eps", _float), ("mixture", _pointer),
    )  # fmt: skip


class _Pass(ctypes.Structure):
    """`Pass` of native/layers.c."""

    _fields_ = (
        ("layers", _pointer), ("count", _long), ("rows", _long), ("width", _long), ("x", _pointer),
        ("normed", _pointer), ("qkv", _pointer), ("heads", _pointer), ("gate_up", _pointer), ("inner", _pointer),
        ("added", _pointer), ("scratch", _pointer),
        ("cosines", _pointer), ("sines", _pointer), ("scale", _pointer), ("wanted", _pointer), ("kept", _long),
        ("bf16", _int), ("threads", _int), ("failed", _int),
    )  # fmt: skip


@dataclass(frozen=True)
class Dense:
    """A layer that the kernels can compute whole.

    call: what they have to know, but for what is the pass's own. row_bytes: what they write on their way for each row,
    in `_Pass`'s order.
    """

    call: _Layer
    heads: int
    row_bytes: tuple[int, ...]
    mixture: MixtureCall | None  # lies at an address in `call`

    @staticmethod
    def of(block: nn.Module, dtype: torch.dtype) -> "Dense | None":
        """The layer's parts, where each is of the very kind that the kernels stand for."""
        attention, feed_forward = block.get_submodule("self_attn"), block.get_submodule("feed_forward")
        if type(attention) is not Attention or any(map(hooked, (block, attention, feed_forward))):
            return None
        products, mixture = [attention.qkv_proj, attention.o_proj], None
        if type(feed_forward) is PackedFeedForward:
            products += feed_forward.gate_up_proj, feed_forward.down_proj
        elif type(feed_forward) is not MixtureOfExperts or (mixture := feed_forward.call(dtype)) is None:
            return None
        panels = [each.packed for each in products if type(each) is PackedLinear and not hooked(each)]
        norms = [block.get_submodule(name) for name in ("input_layernorm", "post_attention_layernorm")]
        weights = [norm.get_parameter("weight") for norm in norms]
        if len(panels) < len(products) or attention.head_dim > WIDEST or any(w.dtype != dtype for w in weights):
            return None
        qkv, out, rotary = panels[0], panels[1], attention.rotary
        between = (0, 0) if mixture else (panels[2].outputs, panels[3].width)
        widths = qkv.width, qkv.outputs, out.width, *between, qkv.width
        row_bytes = *(width * dtype.itemsize for width in widths), max(each.scratch_bytes(1) for each in panels)
        addresses = [each.address(dtype == torch.bfloat16) for each in panels] + ([None, None] if mixture else [])
        call = _Layer(
            *addresses, *(weight.data_ptr() for weight in weights), None, None, between[1],
            rotary.rotates, rotary.scales, rotary.adjacent, -1 if rotary.norm_eps is None else rotary.norm_eps,
            norms[0].eps, None if mixture is None else ctypes.addressof(mixture),
        )  # fmt: skip
        return Dense(call, out.width // attention.head_dim, row_bytes, mixture)


class Layers:
    """Passes through a decoder's blocks."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        self._blocks = blocks
        self._seen: list[object] = []
        self._dense: list[Dense | None] = []

    def forward(
        self,
        x_BSD: Tensor,
        positions: Positions,
        cache: ModelCache | None,
        start: int = 0,
        stop: int | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """The stream after blocks start..stop-1 [B, S, D], by default after all; or its `rows` [B, R, D] only.

        Of other rows the kernels compute no more of the last block than its keys and values.
        """
        blocks = list(self._blocks)[start:stop]
        kernels = fast(x_BSD) if isinstance(cache, Batch) and cache.pool.stored in KINDS else None
        if kernels is None or not isinstance(cache, Batch):
            for at, block in enumerate(blocks, start):
                x_BSD = block(x_BSD, positions, cache.layers[at] if cache else None)
            return x_BSD if rows is None else x_BSD[:, rows]
        x_BSD = x_BSD.contiguous()
        run: list[Dense] = []
        for at, (block, dense) in enumerate(zip(blocks, self._look(x_BSD.dtype)[start:stop], strict=True), start):
            if dense is not None:
                run.append(dense)
                continue
            _call(kernels, x_BSD, run, at - len(run), positions, cache)
            run = []
            x_BSD = block(x_BSD, positions, cache.layers[at])
        wanted = rows if run and rows is not None and _in_order(rows, x_BSD.shape[1]) else None
        _call(kernels, x_BSD, run, start + len(blocks) - len(run), positions, cache, wanted)
        if wanted is not None:
            return x_BSD[:, : len(wanted)]
        return x_BSD if rows is None else x_BSD[:, rows]

    def _look(self, dtype: torch.dtype) -> list[Dense | None]:
        """Of each block what the kernels can take; found anew whenever a part has been exchanged."""
        seen: list[object] = [dtype]
        for block in self._blocks:
            for name in ("self_attn", "feed_forward"):
                part = block._modules[name]
                assert part is not None
                seen += (part, *part._modules.values())
                if type(part) is MixtureOfExperts:
                    seen.append(part.call(dtype))
        if len(seen) != len(self._seen) or not all(map(is_, seen, self._seen)):
            self._dense = [Dense.of(block, dtype) for block in self._blocks]
            self._seen = seen
        return self._dense


def _in_order(rows_R: Tensor, length: int) -> bool:
    """Whether these are numbers of rows, each once and upward, as the kernels take them."""
    if rows_R.dtype != torch.int64 or not rows_R.is_contiguous():
        return False
    numbers = [-1, *rows_R.tolist(), length]
    return all(before < after for before, after in pairwise(numbers))


def _call(
    kernels: Kernels,
    x_1SD: Tensor,
    run: list[Dense],
    first: int,
    positions: Positions,
    cache: Batch,
    wanted_R: Tensor | None = None,
) -> None:
    """Bring the stream through the layers from `first` on, in place; wanted: rows to come out, at the front."""
    if not run:
        return
    rows, width, dtype = x_1SD.shape[1], x_1SD.shape[2], x_1SD.dtype
    layers = (_Layer * len(run))(*(dense.call for dense in run))  # copies
    for at, (layer, dense) in enumerate(zip(layers, run, strict=True), first):
        attention = cache.layers[at].call(dtype, dense.heads)
        layer.pool, layer.attention = attention.pool, ctypes.addressof(attention)
    starts = [0]
    for each in zip(*(dense.row_bytes for dense in run), strict=True):
        starts.append(starts[-1] + -(-rows * max(each) // LINE) * LINE)
    memory = torch.empty(starts[-1], dtype=torch.uint8)
    base = memory.data_ptr()
    cosines, sines = positions.turns
    call = _Pass(
        ctypes.addressof(layers), len(run), rows, width, x_1SD.data_ptr(), *(base + start for start in starts[:-1]),
        cosines.data_ptr(), sines.data_ptr(), None if positions.scale_S is None else positions.scale_S.data_ptr(),
        None if wanted_R is None else wanted_R.data_ptr(), -1 if wanted_R is None else len(wanted_R),
        dtype == torch.bfloat16, native.threads(),
    )  # fmt: skip
    kernels.layers(ctypes.byref(call))
    if call.failed:
        raise MemoryError("no memory left for the buffers of attention and experts")
