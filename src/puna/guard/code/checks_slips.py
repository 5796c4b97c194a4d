"""Checks of C and C++ for slips of the pen: = for ==, & for &&, a char for getc's result, a lock or a secret kept."""

import re
from collections.abc import Iterable

from puna.guard.code.checks import check
from puna.guard.code.checks_facts import Facts, bare, called, calls_of, dereferenced, facts
from puna.guard.code.checks_leaks import Held, arm_of
from puna.guard.code.checks_null import null_tested
from puna.guard.code.checks_outside import COUNTED, TEXT_NUMBER, taken
from puna.guard.code.view import Node


@check("assigned-in-condition", "if", "assign")
def assigned_in_condition(function: Node) -> Iterable[Node]:
    """`if (x = 1)`."""
    for node in facts(function).of("if"):
        test = node.args[0] if node.args else node
        if test.kind == "assign" and test.name == "=" and not test.type and test.args:
            value = bare(test.args[0])
            if value.kind in ("number", "constant", "string") or value.name.isupper():
                yield test


@check("null-joined-wrongly", "binary")
def null_joined_wrongly(function: Node) -> Iterable[Node]:
    """`(p != NULL) & (p->x == 1)`, `p == NULL && p->x`, `p != NULL || p->x`: the pointer is reached through where it is
    NULL."""
    known = facts(function)
    for node in known.of("binary"):
        if node.name not in ("&", "|", "&&", "||") or len(node.args) < 2:
            continue
        test = bare(node.args[0])
        paths = [p for p in null_tested(test) if p]
        if not paths:
            continue
        absent = test.name in ("==", "!")
        if (node.name == "&&" and not absent) or (node.name == "||" and absent):
            continue
        for use in bare(node.args[1]).walk():
            target = dereferenced(use)
            if target is not None and bare(target).path() in paths:
                yield use
                break


@check("null-reached", "assign")
def null_reached(function: Node) -> Iterable[Node]:
    """`p = NULL;` and the next thing that happens to p is that it is reached through."""
    known = facts(function)
    for node in known.of("assign"):
        value = bare(node.args[0]) if node.args and node.name == "=" else node
        name = node.base.path() if node.base is not None and node.base.kind == "name" else ""
        if not name or value.kind != "constant" or value.value is not None or "*" not in known.types.get(name, ""):
            continue
        start = known.place[id(node)] + len(node.walk())
        for use in known.nodes[start:]:
            if use.raw in ("labeled_statement", "case_statement", "ERROR") or use.raw.startswith("preproc"):
                break
            if use.kind != "name" or use.name != name:
                continue
            above = known.parent[id(use)]
            reached = dereferenced(above) is use and above.raw != "subscript_expression"
            if reached and not _conditional(known, above, node) and not _sized(known, above):
                yield above
            break


def _conditional(known: Facts, use: Node, since: Node) -> bool:
    """Whether the use is in a loop or branch that the assignment isn't in."""
    around = {id(n) for n in known.ancestors(since)}
    for above in known.ancestors(use):
        forks = above.kind in ("if", "loop", "conditional", "catch") or above.name in ("&&", "||")
        if forks and (id(above) not in around or arm_of(above, use, known) != arm_of(above, since, known)):
            return True
        if above.kind == "unary" and above.name == "&":
            return True
    return False


def _sized(known: Facts, node: Node) -> bool:
    return any(called(a) in ("sizeof", "typeof", "offsetof", "decltype") for a in known.ancestors(node))


_GETS = ("fgetc", "getc", "getchar", "fgetwc", "getc_unlocked")


@check("character-narrowed", "assign", "call")
def character_narrowed(function: Node) -> Iterable[Node]:
    """`char c; while ((c = getchar()) != EOF)`: EOF is no character."""
    known = facts(function)
    for call in calls_of(function, _GETS):
        node = known.parent[id(call)]
        name = node.base.path() if node.kind == "assign" and node.base is not None else ""
        if known.types.get(name) in ("char", "unsigned char") and any(n.name == "EOF" for n in known.of("name")):
            yield node


_LOCKS = {
    "pthread_mutex_lock": ("pthread_mutex_unlock",),
    "pthread_spin_lock": ("pthread_spin_unlock",),
    "pthread_rwlock_wrlock": ("pthread_rwlock_unlock",),
    "pthread_rwlock_rdlock": ("pthread_rwlock_unlock",),
    "mutex_lock": ("mutex_unlock",),
    "spin_lock": ("spin_unlock",),
    "spin_lock_irqsave": ("spin_unlock_irqrestore",),
    "spin_lock_bh": ("spin_unlock_bh",),
    "spin_lock_irq": ("spin_unlock_irq",),
    "down_read": ("up_read",),
    "down_write": ("up_write",),
    "read_lock": ("read_unlock",),
    "write_lock": ("write_unlock",),
    "EnterCriticalSection": ("LeaveCriticalSection",),
    "g_mutex_lock": ("g_mutex_unlock",),
    "mtx_lock": ("mtx_unlock",),
}


@check("lock-kept", "call", "return")
def lock_kept(function: Node) -> Iterable[Node]:
    """A return between a lock and the unlock that the function otherwise does."""
    known = facts(function)
    for call in calls_of(function, _LOCKS):
        gives, path = _LOCKS[called(call)], _held(call)
        if not path or known.in_test(call) or known.nested(call):
            continue
        given = [n for n in known.of("call") if called(n) in gives and _held(n) == path]
        if not given or known.nested(given[-1]) or any(n.raw == "ERROR" for n in known.nodes):
            continue
        again = [n for n in known.of("call") if called(n) == called(call) and _held(n) == path]
        if len(again) > 1:
            continue
        held = Held(known, "", call, given)
        for leave in known.of("return"):
            at = known.place[id(leave)]
            if known.place[id(call)] < at < known.place[id(given[-1])] and not held.settled(leave):
                yield leave
                return


def _held(call: Node) -> str:
    if not call.args:
        return ""
    lock = bare(call.args[0])
    return (lock.args[0] if lock.kind == "unary" and lock.args else lock).path()


_SECRET = re.compile(r"(?i)passw|passphrase|secret|priv_?key|session_?key|^(key|pin|pw|pwd)\d?$|_key$")


@check("secret-left", "call")
def secret_left(function: Node) -> Iterable[Node]:
    """memset of a secret array of the function, which nothing looks at afterwards: compilers leave it out."""
    known = facts(function)
    for call in calls_of(function, ("memset", "bzero") if known.arrays else ()):
        target = bare(call.args[0]) if call.args else call
        if target.kind != "name" or target.name not in known.arrays or target.name in known.static:
            continue
        if len(call.args) == 3 and bare(call.args[1]).value not in (0, "\0"):
            continue
        uses = [n for n in known.of("name") if n.name == target.name]
        later = [n for n in uses if known.place[id(n)] > known.place[id(call)] + len(call.walk())]
        if _SECRET.search(target.name) and not later and len(uses) > 2:
            yield call


_VECTORS = ("EVP_EncryptInit_ex", "EVP_EncryptInit", "EVP_EncryptInit_ex2", "EVP_CipherInit_ex")


@check("iv-constant", "call")
def iv_constant(function: Node) -> Iterable[Node]:
    """The initialisation vector is an array that was set to constants, and nothing else was put in it."""
    known = facts(function)
    for call in calls_of(function, _VECTORS):
        given = bare(call.args[4 if called(call).endswith("_ex") else 3]) if len(
            call.args) > 3 + called(call).endswith("_ex") else call  # fmt: skip
        if given.kind != "name" or given.name not in known.arrays:
            continue
        declared = [n for n in known.of("assign") if n.base is not None and n.base.path() == given.name and n.args]
        fixed = declared and all(
            n.kind in ("collection", "number", "string", "map") for n in declared[0].args[0].walk()
        )
        others = [n for n in known.of("call") if n is not call and any(bare(a).path() == given.name for a in n.args)]
        cleared = any(called(n) == "memset" for n in others)
        before = [
            n for n in others if called(n) not in ("memset", "sizeof") and known.place[id(n)] < known.place[id(call)]
        ]
        if (fixed or cleared) and not before:
            yield call


def _looked_at(known: Facts, path: str) -> bool:
    """Whether a condition looks at the value itself, not at a call that is given its address."""
    return any(
        n.path() == path and known.in_test(n) and known.parent[id(n)].name != "&"
        for kind in ("name", "member")
        for n in known.of(kind)
    )


@check("divided-by-outside", "binary")
def divided_by_outside(function: Node) -> Iterable[Node]:
    """A number out of text or a message divides, and no condition looked at it."""
    known = facts(function)
    divisions = [n for n in known.of("binary") if n.name in ("/", "%") and len(n.args) > 1]
    if not divisions:
        return
    for pattern in (TEXT_NUMBER, COUNTED):
        for node, path, _ in taken(known, pattern):
            start = known.place[id(node)]
            if known.types.get(path, "") in ("double", "float") or _looked_at(known, path):
                continue
            for use in divisions:
                if known.place[id(use)] > start and any(bare(a).path() == path for a in use.args[1:]):
                    yield use
                    return
