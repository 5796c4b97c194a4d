"""The code inside a model's answer, judged whole or as it streams."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from puna.guard.code import extract
from puna.guard.code.budget import Budget, running
from puna.guard.code.detect import detect
from puna.guard.code.extract import UNREAD, Piece, Run, pieces
from puna.guard.code.finding import Finding
from puna.guard.code.scan import INCOMPLETE, SECONDS, incomplete, scan

LOOKING = 0.5  # share of the time in which code is looked for
PLACING = 0.05  # share of it that is left when the last piece begins
STRETCH = 40  # lines of an open block after which its finished functions are judged
_IMPORT = re.compile(r"^\s*(import|from|using|use|#include|require|package|const .*require\(|<\?php)")


def scan_pieces(found: list[Piece], seconds: float = SECONDS, limit: float | None = None) -> list[Finding]:
    """The findings in pieces of code, at their lines in the whole; `path` names the part. The pieces share `seconds`;
    `limit` is the time that is named where it is over (`seconds` itself, where that isn't a rest of it)."""
    end = time.thread_time() + seconds * (1 - PLACING)
    limit = seconds if limit is None else limit
    findings: dict[tuple[str, str, int], Finding] = {}
    for piece in found:
        left = end - time.thread_time()
        if left <= 0 or piece.language == UNREAD:
            part, line = piece.places[0]
            reason = f"takes longer than {limit:g} s" if left <= 0 else "is too much, or in too many blocks"
            stopped = replace(incomplete(line, piece.language, reason), path=part)
            findings.setdefault((stopped.rule, part, line), stopped)
            if left <= 0:
                break
            continue
        for finding in scan(piece.source, piece.language, seconds=left, limit=limit):
            if piece.added is not None and finding.line - 1 not in piece.added and finding.rule != INCOMPLETE:
                continue
            placed = place(finding, piece)
            findings.setdefault((placed.rule, placed.path, placed.line), placed)
    return list(findings.values())


def scan_found(text: str, language: str | None = None, seconds: float = SECONDS) -> list[Finding]:
    """The findings in the code inside `text`; finding the code counts against the limit, too."""
    start = time.thread_time()
    looking = Budget(seconds * LOOKING)
    before = running.set(looking)
    try:
        found = pieces(text, language)
    finally:
        running.reset(before)
    findings = scan_pieces(found, seconds - (time.thread_time() - start), seconds)
    if looking.spent and not any(finding.rule == INCOMPLETE for finding in findings):
        findings.append(incomplete(1, "text", f"takes longer than {seconds:g} s to be told from other text"))
    return findings


def place(finding: Finding, piece: Piece) -> Finding:
    """A finding of a piece, with its lines in the whole."""
    last = len(piece.places) - 1
    part, line = piece.places[min(finding.line - 1, last)]
    end_line = piece.places[min(finding.end_line - 1, last)][1]
    trace = tuple((piece.places[min(n - 1, last)][1], text) for n, text in finding.trace)
    column, end_column = finding.column + piece.before, finding.end_column + piece.before
    return replace(finding, line=line, column=column, end_line=end_line, end_column=end_column, path=part, trace=trace)


def scan_answer(text: str, seconds: float = SECONDS) -> list[Finding]:
    """The findings in the code inside `text`: an answer with fenced blocks, a tool call's arguments as JSON, a diff, a
    notebook, or code alone. Lines are the text's own; in JSON, `path` names the string and lines count within it."""
    return scan_found(text, seconds=seconds)


class CodeStream:
    """Judges an answer as it arrives: `feed` each part, `close` at the end; both give the findings that are new.

    A fenced block is judged as it closes. Of a block that goes on for long, what precedes the latest line at the
    margin is judged before, with the block's imports; so a reader is warned while the rest is being written. An answer
    without fences is judged at the end.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self.fenced = False
        self._rest = ""
        self._lines: list[str] = []  # of the answer so far, or of the open block
        self._number = 0  # lines before them
        self._fence = ""
        self._named = ""
        self._judged = 0  # lines of the open block that were judged
        self._depth = 0  # blocks that are open inside a block of Markdown
        self._context: list[str] = []  # the judged lines, blank but for imports
        self._told: set[tuple[str, str, int]] = set()
        self._until = 0.0  # processor time at which what is judged now must be over

    def feed(self, text: str) -> list[Finding]:
        """Take the next part of the answer."""
        text = self._rest + text
        held = "\r" if text.endswith("\r") else ""  # a \n may follow
        *whole, self._rest = extract.plain_ends(text.removesuffix(held)).split("\n")
        self._rest += held
        with self._limited():
            return [finding for line in whole for finding in self._line(line)]

    def close(self) -> list[Finding]:
        """The answer has ended: judge what is open."""
        with self._limited():
            found = self._line(self._rest.removesuffix("\r")) if self._rest else []
            self._rest = ""
            if self._fence:
                return found + self._end()
            if not self.fenced:
                found += self._new(scan_found("\n".join(self._lines), seconds=self.seconds))
            return found

    @contextmanager
    def _limited(self) -> Iterator[None]:
        """All that is judged at once shares one limit."""
        self._until = time.thread_time() + self.seconds
        before = running.set(Budget(self.seconds))
        try:
            yield
        finally:
            running.reset(before)

    def _judge(self, found: list[Piece]) -> list[Finding]:
        return self._new(scan_pieces(found, self._until - time.thread_time(), self.seconds))

    def _line(self, line: str) -> list[Finding]:
        opened = extract.opening(line) if "```" in line or "~~~" in line else None
        found: list[Finding] = []
        if not self._fence:
            if opened is None:
                self._lines.append(line)
                return []
            self._begin(opened)
        elif opened is not None and not self._depth and extract.closes(line, self._fence):
            found = self._end()
        elif opened is not None and opened[0] == self._fence and self._named in extract.MARKDOWN:
            self._depth += 1 if opened[1] else -1
            self._lines.append(line)
        elif opened is not None and opened[1] and opened[0] == self._fence:
            found = self._end()  # the block before was never closed
            self._number -= 1
            self._begin(opened)
        else:
            self._lines.append(line)
            if len(self._lines) - self._judged > STRETCH and line[:1].strip() and line[:1] not in "})]":
                found = self._stretch()
        return found

    def _begin(self, opened: tuple[str, str]) -> None:
        self.fenced = True
        self._fence, self._named = opened
        self._number += len(self._lines) + 1
        self._lines, self._context = [], []
        self._judged = self._depth = 0

    def _end(self) -> list[Finding]:
        """The open block, judged whole."""
        found = self._judge(extract.block(self._lines, self._named, self._number + 1))
        self._number += len(self._lines) + 1
        self._lines, self._fence = [], ""
        return found

    def _stretch(self) -> list[Finding]:
        """The finished part of a long block: its new lines, after the imports of those before."""
        upto = len(self._lines) - 1
        latest = self._lines[self._judged : upto]
        source = "\n".join([*self._context, *latest])
        self._context += [line if _IMPORT.match(line) else "" for line in latest]
        start = "\n".join(self._lines[:200])
        language = extract.spoken(start, self._named) or detect(start)
        self._judged = upto
        if language is None:
            return []
        piece = Piece(source, language, Run("", self._number + 1, upto))
        return self._judge([piece])

    def _new(self, findings: list[Finding]) -> list[Finding]:
        fresh = [f for f in findings if (f.rule, f.path, f.line) not in self._told]
        self._told.update((f.rule, f.path, f.line) for f in fresh)
        return fresh
