"""Logits that a model gave when its training ended: what every export of it is compared with.

Legend: P prompts, V vocabulary.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from puna.errors import PunaError

FILE = "recorded.npz"
# What a format, and the trainer's own arithmetic, may change: the distance of two logits' rows as a share of the row's
# own spread (`distance`). Rounding to so many bits of mantissa moves a tiny or a billion-parameter model about equally.
FORMATS = {"F32": 0.002, "F16": 0.01, "BF16": 0.06, "Q8_0": 0.12, "Q4_0": 0.6, "int8": 0.12, "int4": 0.6}
ARITHMETIC = {"float32": 0.002, "bfloat16": 0.06}


@dataclass(frozen=True)
class Recorded:
    """The logits [P, V] after each of some prompts, and the dtype that they were computed in."""

    prompts: list[list[int]]
    logits_PV: Tensor
    dtype: str

    def write(self, folder: Path) -> None:
        """Into a folder, as NumPy's arrays: readers of weights take no notice of them."""
        prompts = json.dumps(self.prompts).encode()
        arrays = {"prompts": np.frombuffer(prompts, np.uint8), "logits": self.logits_PV.half().numpy()}
        with (folder / FILE).open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays, dtype=np.frombuffer(self.dtype.encode(), np.uint8))

    def tolerance(self, format: str) -> float:
        """The largest `distance` that an export in a format may have."""
        return ARITHMETIC.get(self.dtype, ARITHMETIC["bfloat16"]) + FORMATS[format]


def read_recorded(folder: Path) -> Recorded | None:
    """What was recorded beside a model, or None. Raises PunaError for a damaged file."""
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as found:
            prompts = json.loads(found["prompts"].tobytes())
            return Recorded(prompts, torch.from_numpy(found["logits"]).float(), found["dtype"].tobytes().decode())
    except (OSError, ValueError, KeyError) as error:
        raise PunaError(f"{file} is damaged ({error}); train again, or delete it to export unchecked") from None


def distance(given_PV: Tensor, recorded_PV: Tensor) -> float:
    """The root mean square over all logits of their difference, each row's mean taken out, as a share of the recorded
    ones' own. 0: the same distributions."""
    given, recorded = (x.float() - x.float().mean(-1, keepdim=True) for x in (given_PV, recorded_PV))
    return float((given - recorded).norm() / recorded.norm())
