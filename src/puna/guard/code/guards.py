"""Which names a condition tests: `x in ALLOWED`, `x == "a"`, `x < n`, `valid(x)`, `re.match(p, x)`; a test for
emptiness, or whether there is such a file, tests nothing."""

import re

from puna.guard.code.view import Node

COMPARISONS = {
    "==",
    "!=",
    "===",
    "!==",
    "<",
    ">",
    "<=",
    ">=",
    "in",
    "not in",
    "!in",
    "=~",
    "!~",
    "instanceof",
    "is",
    "=",
    "-eq",
    "<>",
}
EMPTINESS = {
    "len",
    "isset",
    "empty",
    "is_null",
    "strlen",
    "defined",
    "isEmpty",
    "is_none",
    "is_some",
    "nil?",
    "blank?",
    "present?",
    "hasattr",
    "count",
    "bool",
    "get",
    "has_key",
    "has",
    "print",
    "isfile",
    "isdir",
    "exists",
    "lexists",
    "is_file",
    "is_dir",
    "file_exists",
    "existsSync",
    "function_exists",
    "method_exists",
    "is_callable",
    "class_exists",
    "exist?",
    "exists?",
    "file?",
    "directory?",
    "readable?",
    "nil",
    "Exists",
    "isFile",
    "isDirectory",
    "isBlank",
    "isNotBlank",
    "isNotEmpty",
    "isNullOrEmpty",
    "isNullOrBlank",
    "IsNullOrEmpty",
    "IsNullOrWhiteSpace",
    "hasText",
    "hasLength",
    "isNull",
    "nonNull",
    "isPresent",
}

FILLS = {
    *("read", "recv", "recvfrom", "fread", "scanf", "fscanf", "sscanf", "fgets", "getline", "sizeof"),
    *("sprintf", "snprintf", "vsnprintf", "asprintf", "vasprintf", "strlcpy", "strlcat"),
}


_SAME = {"==": True, "===": True, "is": True, "!=": False, "!==": False, "is not": False}


def side(test: Node) -> bool | None:
    """Where a comparison with one constant says what a value is: True where it holds, False where it doesn't; None for
    other conditions, which say something either way."""
    if test.kind != "binary" or len(test.args) != 2 or not any(a.kind in ("string", "number") for a in test.args):
        return None
    return _SAME.get(test.name)


def tested(node: Node) -> set[str]:
    """Names (and paths of members) on which the condition's outcome depends, emptiness tests aside."""
    found: set[str] = set()
    stack = [node]
    for _ in range(200):
        if not stack:
            break
        at = stack.pop()
        if at.kind == "binary":
            if at.name in ("in", "not in") and at.args[0].kind == "string" and str(at.args[0].value).isidentifier():
                continue  # "name" in request.args: whether it is there
            if at.name in COMPARISONS:
                if not any(
                    (a.kind == "constant" and a.value is None) or (a.kind == "string" and a.value == "")
                    for a in at.args
                ):
                    for operand in at.args:
                        _mentioned(operand, found)
                else:  # `urlsplit(x).netloc == ""`, `re.match(p, x) is None`: what is called tests x
                    stack.extend(at.args)
            else:
                stack.extend(at.args)
        elif at.kind == "call":
            name = at.base.name if at.base is not None else ""
            if name in ("has", "get") and at.args and at.args[0].kind in ("name", "member"):  # HOSTS.has(url.hostname)
                _mentioned(at.args[0], found)
            elif name not in EMPTINESS:
                for operand in at.args:
                    _mentioned(operand, found)
                if at.base is not None and at.base.kind == "member" and at.base.base is not None:
                    _mentioned(at.base.base, found)
        elif at.kind == "index":  # allowed[host]
            for operand in at.args:
                _mentioned(operand, found)
        else:
            stack.extend(at.children())
    return found


_KINDS = {
    "type",
    "kind",
    "action",
    "event",
    "method",
    "status",
    "code",
    "op",
    "protocol",
    "scheme",
}  # say nothing of the rest
# parts that speak for what they are taken of; any other field (`form.age`) says nothing of the other fields
_PARTS = re.compile(
    r"(?i)host|scheme|netloc|origin|domain|authority|path|parent|suffix|^ext|size|^len|count|content|mime|name$|valid|"
    r"error|^err$|^ok$|^\d"
)


def _mentioned(node: Node, found: set[str]) -> None:
    holders: set[int] = set()
    calls: set[int] = set()
    for below in node.walk()[:60]:
        if below.kind == "call":
            calls.add(id(below.base))
        elif below.kind == "member" and below.base is not None:
            field = below.base.kind == "name" and id(below) not in calls and not _PARTS.search(below.name)
            if field or below.name in _KINDS:
                holders.add(id(below.base))
        if id(below) in holders:
            continue
        if below.kind == "call" and below.base is not None and below.base.name in FILLS:
            return  # what the call fills or measures isn't tested
        if below.kind == "name":
            found.add(below.name)
        elif (below.kind == "member" and (path := below.path())) or (below.kind == "index" and (path := keyed(below))):
            found.add(path)


def keyed(node: Node) -> str:
    """`params[x]` for an index that is a literal text; "" for any other."""
    if len(node.args) != 1 or node.args[0].kind != "string" or node.base is None:
        return ""
    path = node.base.path()
    return f"{path}[{node.args[0].value}]" if path else ""
