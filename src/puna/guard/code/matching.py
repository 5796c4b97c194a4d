"""Rules against what the flow analysis reports."""

import copy
import math

from puna.guard.code.budget import Budget
from puna.guard.code.checks import NEEDS
from puna.guard.code.checks_facts import facts
from puna.guard.code.conditions import Test
from puna.guard.code.file_text import FileText
from puna.guard.code.finding import Finding
from puna.guard.code.lowering import MAX_NAME
from puna.guard.code.pattern import last_name
from puna.guard.code.rule import Alternative, Rule
from puna.guard.code.scope import Call, Listener, Scope
from puna.guard.code.value import Atom, Value
from puna.guard.code.view import Node

Entry = tuple[Rule, Alternative]
_NO_ENTRIES: list[Entry] = []
MAX_SEEN = 8192  # answers that an index remembers
MAX_WRITTEN = 100  # matches of one rule in the source as written


class RuleIndex:
    """A set of rules, looked up by what they match on. Built once for each set; read only afterwards."""

    def __init__(self, rules: tuple[Rule, ...]) -> None:
        self.named: dict[str, dict[str, list[Entry]]] = {"call": {}, "assign": {}}
        self.seen: dict[str, dict[tuple[str, ...], list[Entry]]] = {"call": {}, "assign": {}}
        self.loose: dict[str, list[Entry]] = {}
        self.checks: dict[frozenset[str], list[Entry]] = {}  # by the kinds of nodes that they need
        self.able: dict[frozenset[str], list[Entry]] = {}
        self.keys: dict[str, list[Entry]] = {}
        for rule in rules:
            for alternative in rule.alternatives:
                names = alternative.patterns.names() if alternative.patterns is not None else None
                if alternative.kind in self.named and names is not None:
                    for name in names:
                        self.named[alternative.kind].setdefault(name, []).append((rule, alternative))
                elif alternative.check is not None:
                    self.checks.setdefault(NEEDS[alternative.check], []).append((rule, alternative))
                else:
                    self.loose.setdefault(alternative.kind, []).append((rule, alternative))

    def at(self, kind: str, paths: tuple[str, ...]) -> list[Entry]:
        """The entries whose patterns match one of the paths."""
        seen = self.seen[kind]
        found = seen.get(paths)
        if found is None:
            if len(seen) >= MAX_SEEN:
                seen.clear()
            table = self.named[kind]
            maybe = [entry for name in {last_name(path) for path in paths} for entry in table.get(name, _NO_ENTRIES)]
            maybe += self.loose.get(kind, _NO_ENTRIES)
            found = [entry for entry in maybe if entry[1].patterns is not None and entry[1].patterns.match(paths)]
            seen[paths] = found
        return found

    def keyed(self, key: str) -> list[Entry]:
        """The entries for this key."""
        found = self.keys.get(key)
        if found is None:
            if len(self.keys) >= MAX_SEEN:
                self.keys.clear()
            entries = self.loose.get("key", _NO_ENTRIES)
            found = [e for e in entries if e[1].regex is not None and e[1].regex.fullmatch(key)]
            self.keys[key] = found
        return found

    def checks_for(self, kinds: frozenset[str]) -> list[Entry]:
        """The entries whose checks may find something in a function with nodes of these kinds."""
        found = self.able.get(kinds)
        if found is None:
            if len(self.able) >= MAX_SEEN:
                self.able.clear()
            found = [entry for needs, entries in self.checks.items() if needs <= kinds for entry in entries]
            self.able[kinds] = found
        return found


class Matcher(Listener):
    """Collects the findings of one file in `found`. `shift` is added to the nodes' offsets (for a piece that is read
    by itself)."""

    def __init__(
        self,
        index: RuleIndex,
        source: bytes,
        language: str,
        found: dict[tuple[str, int], Finding],
        budget: Budget,
        shift: int = 0,
    ) -> None:
        self.index = index
        self.budget = budget
        self.file_text = FileText(source, budget)
        self.language = language
        self.found = found
        self.shift = shift
        self.file_matches: dict[int, bool] = {}
        self.entered: set[int] = set()  # functions of the tree that is walked, by their ids

    def inside(self, index: RuleIndex, language: str, shift: int) -> "Matcher":
        """One for code of another language in the same file."""
        made = copy.copy(self)
        made.index, made.language, made.shift = index, language, shift
        made.file_matches = {}
        made.entered = set()
        return made

    # ---- what is reported

    def call(self, call: Call) -> None:
        for rule, alternative in self.index.at("call", call.paths):
            if self.shaped(alternative, call) and self.placed(alternative, call.scope):
                held = _call_tests(alternative, call)
                if held:
                    self.add(rule, call.node, held)

    def assign(self, node: Node, target: Value, value: Value, scope: Scope) -> None:
        for rule, alternative in self.index.at("assign", target.paths):
            self.consider(rule, alternative, node, {"value": value, "target": target}, scope)

    def pair(self, node: Node, key: str, value: Value, scope: Scope) -> None:
        if len(key) > MAX_NAME:
            return
        for rule, alternative in self.index.keyed(key):
            at = value.node if value.node is not None and value.node.start >= node.start else node
            self.consider(rule, alternative, at, {"value": value}, scope)

    def compare(self, node: Node, left: Value, right: Value, scope: Scope) -> None:
        for rule, alternative in self.index.loose.get("compare", _NO_ENTRIES):
            if node.name in alternative.operators:
                for one, other in ((left, right), (right, left)):
                    if self.consider(rule, alternative, node, {"one": one, "other": other}, scope):
                        break

    def text(self, node: Node, value: Value, scope: Scope) -> None:
        values = {"value": value}
        for rule, alternative in self.index.loose.get("text", _NO_ENTRIES):
            self.consider(rule, alternative, node, values, scope)

    def result(self, node: Node, value: Value, scope: Scope) -> None:
        for rule, alternative in self.index.loose.get("return", _NO_ENTRIES):
            self.consider(rule, alternative, node, {"value": value}, scope)

    def enter(self, scope: Scope) -> None:
        """A function is walked again where input goes into it; what its own shape tells, it told the first time."""
        if scope.top is not None:
            self.entered.clear()  # another tree, whose nodes may have the same ids
        looked_at = scope.function or (_statements(scope.top) if scope.top is not None else None)
        if looked_at is None or id(looked_at) in self.entered:
            return
        if scope.function is not None:
            self.entered.add(id(scope.function))
        if self.index.checks:
            self.checked(looked_at, scope)
        if scope.function is None:
            return
        for rule, alternative in self.index.loose.get("function", _NO_ENTRIES):
            if alternative.regex is not None and alternative.regex.search(scope.function.name):
                self.consider(rule, alternative, scope.function, {}, scope)

    def checked(self, function: Node, scope: Scope) -> None:
        """The checks that may find something in a function with such nodes."""
        for rule, alternative in self.index.checks_for(frozenset(facts(function).kinds)):
            assert alternative.check is not None
            for node in alternative.check(function):
                if not self.placed(alternative, scope):
                    break
                self.add(rule, node, True)

    def imported(self, node: Node, scope: Scope) -> None:
        paths = tuple(path for _, path in node.value)
        for rule, alternative in self.index.loose.get("import", _NO_ENTRIES):
            if alternative.patterns is not None and alternative.patterns.match(paths):
                self.consider(rule, alternative, node, {}, scope)

    def catch(self, node: Node, scope: Scope) -> None:
        for rule, alternative in self.index.loose.get("catch", _NO_ENTRIES):
            if (
                alternative.regex is not None
                and alternative.regex.search(node.type)
                and not (alternative.empty and not _empty(node))
            ):
                self.consider(rule, alternative, node, {}, scope)

    def written(self) -> None:
        """Rules on the source as it is written, comments and all."""
        for rule, alternative in self.index.loose.get("source", _NO_ENTRIES):
            assert alternative.written is not None
            found = self.file_text.find(alternative.written, alternative.contains, alternative.line)
            for count, match in enumerate(found):
                if count > MAX_WRITTEN or self.budget.check():
                    break
                group = match[match.lastindex or 0]
                if alternative.refused is not None and alternative.refused.search(group):
                    continue
                if alternative.entropy and entropy(group) < alternative.entropy:
                    continue
                if self.placed(alternative, Scope()):
                    start, end = match.span(match.lastindex or 0)
                    self.add(rule, Node("other", start - self.shift, end - self.shift, ""), True)

    # ---- judging

    def consider(
        self, rule: Rule, alternative: Alternative, node: Node, values: dict[str, Value], scope: Scope
    ) -> bool:
        result: Atom | bool = True
        for name, test in alternative.tests:
            held = test(values.get(name))
            if not held:
                return False
            if held is not True:
                result = held
        if not self.placed(alternative, scope):
            return False
        self.add(rule, node, result)
        return True

    def placed(self, alternative: Alternative, scope: Scope) -> bool:
        """Whether the file and the function around are as the rule wants them."""
        if alternative.file is not None or alternative.not_file is not None:
            known = self.file_matches.get(id(alternative))
            if known is None:
                known = alternative.file is None or self.file_text.holds(alternative.file)
                known = known and (alternative.not_file is None or not self.file_text.holds(alternative.not_file))
                self.file_matches[id(alternative)] = known
            if not known:
                return False
        return all(test(scope) for test in alternative.context)

    @staticmethod
    def shaped(alternative: Alternative, call: Call) -> bool:
        if alternative.count is not None and not alternative.count[0] <= len(call.args) <= alternative.count[1]:
            return False
        return not (alternative.unused and call.used) and (alternative.new is None or call.node.new == alternative.new)

    def add(self, rule: Rule, node: Node, held: Atom | bool) -> None:
        line, column = self.position(node.start)
        end_line, end_column = self.position(node.end)
        trace: tuple[tuple[int, str], ...] = ()
        confidence = rule.confidence
        if isinstance(held, Atom):
            trace = ((self.position(held.at)[0], held.text),)
            if held.label in ("parameter", "unknown") and confidence == "high":
                confidence = "medium"
            elif held.label == "unknown" and rule.confidence == "medium":
                confidence = "low"
        finding = Finding(
            rule.id,
            rule.cwe,
            rule.severity,
            confidence,
            line,
            column,
            end_line,
            end_column,
            rule.message,
            rule.fix,
            rule.why,
            self.language,
            trace=trace,
        )
        before = self.found.get((rule.id, line))
        if before is None or (before.confidence == "medium" and confidence == "high"):
            self.found[(rule.id, line)] = finding

    def position(self, offset: int) -> tuple[int, int]:
        """1-based line and column (in characters) of a node's offset."""
        return self.file_text.position(offset + self.shift)


def _call_tests(alternative: Alternative, call: Call) -> Atom | bool:
    result: Atom | bool = True
    for spec, test in alternative.tests:
        held = _argument(spec, test, call)
        if not held:
            return False
        if held is not True:
            result = held
    return result


def _argument(spec: str, test: Test, call: Call) -> Atom | bool:
    if spec == "receiver":
        return test(call.receiver)
    if spec == "any":
        return next((held for value in call.args if (held := test(value))), False)
    if spec == "last":
        return test(call.args[-1] if call.args else None)
    if spec.endswith("+"):
        return next((held for value in call.args[int(spec[:-1]) :] if (held := test(value))), False)
    position, _, key = spec.partition("/")
    if position.lstrip("-").isdigit():
        return test(call.argument(int(position), key or None))
    return test(call.argument(None, spec))


def _statements(top: Node) -> Node:
    """What stands outside every function, as a function of its own: a piece of code often lacks its head."""
    return Node(
        "function", top.start, top.end, "module", body=[n for n in top.body if n.kind not in ("function", "class")]
    )


def _empty(node: Node) -> bool:
    return all((n.kind == "other" and not n.args) or n.kind in ("exit", "constant") for n in node.body)


def entropy(text: bytes) -> float:
    """Bits per character, by the text's own frequencies."""
    if not text:
        return 0.0
    counts = [text.count(bytes([byte])) for byte in set(text)]
    return -sum(n / len(text) * math.log2(n / len(text)) for n in counts)
