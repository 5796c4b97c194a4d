"""Checks of pointers in C and C++ that may be NULL where they are reached through."""

import re
from collections.abc import Iterable

from puna.guard.code.checks import check
from puna.guard.code.checks_facts import Facts, address_only, bare, called, dereferenced, facts, in_sizeof, leaves
from puna.guard.code.view import Node

_NULLABLE = re.compile(
    r"^(m|c|re)alloc$|^(str|mem)n?dup$|^(fopen|fdopen|freopen|popen|opendir|getenv|strchr|strrchr|strstr|memchr|strpbrk|strtok|strtok_r|bsearch|localtime|gmtime|getpw\w+|getgr\w+|gethostby\w+|crypt|setlocale|dlsym|dynamic_cast|lock)$"
    r"|^k[mvz]?[mzc]alloc(_node|_array)?$|^kmem\w*alloc\w*$|^vz?alloc\w*$|^devm_k\w*alloc$|^kstrdup$|^kmemdup$|^alloc_\w+$|^dev_alloc\w*"
    r"|^\w+_(find|lookup)_\w+$|^\w+_by_(id|name|index|idx|addr|address|handle|fd|key|number|type|pid|uid|tag|attr)$"
    r"|^(xa_load|rcu_dereference_sk_user_data|dev_get_platdata|skb_header_pointer|of_get_(next_)?(child|parent)\w*)$"
    r"|^Clone(?!\w*Info$)\w+$|^platform_get_resource\w*$|^\w+_(find|lookup|search)(_by_\w+|_entry)?$|^find_\w+$|^lookup_\w+$|^GetValueFrom\w+$|^\w+_get_(resource|property|attr)\w*$"
    r"|^(av_(mallocz?|calloc|strdup|memdup|frame_alloc|packet_alloc|buffer_alloc)\w*|avformat_new_\w+|av_new_\w+|ReadImage|CloneImage|AcquireMagickMemory|AcquireQuantumMemory|xmlNew\w+|xmlStrn?dup|xmlNodeListGetString|xmlGet(Ns)?Prop|gf_malloc|talloc\w*|ldb_request_get_control|GetInput|GetOutput|GetTemporary|GetIntermediates|GetVariableInput|usb_ifnum_to_if|usb_altnum_to_altsetting|of_match_device|of_get_property|devm_ioremap|ioremap|k?asprintf|devm_kasprintf|devm_kstrdup|nlmsg_new|skb_(clone|copy|copy_expand|realloc_headroom)|create_\w*workqueue|OPENSSL_(m|z)alloc|OPENSSL_strdup|BN_(new|dup)|EVP_\w+_new|BIO_new\w*|pem_malloc|zend_hash_(str_)?find\w*|inet_ntoa|lookupKey\w*|r_(buf_get_at|str_new\w*|list_new)|table_lookup|in6?_dev_get|__in6_dev_get|buflist_find\w*)$"
    r"|^(?!g_|gtk_|gdk_|G[A-Z])(\w*(_|^)alloc|\w+_(create|open|start|clone|dup))$|^Create(?!\w*(Info|Builder))\w*$"
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
        "getc",
        "fgetc",
        "fscanf",
        "fseek",
        "ftell",
        "feof",
        "rewind",
        "readdir",
    ]
)


@check("null-unchecked", "call")
def null_unchecked(function: Node) -> Iterable[Node]:
    """A pointer from a function that may give NULL is reached through before any condition looked at it."""
    known = facts(function)
    for node in known.of("assign"):
        if node.name != "=" or node.base is None or not node.args:
            continue
        name = called(bare(node.args[0]))
        path = node.base.path()
        if path and name and _NULLABLE.search(name) and not _ABORTS.search(name) and not known.in_test(node):
            found = _first_use(known, node, path)
            if found is not None:
                yield found
    for node in known.of("call"):
        if called(node) in READERS and any(_GIVES_NULL.search(called(bare(a)) or "-") for a in node.args[:2]):
            yield node


def _first_use(known: Facts, node: Node, path: str) -> Node | None:
    """The first place after an assignment to `path` that reaches through it, if no condition comes before."""
    inside = {id(n) for n in node.walk()}
    end = len(known.nodes)
    for at in range(known.place[id(node)] + 1, end):
        use = known.nodes[at]
        if at >= end:
            return None
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
        if use.kind == "return" and not known.nested(use):
            end = at + len(use.walk())
        target = dereferenced(use)
        if target is not None and bare(target).path() == path:
            return None if in_sizeof(use, known) or address_only(use, known) else use
        if use.kind == "call" and any(
            a.kind == "unary" and a.name == "&" and a.args and a.args[0].path() == path for a in use.args
        ):
            return None
        if use.kind == "call" and called(use) in READERS and any(bare(a).path() == path for a in use.args):
            return use
    return None


_KEYED = re.compile(r"^(get|fetch|find|lookup|search|query)(_[a-z]+|[A-Z]\w+)$|^(Get|Find|Lookup)[A-Z]\w+$")
_KEY = re.compile(r"(?i)(^|_)(id|idx|index|key|handle|nr|no|name|tag|type)$")


@check("null-by-key", "assign", "call")
def null_by_key(function: Node) -> Iterable[Node]:
    """`p = x->get_item(id)` is reached through untested: there need not be one of that name or number."""
    known = facts(function)
    for node in known.of("assign"):
        value = bare(node.args[0]) if node.args and node.name == "=" else node
        if node.base is None or not value.args or not _KEYED.match(called(value)) or _NULLABLE.search(called(value)):
            continue
        path, key = node.base.path(), bare(value.args[-1])
        if known.types.get(path, "").endswith("*") and key.kind in ("name", "member") and _KEY.search(key.name):
            found = None if known.in_test(node) else _first_use(known, node, path)
            if found is not None:
                yield found


@check("null-tested-before", "if")
def null_tested_before(function: Node) -> Iterable[Node]:
    """`if (p) { ... } p->x`: the condition shows that p can be NULL, and what follows it reaches through p anyway."""
    known = facts(function)
    for node in known.of("if"):
        if node.orelse or not node.args or not node.body or leaves(node.body):
            continue
        for path in _held(bare(node.args[0])):
            if any(n.kind == "assign" and n.base is not None and n.base.path() == path for n in node.walk()):
                continue
            use = _reached_after(known, node, path)
            if use is not None:
                yield use


def _held(test: Node) -> list[str]:
    """Pointers that aren't NULL where the condition holds."""
    if test.kind == "binary" and test.name == "&&":
        return [path for part in test.args for path in _held(bare(part))]
    if test.kind in ("name", "member"):
        return [test.path()]
    return null_tested(test) if test.kind == "binary" and test.name == "!=" else []


def _reached_after(known: Facts, node: Node, path: str) -> Node | None:
    """The use of `path` in the statements right after `node`, if nothing between sets it or asks again."""
    parent = known.parent.get(id(node))
    runs = (parent.body, parent.orelse) if parent is not None else ()
    after = next((run[i + 1 :] for run in runs for i, n in enumerate(run) if n is node), [])
    for statement in after:
        if statement.raw in ("labeled_statement", "case_statement"):
            return None
        for use in statement.walk():
            if use.kind in ("name", "member", "index") and use.path() == path:
                above = known.parent[id(use)]
                straight = statement.kind not in ("if", "loop", "other") and not any(
                    a.kind in ("conditional", "if", "loop") or (a.kind == "binary" and a.name in ("&&", "||"))
                    for a in known.ancestors(use)
                    if known.place.get(id(a), -1) >= known.place[id(statement)]
                )
                reached = dereferenced(above) is use and known.types.get(path, "*").endswith("*")
                if not (straight and reached and above.raw != "subscript_expression"):
                    return None
                return None if in_sizeof(above, known) or address_only(above, known) else above
    return None


@check("null-late")
def null_late(function: Node) -> Iterable[Node]:
    """A pointer is reached through, and only afterwards compared with NULL, with nothing assigned between."""
    known = facts(function)
    tests = [n for kind in ("unary", "binary") for n in known.of(kind) if null_tested(n)]
    aliases = _aliases(known) if tests else {}
    reported: set[str] = set()
    for test in sorted(tests, key=lambda n: known.place[id(n)]):
        for path in null_tested(test):
            if not path or path in reported or path.count(".") > 1 or _asserted(known, test):
                continue
            use = _earlier_use(known, test, {path, *aliases.get(path, ())})
            if use is None or _refused_before(known, tests, path, known.place[id(use)]):
                continue
            if _refuses(known, test) or known.place[id(test)] - known.place[id(use)] < _NEAR:
                reported.add(path)
                yield use


def _refused_before(known: Facts, tests: list[Node], path: str, use: int) -> bool:
    """Whether the function was left already where the pointer is NULL, and nothing was assigned since: the later test
    is needless, not late."""
    asked = [
        known.place[id(t)]
        for t in tests
        if path in null_tested(t) and _refuses(known, t) and not any(a.name == "&&" for a in known.ancestors(t))
    ]
    last = max((at for at in asked if at < use), default=None)
    return last is not None and not any(
        n.base is not None and n.base.path() == path for n in known.of("assign") if last < known.place[id(n)] < use
    )


_NEAR = 100  # nodes, some ten lines


def _refuses(known: Facts, test: Node) -> bool:
    """Whether the function is left where the pointer is NULL: the test is meant for all that follows."""
    above = next((n for n in known.ancestors(test) if n.kind in ("if", "loop", "conditional")), test)
    return above.kind == "if" and (leaves(above.body) or (test.name == "!=" and leaves(above.orelse)))


def _asserted(known: Facts, test: Node) -> bool:
    """Whether the test only documents: assert(p != NULL)."""
    return any(re.search(r"(?i)assert|BUG_ON|WARN_ON", called(above) or "-") for above in known.ancestors(test))


def _is_called(known: Facts, node: Node) -> bool:
    above = known.parent.get(id(node))
    return above is not None and above.kind == "call" and above.base is node


def _aliases(known: Facts) -> dict[str, set[str]]:
    """parameter -> local names that were declared as (a cast of) it."""
    found: dict[str, set[str]] = {}
    for node in known.of("assign"):
        if node.type and node.args and node.args[0].kind == "cast" and node.base is not None:
            path = bare(node.args[0]).path()
            if path in known.parameters:
                found.setdefault(path, set()).add(node.base.path())
    return found


def null_tested(node: Node) -> list[str]:
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
    holders = {path.rpartition(".")[0] for path in paths if "." in path}  # a call that is given one may set the member
    for at in range(end - 1, -1, -1):
        node = known.nodes[at]
        if node.raw == "labeled_statement":
            return None  # others jump here, from before the use
        if node.kind == "return" and known.parent[id(node)].kind in ("function", "block") and not known.nested(node):
            return None  # another function's end, where the grammar lost the bounds
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
            (a.kind == "unary" and a.name == "&" and a.args and a.args[0].path() in paths) or a.path() in holders
            for a in node.args
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
        if node.raw == "subscript_expression" or in_sizeof(node, known) or address_only(node, known):
            continue
        above = known.parent.get(id(node))
        if above is not None and above.kind == "call" and _is_called(known, above):
            continue  # a declaration that reads as a call: int (*f)(void)
        if any(a.kind == "assign" and a.name == "=" and a.base is not None and a.base.path() in paths
               for a in known.ancestors(node)):  # fmt: skip
            return None
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
