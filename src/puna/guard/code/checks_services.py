"""Checks of services written in Go, Rust and Swift: whose records are given, what is logged and hashed, what is left
open, nonces that nobody filled."""

import re
from collections.abc import Iterable, Iterator

from puna.guard.code.checks import check
from puna.guard.code.checks_facts import Facts, called, facts
from puna.guard.code.view import Node

_REQUEST = re.compile(
    r"\b(gin\.Context|echo\.Context|fiber\.Ctx|http\.Request|HttpRequest|Request|Path<)|^(req|request)$"
)
_LOOKUPS = re.compile(
    r"(?i)^(first|find|take|get|last|find_?one|find_?by_?\w*id|get_?by_?\w*id|get_?\w+_?by_?id|query_?row(_?context|x)?|"
    r"query_?(as|one|scalar|opt)!?|get_?context|fetch_?one|delete(_?one|_?by_?id)?|load)$"
)
_PERSONAL = re.compile(
    r"(?i)(invoice|order(?!_?by|ing|ed\b|\s+by)|account|payment|document|message|patient|booking|ticket|transaction|"
    r"subscription|conversation|prescription|receipt|wallet|profile|address|medical|\bnotes?\b)"
)
_MINE = re.compile(
    r"(?i)(current_?user|(^|_|\.)user_?id$|^uid$|owner|author|tenant|principal|claims|^me$|^user$|session|\.user$|auth)"
)
_ASKS = re.compile(
    r"(?i)^(can|may|is|has|check|ensure|require|verify|assert)_?\w*(own|access|allow|permi|admin|role|view|read|edit|belong)|"
    r"authori[sz]e|forbid|permission|enforce|policy"
)
_DENIED = re.compile(r"(?i)forbidden|^(is_?)?admin$|role|unscoped|owner")
_OWN_COLUMN = re.compile(
    r"(?i)\b(user|owner|customer|tenant|author|member|created_by|creator|account)(_?id)?\b\s*(=|:|IN\b)"
)
_LOGS = re.compile(r"(?i)log|debug|info|warn|trace|print|error")


def _chain(known: Facts, node: Node) -> Node:
    """The whole chain of calls that a call is part of: `db.Where(...).First(...)`, `query(...).bind(...)`."""
    above = known.parent.get(id(node))
    while above is not None and (above.kind == "member" or (above.kind == "call" and above.base is node)):
        node = above
        above = known.parent.get(id(above))
    return node


@check("record-unowned", "call")
def record_unowned(function: Node) -> Iterable[Node]:
    """A handler that knows its user, and gives the record whose number the request names, whose ever it is."""
    if not any(_REQUEST.search(p.type or p.name) for p in function.args):
        return
    known = facts(function)
    users = [n for n in known.nodes if n.kind in ("name", "member") and _MINE.search(n.path())]
    users += [p for p in function.args if _MINE.search(p.name)]
    if not users or _asked(known):
        return
    for node in known.of("call"):
        if not _LOOKUPS.match(called(node)):
            continue
        parts = _chain(known, node).walk()
        if not _personal(parts, known) or not any(_numbered(n) for n in parts):
            continue
        mine = any(n.kind in ("name", "member") and _MINE.search(n.path()) for n in parts)
        if not mine and not any(n.kind == "string" and _OWN_COLUMN.search(str(n.value)) for n in parts):
            yield node
            return


def _asked(known: Facts) -> bool:
    """Whether the function compares the user with something, hands them to what decides, or refuses."""
    for node in known.nodes:
        if node.kind in ("name", "member") and _DENIED.search(node.name):
            return True
        if node.kind == "call" and _ASKS.search(called(node)):
            return True
        if node.kind == "binary" and node.name in ("==", "!=") and len(node.args) == 2:
            for one, other in (node.args, node.args[::-1]):
                if _MINE.search(one.path()) and other.kind in ("name", "member", "call"):
                    return True
    return False


def _personal(parts: list[Node], known: Facts) -> bool:
    for node in parts:
        if node.kind == "string" and re.search(r"(?i)\b(from|update|into)\s+\S", str(node.value)):
            if _PERSONAL.search(re.sub(r"(?is)\border\s+by\b.*", "", str(node.value))):
                return True
        elif node.kind in ("name", "member") and _PERSONAL.search(f"{node.name} {known.types.get(node.path(), '')}"):
            return True
    return False


def _numbered(node: Node) -> bool:
    if node.kind == "string":
        return re.search(r"(?i)id$", str(node.value)) is not None
    return (node.kind in ("name", "member") and re.search(r"(?i)(^|_)id$|ID$|Id$", node.name) is not None) or (
        node.kind == "call" and called(node) in ("Param", "Params", "PathValue", "URLParam", "Vars", "into_inner")
    )


_SECRET = re.compile(
    r"(?i)^(plain_?|user_?|new_?|old_?|db_?|raw_?)?(password|passwd|passphrase|pass_?word|secret_?key|client_?secret|api_?key|"
    r"api_?secret|api_?token|access_?token|refresh_?token|auth_?token|bearer_?token|session_?token|private_?key|"
    r"credit_?card(_?number)?|card_?number|cvv|cvc|ssn|otp)$"
)
_LOGGERS = re.compile(
    r"(?i)(^|\.|_)(log|logger|logging|slog|logrus|klog|glog|zap|sugar|zerolog|os_log)(\(\))?(\.\w+\(\))?$"
)
_WRITES = re.compile(
    r"^(print|printf|println|info|debug|warn|warning|error|fatal|panic|trace|log|notice|critical|msg|str)"
    r"(f|ln|w|ctx|context)?$"
)
_PRINTS = frozenset(("print", "NSLog", "os_log", "debugPrint", "dump"))
_HIDES = re.compile(
    r"(?i)mask|redact|hash|len|count|isempty|is_empty|empty|encrypt|prefix|bool|type|valid|verify|check"
)


@check("secret-in-log", "call")
def secret_in_log(function: Node) -> Iterable[Node]:
    """A password, key, card number or a header that holds one among what a log gets, neither masked nor only asked for
    its length."""
    return _logged(function, _SECRET)


@check("token-in-log", "call")
def token_in_log(function: Node) -> Iterable[Node]:
    """The same, with whatever is called a token."""
    return _logged(function, re.compile(r"(?i)^\w*(token|secret)$"))


def _logged(function: Node, secret: re.Pattern[str]) -> Iterator[Node]:
    for node in facts(function).of("call"):
        name = called(node)
        holder = node.base.base if node.base is not None else None
        if holder is None:
            if name not in _PRINTS and not (name.endswith("!") and _WRITES.match(name[:-1])):
                continue
        elif not _WRITES.match(name.lower()) or not _LOGGERS.search(holder.path()):
            continue
        if any(secret.match(n.name) or _header(n) for arg in node.args for n in _shown(arg)):
            yield node


def _header(node: Node) -> bool:
    """`r.Header.Get("Authorization")`."""
    return node.kind == "call" and any(
        a.kind == "string" and re.fullmatch(r"(?i)(proxy-)?authorization|x-api-key|cookie", str(a.value)) is not None
        for a in node.args
    )


def _shown(node: Node) -> Iterator[Node]:
    """The names and members whose value becomes part of `node`'s."""
    stack = [node]
    while stack:
        at = stack.pop()
        if at.kind == "name" or (at.kind == "member" and not _HIDES.search(at.name)):
            yield at
        elif at.kind == "call":
            if not _HIDES.search(called(at)):
                yield at
                stack.extend([*at.args, *([at.base.base] if at.base is not None and at.base.base is not None else [])])
        elif at.kind not in ("function", "member") and not (at.kind == "binary" and at.name in ("==", "!=", "<", ">")):
            stack.extend(at.args[1:] if at.kind == "conditional" else at.args)


_PASSWORD = re.compile(r"(?i)passw|passphrase|(^|_)pwd?$")
_HASHED = re.compile(r"(?i)hash|stored|digest|salted|len")
_FAST = re.compile(
    r"(?i)^(crypto\.)?(insecure\.)?(md5|sha1|sha224|sha256|sha384|sha512|sha3_?\d*|sha_?\d+|blake2b|blake3)$"
)
_FEEDS = frozenset(("Write", "update", "chain_update", "WriteString", "input"))
_SUMS = frozenset(("Sum", "Sum224", "Sum256", "Sum384", "Sum512", "digest", "compute", "hash"))


@check("password-hashed-fast", "call")
def password_hashed_fast(function: Node) -> Iterable[Node]:
    """A password goes into a hash that is made to be fast."""
    known = facts(function)
    hashers = {
        node.base.path()
        for node in known.of("assign")
        if node.base is not None and node.args and any(_makes(n) for n in node.args[0].walk()[:12])
    }
    for node in known.of("call"):
        base = node.base
        if base is None or not any(_is_password(n) for a in node.args for n in a.walk()[:40]):
            continue
        holder = base.base.path() if base.base is not None else ""
        if (
            re.fullmatch(r"CC_(MD5|SHA\d+)", base.name)
            or (base.name in _SUMS and _FAST.match(holder))
            or (base.name in _FEEDS and holder in hashers - {""})
            or (base.name == "WriteString" and node.args and node.args[0].path() in hashers - {""})
        ):
            yield node


def _makes(node: Node) -> bool:
    """`sha256.New()`, `Sha256::new()`, `SHA256()`."""
    if node.kind != "call" or node.base is None:
        return False
    holder = node.base.base.path() if node.base.base is not None else ""
    return (node.base.name in ("New", "new", "default") and _FAST.match(holder) is not None) or (
        not holder and _FAST.match(node.base.name) is not None
    )


def _is_password(node: Node) -> bool:
    return (
        node.kind in ("name", "member")
        and _PASSWORD.search(node.name) is not None
        and _HASHED.search(node.name) is None
    )


_BLOCK_MODES = {"Seal": 1, "NewCBCEncrypter": 1, "NewCTR": 1, "NewCFBEncrypter": 1, "NewOFB": 1}


@check("nonce-unset", "call", "assign")
def nonce_unset(function: Node) -> Iterable[Node]:
    """Go: a nonce that is made and never filled (all zeros), constant, or a part of the key."""
    known = facts(function)
    for node in known.of("call"):
        at = _BLOCK_MODES.get(called(node))
        if at is None or len(node.args) <= at or node.args[at].kind not in ("name", "cast", "index"):
            continue
        given = node.args[at]
        name = given.path() if given.kind == "name" else ""
        values = [
            n.args[0] for n in known.of("assign") if name and n.base is not None and n.args and _bound(n.base) == name
        ] or [given]
        if len(values) == 1 and (_fixed(values[0]) or (called(values[0]) == "make" and not _filled(name, node, known))):
            yield node


def _bound(target: Node) -> str:
    return target.args[0].path() if target.kind == "collection" and target.args else target.path()


def _fixed(value: Node) -> bool:
    """A constant, or a part of the key."""
    if value.kind == "index":
        return value.base is not None and re.search(r"(?i)key$", value.base.path()) is not None
    below = value.walk()
    return value.kind in ("cast", "collection") and all(
        n.kind in ("string", "number", "cast", "collection", "other") for n in below
    )


def _filled(name: str, use: Node, known: Facts) -> bool:
    """Whether the name is given to any other call, or an element of it is set."""
    for node in known.nodes:
        if node.kind == "assign" and node.base is not None and node.base.kind == "index" and node.base.base is not None:
            filled = node.base.base.path() == name
        else:
            other = node.kind == "call" and node is not use
            filled = (
                other
                and called(node) not in ("make", "len", "append", *_BLOCK_MODES)
                and any(n.kind == "name" and n.name == name for a in node.args for n in a.walk())
            )
        if filled:
            return True
    return False


_OPENS = frozenset(("Open", "Query", "QueryContext", "Queryx", "Get", "Post", "Do", "PostForm", "Head"))
_OPENERS = re.compile(r"(?i)(^|\.)(os|http|db|tx|conn|pool|client|http_?client|DefaultClient)$")


@check("handle-unclosed", "call", "assign")
def handle_unclosed(function: Node) -> Iterable[Node]:
    """Go: a file, rows or an answer is opened, and neither closed nor handed on."""
    known = facts(function)
    for node in known.of("assign"):
        if not node.args or called(node.args[0]) not in _OPENS or node.base is None:
            continue
        opened = node.args[0].base
        if opened is None or opened.base is None or not _OPENERS.search(opened.base.path()):
            continue
        first = node.base.args[0] if node.base.kind == "collection" and node.base.args else node.base
        name = first.path()
        if not name or name == "_" or first.kind != "name":
            continue
        answer = opened.name in ("Get", "Post", "Do", "PostForm", "Head")
        if answer and not any(n.kind == "member" and n.path() == f"{name}.Body" for n in known.nodes):
            continue
        if not _handed_on(name, node, known):
            yield node


_READS = frozenset(("Copy", "CopyN", "ReadAll", "NewDecoder", "NewReader", "NewScanner", "len"))


def _handed_on(name: str, opened: Node, known: Facts) -> bool:
    for node in known.nodes:
        if node.kind == "member" and node.name == "Close" and node.path().startswith(name + "."):
            return True
        if node is opened or node is opened.base:
            continue
        held: list[Node] = []
        if node.kind in ("return", "assign", "collection", "map") or (node.kind == "call" and node.new):
            held = node.args
        elif node.kind == "call":
            held = [] if called(node) in _READS else node.args
        if any(a.kind == "name" and a.name == name for a in held):
            return True
        if node.kind == "call" and any(a.kind == "unary" and a.args and a.args[0].path() == name for a in node.args):
            return True
        below = [n for r in node.args for n in r.walk()] if node.kind == "return" else []
        if any(n.kind == "member" and n.path() == f"{name}.Body" for n in below) and not any(
            called(n) in _READS for n in below
        ):
            return True
    return False
