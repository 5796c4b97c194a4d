"""Stop strings in streamed text: nothing of a stop string is ever shown, whatever the pieces it arrives in."""

from collections.abc import Sequence


class StopStrings:
    """Watches text for stop strings.

    The answer ends where the first stop string is complete, as if characters arrived one at a time, so the result
    doesn't depend on how the text was cut. Text that may still become a stop string is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.matched: str | None = None
        self._held = ""

    def push(self, text: str) -> str:
        """Takes the next text, returns what may be shown now. After a match (`.matched` is set) nothing is."""
        if self.matched is not None:
            return ""
        text = self._held + text
        ends = [(at + len(stop), at, stop) for stop in self.stops if (at := text.find(stop)) >= 0]
        if ends:
            _, start, self.matched = min(ends)
            self._held = ""
            return text[:start]
        keep = self._may_begin_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The text still held back, now that no more follows."""
        held, self._held = self._held, ""
        return held

    def _may_begin_stop(self, text: str) -> int:
        """Length of the longest end of `text` that is the beginning of a stop string."""
        longest = min(len(text), max((len(stop) for stop in self.stops), default=1) - 1)
        for size in range(longest, 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self.stops):
                return size
        return 0
