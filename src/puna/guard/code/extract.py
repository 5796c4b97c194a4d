"""Code where it is: in fenced blocks, diffs, notebooks and the arguments of tool calls."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from puna.guard.code.detect import detect, scores
from puna.guard.code.languages import FORMATS, canonical, of_file

LIKELY = ("code", "script", "source", "program", "snippet", "cell")  # keys under which code stands
UNSAID = ("text", "txt", "plain", "plaintext", "code")  # names of no language
MARKDOWN = ("markdown", "md", "mdx")
MAX_PIECES = 500  # pieces of one text
MAX_DEPTH = 3  # blocks of Markdown in blocks of Markdown
UNREAD = "unread"  # language of a piece in place of those that are too many, or too deep
_FENCE = re.compile(r"^[ \t>]*+(?:[-*+] |\d{1,3}[.)] )?[ \t]*+(`{3,}|~{3,})[ \t]*+\{?[ \t]*+\.?([\w+#.-]*+)([^`\n]*+)$")
_DIFF = re.compile(r"^(?:diff --git |@@ -\d+(?:,\d+)? \+\d+)", re.MULTILINE)
_SESSION = re.compile(r"^(?:>>>|\.\.\.|\$|%|#) ?")
# fmt: off
_CODE_KEYS = re.compile(
    r"(?i)^(code|script|source|program|snippet|cell|python|javascript|patch|diff|new_str|file_text|content|text)$"
)
_SHELL_KEYS = re.compile(r"(?i)^(command|cmd|commands|bash|shell|shell_command)$")
_SQL_KEYS = re.compile(r"(?i)^(sql|sql_query|statement)$")  # fmt: skip
_NAME_KEYS = ("path", "file_path", "filename", "file", "filepath", "name")


@dataclass(frozen=True)
class Piece:
    """Code and where each of its lines stands: `places[i]` is (part of the whole, 1-based line there), the part "" for
    the text itself. `added`: the lines that count (of a diff); None means all. `before`: signs before each line."""

    source: str
    language: str
    places: Sequence[tuple[str, int]]
    added: frozenset[int] | None = None
    before: int = 0


@dataclass(frozen=True)
class Run(Sequence[tuple[str, int]]):
    """The places of `lines` lines that follow each other in one part."""

    part: str
    first: int
    lines: int

    def __len__(self) -> int:
        return self.lines

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return tuple(self)[at]
        if not 0 <= at < self.lines:
            raise IndexError(at)
        return self.part, self.first + at


def pieces(text: str, language: str | None = None, depth: int = 0) -> list[Piece]:
    """The code in `text`, in order. `language`: what the text is said to be ("python", "diff", "markdown",
    "notebook"); without it, or where it isn't known, that is found out. Text in which no code is found
    is one piece of language "text"; what is too much or too deep to be looked at is one of language UNREAD. `depth`:
    blocks of Markdown around."""
    text = plain_ends(text)
    said = (language or "").strip().lower()
    if said in ("diff", "patch") or (not said and _DIFF.search(text)):
        return _diff(text)
    if said in MARKDOWN:
        return _fences(text, depth=depth) if depth <= MAX_DEPTH else [Piece("", UNREAD, Run("", 1, 1))]
    if said in ("ipynb", "notebook", "jupyter") or (not said and text.lstrip()[:1] == "{" and '"cells"' in text):
        cells = _notebook(text)
        if cells is not None:
            return cells
    known = canonical(said) if said else None
    if known == "json":
        return _arguments(text) or [_whole(text, known)]
    if known is not None:
        fenced = _FENCE.match(text.lstrip().split("\n", 1)[0]) is not None
        return _fences(text, known) if fenced else [_whole(text, known)]
    if any(_FENCE.match(line) for line in text.split("\n") if "```" in line or "~~~" in line):
        return _fences(text)
    calls = _arguments(text)
    if calls is not None:
        return calls
    return [_whole(text, detect(text) or "text")]


def plain_ends(text: str) -> str:
    """All line ends as \\n, as compilers and interpreters take them."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _whole(text: str, language: str, where: str = "", first: int = 1) -> Piece:
    return Piece(text, language, Run(where, first, text.count("\n") + 1))


def opening(line: str) -> tuple[str, str] | None:
    """The fence (`` ``` ``, `~~~~`) that a line opens and the language it names; None for other lines."""
    match = _FENCE.match(line)
    return (match[1], match[2].lower()) if match else None


def closes(line: str, fence: str) -> bool:
    """Whether a line closes the block that `fence` opened."""
    found = opening(line)
    return found is not None and not found[1] and found[0][0] == fence[0] and len(found[0]) >= len(fence)


def block(lines: list[str], named: str, first: int, default: str | None = None, depth: int = 0) -> list[Piece]:
    """The pieces in a fenced block; `first` is the line number of its first line, `depth` as for `pieces`."""
    source = "\n".join(lines)
    if named in MARKDOWN or named in ("diff", "patch", "ipynb"):
        shift = first - 1
        return [
            replace(p, places=tuple((w, n + shift) if not w else (w, n) for w, n in p.places))
            for p in pieces(source, named, depth + 1)
        ]
    language = spoken(source, named) or (None if named else default) or detect(source) or "text"
    if language in ("python", "shell") and any(line.startswith((">>> ", "$ ")) for line in lines):
        source = "\n".join(_SESSION.sub("", line) if _SESSION.match(line) else "" for line in lines)
    return [_whole(source, language, first=first)]


def spoken(source: str, named: str) -> str | None:
    """The language that a block names, unless nothing in the block looks like it and much like another."""
    language = canonical(named) if named and named not in UNSAID else None
    if language is None or language in FORMATS or len(source) < 40:
        return language
    found = detect(source)
    if found is None or found in (language, *FORMATS) or scores(source).get(language):
        return language
    return found


def _fences(text: str, default: str | None = None, depth: int = 0) -> list[Piece]:
    """Blocks between fences. A block that isn't closed ends with the text, or where the next one opens; inside
    Markdown, an opening fence opens a block within the block."""
    found: list[Piece] = []
    lines = text.split("\n")
    fence, named, start, inner = "", "", 0, 0
    for number, line in enumerate(lines):
        if not fence:
            if (opened := opening(line)) is not None:
                fence, named = opened
                start, inner = number + 1, 0
        elif closes(line, fence):
            if inner and len(opening(line)[0]) == len(fence):  # type: ignore[index]
                inner -= 1
                continue
            found += block(lines[start:number], named, start + 1, default, depth)
            fence = ""
        elif (opened := opening(line)) is not None and opened[1] and opened[0] == fence:
            if named in MARKDOWN:
                inner += 1
            else:  # the block before was never closed
                found += block(lines[start:number], named, start + 1, default, depth)
                named, start = opened[1], number + 1
        if len(found) >= MAX_PIECES:
            return [*found[:MAX_PIECES], Piece("", UNREAD, Run("", number + 1, 1))]
    if fence:
        found += block(lines[start:], named, start + 1, default, depth)
    return found


def _diff(text: str) -> list[Piece]:
    """The new side of each file in a unified diff; only added lines count."""
    found: list[Piece] = []
    path = ""
    rows: list[str] = []
    places: list[tuple[str, int]] = []
    added: set[int] = set()

    def end() -> None:
        if rows and added:
            source = "\n".join(rows)
            language = of_file(path) or detect(source) or "text"
            found.append(Piece(source, language, tuple(places), frozenset(added), before=1))
        rows.clear()
        places.clear()
        added.clear()

    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if line.startswith(("diff --git ", "--- ", "index ")):
            if line.startswith("diff --git "):
                end()
        elif line.startswith("+++ ") and (number < 2 or lines[number - 2].startswith("--- ")):
            end()
            path = line[4:].split("\t")[0].strip()
        elif line.startswith("@@"):
            rows.append("")
            places.append(("", number))
        elif line.startswith(("+", " ")):
            if line[0] == "+":
                added.add(len(rows))
            rows.append(line[1:])
            places.append(("", number))
    end()
    if len(found) > MAX_PIECES:
        return [*found[:MAX_PIECES], Piece("", UNREAD, found[MAX_PIECES].places)]
    return found


def _notebook(text: str) -> list[Piece] | None:
    """The code cells as one program, so that what one cell imports the next one knows; lines for the shell apart."""
    try:
        book = json.loads(text)
    except (ValueError, RecursionError):
        return None
    cells = book.get("cells") if isinstance(book, dict) else None
    if not isinstance(cells, list):
        return None
    meta = book.get("metadata")
    kernel = meta.get("kernelspec") if isinstance(meta, dict) else None
    language = canonical(str(kernel.get("language", "python"))) if isinstance(kernel, dict) else "python"
    rows: dict[str, list[str]] = {language or "text": [], "shell": []}
    places: dict[str, list[tuple[str, int]]] = {name: [] for name in rows}
    for i, cell in enumerate(cells, 1):
        if not isinstance(cell, dict) or cell.get("cell_type") != "code":
            continue
        source = cell.get("source", "")
        source = "".join(map(str, source)) if isinstance(source, list) else str(source)
        whole = "shell" if re.match(r"%%(bash|sh|shell|script)\b", source) else language or "text"
        for n, line in enumerate(source.split("\n"), 1):
            target = "shell" if line.lstrip().startswith(("!", "%sx ")) else whole
            rows[target].append("" if line.startswith("%") else line.lstrip("! ") if target != whole else line)
            places[target].append((f"#cell-{i}", n))
    return [Piece("\n".join(rows[name]), name, tuple(places[name])) for name in rows if rows[name]]


def _arguments(text: str) -> list[Piece] | None:
    """Code in the strings of a JSON value: the arguments of a tool call, or a list of calls. None if `text` isn't
    one that holds code."""
    if text.lstrip()[:1] not in ("{", "["):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    found: list[Piece] = []
    _strings(value, "", {}, found, 0)
    if len(found) > MAX_PIECES:
        found[MAX_PIECES:] = [Piece("", UNREAD, found[MAX_PIECES].places)]
    return [*found, _whole(text, "json")] if found else None


def _strings(value: Any, path: str, beside: dict[str, Any], found: list[Piece], depth: int) -> None:
    if len(found) > MAX_PIECES:
        return None
    if depth > 12:
        if isinstance(value, dict | list) and value:
            found.append(Piece("", UNREAD, Run(path, 1, 1)))
        return None
    if isinstance(value, dict):
        for key, below in value.items():
            _strings(below, f"{path}.{key}" if path else str(key), value, found, depth + 1)
    elif isinstance(value, list):
        for i, below in enumerate(value):
            _strings(below, f"{path}[{i}]", beside, found, depth + 1)
    elif isinstance(value, str):
        key = re.sub(r"\[\d+\]$", "", path).rsplit(".", 1)[-1]
        if key == "arguments" and value.lstrip()[:1] == "{":
            try:
                return _strings(json.loads(value), path, {}, found, depth + 1)
            except (ValueError, RecursionError):
                pass  # half-finished arguments: judged as they stand
        language = None
        if _SHELL_KEYS.match(key):
            language = "shell"
        elif _SQL_KEYS.match(key):
            language = "sql"
        elif _CODE_KEYS.match(key) or "\n" in value or key == "arguments":
            named = beside.get("language") or beside.get("lang")
            files = [str(beside[k]) for k in _NAME_KEYS if isinstance(beside.get(k), str)]
            language = canonical(str(named)) if named else next((of_file(f) for f in files if of_file(f)), None)
            language = language or detect(value, likely=key.lower() in LIKELY)
        if language is not None:
            found.append(_whole(value, language, where=path))
    return None
