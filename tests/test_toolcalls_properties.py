"""Tool calls, for all inputs: what is encoded is read back; what is not a call is lost nowhere; pieces don't matter."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from puna.text.toolcalls import ToolCall, ToolCallParser, encode_calls

NAMES = st.from_regex(r"[A-Za-z0-9_\-.]{1,12}", fullmatch=True)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
                      max_leaves=8)  # fmt: skip
CALL = st.builds(ToolCall, NAMES, st.dictionaries(st.text() | NAMES, VALUES, max_size=4))
STYLES = st.sampled_from(["pythonic", "json", "function_tag"])
# Text made of what calls are made of.
PIECES = ["[", "]", "{", "}", "(", ")", "f", "g", "f(", "a=", "=", ",", ";", ":", " ", "\n", "'", '"', "\\", "1", "-",
          ".", '"name"', '"parameters"', '{"name": "f", "parameters": {}}', "[f()]", "[f(a=1)]", "<", ">",
          "<function=f>", "</function>", "<|python_tag|>", "<|python_start|>", "<|python_end|>", "<|", "`", "```", "*",
          "true", "None", ".call(", "brave_search", "é", "🙂"]  # fmt: skip
LOOKALIKES = st.lists(st.sampled_from(PIECES), max_size=25).map("".join)


def events(text, cuts=(), tools=None):
    parser = ToolCallParser(tools)
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    seen = []
    for start, end in pairwise(edges):
        seen += parser.push(text[start:end])
    merged = []
    for event in seen + parser.finish():
        if isinstance(event, str) and merged and isinstance(merged[-1], str):
            merged[-1] += event
        else:
            merged.append(event if isinstance(event, str) else (event.name, event.arguments))
    return merged


CUTS = st.lists(st.integers(0, 10_000), max_size=8)


@settings(max_examples=120, deadline=None)
@given(st.lists(CALL, min_size=1, max_size=3), STYLES, CUTS, st.booleans())
def test_round_trip(calls, style, cuts, known):
    tools = [call.name for call in calls] if known else None
    # repr: 1 and True, 0.0 and -0.0 are equal, but not the same
    assert repr(events(encode_calls(calls, style), cuts, tools)) == repr([(c.name, c.arguments) for c in calls])


@settings(max_examples=60, deadline=None)
@given(st.lists(CALL, min_size=1, max_size=3), STYLES)
def test_round_trip_character_by_character(calls, style):
    text = encode_calls(calls, style)
    assert repr(events(text, range(len(text)))) == repr([(c.name, c.arguments) for c in calls])


@settings(max_examples=400, deadline=None)
@given(LOOKALIKES, CUTS)
def test_pieces_do_not_matter(text, cuts):
    assert events(text, cuts) == events(text) == events(text, range(len(text)))


@settings(max_examples=400, deadline=None)
@given(LOOKALIKES | st.text())
def test_nothing_is_lost(text):
    """With no tool known there is no call: all comes out as it came in. Else text keeps its order."""
    assert "".join(events(text, range(len(text)), tools=[])) == text
    shown = iter(text)
    assert all(char in shown for event in events(text) if isinstance(event, str) for char in event)
