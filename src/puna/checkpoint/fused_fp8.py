"""Routed experts of one projection in one FP8 tensor, as transformers writes Llama 4 in fbgemm_fp8.

`experts.gate_up_proj` [E, K, N] float8_e4m3fn with `gate_up_proj_scale` [E, 1, N], `down_proj` likewise with
`down_proj_scale` [E, N, 1]: a scale for each output (transformers 5.23 `integrations/fbgemm_fp8.py`).
Legend: E experts, K inputs, N outputs.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from puna.checkpoint.safetensors_read import DTYPES, SafetensorsFile
from puna.checkpoint.validate import check_finite, check_fp8
from puna.errors import PunaError
from puna.model.quantized import Float8, Weight

SCALE = "_scale"  # the scales' name is the tensor's with this behind it
_AGAIN = "Download the file again."


class FusedFloat8:
    """See `puna.checkpoint.stored.Stored`. Raises PunaError where the scales are not as described above."""

    def __init__(self, name: str, files: Mapping[str, SafetensorsFile]) -> None:
        self.file, self.name = files[name], name
        self.shape = self.file.entries[name].shape
        if name + SCALE not in files:
            raise PunaError(f"{self.where}: {name}{SCALE} is missing, which its FP8 values need. {_AGAIN}")
        self._scales = files[name + SCALE]
        entry = self._scales.entries[name + SCALE]
        if len(self.shape) != 3:
            raise PunaError(f"{self.where} has shape {list(self.shape)}, where [experts, inputs, outputs] is expected.")
        experts, _, outputs = self.shape
        if entry.dtype not in DTYPES or entry.shape not in ((experts, 1, outputs), (experts, outputs, 1)):
            raise PunaError(
                f"{self._scales_where} is {entry.dtype} {list(entry.shape)}; experts of shape {list(self.shape)} need "
                f"floats [{experts}, 1, {outputs}] or [{experts}, {outputs}, 1]. {_AGAIN}"
            )

    @property
    def where(self) -> str:
        """See `Stored.where`."""
        return f"{self.file.path}, tensor {self.name}"

    @property
    def _scales_where(self) -> str:
        return f"{self._scales.path}, tensor {self.name}{SCALE}"

    def read(self) -> Tensor:
        """See `Stored.read`: [E, K, N]."""
        return self.read_rows(0, self.shape[0])

    def read_rows(self, start: int, stop: int) -> Tensor:
        """See `Stored.read_rows`: whole experts."""
        return torch.stack([one.dequantize().T for one in self.experts(start, stop)])

    def read_packed(self) -> list[Weight]:
        """Every expert's matrix [N, K]."""
        return self.experts(0, self.shape[0])

    def experts(self, start: int, stop: int) -> list[Weight]:
        """The matrices [N, K] of some experts; the others are not read."""
        values = self.file.read_rows(self.name, start, stop, bits=True)
        check_fp8(values, self.where)
        scales = self._scales.read_rows(self.name + SCALE, start, stop).float()
        check_finite(scales, self._scales_where)
        turned = values.view(torch.uint8).transpose(1, 2)  # few operations know 8-bit floats
        return [
            Float8(one.contiguous().view(torch.float8_e4m3fn), scale.reshape(-1, 1))
            for one, scale in zip(turned, scales, strict=True)
        ]
