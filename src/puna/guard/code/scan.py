"""One scan: source in, findings out."""

import time
from collections.abc import Iterable
from functools import cache

from puna.guard.code import languages
from puna.guard.code.finding import Finding
from puna.guard.code.flow import Flow
from puna.guard.code.knowledge import knowledge
from puna.guard.code.matching import Matcher, RuleIndex
from puna.guard.code.rule import Rule, rules_for

SECONDS = 2.0  # a scan stops here, with what it has found


@cache
def _index(language: str) -> RuleIndex:
    return RuleIndex(rules_for(language))


def scan(source: str, language: str, rules: Iterable[Rule] | None = None, seconds: float = SECONDS) -> list[Finding]:
    """The findings in `source`, in order of line; `language` is a name of `languages.LANGUAGES`. `rules`: these alone
    instead of all of the language."""
    data = source.encode("utf-8", "replace")
    ruled = languages.RULES_OF.get(language, language)
    index = _index(ruled) if rules is None else RuleIndex(tuple(r for r in rules if ruled in r.languages))
    end = time.monotonic() + seconds
    matcher = Matcher(index, data, ruled)
    Flow(languages.view(data, language), knowledge(ruled), matcher, lambda: time.monotonic() > end).run()
    return sorted(matcher.found.values(), key=lambda f: (f.line, f.column, f.rule))
