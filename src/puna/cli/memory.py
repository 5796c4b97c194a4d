"""What commands that load a model say on standard error: memory before and after, and what the load changed."""

import math
import sys
from typing import TYPE_CHECKING

from puna.errors import PunaError

if TYPE_CHECKING:
    from puna.engine import Model
    from puna.engine.forecast import Forecast


def in_bytes(gigabytes: float | None) -> int | None:
    """`--memory`, as `puna.load` takes it."""
    if gigabytes is None:
        return None
    if not math.isfinite(gigabytes):
        raise PunaError(f"--memory must be a number of GB, not {gigabytes}; leave it out to take all that is available")
    return int(gigabytes * 1e9)


def show_forecast(forecast: "Forecast") -> None:
    """One line before anything is loaded. The cache counts in full, though it takes memory only as it fills."""
    import torch

    from puna.model.memory import available_bytes

    free = available_bytes(torch.device("cpu")) / 1e9
    print(f"{forecast.needed}; {free:.1f} GB free", file=sys.stderr)


def show_notes(llama: "Model") -> None:
    """What the load left out or packed in other bits than the file's, one line each."""
    for note in llama.notes:
        print(f"note: {note}", file=sys.stderr)


def show_used(llama: "Model") -> None:
    """One line at the end: what was forecast for the cache that was filled, and the real peak."""
    forecast, peak = llama.memory_used()
    if forecast is not None and peak:
        off = forecast.total / peak - 1
        print(f"memory: forecast {forecast.total / 1e9:.2f} GB for {forecast.context:,} tokens in the cache, "
              f"peak {peak / 1e9:.2f} GB ({off:+.1%})", file=sys.stderr)  # fmt: skip
