"""What a command needs to know of torchrun, without importing torch."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from puna.errors import AgreedError, PunaError


def one_of_many() -> bool:
    """Whether torchrun started this process beside others."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def prints() -> bool:
    """Whether this process shows results: the only one, or the first of several."""
    return not one_of_many() or os.environ["RANK"] == "0"


def refuse_many(command: str) -> None:
    """Raise PunaError in a command that can't share its work: its processes would each do all of it."""
    if one_of_many():
        raise PunaError(f"`puna {command}` runs in one process; start it without torchrun (`puna generate` shares)")


@contextmanager
def one_error() -> Iterator[None]:
    """Where all processes fail alike, only one of each machine says why: the first, which torchrun must not stop before
    it has, so that the others leave later."""
    try:
        yield
    except PunaError as error:
        torch = sys.modules.get("torch.distributed")
        alike = isinstance(error, AgreedError) or torch is None or not torch.is_initialized()
        if not alike or os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        time.sleep(1)
        raise SystemExit(1) from None
