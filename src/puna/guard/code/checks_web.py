"""Checks of programs that answer requests, in any language: what is logged, sent back, looked up or allocated."""

import re
from collections.abc import Iterable, Iterator

from puna.guard.code.checks import check
from puna.guard.code.checks_facts import Facts, called, facts
from puna.guard.code.view import Node

_SECRET = re.compile(
    r"(?i)^(plain_?|user_?|new_?|old_?|db_?|raw_?)?(password|passwd|passphrase|secret_?key|client_?secret|api_?key|"
    r"api_?token|access_?token|refresh_?token|auth_?token|private_?key|credit_?card(_?number)?|card_?number|cvv|cvc|ssn)$"
)
_LOGS = frozenset(
    """log info debug warn warning error critical fatal trace exception print puts println error_log notice
    logger""".split()  # noqa: SIM905 - a list of words
)
_LOGGERS = re.compile(r"(?i)(^|\.|_)(console|log|logger|logging|winston|pino|log4js|Log|logs|syslog)(\(\))?$")
_PRINTS = frozenset(("print", "puts", "error_log", "println"))
_HIDES = re.compile(
    r"(?i)mask|redact|hash|len|length|bool|type|isset|empty|filter|encrypt|strip|obscur|present|blank|nil"
)
_ANSWERS = frozenset(("json", "jsonify", "JsonResponse", "send", "json_encode", "JSONResponse", "render"))
_KEPT = re.compile(
    r"(?i)^(password|passwd|password_?hash|hashed_?password|password_?digest|ssn|secret|cvv|card_?number)$"
)
_REQUEST = re.compile(r"(^|\.)(req|request|ctx|params|_GET|_POST|_REQUEST)(\.|\[|$)")
_NUMBERS = frozenset(("parseInt", "Number", "int", "intval", "to_i", "parseFloat", "float"))
_BOUNDS = re.compile(r"(?i)min|clamp|limit|max|cap|bound")
_ALLOCATES = frozenset(
    ("alloc", "allocUnsafe", "repeat", "bytearray", "bytes", "str_repeat", "range", "limit", "Array")
)
_COUNTS = frozenset(("limit", "take", "per_page", "pageSize", "perPage"))
_ROUTES = frozenset(("get", "put", "patch", "delete", "post"))
_LOOKUPS = re.compile(
    r"^(findById|findByPk|findByIdAnd(Update|Delete|Remove)|findOne|findUnique|get_or_404|get_object_or_404|get|"
    r"filter_by|first_or_404|deleteOne|updateOne)$"
)
_PERSONAL = re.compile(
    r"(?i)(invoice|order|account|payment|document|message|patient|booking|ticket|transaction|statement|subscription|"
    r"conversation|prescription|receipt|wallet|users?$|user\b|profile|address)"
)
_LOGIN = re.compile(r"(?i)auth|login|jwt|protect|session|passport|token|current_?user|get_user")
_ABOVE = re.compile(r"(?i)admin|role|permission|staff|superuser|owner|own|policy|can[A-Z_]|allow|scope")
_OWN = re.compile(
    r"(?i)current_?user|owner|author|permission|authori[sz]e|abilit|policy|session|\buser\.|\.user(\.|$|_)|user_?id|tenant|"
    r"forbidden|is_?admin|\brole|account\.id|can_"
)


@check("secret-logged", "call")
def secret_logged(function: Node) -> Iterable[Node]:
    """A password, key or card number among what a log function gets, neither masked nor only asked for its length."""
    for node in facts(function).of("call"):
        name = called(node)
        if name not in _LOGS or node.base is None:
            continue
        holder = node.base.base
        if not (name in _PRINTS if holder is None else _LOGGERS.search(holder.path())):
            continue
        if any(_SECRET.match(n.name) for arg in node.args for n in _shown(arg)):
            yield node


def _shown(node: Node) -> Iterator[Node]:
    """The names and members whose value becomes part of `node`'s: not those compared, counted or masked."""
    stack = [node]
    while stack:
        at = stack.pop()
        if at.kind == "call":
            if _HIDES.search(called(at)):
                continue
            stack.extend(at.args)
        elif at.kind in ("name", "member"):
            yield at
        elif at.kind == "index" and len(at.args) == 1 and at.args[0].kind == "string":  # params[:password]
            yield Node("name", at.start, at.end, at.raw, name=str(at.args[0].value))
        elif at.kind == "unary" or (at.kind == "binary" and at.name in ("==", "===", "!=", "!==", "<", ">", "in")):
            continue
        elif at.kind == "conditional":
            stack.extend(at.args[1:])
        elif at.kind != "function":
            stack.extend(at.args)


@check("secret-answered", "call", "map")
def secret_answered(function: Node) -> Iterable[Node]:
    """`res.json({password: user.password})`: an answer that holds what should stay in the database."""
    for node in facts(function).of("call"):
        if called(node) not in _ANSWERS:
            continue
        for arg in node.args:
            for table in arg.walk():
                if table.kind != "map" or table.keys is None:
                    continue
                for key, value in zip(table.keys, table.args, strict=False):
                    if key and _KEPT.match(key) and value.kind in ("member", "index") and _field(value) == key:
                        yield value


def _field(node: Node) -> str:
    if node.kind == "index":
        return str(node.args[0].value) if node.args and node.args[0].kind == "string" else ""
    return node.name


@check("size-from-request", "call")
def size_from_request(function: Node) -> Iterable[Node]:
    """Memory, text or rows whose number is a number of the request, and nothing bounds it."""
    known = facts(function)
    numbers = {
        node.base.path(): node
        for node in known.of("assign")
        if node.base is not None and node.base.kind == "name" and node.args and _requested(node.args[0])
    }
    for node in known.of("call"):
        for table in node.args:
            for key, value in zip(table.keys or (), table.args, strict=False):
                if key in _COUNTS and (
                    _requested(value) or (value.kind == "name" and _unbounded(value.name, numbers, known))
                ):
                    yield value
        if called(node) not in _ALLOCATES or not node.args:
            continue
        size = node.args[-1] if called(node) == "str_repeat" else node.args[0]
        if _requested(size) or (size.kind == "name" and _unbounded(size.name, numbers, known)):
            yield node
    for node in known.of("binary"):
        if node.name == "*" and len(node.args) == 2:
            for one, other in (node.args, node.args[::-1]):
                listed = one.kind == "collection" and len(one.args) == 1
                if (one.kind == "string" or listed) and other.kind == "name" and _unbounded(other.name, numbers, known):
                    yield node


def _unbounded(name: str, numbers: dict[str, Node], known: Facts) -> bool:
    return name in numbers and not known.tested.get(name)


def _requested(node: Node) -> bool:
    """`parseInt(req.query.n)`, `int(request.args["n"])`, with nothing like min around."""
    calls = [n for n in node.walk() if n.kind == "call"]
    if any(_BOUNDS.search(called(n)) for n in calls):
        return False
    return any(
        called(n) in _NUMBERS and any(_REQUEST.search(m.path()) for a in (*n.args, n.base) if a for m in a.walk())
        for n in calls
    )


@check("object-of-anyone", "call")
def object_of_anyone(function: Node) -> Iterable[Node]:
    """A route that asks for a login, and then gives whatever record the request names, whose ever it is."""
    for marks, handler in _routes(function):
        words = " ".join(marks)
        if not _LOGIN.search(words) or _ABOVE.search(words):
            continue
        nodes = [n for part in handler.body for n in part.walk()]
        if any(n.kind in ("name", "member") and _OWN.search(n.path()) for n in nodes):
            continue
        parameters = {p.name for p in handler.args if re.search(r"(?i)(^|_)(id|pk|uid)$|Id$", p.name)}
        for node in nodes:
            if node.kind == "call" and _LOOKUPS.match(called(node)) and _PERSONAL.search(_about(node)):
                below = [n for a in node.args for n in a.walk()]
                if any(
                    n.name in parameters or re.search(r"\breq(uest)?\.(params|query|body)", n.path()) for n in below
                ):
                    yield node


def _about(node: Node) -> str:
    """What is looked up, as written: the path before the call, and its first argument."""
    assert node.base is not None
    first = node.args[0].path() if node.args else ""
    return f"{node.base.path()} {first}".replace(".", " ").replace("()", "")


def _routes(function: Node) -> Iterator[tuple[list[str], Node]]:
    """(names of what guards it, handler): `app.get("/x/:id", auth, (req, res) => ...)`, and functions that are marked
    as routes."""
    for node in facts(function).of("call"):
        if called(node) in _ROUTES and len(node.args) > 2 and node.args[-1].kind == "function":
            path = node.args[0]
            if path.kind == "string" and ":" in str(path.value):
                yield (
                    [n.path() for a in node.args[1:-1] for n in a.walk() if n.kind in ("name", "member")],
                    node.args[-1],
                )
    marks = [n.path() or n.name for mark in function.marks for n in mark.walk() if n.kind in ("name", "member")]
    given = [n.path() for p in function.args for d in p.args for n in d.walk() if n.kind in ("name", "member")]
    first = function.args[0].name if function.args else ""
    if first == "request" or any(m.rsplit(".", 1)[-1] in (*_ROUTES, "route") for m in marks):
        yield [*marks, *given], function


@check("changed-by-get", "call")
def changed_by_get(function: Node) -> Iterable[Node]:
    """A handler that deletes on GET: a Django view that doesn't ask for the method, a Flask route without methods."""
    marks = " ".join(n.path() or n.name for mark in function.marks for n in mark.walk())
    routes = [m for m in function.marks if m.base is not None and m.base.name.rsplit(".", 1)[-1] == "route"]
    if routes:
        route = routes[0]
        text = str(route.args[0].value) if route.args and route.args[0].kind == "string" else ""
        methods = [n.value for a in route.args[1:] for n in a.walk() if n.kind == "string"]
        if not re.search(r"(?i)delete|remove|destroy", text) or (methods and "GET" not in methods):
            return
    elif not (
        function.args
        and function.args[0].name == "request"
        and re.search(r"(?i)delete|remove|destroy", function.name)
        and re.search(r"login_required", marks)
        and not re.search(r"(?i)require_|http_methods|post|api_view|action", marks)
    ):
        return
    known = facts(function)
    if any(n.name in ("method", "POST", "form", "is_valid") for n in known.of("member")):
        return
    for node in known.of("call"):
        if called(node) == "delete":
            yield node
            return


@check("keys-copied", "loop", "assign")
def keys_copied(function: Node) -> Iterable[Node]:
    """A function that copies all keys of one object into another, level by level, or sets what a path of keys names:
    a key __proto__ reaches the prototype of all objects."""
    known = facts(function)
    if any(n.kind == "string" and n.value in ("__proto__", "constructor", "prototype") for n in known.nodes):
        return
    if any(re.search(r"(?i)hasOwn|isSafe|unsafe|isPlainObject|isProto|create$", called(n)) for n in known.of("call")):
        return
    itself = [n for n in known.of("call") if function.name and called(n) == function.name]
    for loop in known.of("loop"):
        keys = {loop.base.path()} if loop.base is not None else set()
        inside = [n for part in loop.body for n in part.walk()]
        for node in inside:
            target = node.base
            if node.kind != "assign" or target is None or target.kind != "index" or not target.args or not node.args:
                continue
            key = target.args[0]
            deeper = key.path() in keys - {""} and _deeper(itself, key.path()) and _holds(node.args[0], key.path())
            if deeper or (key.kind == "index" and any(_walks(n, target.base) for n in inside)):
                yield node
        steps = [n.base.path() for n in inside if n.base is not None and _walks(n, n.base)]
        for node in function.body if steps else ():  # the last step stands after the loop
            target = node.base if node.kind == "assign" and node.start > loop.start else None
            if target is None or target.kind != "index" or target.base is None or not target.args:
                continue
            if target.base.path() in steps and target.args[0].kind != "string":
                yield node


def _deeper(calls: list[Node], key: str) -> bool:
    return any(
        n.kind == "index" and n.args and n.args[0].path() == key for c in calls for a in c.args for n in a.walk()
    )


def _holds(value: Node, key: str) -> bool:
    return any(n.kind == "index" and n.args and n.args[0].path() == key for n in value.walk())


def _walks(node: Node, holder: Node | None) -> bool:
    """`node = node[part]`: a step down."""
    path = holder.path() if holder is not None else ""
    return (
        node.kind == "assign"
        and node.base is not None
        and node.base.path() == path != ""
        and any(n.kind == "index" and n.base is not None and n.base.path() == path for a in node.args for n in a.walk())
    )


@check("exists-then-write", "if", "call")
def exists_then_write(function: Node) -> Iterable[Node]:
    """`if (!exists(p)) write(p)`, `if access(p): open(p)`: between the two, somebody else puts something there."""
    for node in facts(function).of("if"):
        test = node.args[0]
        asked = [n for n in test.walk() if n.kind == "call" and called(n) in ("existsSync", "accessSync", "access")]
        asked += [
            n for n in test.walk() if called(n) == "exists" and n.base is not None and n.base.path() == "os.path.exists"
        ]
        negated = any(n.kind == "unary" and n.name in ("!", "not") for n in test.walk())
        for call in asked:
            path = call.args[0].path() if call.args else ""
            if not path or not (negated or called(call) == "access"):
                continue
            for below in (n for part in node.body for n in part.walk()):
                if (
                    called(below) in ("writeFileSync", "writeFile", "open", "appendFileSync")
                    and below.args
                    and below.args[0].path() == path
                    and (called(below) != "open" or called(call) == "access" or _writes(below))
                ):
                    yield below


def _writes(node: Node) -> bool:
    return len(node.args) > 1 and node.args[1].kind == "string" and str(node.args[1].value).startswith("w")
