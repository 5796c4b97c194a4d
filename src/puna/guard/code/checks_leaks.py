"""Checks of memory, files and descriptors in C and C++ that a function takes and doesn't give back."""

import re
from collections.abc import Iterable

from puna.guard.code.checks import check
from puna.guard.code.checks_facts import Facts, bare, called, facts, leaves, shapes
from puna.guard.code.view import Node

_MEMORY = re.compile(
    r"^([mc]alloc|strn?dup|wcsdup|k[mzcv]?[mzc]?alloc(_array)?|kvzalloc|vmalloc|vzalloc|kstrdup|kmemdup)$"
)
_HANDLES = re.compile(r"^(fopen|fdopen|freopen|popen|tmpfile|opendir|open|openat|creat|socket|accept4?|mkstemp)$")
_FREES = frozenset(("free", "delete", "kfree", "vfree", "kvfree", "kfree_sensitive"))
_CLOSES = frozenset(("fclose", "pclose", "close", "closedir", "closesocket"))
_BORROWS = re.compile(  # functions of the C library that keep nothing of what they are given
    r"^(v?f?s?n?w?printf|w?mem(cpy|move|set|cmp|chr)|str\w+|wcs\w+|f(gets|puts|read|write|seeko?|tello?|flush|getc|putc|scanf)"
    r"|feof|ferror|clearerr|rewind|getc|putc|ungetc|puts|fputws?|getline|getdelim|perror|assert|sizeof|ato(i|l|ll|f)|is\w+"
    r"|p?read|p?write|send(to)?|recv(from)?|connect|bind|listen|[gs]etsockopt|shutdown|lseek|fstat|ftruncate|fsync|flock"
    r"|readdir|qsort|snprintf|sprintf|explicit_bzero|bzero|time|localtime_r|gmtime_r|inet_\w+|fileno|accept)$"
)
_LONG = 700  # nodes, some 80 lines: in longer functions who owns what mostly hangs on flags that this doesn't follow
_STARTS = re.compile(
    r"(?i)start|run|exec|invoke|call|show|open|init|attach|regist|delete|release|queue|set|add|post|send"
)
_OPAQUE = ("ERROR", "lambda_expression", "preproc_if", "preproc_ifdef", "preproc_else", "gnu_asm_expression")


@check("memory-leaked", "assign", "call")
def memory_leaked(function: Node) -> Iterable[Node]:
    """Memory that only this function knows of and doesn't free, or not before one of its returns."""
    return _leaked(function, _MEMORY, _FREES)


@check("handle-leaked", "assign", "call")
def handle_leaked(function: Node) -> Iterable[Node]:
    """A file or descriptor that only this function knows of and doesn't close, or not before one of its returns."""
    return _leaked(function, _HANDLES, _CLOSES)


def _leaked(function: Node, takes: re.Pattern[str], gives: frozenset[str]) -> Iterable[Node]:
    known = facts(function)
    if function.raw == "module" or function.name in ("main", "wmain"):  # all is given back at a program's end
        return
    if len(known.nodes) > _LONG:
        return
    seen: set[str] = set()
    for node in known.of("assign"):
        name = node.base.name if node.base is not None and node.base.kind == "name" and node.name == "=" else ""
        value = bare(node.args[0]) if name and node.args else node
        made = value.kind == "call" and value.new and value.raw == "new_expression" and gives is _FREES
        if called(value) in ("static_cast", "reinterpret_cast") and value.args:
            value = bare(value.args[0])
        if not (made or takes.match(called(value))) or name in seen:
            continue
        seen.add(name)
        if known.parent[id(node)].kind == "assign" or _set_again(known, name, node):
            continue
        if name in known.parameters or name in known.static or name not in known.types or "<" in known.types[name]:
            continue
        if not shapes(function).isdisjoint(_OPAQUE):
            return
        given = [n for n in known.of("call") if called(n) in gives and _given(n, name)]
        yield from Held(known, name, node, given).faults(made)


def _set_again(known: Facts, name: str, taken: Node) -> bool:
    return any(
        n.base is not None and n.base.path() == name and n.args and known.place[id(n)] > known.place[id(taken)]
        for n in known.of("assign")
    )


def _given(call: Node, name: str) -> bool:
    return any(bare(n).kind == "name" and bare(n).name == name for n in call.args)


class Held:
    """What one variable holds, from where it is taken on."""

    def __init__(self, known: Facts, name: str, taken: Node, given: list[Node]) -> None:
        self.known = known
        self.name = name
        self.taken = taken
        self.uses = [n for n in known.of("name") if n.name == name] if name else []
        self.given = given

    def faults(self, made: bool) -> Iterable[Node]:
        known = self.known
        kept = {known.place[id(use)]: self.kept(use) for use in self.uses}
        if not self.given:
            if not any(kept.values()):
                if len(self.uses) > 1 and not (made and self.runs()):
                    yield self.taken
                return
            first = min(place for place, what in kept.items() if what)
            yield from (n for n in known.of("return") if self.lost(n, first))
            return
        last = self.given[-1]
        for leave in [*known.of("return"), *known.of("throw")]:
            at = known.place[id(leave)]
            before = {what for place, what in kept.items() if place < at}
            owned = "kept" not in kept.values() and (not known.nested(last) or self.beside(last))  # freed in any case
            if "kept" in before or not (owned or "lent" not in before):
                continue
            if known.place[id(self.taken)] < at < known.place[id(last)] and not self.settled(leave):
                yield leave
                return

    def lost(self, leave: Node, first: int) -> bool:
        """Whether the function is left here before what it took went anywhere."""
        at = self.known.place[id(leave)]
        return self.known.place[id(self.taken)] < at < first and not self.settled(leave)

    def beside(self, given: Node) -> bool:
        """Whether it is given back in the same run of statements as it is taken in."""
        above = self.known.parent[id(self.taken)]
        run = self.known.parent.get(id(above)) if above.raw == "declaration" else above
        return run is self.known.parent[id(given)]

    def runs(self) -> bool:
        """C++: whether the object is started, shown or the like, and may delete itself."""
        members = [self.known.parent[id(n)] for n in self.uses]
        return any(n.kind == "member" and _STARTS.search(n.name) is not None for n in members)

    def kept(self, use: Node) -> str:
        """`kept`: what is held is known to others from here on; `lent`: to a function that may keep it."""
        known = self.known
        below, above = use, known.parent.get(id(use))
        while above is not None:
            if above.kind == "call":
                if (
                    above.base is below
                    or called(above) == "sizeof"
                    or called(above) in _FREES
                    or called(above) in _CLOSES
                ):
                    return ""
                if called(above) in ("static_cast", "reinterpret_cast"):
                    below, above = above, known.parent.get(id(above))
                    continue
                return "" if _BORROWS.match(called(above)) else "lent"
            if above.kind == "assign":
                if above.base is below:
                    again = above.args and above is not self.taken and bare(above.args[0]).kind == "call"
                    return "kept" if again or above.name != "=" else ""
                return "kept"
            if above.kind == "return":
                return "kept"
            if above.kind == "unary":
                if above.name == "&":
                    return "kept"
                return ""
            if above.kind in ("index", "member"):
                held = known.parent.get(id(above))
                while held is not None and held.kind in ("index", "member"):
                    held = known.parent.get(id(held))
                return "kept" if held is not None and held.kind == "unary" and held.name == "&" else ""
            if above.kind in ("if", "loop", "function", "block") or (
                above.kind == "binary" and above.name not in ("+", "-", ",")
            ):
                return ""
            if above.kind == "collection" or (above.kind == "other" and above.raw == "switch_statement"):
                return "kept"
            below, above = above, known.parent.get(id(above))
        return ""

    def settled(self, leave: Node) -> bool:
        """Whether there is nothing to give back at this return, or it was given back."""
        known = self.known
        if any(n.kind == "name" and n.name == self.name and self.gives_on(n) for n in leave.walk()):
            return True
        above = {id(n): n for n in known.ancestors(leave)}
        if any(self.asked(n.args[0]) for n in above.values() if n.kind in _FORKS and n.args):
            return True
        for fork in known.ancestors(self.taken):
            arm = arm_of(fork, self.taken, known) if fork.kind in _FORKS or fork.raw == "case_statement" else 0
            if arm and (id(fork) not in above or arm_of(fork, leave, known) != arm):
                return True
        return any(known.place[id(n)] < known.place[id(leave)] and self.passed(n, above) for n in self.given)

    def gives_on(self, use: Node) -> bool:
        """Whether the return hands the variable itself on, not a member of what it points to."""
        above = self.known.parent[id(use)]
        return above.kind != "member" or self.known.parent[id(above)].kind != "return"

    def asked(self, test: Node) -> bool:
        """Whether the condition looks at the variable itself, not at what a call makes of it."""
        return any(n.kind == "name" and n.name == self.name and not self._through(n) for n in test.walk())

    def _through(self, use: Node) -> bool:
        """Whether the use is what a call is given, or reaches through the pointer."""
        above = self.known.parent[id(use)]
        return above.kind in ("member", "index") or any(_BORROWS.match(called(a)) for a in self.known.ancestors(use))

    def passed(self, given: Node, above: dict[int, Node]) -> bool:
        """Whether the way to the place under `above` leads past `given`."""
        for fork in self.known.ancestors(given):
            if fork.kind == "if" and id(fork) not in above:
                arm = (fork.body, fork.orelse)[arm_of(fork, given, self.known) == 2]
                if leaves(arm):
                    return False
        return True


_FORKS = ("if", "loop", "conditional", "catch", "other")


def arm_of(fork: Node, node: Node, known: Facts) -> int:
    """1: in the body, 2: in the else part, 0: in the condition."""
    inside = {id(node), *(id(n) for n in known.ancestors(node))}
    if any(id(n) in inside for n in fork.orelse):
        return 2
    return 1 if any(id(n) in inside for n in fork.body) or fork.raw == "switch_statement" else 0
