"""Stop strings: the same result however the text is cut, and never a character too many."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from puna.engine.stops import StopStrings

letters = st.text(alphabet="ab.", max_size=14)


def one_character_at_a_time(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition: the answer ends as soon as what was read ends with a stop string."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - len(max(ending, key=len))], True
    return text, False


@given(
    text=letters,
    stops=st.lists(st.text(alphabet="ab.", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 14), max_size=6),
)
def test_every_cut_gives_what_the_definition_gives(text: str, stops: list[str], cuts: list[int]) -> None:
    expected, stopped = one_character_at_a_time(text, stops)
    watcher = StopStrings(stops)
    shown = ""
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for start, end in pairwise(bounds):
        shown += watcher.push(text[start:end])
        assert expected.startswith(shown), "something was shown that had to be held back"
    shown += watcher.finish()
    assert (shown, watcher.matched is not None) == (expected, stopped)


def test_only_a_possible_beginning_is_held_back() -> None:
    watcher = StopStrings(["\n\nUser:"])
    assert watcher.push("Fine.\n") == "Fine."
    assert watcher.push("\nUs") == ""
    assert watcher.push("ing") == "\n\nUsing"
    assert watcher.push(" it\n\nUser") == " it"
    assert watcher.push(": more") == ""
    assert (watcher.matched, watcher.push("x"), watcher.finish()) == ("\n\nUser:", "", "")
