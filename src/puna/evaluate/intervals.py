"""How sure a share is."""

import math

Z = 1.959964  # of a two-sided 95 % interval


def wilson(hits: int, total: int, z: float = Z) -> tuple[float, float]:
    """The 95 % interval of a share, which holds for few hits too (Wilson 1927). (0, 1) for no trials."""
    if total == 0:
        return 0.0, 1.0
    share = hits / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return (max(0.0, middle - half) if hits else 0.0), (min(1.0, middle + half) if hits < total else 1.0)
