"""How much one scan may cost: processor time of its thread, so that a busy machine doesn't cut it short."""

import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, SupportsIndex


class Budget:
    """`seconds` of this thread's processor time; `spent` becomes true when they are over and stays so. `deep` is the
    offset at which nesting went beyond what is read."""

    def __init__(self, seconds: float) -> None:
        self.end = time.thread_time() + seconds
        self.look = time.monotonic() + seconds  # processor time can't be over before; the wall clock is cheap to read
        self.spent = False
        self.deep: int | None = None  # where something was nested too deeply to be read

    def check(self) -> bool:
        """Look at the clock. True when the budget is over."""
        if not self.spent and time.monotonic() >= self.look:
            left = self.end - time.thread_time()
            self.look = time.monotonic() + left
            self.spent = left <= 0
        return self.spent


running: ContextVar[Budget | None] = ContextVar("running", default=None)  # that of this thread's scan


class OutOfTime(Exception):
    """The budget ended inside of something that looks at a very long function."""


class Watched(list[Any]):
    """A list that looks at the clock whenever one goes through it, so that what is quadratic in it ends in time.
    Raises OutOfTime."""

    def __init__(self, items: list[Any], budget: Budget) -> None:
        super().__init__(items)
        self.budget = budget

    def __iter__(self) -> Iterator[Any]:
        for item in super().__iter__():
            if self.budget.check():
                raise OutOfTime
            yield item

    def __getitem__(self, at: SupportsIndex | slice) -> Any:
        if self.budget.check():
            raise OutOfTime
        return super().__getitem__(at)
