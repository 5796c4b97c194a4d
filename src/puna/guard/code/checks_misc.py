"""Checks of C and C++ that look at more than one place: pairs of calls, declarations, what a handler calls."""

import re
from collections.abc import Iterable

from puna.guard.code.checks import check
from puna.guard.code.checks_facts import Facts, bare, called, facts, leaves
from puna.guard.code.checks_null import null_tested
from puna.guard.code.view import Node

_UNSAFE_IN_HANDLER = frozenset(
    [
        "printf",
        "fprintf",
        "sprintf",
        "snprintf",
        "malloc",
        "calloc",
        "realloc",
        "free",
        "puts",
        "fputs",
        "fopen",
        "fclose",
        "exit",
        "syslog",
        "localtime",
        "strtok",
    ]
)
_ENGINES = re.compile(r"(^|::|\.)(mt19937(_64)?|minstd_rand0?|default_random_engine|ranlux\w+|knuth_b)$")


@check("mismatched-delete", "assign", "call")
def mismatched_delete(function: Node) -> Iterable[Node]:
    """C++: memory given back to another allocator than it came from."""
    known = facts(function)
    made: dict[str, set[str]] = {}
    for node in known.of("assign"):
        if node.base is not None and node.args:
            value = bare(node.args[0])
            while called(value) in ("static_cast", "reinterpret_cast") and value.args:
                value = bare(value.args[0])
            made_new = value.kind == "call" and value.new and value.raw == "new_expression"
            kind = "new" + value.name if made_new else called(value)
            made.setdefault(node.base.path(), set()).add(kind)
    for node in known.of("call"):
        name = called(node)
        if name in ("free", "delete") and len(node.args) == 1:
            sources = made.get(bare(node.args[0]).path(), set())
            mixed = name == "free" and sources and sources <= {"new", "new[]"}
            mixed = mixed or (name == "delete" and sources == {"new[]" if not node.name else "new"})
            if mixed or (name == "delete" and sources and sources <= {"malloc", "calloc", "realloc", "strdup"}):
                yield node


@check("local-returned", "return")
def local_returned(function: Node) -> Iterable[Node]:
    """`return buf` where buf is an array of the function that isn't static."""
    if re.search(r"(?i)string|vector|array|span|view|optional|::", function.type):
        return
    known = facts(function)
    for node in known.of("return"):
        if node.args:
            value = bare(node.args[0])
            if value.kind == "name" and value.name in known.arrays and value.name not in known.static:
                yield node
            if value.kind == "unary" and value.name == "&" and value.args and value.args[0].kind == "name":
                name = value.args[0].name
                if name in known.types and name not in known.parameters | known.static:
                    yield node


@check("realloc-lost", "assign", "call")
def realloc_lost(function: Node) -> Iterable[Node]:
    """`p = realloc(p, n)`."""
    for node in facts(function).of("assign"):
        if node.base is not None and node.args and node.name == "=":
            value = bare(node.args[0])
            if (
                called(value) == "realloc"
                and value.args
                and bare(value.args[0]).path() == node.base.path()
                and (node.base.kind == "name" or (node.base.kind == "member" and _goes_on(function, node)))
            ):
                yield node


def _goes_on(function: Node, node: Node) -> bool:
    """Whether the function returns where realloc failed, so that whoever holds the structure goes on without."""
    known = facts(function)
    path = node.base.path() if node.base is not None else ""
    return any(
        known.place[id(test)] > known.place[id(node)] and leaves(test.body) and path in null_tested(bare(test.args[0]))
        for test in known.of("if")
    )


@check("file-race", "call")
def file_race(function: Node) -> Iterable[Node]:
    """access() on a path, or stat() whose owner or kind of file is looked at, that is then opened by the same name."""
    known = facts(function)
    calls = {called(n) for n in known.of("call")}
    looked_at = not calls.isdisjoint({"stat", "lstat"}) and "fstat" not in calls
    looked_at = looked_at and any(n.name in ("st_uid", "st_gid", "S_ISLNK") for n in known.nodes)
    for node in known.of("call"):
        asks = called(node) in ("access", "_access") or (looked_at and called(node) in ("stat", "lstat"))
        if asks and node.args and known.in_test(node):
            path = node.args[0].path()
            for later in known.nodes[known.place[id(node)] :] if path else ():
                if called(later) in _OPENS and later.args and later.args[0].path() == path:
                    yield later
                    return
        elif called(node) == "exists" and node.args and _refused(known, node):
            path, test = node.args[0].path(), known.parent[id(node)]
            inside = known.parent[id(test)]
            for later in (n for part in inside.body for n in part.walk()) if path and inside.kind == "if" else ():
                if called(later).endswith("ofstream") and later.args and later.args[0].path() == path:
                    yield later
                    return


_OPENS = ("fopen", "open", "creat", "freopen")


def _refused(known: Facts, node: Node) -> bool:
    above = known.parent[id(node)]
    return above.kind == "unary" and above.name == "!"


@check("fixed-seed", "assign", "call")
def fixed_seed(function: Node) -> Iterable[Node]:
    """C++: an engine made from a constant."""
    for node in facts(function).of("assign"):
        if _ENGINES.search(node.type) and node.args:
            value = bare(node.args[0])
            if value.kind == "call" and len(value.args) == 1 and bare(value.args[0]).kind == "number":
                yield node


@check("signal-handler", "call")
def signal_handler(function: Node) -> Iterable[Node]:
    """A function with the shape and the name of a signal handler that calls what isn't safe in one."""
    if len(function.args) != 1 or function.args[0].type != "int" or function.type != "void":
        return
    if re.search(r"(?i)signal|^sig|_sig|handler$|^on_?(sig|int|term|hup|chld|alarm)", function.name) and re.search(
        r"(?i)^(sig|s|signo|signum|signal|n|num)", function.args[0].name
    ):
        for node in facts(function).of("call"):
            if called(node) in _UNSAFE_IN_HANDLER:
                yield node
                return
