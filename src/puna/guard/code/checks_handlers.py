"""Checks of handlers in Java, Kotlin and C#: whose record is given, and whether anything asks for a null."""

import re
from collections.abc import Iterable, Iterator

from puna.guard.code.checks import check
from puna.guard.code.checks_facts import Facts, bare, called, facts
from puna.guard.code.view import Node

_ROUTES = re.compile(
    r"^(Get|Put|Patch|Delete|Request)Mapping$|^Http(Get|Put|Patch|Delete)$|^(GET|PUT|DELETE|PATCH)$|^(Get|Put|Delete)$"
)
_LOOKUPS = re.compile(
    r"(?i)^((find|get|delete|remove|fetch|load)(One)?ById(OrThrow|OrNull)?(Async)?|getReferenceById|getOne|Find(Async)?|"
    r"(First|Single)(OrDefault)?(Async)?|deleteById|DeleteAsync)$"
)
_ID = re.compile(r"(?i)(^|_)(id|uuid|number|no)$|Id$")
_MAYBE_OTHERS = re.compile(
    r"(?i)account|invoice|payment|order|patient|medical|prescription|wallet|transaction|payslip|salar|message|document|"
    r"credit_?card|booking|reservation|ticket|statement|receipt|address|profile|subscription|conversation|"
    r"notification|note"
)
_SURELY_OTHERS = re.compile(
    r"(?i)account|invoice|payment|patient|medical|prescription|wallet|payslip|salar|bank_?statement|creditcard"
)
_ASKS = re.compile(
    r"(?i)principal|authenticat|authori[sz]|current_?user|owner|permission|policy|session|security|tenant|isinrole|"
    r"claims|getuser|user_?id|username|forbid|access|\bauth\b|\bUser\.(Id|Find|Get|Claims|Has)"
)
_VERBS = ("get", "put", "patch", "delete")
_LOGINS = re.compile(
    r"^(PreAuthorize|Secured|RolesAllowed|Authorize|AuthenticationPrincipal)$|^(Principal|Authentication|UserDetails|Jwt|"
    r"ClaimsPrincipal|OidcUser|OAuth2User)$"
)


@check("record-of-anyone", "call")
def record_of_anyone(function: Node) -> Iterable[Node]:
    """A handler gives or deletes the record that the address names, and nothing in it asks whose it is: where the
    handler knows who is calling, or the record is nobody else's business."""
    types = {a.type for a in function.args} | _names([mark for a in function.args for mark in a.marks])
    known = any(_LOGINS.match(t) for t in types | _names(function.marks))
    return _unasked(function, _MAYBE_OTHERS if known else _SURELY_OTHERS)


@check("personal-record-of-anyone", "call")
def personal_record_of_anyone(function: Node) -> Iterable[Node]:
    """The same in a class that all have to log in for."""
    return _unasked(function, _MAYBE_OTHERS)


def _names(marks: list[Node]) -> set[str]:
    return {n.name for mark in marks for n in mark.walk() if n.kind in ("name", "member")}


def _unasked(function: Node, kinds: re.Pattern[str]) -> Iterator[Node]:
    if not any(_ROUTES.match(mark) for mark in _names(function.marks)):
        return
    texts = [str(n.value) for mark in function.marks for n in mark.walk() if n.kind == "string"]
    if any(re.search(r"(?i)role|authority|owner|permission|@\w|#\w", text) for text in texts):
        return
    known = facts(function)
    if _asks(known.nodes):
        return
    given = {a.name for a in function.args if _ID.search(a.name)}
    for node in known.of("call"):
        if (
            _looks_up(node, kinds, f"{function.type} {' '.join(texts)}")
            and {n.name for a in node.args for n in a.walk() if n.kind == "name"} & given
        ):
            yield node
            return


def _asks(nodes: list[Node]) -> bool:
    return any(_ASKS.search(n.path() or n.name) for n in nodes if n.kind in ("name", "member"))


def _looks_up(node: Node, kinds: re.Pattern[str], about: str) -> bool:
    """`invoices.findById(...)`, `db.Orders.Find(...)`, for records of these kinds; `about`: what else names them."""
    if not _LOOKUPS.match(called(node)) or node.base is None or node.base.base is None:
        return False
    return kinds.search(f"{node.base.base.path()} {about}") is not None


@check("routed-record-of-anyone", "call")
def routed_record_of_anyone(function: Node) -> Iterable[Node]:
    """Ktor: the same in a route below `authenticate`."""
    known = facts(function)
    for route in known.of("call"):
        head = _head(route)
        path = head.args[0] if head is not None and head.args else route
        if head is None or called(head) not in _VERBS or path.kind != "string" or "{" not in str(path.value):
            continue
        above = [_head(n) for n in known.ancestors(route)]
        if not any(n is not None and called(n) == "authenticate" for n in above):
            continue
        below = route.args[-1].walk()
        records = [n for n in below if _looks_up(n, _MAYBE_OTHERS, str(path.value))]
        if records and not _asks(below) and any(n.path() == "call.parameters" for n in below):
            yield records[0]


def _head(node: Node) -> Node | None:
    """Of `get("/x") { ... }` the part before the block."""
    below = node.base if node.kind == "call" else None
    return below if below is not None and below.kind == "call" else None


_MAYBE = frozenset(
    """FirstOrDefault SingleOrDefault LastOrDefault FirstOrDefaultAsync SingleOrDefaultAsync getenv
    GetEnvironmentVariable""".split()  # noqa: SIM905 - a list of words
)


@check("maybe-nothing-used", "call", "member")
def maybe_nothing_used(function: Node) -> Iterable[Node]:
    """`list.FirstOrDefault(...).Name`, or the same through a variable that no condition asks for."""
    known = facts(function)
    held = {
        node.base.name: node
        for node in known.of("assign")
        if node.base is not None and node.base.kind == "name" and node.args and _maybe(node.args[0])
    }
    for node in known.of("member"):
        base = bare(node.base) if node.base is not None else None
        if base is None or node.raw == "conditional_access_expression":
            continue
        if _maybe(base):
            yield node
        elif base.kind == "name" and base.name in held and not _asked(known, base.name, node):
            del held[base.name]
            yield node


def _maybe(node: Node) -> bool:
    node = bare(node)
    return node.kind == "call" and called(node) in _MAYBE and node.base is not None and len(node.args) < 2


def _asked(known: Facts, name: str, use: Node) -> bool:
    """Whether a condition, a pattern or a call has the name before its use."""
    at = known.place[id(use)]
    if known.tested.get(name):
        return True
    return any(n.kind == "call" and any(bare(a).path() == name for a in n.args) for n in known.nodes[:at])
