"""docs/code-guard.md tells what the rules cover; PUNA_UPDATE_DOCS=1 makes the page's tables anew."""

import collections
import os
import re
from pathlib import Path

from puna.guard.code.rule import SPOKEN, all_rules

PAGE = Path(__file__).parents[1] / "docs" / "code-guard.md"
# CWE Top 25 of 2024 (https://cwe.mitre.org/top25/archive/2024/2024_cwe_top25.html) -> CWEs that count as covering it:
# itself, and the more special ones that rules name instead
TOP_25 = {
    79: (80, 83, 87),
    787: (120, 121, 122, 242, 676, 193, 131, 680),
    89: (),
    352: (),
    22: (23, 36, 73),
    125: (126, 127, 129),
    78: (),
    416: (415, 825),
    862: (),
    434: (),
    94: (95, 96, 1336),
    20: (1284, 1287, 625, 777, 185),
    77: (78, 88),
    287: (306, 345, 347, 521),
    269: (250, 732, 276),
    502: (),
    200: (209, 532, 497, 215),
    863: (),
    918: (),
    119: (120, 121, 122, 125, 787, 129, 131, 676),
    476: (690, 252),
    798: (259, 321),
    190: (191, 680, 131),
    400: (1333, 770, 776, 409, 674),
    306: (),
}


def tables() -> str:
    by_cwe: dict[int, list] = collections.defaultdict(list)
    for rule in all_rules():
        by_cwe[int(rule.cwe[4:])].append(rule)
    link = "[CWE-{0}](https://cwe.mitre.org/data/definitions/{0}.html)"
    lines = [f"{len(all_rules())} rules, {len(by_cwe)} CWEs.", "", "| CWE | rules | languages |", "|---|---|---|"]
    for number, rules in sorted(by_cwe.items()):
        spoken = [name for name in SPOKEN if any(name in rule.languages for rule in rules)]
        names = "all" if len(spoken) == len(SPOKEN) else ", ".join(spoken)
        lines.append(f"| {link.format(number)} | {len(rules)} | {names} |")
    lines += ["", "The CWE Top 25 of 2024, by languages with a rule for it or for a special case of it:", ""]
    lines += ["| CWE | languages |", "|---|---|"]
    for number, special in TOP_25.items():
        rules = [rule for cwe in (number, *special) for rule in by_cwe.get(cwe, [])]
        names = ", ".join(name for name in SPOKEN if any(name in rule.languages for rule in rules))
        lines.append(f"| {link.format(number)} | {names or 'none'} |")
    return "\n".join(lines)


def test_the_page_tells_what_is_covered() -> None:
    text = PAGE.read_text("utf-8")
    made = f"<!-- covered -->\n{tables()}\n<!-- end covered -->"
    if os.environ.get("PUNA_UPDATE_DOCS"):
        PAGE.write_text(
            re.sub("<!-- covered -->.*<!-- end covered -->", lambda _: made, text, flags=re.DOTALL), "utf-8"
        )
    assert made in PAGE.read_text("utf-8"), "run PUNA_UPDATE_DOCS=1 python -m pytest tests/test_guard_docs.py"


def test_sixty_cwes_are_covered() -> None:
    assert len({rule.cwe for rule in all_rules()}) >= 60
