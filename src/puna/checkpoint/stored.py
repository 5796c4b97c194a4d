"""One weight as a safetensors folder stores it: a plain tensor, or integers or FP8 with their scales beside them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from puna.checkpoint.compressed_config import Quantisation, Scheme
from puna.checkpoint.fewbits import FALLBACK_GROUP, FINEST, fallback
from puna.checkpoint.fused_fp8 import SCALE, FusedFloat8
from puna.checkpoint.safetensors_read import DTYPES, SafetensorsFile
from puna.checkpoint.validate import check_finite, check_fp8
from puna.errors import PunaError
from puna.model.quantized import Float8, Quantized, Weight, Words, plain
from puna.model.words import unpack_int32

Files = Mapping[str, SafetensorsFile]
HEAD_IN_SIX = {"puna.head_bits": "6"}  # in a file's metadata: the output layer's integers have 6 bits, stored in 8
_AGAIN = "Download the file again"
# Tensors beside a weight that say how activations and caches were quantised: nothing that a weight needs.
_LEFT_OUT = ("input_scale", "input_zero_point", "input_scale_ub", "input_global_scale", "output_scale",
             "output_zero_point", "k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point")  # fmt: skip
_PARTS = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


class Stored(Protocol):
    """A weight on disk."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's own shape."""
        ...

    @property
    def where(self) -> str:
        """File and stored name, for error messages."""
        ...

    def read(self) -> Tensor:
        """In its stored dtype; quantised ones in float32."""
        ...

    def read_rows(self, start: int, stop: int) -> Tensor:
        """As `read`, of rows start..stop-1."""
        ...

    def read_packed(self) -> Weight | list[Weight]:
        """In its stored bits, where `Quantized` or `Float8` can say them, else `fallback`; experts in one tensor of few
        bits one by one."""
        ...


@dataclass(frozen=True)
class Plain:
    """A tensor of floats."""

    file: SafetensorsFile
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.entries[self.name].shape

    @property
    def where(self) -> str:
        return f"{self.file.path}, tensor {self.name}"

    def read(self) -> Tensor:
        return self.file.read(self.name)

    def read_rows(self, start: int, stop: int) -> Tensor:
        return self.file.read_rows(self.name, start, stop)

    def read_packed(self) -> Tensor:
        return self.read()


@dataclass(frozen=True)
class FirstRows:
    """The first rows of a stored tensor of floats: the others are for pictures."""

    whole: Stored
    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        rows, *others = self.whole.shape
        return min(rows, self.rows), *others

    @property
    def where(self) -> str:
        return self.whole.where

    def read(self) -> Tensor:
        return self.whole.read_rows(0, self.rows)

    def read_rows(self, start: int, stop: int) -> Tensor:
        return self.whole.read_rows(start, stop)

    def read_packed(self) -> Tensor:
        return self.read()


class Compressed:
    """A module's weight [N, K] in few bits. Raises PunaError where its tensors are not what the scheme says."""

    def __init__(self, module: str, files: Files, scheme: Scheme) -> None:
        self.module, self.scheme = module, scheme
        self._files = {part: files[f"{module}.{part}"] for part in _PARTS if f"{module}.{part}" in files}
        bits = "weight_packed" if scheme.packed else "weight"
        self._bits = bits
        needed = [bits, "weight_scale"] + ["weight_shape"] * scheme.packed
        needed += ["weight_zero_point"] * (not scheme.symmetric)
        missing = [part for part in needed if part not in self._files]
        if missing:
            raise PunaError(f"{self.where}: {module}.{missing[0]} is missing, which its scheme needs. {_AGAIN}.")
        self._check_dtype(bits, ("I32",) if scheme.packed else ("F8_E4M3",) if scheme.floating else ("I8",))
        self._check_dtype("weight_scale", tuple(DTYPES))
        self._check_shapes()

    @property
    def where(self) -> str:
        """See `Stored.where`."""
        file = self._files.get(self._bits) or next(iter(self._files.values()))
        return f"{file.path}, tensor {self.module}.{self._bits}"

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """See `Stored.shape`."""
        if not self.scheme.packed:
            return self._entry("weight")
        if self._entry("weight_shape") != (2,) or self._dtype("weight_shape") not in ("I64", "I32"):
            raise self._error("weight_shape", "must hold two integers")
        rows, columns = self._read("weight_shape").tolist()
        packed = self._entry("weight_packed")
        if packed != (rows, -(-columns * self.scheme.bits // 32)):
            raise self._error("weight_packed", f"has shape {list(packed)}, which does not hold [{rows}, {columns}]")
        return rows, columns

    @property
    def _span(self) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        rows, columns = self.shape
        whole = {"tensor": (rows, columns), "channel": (1, columns)}
        return whole.get(self.scheme.strategy, self.scheme.block)

    def _check_shapes(self) -> None:
        if len(self.shape) != 2:
            raise self._error(self._bits, f"has shape {list(self.shape)}, where a matrix is expected")
        rows, columns = self.shape
        span = self._span
        scales = (-(-rows // span[0]), -(-columns // span[1]))
        found = self._entry("weight_scale")
        flat = {"tensor": ((), (1,)), "channel": ((rows,),)}.get(self.scheme.strategy, ())
        if found != scales and found not in flat:
            raise self._error("weight_scale", f"has shape {list(found)}, needs {list(scales)}")
        if not self.scheme.symmetric:
            zeros = (-(-rows * self.scheme.bits // 32), scales[1]) if self._packed_zeros else scales
            if self._entry("weight_zero_point") not in (zeros, *(flat if not self._packed_zeros else ())):
                shape = list(self._entry("weight_zero_point"))
                raise self._error("weight_zero_point", f"has shape {shape}, needs {list(zeros)}")

    @property
    def _packed_zeros(self) -> bool:
        return self._dtype("weight_zero_point") == "I32"

    def read(self) -> Tensor:
        """See `Stored.read`."""
        return plain(self._exact())

    def read_rows(self, start: int, stop: int) -> Tensor:
        """See `Stored.read_rows`."""
        return self.read()[start:stop]

    def read_packed(self) -> Weight:
        """See `Stored.read_packed`."""
        exact = self._exact()
        return fallback(exact) if isinstance(exact, Tensor) else exact

    def _exact(self) -> Weight:
        """The stored bits; a float32 tensor where no class of ours can say them."""
        rows, columns = self.shape
        scales = self._read("weight_scale")
        check_finite(scales, self._place("weight_scale"))
        scales, group = self._by_row(scales)
        values = self._read(self._bits)
        if self.scheme.floating:
            check_fp8(values, self.where)
            return Float8(values, scales.float()) if group >= columns else self._scaled(values.float(), scales, group)
        coarse = group % FINEST == 0 or group >= columns
        if self.scheme.packed and self.scheme.symmetric and coarse:
            return Words(6 if self._in_six(values) else self.scheme.bits, values, columns, scales, group)
        if self.scheme.packed:
            values = unpack_int32(values, self.scheme.bits, columns)
        elif self.scheme.bits == 4 and not values.is_meta and (int(values.min()) < -8 or int(values.max()) > 7):
            raise self._error("weight", "holds integers that are not of 4 bits")
        if self.scheme.symmetric:
            return Quantized(self.scheme.bits, values, scales, group) if coarse else self._scaled(values, scales, group)
        shifted = values.to(torch.int16) - self._zeros(rows).repeat_interleave(group, 1)[:, :columns]
        if coarse and (shifted.is_meta or (int(shifted.min()) >= -128 and int(shifted.max()) <= 127)):
            return Quantized(8, shifted.to(torch.int8), scales, group)
        return self._scaled(shifted, scales, group)

    def _in_six(self, words: Tensor) -> bool:
        """Whether the file says that these are 6 bits in 8, and they are."""
        said = HEAD_IN_SIX.items() <= self._files[self._bits].metadata.items() and self.module.endswith("lm_head")
        if not said or self.scheme.bits != 8 or self.shape[1] % 4:
            return False
        if words.is_meta:
            return True
        least, most = words.view(torch.uint8).aminmax()
        return int(least) >= 128 - 32 and int(most) < 128 + 32

    def _scaled(self, values: Tensor, scales: Tensor, group: int) -> Tensor:
        return values * scales.float().repeat_interleave(group, 1)[:, : self.shape[1]]

    def _zeros(self, rows: int) -> Tensor:
        zeros = self._read("weight_zero_point")
        if self._packed_zeros:
            return unpack_int32(zeros.T.contiguous(), self.scheme.bits, rows).T.to(torch.int16)
        return self._by_row(zeros)[0].to(torch.int16)

    def _by_row(self, scales: Tensor) -> tuple[Tensor, int]:
        """Scales [N, G] of every row, and the columns that share one."""
        rows, columns = self.shape
        down, across = self._span
        spread = scales.reshape(-(-rows // down), -(-columns // across)).repeat_interleave(down, 0)[:rows]
        return spread.contiguous(), across

    def _read(self, part: str) -> Tensor:
        return self._files[part].read_bits(f"{self.module}.{part}")

    def _entry(self, part: str) -> tuple[int, ...]:
        return self._files[part].entries[f"{self.module}.{part}"].shape

    def _dtype(self, part: str) -> str:
        return self._files[part].entries[f"{self.module}.{part}"].dtype

    def _check_dtype(self, part: str, allowed: tuple[str, ...]) -> None:
        if self._dtype(part) not in allowed:
            raise self._error(part, f"has dtype {self._dtype(part)}, needs {' or '.join(allowed)}")

    def _place(self, part: str) -> str:
        return f"{self._files[part].path}, tensor {self.module}.{part}"

    def _error(self, part: str, problem: str) -> PunaError:
        return PunaError(f"{self._place(part)} {problem}. {_AGAIN}.")


@dataclass(frozen=True)
class Contents:
    """Weights by stored name (`<module>.weight` where compressed); notes as in `Source`."""

    weights: dict[str, Stored]
    notes: tuple[str, ...] = ()
    packed_notes: tuple[str, ...] = ()


def collect(files: Files, quantisation: Quantisation | None) -> Contents:
    """Put the tensors of a folder together to weights.

    Raises PunaError for a quantised tensor that no scheme covers, and for a module whose tensors are not whole.
    """
    if quantisation is None:
        return Contents({name: Plain(file, name) for name, file in files.items()})
    left_out = [name for name in files if name.rpartition(".")[2] in _LEFT_OUT]
    weights: dict[str, Stored] = {}
    schemes: list[Scheme] = []
    fused = {name for name, file in files.items() if file.entries[name].dtype == "F8_E4M3"}
    fused = {name for name in fused if not name.endswith(".weight")}
    scales = {name + SCALE for name in fused}
    for name, file in files.items():
        if name in fused:
            weights[name] = FusedFloat8(name, files)
            continue
        module, _, part = name.rpartition(".")
        known = part in _PARTS and f"{module}.weight" in weights  # a bias beside it is a weight of its own
        if part in _LEFT_OUT or known or name in scales:
            continue
        entry = file.entries[name]
        if part not in _PARTS or (part == "weight" and f"{module}.weight_scale" not in files and entry.dtype in DTYPES):
            weights[name] = Plain(file, name)
            continue
        scheme = quantisation.scheme(module)
        if scheme is None:
            raise PunaError(
                f"{file.path}, tensor {name}: {quantisation.path} covers this module by no scheme, or ignores it. "
                "Check that the configuration belongs to these weights."
            )
        weights[f"{module}.weight"] = Compressed(module, files, scheme)
        schemes.append(scheme)
    notes = list(quantisation.notes)
    if left_out:
        notes.append(f"Left out {len(left_out)} scales of activations: they are not quantised here.")
    zeros = sum(not scheme.symmetric for scheme in schemes)
    blocks = sum(scheme.floating and scheme.strategy not in ("tensor", "channel") for scheme in schemes)
    fine = sum(scheme.strategy == "group" and scheme.block[1] % FINEST > 0 for scheme in schemes)
    packed, as_int8 = [], f"packed as int8 with a scale for {FALLBACK_GROUP} inputs"
    if zeros:
        packed.append(f"{zeros} weights with zero points: packed as int8, exactly where value - zero fits.")
    if blocks:
        packed.append(f"{blocks} weights in FP8 with a scale a block: {as_int8}.")
    if fine:
        packed.append(f"{fine} weights in groups that {FINEST} doesn't divide: {as_int8}.")
    return Contents(weights, tuple(notes), tuple(packed))
