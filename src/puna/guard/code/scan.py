"""One scan: source in, findings out."""

import re
from collections.abc import Iterable, Iterator
from functools import cache

from puna.guard.code import configuration
from puna.guard.code.budget import Budget, OutOfTime, running
from puna.guard.code.collecting import uncollected
from puna.guard.code.finding import Finding
from puna.guard.code.flow import Flow
from puna.guard.code.knowledge import knowledge
from puna.guard.code.languages import FORMATS, RULES_OF, grammar
from puna.guard.code.lowering import MAX_DEPTH
from puna.guard.code.matching import Matcher, RuleIndex
from puna.guard.code.parsing import view
from puna.guard.code.rule import Rule, rules_for

SECONDS = 2.0  # of processor time; a scan is over by then, with what it has found
READING = 0.75  # share of its time after which a scan reads no further: what is under way must end, findings be placed
PIECE = 100_000  # bytes that are read at once; longer sources are cut at top-level lines
MAX_EMBEDDED = 200  # scripts in one file that are looked into
INCOMPLETE = "scan-incomplete"
_TOP_LEVEL = re.compile(rb"\n(?=[^\s})\]])")


@cache
def _index(language: str) -> RuleIndex:
    return RuleIndex(rules_for(language))


@uncollected()
def scan(
    source: str,
    language: str,
    rules: Iterable[Rule] | None = None,
    seconds: float = SECONDS,
    limit: float | None = None,
) -> list[Finding]:
    """The findings in `source`, in order of line; `language` is a name of `languages.LANGUAGES` or `FORMATS`. `rules`:
    these alone instead of all of the language. `limit`: the time to name where `seconds` are what is left of it. A scan
    that its limit ended says so with a finding of its own."""
    data = source.encode("utf-8", "replace")
    chosen = tuple(rules) if rules is not None else None
    found: dict[tuple[str, int], Finding] = {}
    index = _indexed(language, chosen)  # reads the rules, on the first scan of a language
    if language not in FORMATS:
        grammar(language)
    budget = Budget(seconds * READING)
    matcher = Matcher(index, data, RULES_OF.get(language, language), found, budget)
    matcher.written()
    at = 0
    for start, end in _pieces(data):
        if budget.check():
            break
        at = matcher.shift = start
        before = running.set(budget)
        try:
            _read(data, start, end, language, matcher, chosen, budget)
        except RecursionError:  # the caller's own stack counts too
            budget.deep = 0
        except OutOfTime:
            pass
        finally:
            running.reset(before)
        if budget.deep is not None:
            line = matcher.position(budget.deep)[0]
            found.setdefault(
                (INCOMPLETE, line), incomplete(line, matcher.language, f"is nested too deeply (over {MAX_DEPTH})")
            )
            budget.deep = None
    if budget.spent:
        line = matcher.file_text.position(at)[0]
        found[INCOMPLETE, line] = incomplete(line, matcher.language, f"takes longer than {limit or seconds:.2g} s")
    return sorted(found.values(), key=lambda f: (f.line, f.column, f.rule))


def _read(
    data: bytes, start: int, end: int, language: str, matcher: Matcher, rules: tuple[Rule, ...] | None, budget: Budget
) -> None:
    """One stretch of the source, and the scripts inside."""
    if language in FORMATS:
        root, embedded = configuration.read(data[start:end], language, budget)
        for script in embedded[:MAX_EMBEDDED]:
            if budget.check():
                return
            inner = matcher.inside(_indexed(script.language, rules), script.language, start + script.start)
            code = view(data[start + script.start : start + script.end], script.language, budget)
            Flow(code, knowledge(script.language), inner, budget).run()
    else:
        root = view(data[start:end], language, budget)
    Flow(root, knowledge(matcher.language), matcher, budget).run()


def _indexed(language: str, rules: tuple[Rule, ...] | None) -> RuleIndex:
    ruled = RULES_OF.get(language, language)
    return _index(ruled) if rules is None else RuleIndex(tuple(r for r in rules if ruled in r.languages))


def _pieces(data: bytes) -> Iterator[tuple[int, int]]:
    """Stretches of at most about PIECE bytes, cut before a line that starts at the margin where there is one."""
    start = 0
    while len(data) - start > PIECE * 3 // 2:
        cut = None
        for cut in _TOP_LEVEL.finditer(data, start + PIECE // 2, start + PIECE * 3 // 2):
            if cut.end() >= start + PIECE:
                break
        end = cut.end() if cut is not None else start + PIECE
        yield start, end
        start = end
    yield start, len(data)


def incomplete(line: int, language: str, reason: str) -> Finding:
    """Said where a scan stopped: what follows wasn't judged, which the caller must know."""
    return Finding(
        INCOMPLETE, "CWE-693", "warning", "high", line, 1, line, 1,
        f"The code from here on was not judged completely: it {reason}.",
        "Scan it in smaller parts.",
        "Code that is too long or too deeply nested to be judged could hide anything.", language,
    )  # fmt: skip
