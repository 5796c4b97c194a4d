"""What a helper's name says that it does to text: programs have cleaners and checks of their own, which no list of
libraries knows."""

import re
from functools import lru_cache

_ANY = re.compile(r"saniti[sz]e|(^|_)(valid|validated?|safe|secure|allowed|whitelisted)(_|$)|_or_(raise|fail|404)$")
_NOT = re.compile(
    r"^(un|de)|_un(safe|quote|escape)|(^|_)(mark|loads?|loader|dumps?|yaml|eval|exec|open|substitute)(_|$)|"
    r"safe_(string|str|html|text|markup)$|html_safe"
)
_ESCAPES = re.compile(r"escape|(^|_)(quoted?|esc|encode_for)(_|$)|quote(d|s)?$")
_FOR = (
    ("html", r"html|xml|attr|tag|entit|js|markup"),
    ("sql", r"sql|ident|table|column|literal|like"),
    ("shell", r"shell|cmd|command|(^|_)(sh|arg|args|argv)(_|$)"),
    ("url", r"url|uri|percent|query|link"),
    ("regex", r"regex|regexp|pattern"),
    ("ldap", r"ldap|filter|(^|_)dn(_|$)"),
    ("path", r"path|file"),
    ("log", r"log"),
)
_GENERAL = ("html", "sql", "shell", "ldap", "xpath", "log")
_CHECKS = re.compile(r"^_*(validate|check|verify|ensure|enforce|reject|forbid|abort_if|raise_if|deny|guard)(_|$)")
_RUNS = re.compile(r"^check_(output|call)|^(check|ensure)_(dir|directory|exists|installed)")
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def _words(name: str) -> str:
    """`escapeHtml` as `escape_html`."""
    return _HUMP.sub("_", name).lower()


@lru_cache(8192)
def purposes(name: str) -> tuple[str, ...]:
    """What a function of this name makes text safe for."""
    words = _words(name)
    if _NOT.search(words):
        return ()
    if _ANY.search(words):
        return ("all",)
    if not _ESCAPES.search(words):
        return ()
    return tuple(purpose for purpose, pattern in _FOR if re.search(pattern, words)) or _GENERAL


@lru_cache(8192)
def checks(name: str) -> bool:
    """Whether a function of this name objects to arguments that won't do."""
    words = _words(name)
    return _CHECKS.search(words) is not None and _RUNS.search(words) is None
