"""Checks of variables and buffers in C and C++ that are read although nothing, or not everything, set them."""

import re
from collections.abc import Iterable

from puna.guard.code.checks import check
from puna.guard.code.checks_facts import LEAVES, Facts, bare, called, calls_of, facts, shapes
from puna.guard.code.view import Node

_KINDS = re.compile(
    r"(const )?(unsigned |signed )?(int|long|short|char|float|double|size_t|ssize_t|u?int\d+_t|bool|struct \w+|\w+_t)"
    r"( (int|long))?( ?\*)*"
)
_UNSET, _MAYBE, _SET = 0, 1, 2


@check("value-maybe-unset", "assign")
def value_maybe_unset(function: Node) -> Iterable[Node]:
    """A variable without a first value is set on some ways only, and what follows them all reads it."""
    known = facts(function)
    names = {
        n.base.name: n
        for n in known.of("assign")
        if not n.args and n.base is not None and n.base.kind == "name" and not n.marks and _KINDS.fullmatch(n.type)
    }
    if not names:
        return
    if any(raw in ("labeled_statement", "ERROR") or raw.startswith("preproc") for raw in shapes(function)):
        return
    uses: dict[str, list[Node]] = {name: [] for name in names}
    for node in known.of("name"):
        if node.name in uses:
            uses[node.name].append(node)
    for name, declared in names.items():
        block = known.parent[id(declared)]
        run = known.parent.get(id(block))
        if len(uses[name]) < 3 or run is None or block.raw != "declaration" or run.raw == "switch_statement":
            continue
        first = known.parent[id(uses[name][1])]
        if first.kind == "assign" and first.base is uses[name][1] and known.parent[id(first)] is run:
            continue  # set by the first that happens to it
        if any(not _plain(known, n, declared) for n in uses[name]):
            continue
        found = _first_read(known, name, _following(run, block))
        if found is not None:
            yield found


def _plain(known: Facts, use: Node, declared: Node) -> bool:
    """Whether the variable is set by assignments and read by expressions only: its address isn't taken."""
    above = known.parent[id(use)]
    if above is declared:
        return True
    if above.kind == "assign" and above.base is use:
        return not above.type and above.name == "="
    if above.kind == "unary" and above.name in ("&", "++", "--"):
        return False
    return above.raw not in ("comma_expression", "lambda_capture_specifier") and not called(above).isupper()


def _following(run: Node, block: Node) -> list[Node]:
    for statements in (run.body, run.orelse):
        for i, node in enumerate(statements):
            if node is block:
                return statements[i + 1 :]
    return []


def _first_read(known: Facts, name: str, statements: list[Node]) -> Node | None:
    """The first read in this run of statements, if a way leads there that leaves the variable unset and another that
    sets it."""
    state = _UNSET
    for node in statements:
        inside = [n for n in node.walk() if n.kind == "name" and n.name == name]
        if not inside:
            continue
        reads = [n for n in inside if not _written(known, n)]
        conditional = node.kind in ("if", "loop") or node.raw in ("switch_statement", "for_statement", "try_statement")
        if not conditional:
            if reads and state == _MAYBE and not _guarded(known, reads[0], node):
                return reads[0]
            return None
        head = [n for n in _head(node) if n.kind == "name"]
        if state == _MAYBE and head and head[0].name == name and head[0] in reads and node.kind == "if":
            return head[0]
        if state == _MAYBE or any(n.name == name for n in head):
            return None
        after = _after(node, name)
        if after == _SET or (after == _UNSET and inside):
            return None
        state = after
    return None


def _head(node: Node) -> list[Node]:
    return [n for a in node.args[:1] for n in a.walk() if a.raw != "compound_statement"]


def _guarded(known: Facts, use: Node, statement: Node) -> bool:
    for above in known.ancestors(use):
        if above is statement:
            return False
        if above.kind == "conditional" or (above.kind == "binary" and above.name in ("&&", "||")):
            return True
    return False


def _written(known: Facts, use: Node) -> bool:
    above = known.parent[id(use)]
    return above.kind == "assign" and above.base is use


def _after(node: Node, name: str) -> int:
    """Whether the variable is set when a conditional statement is through."""
    if node.kind == "if":
        states = [_through(arm, name) for arm in (node.body, node.orelse)]
    elif node.raw == "switch_statement":
        states = _cases(node, name)
    elif node.kind == "loop" or node.raw == "for_statement":
        loop = node if node.kind == "loop" else next((n for n in node.body if n.kind == "loop"), node)
        if any(_sets(n, name) for first in node.body if loop is not node and first is not loop for n in first.walk()):
            return _SET
        return _MAYBE if _searches(loop, name) else _SET
    else:
        return _SET
    if all(s == _SET for s in states):
        return _SET
    return _MAYBE if any(s != _UNSET for s in states) and any(s != _SET for s in states) else _UNSET


def _through(statements: list[Node], name: str) -> int:
    """Whether the variable is set at the end of a run; one that leaves has nothing to set."""
    state = _UNSET
    for node in statements:
        if any(n.kind == "assign" and n.base is not None and n.base.path() == name for n in _head(node)):
            return _SET
        if node.kind == "block":
            inner = _through(node.body, name)
        elif node.kind == "if" or node.kind == "loop" or node.raw in ("switch_statement", "for_statement"):
            about = node.kind == "if" or any(n.kind == "name" and n.name == name for n in node.walk())
            inner = _after(node, name) if about else _UNSET
        elif node.kind in LEAVES or called(node).isupper() or _ends(called(node)):
            return _SET
        else:
            inner = _SET if any(_sets(n, name) for n in node.walk()) else _UNSET
        if inner == _SET:
            return _SET
        state = max(state, inner)
    return state


def _sets(node: Node, name: str) -> bool:
    """Assigns to it, or is a call with it, which may be a macro that does."""
    if node.kind == "call":
        return any(n.kind == "name" and n.name == name for n in node.args)
    return node.kind == "assign" and node.base is not None and node.base.path() == name


def _ends(name: str) -> bool:
    return bool(_ENDS.search(name))


_ENDS = re.compile(r"(?i)exit|abort|die|fatal|panic|usage|error|unreachable|throw|longjmp|bug|fail|assert")


def _cases(node: Node, name: str) -> list[int]:
    """One state for each case of a switch that has numbers or characters as cases (all of an enumeration's names may
    be there), and one for none of them."""
    block = node.args[-1]
    cases = [n for n in block.body if n.raw == "case_statement"]
    if not cases or len(cases) != len(block.body):
        return [_SET]
    states = []
    default = False
    for i, case in enumerate(cases):
        label = case.body[0] if case.body else case
        if label.kind not in ("number", "string"):
            default = True
            if label.kind in ("name", "member"):
                return [_SET]
        body: list[Node] = []
        for later in cases[i:]:
            body += later.body
            if any(n.kind in LEAVES for n in later.body):
                break
        stop = next((at for at, n in enumerate(body) if n.raw == "break_statement"), len(body))
        states.append(_through(body[:stop], name))
    return states if default else [*states, _UNSET]


def _searches(loop: Node, name: str) -> bool:
    """A loop over elements that sets the variable where one fits, and is left there."""
    if not loop.args or loop.args[-1].kind in ("number", "constant") or loop.raw == "do_statement":
        return False
    found = False
    sets = [n for n in loop.walk() if n.kind == "assign" and n.base is not None and n.base.path() == name]
    for node in (n for part in loop.body for n in part.walk()):
        if node.kind == "if" and node.body and node.body[-1].raw == "break_statement":
            left = [n for n in sets if not any(n is m for m in node.body)]
            found, sets = found or len(left) < len(sets), left
    return found and not sets


_APPENDS = ("strcat", "strncat", "wcscat", "strlcat")
_TEXT = re.compile(r"(const )?(unsigned )?(char|wchar_t)(\[\]| ?\*)")


@check("text-unset", "assign", "call")
def text_unset(function: Node) -> Iterable[Node]:
    """A buffer without contents is appended to, or measured, before anything was put in it."""
    known = facts(function)
    for call in calls_of(function, (*_APPENDS, "strlen")):
        if not call.args:
            continue
        target = bare(call.args[0])
        if target.kind != "name" or not _TEXT.fullmatch(known.types.get(target.name, "")):
            continue
        if target.name in known.parameters or target.name in known.static:
            continue
        uses = [n for n in known.of("name") if n.name == target.name and known.place[id(n)] < known.place[id(target)]]
        made = [known.parent[id(n)] for n in uses]
        tests = [n for n in made if n.kind in ("if", "unary", "binary") and n.name in ("", "!", "==", "!=")]
        if not made or made[0].kind != "assign" or len(made) - len(tests) != 1:
            continue
        declared = made[0]
        empty = not declared.args and target.name in known.arrays
        empty = empty or bool(declared.args and called(bare(declared.args[0])) == "malloc")
        if empty and not shapes(function) & {"labeled_statement", "ERROR"}:
            yield call
            return


_LEAVES_KERNEL = {"copy_to_user": 1, "copyout": 0, "nla_put": 3, "put_cmsg": 4}


@check("record-unset-sent", "assign", "call")
def record_unset_sent(function: Node) -> Iterable[Node]:
    """A structure on the stack goes to user space or over the network, and nothing cleared it first."""
    known = facts(function)
    for call in calls_of(function, _LEAVES_KERNEL):
        at = _LEAVES_KERNEL[called(call)]
        if len(call.args) <= at:
            continue
        source = bare(call.args[at])
        name = source.args[0].path() if source.kind == "unary" and source.name == "&" and source.args else ""
        sets = [n for n in known.of("assign") if n.base is not None]
        declared = next((n for n in sets if n.type and n.base is not None and n.base.path() == name), None)
        if not name or declared is None or declared.args or not declared.type.startswith("struct"):
            continue
        before = known.nodes[known.place[id(declared)] : known.place[id(call)]]
        whole = [
            n
            for n in before
            if n.kind == "name" and n.name == name and known.parent[id(n)].kind not in ("member", "assign")
        ]
        copied = any(n.kind == "assign" and n.base is not None and n.base.path() == name and n.args for n in before)
        members = [n for n in sets if n in before and n.base is not None and n.base.path().startswith(name + ".")]
        if not whole and not copied and members:
            yield call
            return


@check("value-unset", "assign")
def value_unset(function: Node) -> Iterable[Node]:
    """A number or pointer is declared without a value, and the first that happens to it is that it is read."""
    known = facts(function)
    for node in known.of("assign"):
        plain_kind = _SCALAR.fullmatch(node.type.strip()) if node.type else None
        if node.args or node.base is None or node.base.kind != "name" or plain_kind is None or node.marks:
            continue
        name = node.base.name
        for use in known.nodes[known.place[id(node)] + 1 :]:
            if use is node.base or use.kind != "name" or use.name != name:
                continue
            above = known.parent[id(use)]
            between = known.nodes[known.place[id(node)] : known.place[id(use)]]
            if any(n.raw == "ERROR" or called(n).isupper() for n in between):  # a macro may set it
                break
            if (
                above.kind in ("binary", "return")
                and above.name not in (">>", ",")
                and not _maybe_set(known, name, use)
            ):
                yield use
            break


_SCALAR = re.compile(
    r"(const )?(unsigned |signed )?(int|long|short|char|float|double|size_t|u?int\d+_t|bool)( (int|long))?"
)


def _maybe_set(known: Facts, name: str, use: Node) -> bool:
    """Whether the read may come after something that sets it: in a loop, or behind a label."""
    return (
        any(a.kind in ("loop", "catch") or a.raw == "switch_statement" for a in known.ancestors(use))
        or any(n.raw in ("labeled_statement", "goto_statement") for n in known.nodes)
        or any(n.kind == "other" and any(m.path() == name for m in n.walk()) for n in known.of("other"))
    )
