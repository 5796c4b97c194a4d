"""How much one scan may cost: processor time of its thread, so that a busy machine doesn't cut it short."""

import time


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
