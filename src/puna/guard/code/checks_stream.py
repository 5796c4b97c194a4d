"""Checks of WinPR's streams, whose readers don't ask how many bytes remain: what is read against what was asked for."""

import re
from collections.abc import Iterable

from puna.guard.code.checks import check
from puna.guard.code.checks_facts import alternatives, bare, called, facts, in_order, leaves
from puna.guard.code.view import Node

_UNREAD = re.compile(r"^Stream_Read_(U?INT(8|16|32|64))|^Stream_Read$|^Stream_Seek(_U?INT\d+)?$")
_TESTS = re.compile(
    r"^Stream_(GetRemaining\w+|CheckAndLog\w+|Ensure\w+|SafeSeek\w*|New|EnsureRemaining\w+|StaticInit)$"
)
_FIELD = re.compile(r"^Stream_(Read|Seek)_U?INT(8|16|32|64)(_BE)?$")
_MOVES = re.compile(r"^Stream_(Seek|Read|SetPosition|SetPointer|Rewind)")


@check("stream-unread", "call")
def stream_unread(function: Node) -> Iterable[Node]:
    """Fields are read before anything asked how many bytes remain; after a step of unknown length it must be asked
    again."""
    known = facts(function)
    asked = False
    for node in known.of("call"):
        name = called(node)
        if _TESTS.search(name):
            asked = True
        elif _UNREAD.search(name):
            if not asked:
                yield node
                return
            if name in ("Stream_Seek", "Stream_Read") and node.args and bare(node.args[-1]).kind != "number":
                asked = False


@check("stream-read-on", "call", "if")
def stream_read_on(function: Node) -> Iterable[Node]:
    """`if (Stream_GetRemainingLength(s) < 4) return;` and then more than 4 bytes are read before it is asked again."""
    known = facts(function)
    left: int | None = None  # bytes that are there for sure; None where nothing is known
    for node in known.nodes if any(_TESTS.match(called(n)) for n in known.of("call")) else ():
        if node.kind == "if" and node.args and leaves(node.body):
            for test in alternatives(node.args[0]):
                if in_order(test) and called(bare(test.args[0])) == "Stream_GetRemainingLength":
                    left = _promised(test)
                elif any(_TESTS.match(called(n)) for n in test.walk()):
                    left = None
        elif node.kind == "loop" or node.raw in ("case_statement", "switch_statement", "labeled_statement"):
            left = None
        elif node.kind == "call":
            if left is None:
                continue
            if _TESTS.match(called(node)) and not known.in_test(node):
                left = None
            elif (taken := _taken(node)) is not None:
                left -= taken
                if left < 0:
                    yield node
                    return
            elif not called(node).startswith("Stream_") or _MOVES.match(called(node)):
                left = None if any(bare(a).kind == "name" for a in node.args[:3]) else left


def _promised(test: Node) -> int | None:
    """The bytes that remain where `Stream_GetRemainingLength(s) < n` doesn't hold."""
    limit = bare(test.args[1])
    if test.name not in ("<", "<=") or limit.kind != "number" or not isinstance(limit.value, int):
        return None
    return limit.value + (test.name == "<=")


def _taken(call: Node) -> int | None:
    """The number of bytes that a call reads or skips; None if it isn't constant."""
    field = _FIELD.match(called(call))
    if field is not None:
        return int(field[2]) // 8
    if called(call) == "Stream_Seek" and len(call.args) == 2:
        step = bare(call.args[1])
        return step.value if step.kind == "number" and isinstance(step.value, int) else None
    return None
