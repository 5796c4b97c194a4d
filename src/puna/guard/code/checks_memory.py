"""Checks of memory use in C and C++: what is known about a pointer, an index or a length where it is used."""

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache

from puna.guard.code.checks import check
from puna.guard.code.view import Node

LEAVES = ("return", "throw", "exit")
_ASSERTS = re.compile(
    r"(?i)assert|check|require|expect|ensure|verify|BUG_ON|WARN_ON|IS_ERR|^(UN)?LIKELY$|THROW_IF|validate"
)
_NULLABLE = re.compile(
    r"^(m|c|re)alloc$|^(str|mem)n?dup$|^(fopen|fdopen|freopen|popen|opendir|getenv|strchr|strrchr|strstr|memchr|strpbrk|strtok|strtok_r|bsearch|localtime|gmtime|getpw\w+|getgr\w+|gethostby\w+|crypt|setlocale|dlsym)$"
    r"|^k[mvz]?[mzc]alloc(_node|_array)?$|^kmem\w*alloc\w*$|^vz?alloc\w*$|^devm_k\w*alloc$|^kstrdup$|^kmemdup$|^alloc_\w+$|^dev_alloc\w*"
    r"|^Clone(?!\w*Info$)\w+$|^platform_get_resource\w*$|^\w+_(find|lookup|search)(_by_\w+|_entry)?$|^find_\w+$|^lookup_\w+$|^GetValueFrom\w+$|^\w+_get_(resource|property|attr)\w*$"
)
_ABORTS = re.compile(
    r"(?i)^(x|xx|e|g|s|safe|ck|must|checked|die|p|apr|ngx|mrb|js|lua|zend|R|rb|Py|GC|cosmo|nofail|v8|OP|emalloc)_?[mcr]?e?alloc|^g_|^x|^safe_|^must|^mrb_|^luaM|^apr_|^zend|^e(m|c|re)alloc"
)
_GIVES_NULL = re.compile(r"^(getenv|crypt|strchr|strrchr|strstr|memchr|strpbrk|GetValueFrom\w+|setlocale|dlerror)$")
READERS = frozenset(
    [
        "strcpy",
        "strncpy",
        "strcat",
        "strncat",
        "strlen",
        "strcmp",
        "strncmp",
        "strdup",
        "memcpy",
        "memmove",
        "memset",
        "memcmp",
        "sprintf",
        "fgets",
        "fread",
        "fwrite",
        "fclose",
        "fprintf",
        "fputs",
        "atoi",
        "atol",
        "strtol",
    ]
)


class Facts:
    """One function, looked at once: nodes in source order with their parents, blocks, and what conditions test."""

    def __init__(self, function: Node) -> None:
        self.nodes: list[Node] = []
        self.parent: dict[int, Node] = {}
        self.place: dict[int, int] = {}
        self.parent.update((id(n), function) for n in function.body)
        stack = list(reversed(function.body))
        while stack:
            node = stack.pop()
            self.place[id(node)] = len(self.nodes)
            self.nodes.append(node)
            below = [*node.args, *([node.base] if node.base is not None else []), *node.body, *node.orelse]
            if function.raw == "module":
                below = [n for n in below if n.kind not in ("function", "class")]
            for child in below:
                self.parent[id(child)] = node
            stack.extend(reversed(below))
        self.arrays: dict[str, Node] = {}
        self.static: set[str] = set()
        self.types: dict[str, str] = {a.name: a.type for a in function.args}
        self.parameters = {a.name for a in function.args if a.name}
        for node in self.nodes:
            if node.kind == "assign" and node.base is not None and node.type and node.base.kind == "name":
                self.types.setdefault(node.base.name, node.type)
                if node.marks:
                    self.static.add(node.base.name)
                if node.type.endswith("[]") and isinstance(node.value, Node):
                    self.arrays[node.base.name] = node.value
        self.tests = [test for node in self.nodes for test in _tests(node)]
        self.testing = {id(test) for test in self.tests}
        self.tested: dict[str, list[int]] = {}
        for test in self.tests:
            at = self.place[id(test)]
            for node in test.walk():
                path = node.path() if node.kind in ("name", "member", "index") else ""
                if path:
                    self.tested.setdefault(path, []).append(at)

    def tested_between(self, path: str, start: int, end: int) -> bool:
        return any(start <= at <= end for at in self.tested.get(path, ()))

    def in_test(self, node: Node) -> bool:
        """Whether the node is (part of) a condition."""
        return id(node) in self.testing or any(id(above) in self.testing for above in self.ancestors(node))

    def ancestors(self, node: Node) -> Iterator[Node]:
        above = self.parent.get(id(node))
        while above is not None:
            yield above
            above = self.parent.get(id(above))

    def compared(self, path: str) -> list[tuple[Node, Node]]:
        """(comparison, other side) for every comparison of orders or equality that has `path` on one side."""
        found = []
        for node in self.nodes:
            if node.kind == "binary" and node.name in ("<", ">", "<=", ">=", "==", "!=") and len(node.args) == 2:
                for one, other in (node.args, node.args[::-1]):
                    if any(n.path() == path for n in one.walk()):
                        found.append((node, other))
        return found


@lru_cache(maxsize=2)
def facts(function: Node) -> Facts:
    return Facts(function)


def _tests(node: Node) -> list[Node]:
    if node.kind == "if" or node.kind == "conditional":
        return node.args[:1]
    if node.kind == "loop":
        return node.args
    if node.kind == "binary" and node.name in ("&&", "||", "==", "!="):
        return [node]
    if node.kind == "unary" and node.name == "!":
        return [node]
    if node.kind == "call" and node.base is not None and (_ASSERTS.search(node.base.name) or node.base.name.isupper()):
        return node.args
    return []


def bare(node: Node) -> Node:
    """Without casts and single wrappers."""
    while node.kind in ("cast", "other") and len(node.args) == 1:
        node = node.args[0]
    return node


def called(node: Node) -> str:
    """The last name of what a call calls; "" for anything else."""
    return node.base.name if node.kind == "call" and node.base is not None else ""


def leaves(nodes: list[Node]) -> bool:
    """Whether a run of statements ends by leaving it."""
    if not nodes:
        return False
    last = nodes[-1]
    return (
        last.kind in LEAVES
        or (last.kind == "block" and leaves(last.body))
        or called(last) in ("exit", "abort", "_exit")
    )


def dereferenced(node: Node) -> Node | None:
    """What `node` reaches through, if it is `p->x`, `p[i]` or `*p`."""
    if node.kind in ("member", "index"):
        return node.base
    if node.kind == "unary" and node.name == "*" and node.args:
        return node.args[0]
    return None


def _in_sizeof(node: Node, known: Facts) -> bool:
    return any(called(above) in ("sizeof", "typeof", "offsetof") for above in known.ancestors(node))


def _address_only(node: Node, known: Facts) -> bool:
    """`&p->x` computes an address without reading."""
    for above in known.ancestors(node):
        if above.kind == "unary" and above.name == "&":
            return True
        if above.kind not in ("member", "index"):
            return False
    return False


@check("null-unchecked")
def null_unchecked(function: Node) -> Iterable[Node]:
    """A pointer from a function that may give NULL is reached through before any condition looked at it."""
    known = facts(function)
    for node in known.nodes:
        if node.kind != "assign" or node.name != "=" or node.base is None or not node.args:
            continue
        name = called(bare(node.args[0]))
        path = node.base.path()
        if path and name and _NULLABLE.search(name) and not _ABORTS.search(name) and not known.in_test(node):
            found = _first_use(known, node, path)
            if found is not None:
                yield found
    for node in known.nodes:
        if called(node) in READERS and any(_GIVES_NULL.search(called(bare(a)) or "-") for a in node.args[:2]):
            yield node


def _first_use(known: Facts, node: Node, path: str) -> Node | None:
    """The first place after an assignment to `path` that reaches through it, if no condition comes before."""
    inside = {id(n) for n in node.walk()}
    for use in known.nodes[known.place[id(node)] + 1 :]:
        if id(use) in inside:
            continue
        if (
            use.kind in ("name", "member", "index")
            and use.path() == path
            and known.in_test(use)
            and dereferenced(known.parent[id(use)]) is not use
        ):
            return None
        if use.kind == "assign" and use.base is not None and use.base.path() == path:
            return None
        target = dereferenced(use)
        if target is not None and bare(target).path() == path:
            return None if _in_sizeof(use, known) or _address_only(use, known) else use
        if use.kind == "call" and any(
            a.kind == "unary" and a.name == "&" and a.args and a.args[0].path() == path for a in use.args
        ):
            return None
        if use.kind == "call" and called(use) in READERS and any(bare(a).path() == path for a in use.args[:2]):
            return use
    return None


@check("null-late")
def null_late(function: Node) -> Iterable[Node]:
    """A pointer is reached through, and only afterwards compared with NULL, with nothing assigned between."""
    known = facts(function)
    aliases = _aliases(known)
    reported: set[str] = set()
    for test in known.nodes:
        for path in _null_tested(test):
            if path in reported or path.count(".") > 1:
                continue
            use = _earlier_use(known, test, {path, *aliases.get(path, ())})
            if use is not None:
                reported.add(path)
                yield use


def _aliases(known: Facts) -> dict[str, set[str]]:
    """parameter -> local names that were declared as (a cast of) it."""
    found: dict[str, set[str]] = {}
    for node in known.nodes:
        if node.kind == "assign" and node.type and node.args and node.args[0].kind == "cast" and node.base is not None:
            path = bare(node.args[0]).path()
            if path in known.parameters:
                found.setdefault(path, set()).add(node.base.path())
    return found


def _null_tested(node: Node) -> list[str]:
    """Paths that this condition compares with NULL: `!p`, `p == NULL`."""
    if node.kind == "unary" and node.name == "!" and node.args:
        return [node.args[0].path()] if node.args[0].kind in ("name", "member") else []
    if node.kind == "binary" and node.name in ("==", "!=") and len(node.args) == 2:
        one, other = bare(node.args[0]), bare(node.args[1])
        if (other.kind == "constant" and other.value is None) or (
            other.kind == "name" and other.name in ("NULL", "nullptr")
        ):
            return [one.path()] if one.kind in ("name", "member") else []
    return []


def _earlier_use(known: Facts, test: Node, paths: set[str]) -> Node | None:
    """A use before `test` that always happens when `test` is reached, without an assignment between."""
    end = known.place[id(test)]
    around = {id(a) for a in known.ancestors(test)}
    for at in range(end - 1, -1, -1):
        node = known.nodes[at]
        if (
            node.kind == "assign"
            and node.base is not None
            and node.args
            and node.base.path() in paths
            and node.name == "="
            and not (node.type and bare(node.args[0]).path() in paths)
        ):
            return None
        if node.kind == "call" and any(
            a.kind == "unary" and a.name == "&" and a.args and a.args[0].path() in paths for a in node.args
        ):
            return None
        if (
            node.kind in ("name", "member")
            and node.path() in paths
            and known.in_test(node)
            and dereferenced(known.parent[id(node)]) is not node
        ):
            return None
        target = dereferenced(node)
        if target is None or bare(target).path() not in paths or id(node) in around:
            continue
        if node.raw == "subscript_expression" or _in_sizeof(node, known) or _address_only(node, known):
            continue
        owner = next(
            (
                a
                for a in known.ancestors(node)
                if a.kind in ("if", "loop", "conditional", "catch", "function")
                or a.raw in ("case_statement", "switch_statement")
                or (a.kind == "binary" and a.name in ("&&", "||"))
            ),
            None,
        )
        if owner is None or id(owner) in around:
            if owner is not None and owner.kind == "if" and not _same_arm(owner, node, test, known):
                continue
            if owner is not None and (owner.kind in ("conditional", "binary")):
                continue
            return node
    return None


def _same_arm(owner: Node, one: Node, other: Node, known: Facts) -> bool:
    def arm(node: Node) -> int:
        inside = {id(node), *(id(a) for a in known.ancestors(node))}
        return next(
            (i for i, part in enumerate((owner.args, owner.body, owner.orelse)) if any(id(p) in inside for p in part)),
            0,
        )

    return arm(one) in (0, arm(other))


_FREES = re.compile(
    r"^(k|v|kv|g_|x|av_|u|cJSON_|R_)?free(p|_sensitive)?$|^\w+_(free|release|destroy|delete|dispose)$|^(free|release|destroy|delete|Destroy)_?\w+$|^delete$|^jbd2_journal_stop$"
)
_NOT_FREES = re.compile(
    r"(?i)(lock|sem|mutex|slot|page|ref|irq|region|list|cmd|reg|entry|mem|port|pins?)s?_?(release|delete)|release_(sock|lock|firmware|mem\w*|region)|_unref|delete_(bit|char)|free_(irq|pages?)|clear"
)


@check("freed-used")
def freed_used(function: Node) -> Iterable[Node]:
    """A pointer is reached through after it was freed, in the statements that follow in the same block."""
    for use, kind in _after_free(function):
        if kind == "use":
            yield use


@check("freed-twice")
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
            and not _in_sizeof(node, known)
            and not _address_only(node, known)
        ):
            return node, "use"
    return None
