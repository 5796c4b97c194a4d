"""Input that was made to break a scanner: noise, truncation, nesting, repetition, very long lines."""

import random
from collections.abc import Iterator

from puna.guard.code.languages import FORMATS, LANGUAGES
from puna.guard.code.rule import all_rules

NAMES = (*LANGUAGES, *FORMATS, None)
TOKENS = [
    *"()[]{}<>;:,.=+-*/%&|!?@#$\\'\"`\n\t\0",
    *[
        "==",
        "=>",
        "->",
        "::",
        "if",
        "else",
        "for",
        "while",
        "def",
        "class",
        "fn",
        "func",
        "fun",
        "function",
        "return",
        "import",
        "from",
        "try",
        "catch",
        "except",
        "let",
        "var",
    ],
    *[
        "const",
        "new",
        "eval",
        "exec",
        "${",
        "#{",
        "<%",
        "%>",
        "<?php",
        "?>",
        "/*",
        "*/",
        "//",
        "--",
        "null",
        "None",
        "lambda",
        "match",
        "switch",
        "case",
        "FROM",
        "RUN",
        "self",
        "this",
    ],
    *("'''", '"""', "\ufeff", "\u202e", "\ud800", "é", "中", "0", "0x", "1e999", "a", "b", "x", "y", "|"),
]


def _repeat(pick: random.Random, size: int) -> str:
    """One construct over and over, which nests or grows."""
    units = [
        *("(", "[", "{", "<", "a(", "a[", "x = {", "if (a) {", "else if x:\n", "f(g(", "!", "-", "*", "&", "a.", "a::"),
        *(
            "->",
            "a<b<",
            "a ? b : ",
            "x => ",
            "lambda: ",
            '"',
            "'",
            "`",
            "${",
            "#{",
            "'''",
            "/*",
            "//",
            "\\",
            "\n",
            "- ",
        ),
        *("a: ", "a: &x [*x, *x]\n", "{a: ", "$(", "<<E\n", "a + ", "a, ", "a=b=", "@a ", "template<", "::", "not "),
        *("return ", "0", "%s", "def f(", "class A{", "fn f(", "f'{", "\0", "\u202e", "<?php ", "?>", "--- \n"),
        *("@@ -1 +1 @@\n", "```\n", "RUN \\\n"),
    ]
    unit = pick.choice(units)
    return unit * max(1, size // len(unit))


def hostile(count: int, seed: int = 0, longest: int = 20_000) -> Iterator[tuple[str, str | None]]:
    """`count` sources, each with a language (None: to be detected). The same ones for the same seed."""
    pick = random.Random(seed)
    honest = [code for rule in all_rules() for _, code in (*rule.bad, *rule.good)]
    for _ in range(count):
        kind = pick.randrange(8)
        size = int(longest ** pick.random())
        language = pick.choice(NAMES)
        if kind == 0:
            text = pick.randbytes(size).decode("utf-8", "replace")
        elif kind == 1:
            text = pick.randbytes(size).decode("latin-1")
        elif kind == 2:
            text = "".join(pick.choice(TOKENS) + pick.choice(("", " ", "\n")) for _ in range(size // 3))
        elif kind == 3:
            text = _repeat(pick, size)
        elif kind == 4:
            text = _repeat(pick, size // 2) + _repeat(pick, size // 2)
        elif kind == 5:  # honest code, cut off
            text = pick.choice(honest)
            text = text[pick.randrange(len(text) + 1) :][: pick.randrange(len(text) + 1)]
        elif kind == 6:  # honest code with characters changed
            letters = list(pick.choice(honest))
            for _ in range(1 + len(letters) // 20):
                letters[pick.randrange(len(letters))] = pick.choice(TOKENS)
            text = "".join(letters)
        else:  # honest code of many languages, one after the other, perhaps on one line
            text = pick.choice(("\n", " ", "")).join(pick.choices(honest, k=1 + size // 300))
        yield text, language


def giants() -> Iterator[tuple[str, str | None]]:
    """5 MB: of one line, of one construct, of ordinary code."""
    million = 1_000_000
    yield "x = '" + "a" * (5 * million) + "'", "python"
    yield "a" * (5 * million), None
    yield "x=1;" * (5 * million // 4), "javascript"
    yield "(" * (5 * million), "c"
    yield "a<b<" * (5 * million // 4), "cpp"
    yield "- " * (5 * million // 2), "yaml"
    yield "[" * (5 * million), "json"
    yield '{"a":' * million, None
    yield "import os\ndef f(x):\n    os.system('ls ' + x)\n" * (5 * million // 48), "python"
    yield "password=" * (5 * million // 9), "text"
    yield "```python\nos.system(x + y)\n```\n" * (5 * million // 31), None
    yield "\0" * (5 * million), "swift"
