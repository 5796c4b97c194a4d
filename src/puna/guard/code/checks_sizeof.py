"""Checks of sizeof in C and C++: of pointers taken for arrays, and of arrays that are filled without an end mark."""

import re
from collections.abc import Iterable

from puna.guard.code.checks import check
from puna.guard.code.checks_facts import bare, called, calls, calls_of, facts
from puna.guard.code.view import Node

_SHOWS = ("printf", "fprintf", "puts", "fputs", "strlen", "strcpy", "strcat", "strcmp", "snprintf", "fopen", "syslog")


@check("member-unterminated", "call", "member")
def member_unterminated(function: Node) -> Iterable[Node]:
    """`strncpy(e->name, s, sizeof(e->name));` and then e->name is used as text, without an end mark being set."""
    known = facts(function)
    for call in calls_of(function, ("strncpy",)):
        target, size = (bare(call.args[0]), bare(call.args[2])) if len(call.args) == 3 else (call, call)
        path = target.path() if target.kind == "member" else ""
        if not path or called(size) != "sizeof" or not size.args or bare(size.args[0]).path() != path:
            continue
        ended = any(
            n.base is not None and n.base.kind == "index" and n.base.base is not None and n.base.base.path() == path
            for n in known.of("assign")
        )
        after = known.place[id(call)]
        for use in calls_of(function, _SHOWS) if not ended else ():
            if known.place[id(use)] > after and any(bare(a).path() == path for a in use.args):
                yield use
                break


@check("array-of-caller-measured", "binary", "call")
def array_of_caller_measured(function: Node) -> Iterable[Node]:
    """`sizeof(a) / sizeof(a[0])` with a parameter: it is a pointer."""
    known = facts(function)
    for node in known.of("binary") if "sizeof" in calls(function) else ():
        if node.name != "/" or len(node.args) != 2 or not all(called(bare(a)) == "sizeof" for a in node.args):
            continue
        whole = bare(node.args[0]).args
        name = bare(whole[0]).name if whole and bare(whole[0]).kind == "name" else ""
        if name in known.parameters and re.search(r"(\*|\[\])$", known.types.get(name, "")):
            yield node


@check("sizeof-pointer", "call")
def sizeof_pointer(function: Node) -> Iterable[Node]:
    """The size argument of a memory function is sizeof of the very pointer that it gets."""
    known = facts(function)
    for node in known.of("call"):
        if (
            called(node) in ("memset", "memcpy", "memmove", "strncpy", "snprintf", "fgets", "bzero", "explicit_bzero")
            and node.args
        ):
            pointers = {
                n.name
                for n in map(bare, node.args[:2])
                if n.kind == "name" and n.name not in known.arrays and known.types.get(n.name, "").endswith("*")
            }
            for size in node.args[1:]:
                inside = bare(size.args[0]) if called(size) == "sizeof" and size.args else size
                if inside is not size and inside.kind == "name" and inside.name in pointers:
                    yield node
