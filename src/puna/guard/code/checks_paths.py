"""Checks of paths in C and C++ that are put together from names that others choose."""

import re
from collections.abc import Iterable

from puna.guard.code.checks import check
from puna.guard.code.checks_facts import Facts, bare, called, facts
from puna.guard.code.view import Node

_JOINS = re.compile(
    r"(?i)^(\w*_)?(concat|join|append|make|build)_?(full_?)?path(_?(file|name))?$|^(\w*_)?path_?(join|concat|append|cat|combine)\w{0,2}$"
    r"|^g_build_(file)?name$"
)
_PRINTS = re.compile(r"^(g_|apr_p)?v?s(n|l)?printf$|^(x|k|talloc_|apr_p|g_strdup_)?as?printf$|^(g_strdup_|xas)printf$")
_PATH = re.compile(r"(?i)path|file|dir$|dir\b|folder|fname")
_NO_NAME = re.compile(r"(?i)dir|root|base|prefix|path|ext|suffix|home")
_ENTERS = re.compile(r"(?i)open|unlink|^l?stat|access|read|write|load|save|remove|delete|mkdir|rename|chmod|creat")
_ENTRY_NAMES = re.compile(
    r"^(unzGetCurrentFileInfo(64)?|zip_get_name|zip_stat(_index)?|archive_entry_pathname\w*|mz_zip_reader_file_stat"
    r"|mz_zip_reader_get_filename|zip_fopen(_index)?|zzip_readdir)$"
)
_MAKES = re.compile(
    r"(?i)^(open|fopen|creat|_?mkdir|mkpath|open_?file\w*|create_?dir\w*|create_?file\w*|QFile|f_open|(std\.)?ofstream)$"
)
_CLEANS = re.compile(r"(?i)canon|realpath|relative|saniti|clean|valid|safe|traversal|secure|basename")


@check("path-unchecked", "call")
def path_unchecked(function: Node) -> Iterable[Node]:
    """A file's path is joined from a folder and a name that the caller gave, and nothing looked at the name."""
    known = facts(function)
    for node in known.of("call"):
        if not _JOINS.search(called(node)) or len(node.args) < 2:
            continue
        for argument in node.args[1:]:
            path = bare(argument).path()
            if path in known.parameters and not _judged(known, path) and not _passed_to_test(known, path, node):
                yield node
                break


def _judged(known: Facts, path: str) -> bool:
    """Whether a condition looks at the text, other than for being one certain word or empty."""
    for node in known.nodes:
        if (
            known.in_test(node)
            and node.kind == "call"
            and any(bare(a).path() == path for a in node.args)
            and called(node) not in ("strcmp", "strcasecmp", "g_strcmp0", "streq", "STREQ")
        ):
            return True
        if node.kind == "index" and node.base is not None and node.base.path() == path and known.in_test(node):
            return True
    return False


def _passed_to_test(known: Facts, path: str, node: Node) -> bool:
    for other in known.nodes[: known.place[id(node)]]:
        tests = other.kind == "call" and re.search(
            r"(?i)valid|check|clean|saniti|correct|basename|strchr|strstr|normali|allowed|safe", called(other)
        )
        if tests and any(a.path() == path for a in other.args):
            return True
    return False


@check("path-added", "binary", "string")
def path_added(function: Node) -> Iterable[Node]:
    """C++: `folder + "/skins/" + name` with a name that the caller gave, for a path."""
    known = facts(function)
    for node in known.of("binary"):
        if node.name != "+":
            continue
        above = known.parent.get(id(node))
        target = above.base.path() if above is not None and above.kind == "assign" and above.base is not None else ""
        if not (_PATH.search(target) or _PATH.search(function.name)):
            continue
        for text, name in zip(map(bare, node.args), map(bare, node.args[1:]), strict=False):
            if text.kind != "string" or not str(text.value).endswith(("/", "\\")) or str(text.value).startswith("http"):
                continue
            if _free_name(name, known):
                yield node
                return


def _free_name(node: Node, known: Facts) -> bool:
    """Whether this is a name that the caller gave and nothing looked at."""
    return (
        node.kind == "name"
        and node.name in known.parameters
        and _NO_NAME.search(node.name) is None
        and not _judged(known, node.name)
        and not _knows_parents(known)
    )


def _knows_parents(known: Facts) -> bool:
    """Whether the function knows of `..`."""
    return any(".." in str(n.value) and "..." not in str(n.value) for n in known.of("string"))


@check("path-printed", "call", "string")
def path_printed(function: Node) -> Iterable[Node]:
    """`snprintf(path, n, "%s/%s", folder, name)` with a name that the caller gave, for a file that is then reached."""
    known = facts(function)
    for node in known.of("call"):
        if not _PRINTS.match(called(node)) or len(node.args) < 3:
            continue
        text = next((a for a in map(bare, node.args) if a.kind == "string"), None)
        if text is None or "://" in str(text.value):
            continue
        asked = str(text.value) == "%s%s" and re.search(r"(?i)ur[il]|target|resource|page", bare(node.args[-1]).name)
        if not (asked or re.search(r"/%s(\.\w+)?$", str(text.value))):
            continue
        above = known.parent.get(id(node))
        target = above.base.path() if above is not None and above.kind == "assign" and above.base is not None else ""
        name = bare(node.args[-1])
        if not _PATH.search(target or bare(node.args[0]).path()) or not _free_name(name, known):
            continue
        if any(called(n) in ("realpath", "canonicalize_file_name") for n in known.of("call")):
            continue
        if not _passed_to_test(known, name.name, node) and any(_ENTERS.search(called(n)) for n in known.of("call")):
            yield node
            return


_REQUESTED = re.compile(
    r"(?i)^(http_request_\w*(param|query|path|uri)\w*|(\w+_)?get_?(param|query|uri|url|path_?info)\w*"
    r"|evhttp_request_get_uri|MHD_lookup_connection_value|FCGX_GetParam|mg_get_var|cgi\w*param\w*)$"
)
_REACHES = ("fopen", "open", "unlink", "access", "stat", "lstat", "remove", "rename", "opendir", "rmdir", "mkdir")


@check("path-from-request", "assign", "call")
def path_from_request(function: Node) -> Iterable[Node]:
    """A file is reached by a name that came with an HTTP request, and nothing looked at the name."""
    known = facts(function)
    for node in known.of("assign"):
        path = node.base.path() if node.base is not None and node.args else ""
        if not path or not _REQUESTED.match(called(bare(node.args[0]))) or _knows_parents(known):
            continue
        calls = [n for n in known.of("call") if any(bare(a).path() == path for a in n.args)]
        if any(re.search(r"(?i)good|strchr|strstr|strpbrk|regex|match", called(n)) or _CLEANS.search(called(n))
               for n in calls):  # fmt: skip
            continue
        for use in calls:
            if called(use) in _REACHES and bare(use.args[0]).path() == path:
                yield use
                return


@check("archive-path", "call")
def archive_path(function: Node) -> Iterable[Node]:
    """A file or folder is made by the name of an archive's entry, and nothing looks for `..` in it."""
    known = facts(function)
    if not any(_ENTRY_NAMES.match(called(n)) for n in known.of("call")) or _knows_parents(known):
        return
    if any(_CLEANS.search(called(n)) for n in known.of("call")):
        return
    for node in known.of("call"):
        if _MAKES.match(called(node)):
            yield node
            return
