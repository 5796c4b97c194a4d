"""Every rule's examples are its tests: each bad one is found by the rule, each good one by none."""

from dataclasses import replace

import pytest

from puna.guard.code.rule import Rule, all_rules
from puna.guard.code.scan import scan

RULES = all_rules()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_bad_examples_are_found_and_good_ones_are_not(rule: Rule) -> None:
    for language, code in rule.bad:
        found = [finding.rule for finding in scan(code, language)]
        assert rule.id in found, f"{rule.id} misses its bad example in {language} (found: {found}):\n{code}"
    for language, code in rule.good:
        wrong = [(finding.rule, finding.line) for finding in scan(code, language)]
        assert not wrong, f"{wrong} in a good example of {rule.id} in {language}:\n{code}"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_each_way_to_match_is_shown_by_an_example(rule: Rule) -> None:
    """Mutation: with one entry of `match` taken away, one of the bad examples is no longer found."""
    for i in range(len(rule.alternatives)):
        less = replace(rule, alternatives=rule.alternatives[:i] + rule.alternatives[i + 1 :])
        missed = [
            code for language, code in rule.bad if rule.id not in [f.rule for f in scan(code, language, rules=[less])]
        ]
        assert missed, f"{rule.id}: no bad example needs entry {i + 1} of match"
