"""Checks of memory in C and C++ that is used, or freed again, after it was freed."""

import re
from collections.abc import Iterable, Iterator

from puna.guard.code.checks import check
from puna.guard.code.checks_facts import (
    LEAVES,
    Facts,
    address_only,
    bare,
    called,
    dereferenced,
    facts,
    in_sizeof,
    leaves,
)
from puna.guard.code.checks_null import null_tested
from puna.guard.code.view import Node

_FREES = re.compile(
    r"^(k|v|kv|g_|x|av_|u|cJSON_|R_)?free(p|_sensitive)?$|^\w+_(free|release|destroy|delete|dispose)$|^(free|release|destroy|delete|Destroy)_?\w+$|^delete$|^jbd2_journal_stop$"
)


_NOT_FREES = re.compile(
    r"(?i)(lock|sem|mutex|slot|page|ref|irq|region|list|cmd|reg|entry|mem|port|pins?)s?_?(release|delete)|release_(sock|lock|firmware|mem\w*|region)|_unref|delete_(bit|char)|free_(irq|pages?)|clear"
)


_OWNER = re.compile(
    r"(?i)^(ctx|\w*context(id)?|opaque|\w*pool|\w*cache|allocator|mem|env|db|mrb|L|js|isolate|tif|\w+_ptr|module|self)$"
)
_BESIDE = re.compile(
    r"(?i)len|size|count|num|^n\w?$|^i$|flag|mode|type|free|destroy|delete|release|unref|^(true|false|null)$"
)
_GONE = re.compile(r"^(\w*_)?free(_sensitive)?$|^[kv]+free$|^delete$|^xmlFree\w*$|^[Ff]ree\w+$")
_SHOWN = re.compile(r"(?i)print|log|trace|debug|dbg|assert|^sizeof$|^(un)?likely$|hash|delete|null")
_ANEW = re.compile(r"(?i)clear|reset|init|set|create|new|alloc|open|reserve|safefree")


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


def _held(second: Node) -> bool:
    """Whether the second argument is what is freed, out of what the first one keeps: not a length or a function."""
    return second.kind in ("name", "member", "index") and not _BESIDE.search(second.path().rsplit(".", 1)[-1])


def _freed_path(statement: Node) -> str:
    name = called(statement)
    if name and statement.args and _FREES.search(name) and not _NOT_FREES.search(name):
        if len(statement.args) > 1 and name.endswith(("_func", "_fn", "_cb")):
            return ""
        if len(statement.args) < 3:
            target = bare(statement.args[0])
            if len(statement.args) == 2:
                second = bare(statement.args[1])
                if target.kind == "call" or _OWNER.search(target.name) or _held(second):
                    target = second
            path = target.path() if target.kind in ("name", "member") else ""
            return "" if path.isupper() else path
    return ""


def _after_free(function: Node) -> Iterator[tuple[Node, str]]:
    known = facts(function)
    for call in known.of("call"):
        path = _freed_path(call)
        if not path or not _whole(call, path, known):
            continue
        above = known.parent.get(id(call))
        statement = call
        if above is not None and above.kind == "assign" and above.base is not None:
            if above.base.path() == path:
                continue
            statement = above
        search = _After(known, path, bool(_GONE.search(called(call))))
        outcome = search.meets(_statements_after(known, statement))
        outer = known.parent.get(id(statement))
        while (
            outcome is None
            and search.gone
            and outer is not None
            and outer.kind in ("if", "block")
            and not _left(outer, statement)
        ):
            straight = _straight_start(_statements_after(known, outer))
            outcome = search.meets(straight)
            outer = known.parent.get(id(outer)) if outcome is None else None
        if outcome is not None and outcome[1] != "stop":
            yield outcome


_PLAIN = re.compile(r"^(k|v|kv|g_|x|av_|u|cJSON_|R_)?free(p|_sensitive)?$|^delete$")


def _whole(call: Node, path: str, known: Facts) -> bool:
    """Whether the object itself is freed: of what the caller gave, other functions mostly free a part, unless they are
    named after it (`Curl_up_free(data)`, `conn_free(conn)`)."""
    if call.base is not None and call.base.kind == "member":
        return False
    if _PLAIN.match(called(call)):
        return True
    if path.split(".")[0] not in known.parameters:
        return _named_after(called(call), f"{path} {known.types.get(path, '')}")
    words = {path.rsplit(".", 1)[-1].lower(), re.sub(r"\W|struct|_t$", "", known.types.get(path, "-")).lower()}
    verb = "(free|destroy|release|delete|dispose)"
    return any(
        len(word) > 2 and re.search(rf"(^|_){word}_?{verb}$|^{verb}_?{word}$", called(call).lower()) is not None
        for word in map(re.escape, words)
    )


_VERBS = ("free", "destroy", "release", "delete", "dispose", "all", "stop")


def _named_after(name: str, described: str) -> bool:
    """Whether what the function says it frees is what it is given: `cache_blockdata_free(cache)` frees a part of it."""
    words = [w for w in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+", name) if w.lower() not in _VERBS]
    if not words:
        return True
    last, described = words[-1].lower(), re.sub(r"_|struct|\W", "", described).lower()
    return last in described or described in last or len(last) < 4


def _straight_start(statements: list[Node]) -> list[Node]:
    """The statements up to the first that may not run."""
    for i, node in enumerate(statements):
        if node.kind in ("if", "loop", "other"):
            return statements[:i]
    return statements


def _left(outer: Node, statement: Node) -> bool:
    """Whether the arm of the `if` that holds the statement leaves it."""
    arm = outer.orelse if any(n is statement for n in outer.orelse) else outer.body
    return outer.raw in ("labeled_statement", "case_statement") or leaves(arm)


def _statements_after(known: Facts, statement: Node) -> list[Node]:
    """What follows in the same run of statements."""
    parent = known.parent.get(id(statement))
    for run in (parent.body, parent.orelse) if parent is not None else ():
        for i, node in enumerate(run):
            if node is statement:
                return run[i + 1 :]
    return []


Outcome = tuple[Node, str] | None  # where, and: use, free, or stop (nothing more can be said)


_LEAVING = re.compile(
    r"^[A-Z0-9_]*(RET|EXIT|GOTO|THROW|FAIL|BAIL|ABORT|CHECK|REQUIRE|ERROR)[A-Z0-9_]*$|^Throw[A-Z]\w+$"
)


class _After:
    """The search through what runs after `path` was freed; `gone`: by a function that surely frees the memory."""

    def __init__(self, known: Facts, path: str, gone: bool) -> None:
        self.known = known
        self.path = path
        self.gone = gone
        self.jumped: set[str] = set()

    def meets(self, statements: list[Node], jumped: bool = False) -> Outcome:
        """What a run of statements does first with the freed pointer."""
        for node in statements:
            found: Outcome
            if node.raw in ("case_statement", "preproc_else", "preproc_elif") or (
                node.raw == "labeled_statement" and not jumped
            ):
                return node, "stop"
            if node.kind == "block":
                found = self.meets(node.body, jumped)
            elif node.kind in ("if", "loop"):
                found = self._branch(node)
            elif _LEAVING.search(called(node)):
                return node, "stop"
            else:
                found = self._expression(node)
                if found is None and node.raw == "goto_statement":
                    return self._label(node)
                if found is None and (node.kind in LEAVES or called(node) in ("exit", "abort")):
                    return node, "stop"
            if found is not None:
                return found
        return None

    def _label(self, jump: Node) -> Outcome:
        """What runs from the label on that the jump leads to, further down."""
        for node in self.known.of("block"):
            if node.raw == "labeled_statement" and node.name == jump.name and jump.name not in self.jumped:
                self.jumped.add(jump.name)
                if self.known.place[id(node)] < self.known.place[id(jump)]:
                    break
                return self.meets([*node.body, *_statements_after(self.known, node)], True) or (node, "stop")
        return jump, "stop"

    def _branch(self, node: Node) -> Outcome:
        path = self.path
        for part in node.args:
            if any(n.path() == path and n.kind in ("name", "member") for n in part.walk()):
                again = [n for n in node.body if n.kind == "call" and _freed_path(n) == path]
                asks = bare(part).path() == path or path in null_tested(bare(part))
                return (again[0], "free") if again and asks and self.gone and node.kind == "if" else (node, "stop")
        arms = [self.meets(node.body), self.meets(node.orelse)]
        told = next((arm for arm in arms if arm is not None and arm[1] != "stop"), None)
        if told is not None:
            return told
        stopped = [arm for arm in arms if arm is not None]
        if any(arm[0].kind not in LEAVES for arm in stopped) or len(stopped) == 2:
            return node, "stop"
        return None

    def _expression(self, statement: Node) -> Outcome:
        path, nodes = self.path, statement.walk()
        if statement.kind == "return" and self.gone and statement.args and bare(statement.args[0]).path() == path:
            return statement, "use"
        for node in nodes:
            if node.kind == "assign" and node.base is not None:
                written = node.base.path()
                if written == path or (path.startswith((written + ".", written + "[")) and written):
                    return node, "stop"
                if written.startswith(path + ".") and not self.gone:
                    return node, "stop"  # filled anew: only a part of it was freed
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
                and not in_sizeof(node, self.known)
                and not address_only(node, self.known)
            ):
                return node, "use"
            if node.kind == "call" and _ANEW.search(called(node)) and any(bare(a).path() == path for a in node.args):
                return node, "stop"
            given = node.kind == "call" and self.gone and not _SHOWN.search(called(node))
            if given and any(bare(a).path() == path and bare(a).kind in ("name", "member") for a in node.args):
                return node, "use"
        return None


_PUTS = re.compile(
    r"(_put|_unref|_deref|_decref|_release_ref|_drop_ref)$|^put_(?!user|unaligned|page|cpu|byte|char|bits)"
)
_NO_PUTS = re.compile(r"unlock|page|cpu|fs_|user|byte|char|bits|stream|sym|[bl]e\d|(^|_)u?int")


@check("put-used", "call")
def put_used(function: Node) -> Iterable[Node]:
    """A reference is given up and the object used in the statements that follow."""
    known = facts(function)
    for call in known.of("call"):
        if len(call.args) != 1 or not _PUTS.search(called(call)) or _NO_PUTS.search(called(call)):
            continue
        held = bare(call.args[0])
        if held.kind == "name":
            outcome = _After(known, held.name, True).meets(_statements_after(known, call))
            if outcome is not None and outcome[1] == "use":
                yield outcome[0]
