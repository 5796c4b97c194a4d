"""The literals that an expression needs are in every text that it is found in."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.guard.code.budget import Budget
from puna.guard.code.file_text import FileText
from puna.guard.code.needed import in_one_line, needed
from puna.guard.code.rule import all_rules


@pytest.mark.parametrize(
    ("expression", "literals"),
    [
        ("abc", ("abc",)),
        ("(?i)Auth|is_?Admin|requ(?:ire|est)", ("admin", "auth", "requ")),
        (r"\bmem(?:cpy|move)\(\w+", ("mem",)),
        (r"a(?:cpy|move)\(", ("cpy", "move")),
        (r"hashlib\.md5", ("hashlib.md5",)),
        ("abcd?ef", ("abc",)),
        ("xyz+abcdef", ("abcdef",)),
        ("(?:abc)?def", ("def",)),
        ("(?:abc){2}x", ("abc",)),
        ("(?!secret)name", ("name",)),
        ("[abc]def[]x]", ("def",)),
        ("abc|d", ()),
        ("abc|", ()),
        (".*", ()),
        ("ab{0}c", ()),
        ("(?P<name>token)=", ("token",)),
        (r"\x41123456", ("123456",)),
        (r"(a)\1234", ()),
        ("(?x)a b c d", ()),
    ],
)
def test_what_is_needed(expression, literals):
    assert needed(expression) == literals


def _expressions():
    classes = ["[ab]", "[^b]", r"[^b\n]", r"\w", r"\s", r"\S", "."]
    atom = st.sampled_from([*"abAB", r"\.", "abc", "bab", r"\b", "^", "$", *classes])
    some = st.recursive(
        atom,
        lambda inner: st.one_of(
            st.tuples(inner, st.sampled_from(["", "?", "*", "+", "{2}", "{0,2}", "{1,}", "*?"])).map(
                lambda p: f"(?:{p[0]}){p[1]}"
            ),
            st.lists(inner, min_size=1, max_size=4).map("".join),
            st.lists(inner, min_size=1, max_size=3).map("|".join).map("({})".format),
            inner.map("(?!{})".format),
            st.tuples(st.sampled_from("ab"), st.sampled_from(["?", "*", "+", "{1}"])).map("".join),
        ),
        max_leaves=8,
    )
    return st.tuples(st.sampled_from(["", "(?i)", "(?s)"]), st.lists(some, min_size=1, max_size=3).map("|".join)).map(
        "".join
    )


TEXTS = st.lists(st.sampled_from(["a", "b", "A", "B", ".", " ", "abc", "bab", "\n"]), max_size=12).map("".join)


@settings(deadline=None, max_examples=600)
@given(
    _expressions(), st.lists(st.sampled_from(["a", "b", "A", "B", ".", "abc", "bab", "\n"]), max_size=12).map("".join)
)
def test_no_text_that_matches_lacks_them(expression, text):
    literals = needed(expression)
    if literals and re.search(expression, text):
        assert any(literal in text.lower() for literal in literals)


@settings(deadline=None, max_examples=600)
@given(_expressions(), TEXTS, st.booleans())
def test_a_file_finds_what_the_expression_finds(expression, text, multiline):
    """Whatever is looked for first, and line by line or not."""
    flags = re.MULTILINE if multiline else 0
    pattern, encoded = re.compile(expression, flags), re.compile(expression.encode(), flags)
    file = FileText(text.encode(), Budget(10.0))
    assert file.holds(pattern) == (pattern.search(text) is not None)
    found = [match.span() for match in encoded.finditer(text.encode()) if match[0]]
    assert [match.span() for match in file.find(encoded) if match[0]] == found


@pytest.mark.parametrize(
    ("expression", "line"),
    [("abc.*d", True), (r"a\s+b", False), ("a[^b]c", False), (r"a[^b\n]c", True), ("(?s)a.b", False), ("ab$", False)],
)
def test_in_one_line(expression, line):
    assert in_one_line(re.compile(expression)) == line


def test_rules_find_their_examples_literals():
    """For the expressions that are in use, too: nothing that they find in any rule's example lacks what they need."""
    rules = all_rules()
    examples = [code for rule in rules for pairs in (rule.good, rule.bad) for _, code in pairs]
    patterns = {
        p
        for rule in rules
        for a in rule.alternatives
        for p in (a.file, a.not_file, re.compile(a.written.pattern.decode(), a.written.flags) if a.written else None)
        if p is not None
    }
    assert sum(bool(needed(p.pattern)) for p in patterns) > len(patterns) // 2
    for pattern in patterns:
        literals = needed(pattern.pattern)
        lacking = [c for c in examples[::7] if c.isascii() and not any(w in c.lower() for w in literals)]
        assert not literals or not any(pattern.search(code) for code in lacking)
