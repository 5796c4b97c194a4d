"""Checks of memory in C and C++ that is used, or freed again, after it was freed."""

import re
from collections.abc import Iterable, Iterator

from puna.guard.code.checks import check
from puna.guard.code.checks_facts import LEAVES, Facts, address_only, bare, called, dereferenced, facts, in_sizeof
from puna.guard.code.view import Node

_FREES = re.compile(
    r"^(k|v|kv|g_|x|av_|u|cJSON_|R_)?free(p|_sensitive)?$|^\w+_(free|release|destroy|delete|dispose)$|^(free|release|destroy|delete|Destroy)_?\w+$|^delete$|^jbd2_journal_stop$"
)


_NOT_FREES = re.compile(
    r"(?i)(lock|sem|mutex|slot|page|ref|irq|region|list|cmd|reg|entry|mem|port|pins?)s?_?(release|delete)|release_(sock|lock|firmware|mem\w*|region)|_unref|delete_(bit|char)|free_(irq|pages?)|clear"
)


@check("freed-used", "call")
def freed_used(function: Node) -> Iterable[Node]:
    """A pointer is reached through after it was freed, in the statements that follow in the same block."""
    for use, kind in _after_free(function):
        if kind == "use":
            yield use


@check("freed-twice", "call")
def freed_twice(function: Node) -> Iterable[Node]:
    """A pointer is freed again with nothing assigned to it since."""
    for use, kind in _after_free(function):
        if kind == "free":
            yield use


def _freed_path(statement: Node) -> str:
    name = called(statement)
    if name and statement.args and _FREES.search(name) and not _NOT_FREES.search(name):
        for argument in statement.args:
            target = bare(argument)
            if target.kind in ("name", "member"):
                path = target.path()
                if path and not path.isupper() and (len(statement.args) == 1 or argument is statement.args[0]):
                    return path
    return ""


def _after_free(function: Node) -> Iterator[tuple[Node, str]]:
    known = facts(function)
    for call in known.nodes:
        path = _freed_path(call) if call.kind == "call" else ""
        if not path:
            continue
        above = known.parent.get(id(call))
        statement = call
        if above is not None and above.kind == "assign" and above.base is not None:
            if above.base.path() == path:
                continue
            statement = above
        outcome = _meets(known, _statements_after(known, statement), path)
        if outcome is not None and outcome[1] != "stop":
            yield outcome


def _statements_after(known: Facts, statement: Node) -> list[Node]:
    """What follows in the same run of statements."""
    parent = known.parent.get(id(statement))
    for run in (parent.body, parent.orelse) if parent is not None else ():
        for i, node in enumerate(run):
            if node is statement:
                return run[i + 1 :]
    return []


Outcome = tuple[Node, str] | None  # where, and: use, free, or stop (nothing more can be said)


def _meets(known: Facts, statements: list[Node], path: str) -> Outcome:
    """What a run of statements does first with a freed pointer."""
    for node in statements:
        found: Outcome
        if node.raw in ("labeled_statement", "case_statement", "preproc_else", "preproc_elif"):
            return node, "stop"
        if node.kind == "block":
            found = _meets(known, node.body, path)
        elif node.kind in ("if", "loop"):
            found = _meets_branch(known, node, path)
        else:
            found = _meets_expression(known, node, path)
            if found is None and (node.kind in LEAVES or called(node) in ("exit", "abort")):
                return node, "stop"
        if found is not None:
            return found
    return None


def _meets_branch(known: Facts, node: Node, path: str) -> Outcome:
    for part in node.args:
        if any(n.path() == path and n.kind in ("name", "member") for n in part.walk()):
            return node, "stop"
    arms = [_meets(known, node.body, path), _meets(known, node.orelse, path)]
    told = next((arm for arm in arms if arm is not None and arm[1] != "stop"), None)
    if told is not None:
        return told
    stopped = [arm for arm in arms if arm is not None]
    if any(arm[0].kind not in LEAVES for arm in stopped) or len(stopped) == 2:
        return node, "stop"
    return None


def _meets_expression(known: Facts, statement: Node, path: str) -> Outcome:
    nodes = statement.walk()
    for node in nodes:
        if node.kind == "assign" and node.base is not None:
            written = node.base.path()
            if written == path or (path.startswith((written + ".", written + "[")) and written):
                return node, "stop"
        if node.kind == "unary" and node.name == "&" and node.args and node.args[0].path() == path:
            return node, "stop"
    for node in nodes:
        if node.kind == "call" and _freed_path(node) == path:
            return node, "free"
        target = dereferenced(node)
        if (
            target is not None
            and bare(target).path() == path
            and node.kind != "unary"
            and not in_sizeof(node, known)
            and not address_only(node, known)
        ):
            return node, "use"
    return None
