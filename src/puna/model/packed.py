"""Weights as our kernels read them: panels of sixteen outputs, in float32, bfloat16, 8 or 4 bits (native/linear.c).

A row of a product is the same bits whatever stands beside it, so answers don't depend on who else is asking.
Legend: M rows, N outputs, K inputs, P panels, S groups of inputs.
"""

import ctypes
import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna.errors import PunaError
from puna.model import pages
from puna.model.elementwise import silu_mul
from puna.model.native import Kernels, kernels, threads
from puna.model.quantized import Float8, Quantized, Weight, Words, stored_bits

PANEL = 16  # outputs side by side
KINDS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3, "float8": 4, "int6": 5}
SCALES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
PLACES = ("cpu", "meta")  # without memory, on the meta device, a load is rehearsed
FINEST = 16  # inputs that share a scale, at least: the kernel's step
COARSEST = 256  # and at most: an activation's 8-bit scale should not serve more


class _Weight(ctypes.Structure):
    """native/linear.c, `Weight`."""

    _fields_ = (
        ("kind", ctypes.c_int), ("exact", ctypes.c_int), ("scale_kind", ctypes.c_int), ("group", ctypes.c_int),
        ("outputs", ctypes.c_long), ("inputs", ctypes.c_long),
        ("panels", ctypes.c_void_p), ("scales", ctypes.c_void_p),
    )  # fmt: skip


def packable(weight: Weight, activations: torch.dtype = torch.bfloat16) -> bool:
    """Whether our kernels can hold this weight: on the CPU (or nowhere), in a kind they know, and they are there. And
    whether they take such activations: float32 and bfloat16."""
    if kernels() is None or activations not in (torch.float32, torch.bfloat16):
        return False
    if isinstance(weight, Tensor):
        return weight.device.type in PLACES and weight.dtype in (torch.float32, torch.bfloat16)
    return weight.scales.device.type in PLACES


class Panels:
    """One matrix [N, K] in panels. Activations of float32 meet exact weights; those of bfloat16 meet integer weights as
    int8 themselves, with a scale for each row and group."""

    def __init__(self, weight: Weight) -> None:
        self.outputs, self.width = weight.shape
        self.group, self.scales = 0, torch.empty(0)
        if isinstance(weight, Quantized):
            self.kind = f"int{weight.bits}"
            self.group, scales_NS = _kernel_groups(weight)
            self.inputs = _up(self.width, self.group)
            self.panels = _pack_integers(weight, self.inputs)
            self._set_scales(scales_NS)
        elif isinstance(weight, Float8):
            self.kind = "float8"
            self.group = self.inputs = _up(self.width, FINEST)
            self.panels = _panels(weight.values.view(torch.uint8), self.inputs, 1)
            self._set_scales(weight.scales.float())
        else:
            self.kind = str(weight.dtype).removeprefix("torch.")
            step = 2 if self.kind == "bfloat16" else 1
            self.group = self.inputs = _up(self.width, step)
            self.panels = _panels(weight, self.inputs, step)
        self._exact, self._fast = (self._weight(exact) for exact in (1, 0))
        few = self._exact if self.kind == "float8" else self._fast
        self._addresses = ctypes.addressof(self._exact), ctypes.addressof(few)  # for float32 rows, for bfloat16 rows

    def _set_scales(self, scales_NS: Tensor) -> None:
        self.scales = _panels(scales_NS, scales_NS.shape[1], 1)

    def _weight(self, exact: int) -> _Weight:
        scales = SCALES[self.scales.dtype]
        return _Weight(KINDS[self.kind], exact, scales, self.group, self.outputs, self.inputs,
                       self.panels.data_ptr(), self.scales.data_ptr())  # fmt: skip

    def bytes(self) -> int:
        """Bytes held: panels and scales."""
        return self.panels.nbytes + self.scales.nbytes

    def address(self, bf16: bool) -> int:
        """Where the kernels find what they must know of it, for activations of bfloat16 or of float32."""
        return self._addresses[bf16]

    def scratch_bytes(self, rows: int) -> int:
        """What a product of so many rows writes beside its result."""
        return rows * (4 * self.inputs + 8 * (self.inputs // self.group))

    def product(self, x_MK: Tensor) -> Tensor:
        """x @ weight.T [M, N], in x's dtype (float32 or bfloat16)."""
        rows = x_MK.shape[0]
        bf16 = _is_bf16(x_MK.dtype)
        x_MK = x_MK.contiguous()
        out_MN = x_MK.new_empty(rows, self.outputs)
        scratch = torch.empty(self.scratch_bytes(rows), dtype=torch.uint8)
        _native().linear(
            self._addresses[bf16], x_MK.data_ptr(), out_MN.data_ptr(),
            rows, self.width, bf16,
            scratch.data_ptr(), threads(),
        )  # fmt: skip
        return out_MN

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows `ids` [M] of the weight [M, K], dequantised: float32 or bfloat16. Raises IndexError."""
        ids, bf16 = ids.contiguous(), _is_bf16(dtype)
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.outputs:
            raise IndexError(f"rows {int(ids.min())} to {int(ids.max())} of a weight of {self.outputs}")
        out_MK = torch.empty(len(ids), self.width, dtype=dtype)
        _native().rows(self._addresses[0], ids.data_ptr(), out_MK.data_ptr(), len(ids), self.width, bf16, threads())
        return out_MK

    def unpack(self) -> Weight:
        """The weight as it was given, bit for bit (a scale a row may come back as one a group)."""
        if self.kind == "int6":
            return Quantized(6, self._six_values(), self._scales_NS(), self.group)
        steps = self.panels.movedim(2, 1).flatten(0, 1)[: self.outputs]  # [N, K / step, step]
        if self.kind in ("float32", "bfloat16"):
            return steps.flatten(1)[:, : self.width].contiguous()
        scales = self._scales_NS()
        if self.kind == "float8":
            values = steps.flatten(1)[:, : self.width].contiguous().view(torch.float8_e4m3fn)
            return Float8(values, scales)
        if self.kind == "int4":
            steps = torch.cat((steps & 15, steps >> 4), -1)
        zero = 8 if self.kind == "int4" else 128
        values = (steps.flatten(1)[:, : self.width].to(torch.int16) - zero).to(torch.int8)
        return Quantized(int(self.kind[-1]), values, scales, self.group)

    def _scales_NS(self) -> Tensor:
        return self.scales[..., 0].movedim(2, 1).flatten(0, 1)[: self.outputs].contiguous()

    def _six_values(self) -> Tensor:
        low, high = self.panels[:, :, :2], self.panels[:, :, 2]  # [P, K / 16, 2, 16, 4] and [P, K / 16, 16, 4]
        fours = torch.stack((low[:, :, 0] & 15, low[:, :, 0] >> 4, low[:, :, 1] & 15, low[:, :, 1] >> 4), 2)
        pairs = torch.stack([high >> 2 * i & 3 for i in range(4)], 2)
        values = (fours | pairs << 4).permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1)  # [N, K]
        return (values[: self.outputs, : self.width].to(torch.int16) - 32).to(torch.int8)


class PackedLinear(nn.Module):
    """x @ weight.T through our kernels. Not trainable; float32 and bfloat16 activations."""

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        self.packed = Panels(weight)

    def forward(self, x: Tensor) -> Tensor:
        packed = self.packed
        return packed.product(x.reshape(-1, packed.width)).view(*x.shape[:-1], packed.outputs)


class PackedEmbedding(nn.Module):
    """A table of rows, one a token id; `project` is the output layer where the two are one matrix."""

    device = torch.device("cpu")

    def __init__(self, weight: Weight, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed = Panels(weight)
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        return self.packed.rows(ids.flatten(), self.dtype).view(*ids.shape, -1)

    def project(self, x: Tensor) -> Tensor:
        """Logits [..., V] of states [..., D]."""
        return self.packed.product(x.reshape(-1, self.packed.width)).view(*x.shape[:-1], self.packed.outputs)


class PackedFeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)), gate above up in one matrix [2F, D]."""

    def __init__(self, gate_up: Weight, down: Weight) -> None:
        super().__init__()
        self.gate_up_proj = PackedLinear(gate_up)
        self.down_proj = PackedLinear(down)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu_mul(self.gate_up_proj(x)))


class PackedExperts(nn.Module):
    """One `PackedFeedForward` an expert."""

    def __init__(self, experts: Iterable[tuple[Weight, Weight]]) -> None:
        super().__init__()
        packed = [PackedFeedForward(*weights) for weights in experts]
        self.experts = nn.ModuleList(packed)
        self._panels = [(one.gate_up_proj.packed, one.down_proj.packed) for one in packed]

    def addresses(self, bf16: bool) -> ctypes.Array[ctypes.c_void_p]:
        """What the kernels must know of each expert's two matrices, expert after expert: see `Panels.address`."""
        places = [panels.address(bf16) for pair in self._panels for panels in pair]
        return (ctypes.c_void_p * len(places))(*places)

    def forward(self, x_CD: Tensor, counts: list[int]) -> Tensor:
        """Rows sorted by expert, `counts[e]` of them for expert e -> [C, D]. Other experts' bytes are not read."""
        outputs, row = [], 0
        for (gate_up, down), count in zip(self._panels, counts, strict=True):
            if count:
                outputs.append(down.product(silu_mul(gate_up.product(x_CD[row : row + count]))))
                row += count
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _is_bf16(dtype: torch.dtype) -> bool:
    if dtype not in (torch.float32, torch.bfloat16):  # the kernels would read beyond a narrower tensor's end
        raise TypeError(f"the kernels take float32 and bfloat16, not {dtype}")
    return dtype == torch.bfloat16


def _native() -> Kernels:
    native = kernels()
    assert native is not None, "panels are only made where the kernels are"
    return native


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def _panels(matrix: Tensor, inputs: int, step: int) -> Tensor:
    """[N, K] -> [P, K / step, 16, step], padded with zeros."""
    N, K = matrix.shape
    if N % PANEL or inputs != K:
        matrix = F.pad(matrix, (0, inputs - K, 0, -N % PANEL))
    panels = matrix.view(-1, PANEL, inputs // step, step).transpose(1, 2)
    return _empty(panels.shape, panels.dtype, panels.device).copy_(panels)


def _panel_words(words: Tensor, bits: int) -> Tensor:
    """Words [N, W] of `pack-quantized`, N a multiple of 16 -> [P, W, 16, 1], without unpacking them."""
    N, W = words.shape
    panels = _empty((N // PANEL, W, PANEL, 1), words.dtype, words.device)
    if not words.is_meta:
        words = words.contiguous()
        _native().panel_words(words.data_ptr(), panels.data_ptr(), N, W, bits, threads())
    return panels


def _panel_six(octets: Tensor, zero: int) -> Tensor:
    """Bytes [N, K], each `zero` above a value of 6 bits, N and K multiples of 16 -> [P, K / 16, 3, 16, 4]."""
    N, K = octets.shape
    panels = _empty((N // PANEL, K // FINEST, 3, PANEL, 4), torch.uint8, octets.device)
    if not octets.is_meta:
        octets = octets.contiguous()
        _native().panel_six(octets.data_ptr(), panels.data_ptr(), N, K, zero, threads())
    return panels


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for panels, to lie in large pages where it fills some."""
    size = math.prod(shape) * dtype.itemsize
    if device.type == "meta" or not pages.suit(size):
        return torch.empty(shape, dtype=dtype, device=device)
    return pages.allocate(size).view(dtype).view(shape)


def _pack_integers(weight: Quantized, inputs: int) -> Tensor:
    zero = 8 if weight.bits == 4 else 128
    N, K = weight.shape
    per_word = 32 // stored_bits(weight.bits)
    if isinstance(weight, Words) and (N % PANEL, K % per_word, K) == (0, 0, inputs):
        if weight.bits == 6:
            return _panel_six(weight.words.view(torch.uint8), zero)
        return _panel_words(weight.words, weight.bits).view(torch.uint8)
    values = F.pad(weight.values, (0, inputs - K, 0, -N % PANEL)).view(torch.uint8)
    if weight.bits == 6:
        return _panel_six(values, 0)
    if weight.bits == 8:
        return _panels(values ^ zero, inputs, 4)  # adding 128 turns the sign bit
    low, high = ((values + zero) & 15).view(-1, inputs // 8, 2, 4).unbind(2)
    return _panels((low | high << 4).flatten(1), inputs // 2, 4)


def _kernel_groups(weight: Quantized) -> tuple[int, Tensor]:
    """A group that the kernel's step divides, and that is small enough to serve the activations' scales well."""
    group, scales = weight.group, weight.scales
    if group % FINEST == 0 and group <= COARSEST:
        return group, scales
    K = weight.shape[1]
    if group >= K:  # one scale a row
        finer = next((g for g in (128, 64, 32) if K % g == 0), FINEST)
        return finer, scales.repeat(1, _up(K, finer) // finer)
    finer = next(g for g in (128, 64, 32, 16, 8, 4, 2, 1) if group % g == 0)
    if finer < FINEST:
        raise PunaError(f"a scale for every {group} inputs is not a multiple of {FINEST}, which the kernels need")
    return finer, scales.repeat_interleave(group // finer, 1)[:, : _up(K, finer) // finer]
