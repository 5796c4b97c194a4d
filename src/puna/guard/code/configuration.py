"""YAML, JSON and Dockerfiles in the uniform view: an instruction is a call, a mapping a map. The shell commands inside
are pieces of their own."""

import re
from dataclasses import dataclass
from typing import Any

import yaml

from puna.guard.code.budget import Budget
from puna.guard.code.view import Node

SCRIPT_KEYS = ("run", "script", "before_script", "after_script")
MAX_DEPTH = 60
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_PAIR = re.compile(
    rb"""^[ \t-]*["']?([\w./-]{1,80})["']?[ \t]*:[ \t]*["']?([^\n"',{}\[\]]{1,400})["']?,?[ \t]*$""", re.MULTILINE
)
_INSTRUCTION = re.compile(rb"^[ \t]*([A-Za-z]{2,20})[ \t]+((?:[^\\\n]|\\\r?\n[ \t]*(?:#[^\n]*\n)*|\\.)*)", re.MULTILINE)


@dataclass(frozen=True)
class Embedded:
    """Code of another language inside, at these bytes."""

    language: str
    start: int
    end: int


def read(source: bytes, name: str, budget: Budget) -> tuple[Node, list[Embedded]]:
    """The uniform view of a format of `languages.FORMATS` and what lies embedded in it."""
    if name == "dockerfile":
        return _dockerfile(source)
    if name in ("yaml", "json"):
        return _Yaml(source, budget).read()
    return Node("block", 0, len(source), "text"), []


def _dockerfile(source: bytes) -> tuple[Node, list[Embedded]]:
    calls: list[Node] = []
    embedded: list[Embedded] = []
    for match in _INSTRUCTION.finditer(source):
        name = match[1].decode("ascii").upper()
        args: list[Node] = []
        keys: list[str | None] = []
        for word in re.finditer(rb'"[^"\n]{0,2000}"|[^\s"\\]{1,2000}', match[2]):
            text = word[0].decode("utf-8", "replace").strip('"')
            key = None
            if not args and text.startswith("--") and "=" in text:
                key, _, text = text[2:].partition("=")
            start = match.start(2) + word.start()
            args.append(Node("string", start, start + len(word[0]), "word", value=text))
            keys.append(key)
            if len(args) >= 200:
                break
        start, end = match.span()
        base = Node("name", match.start(1), match.end(1), "instruction", name=name)
        calls.append(Node("call", start, end, "instruction", base=base, args=args, keys=keys))
        if name == "RUN" and not match[2].lstrip().startswith(b"["):
            embedded.append(Embedded("shell", match.start(2), end))
    return Node("block", 0, len(source), "file", body=calls), embedded


class _Yaml:
    """Events of the YAML parser as nodes (an alias is a leaf, so nothing is expanded); JSON is read the same way. Where
    the parser gives up, lines of the form `key: value` are read by themselves."""

    def __init__(self, source: bytes, budget: Budget) -> None:
        self.source = source
        self.text = source.decode("utf-8", "replace")
        self.ascii = len(self.text) == len(source)
        self.budget = budget
        self.embedded: list[Embedded] = []

    def at(self, mark: Any) -> int:
        """Byte offset of a mark, which counts characters."""
        return mark.index if self.ascii else len(self.text[: mark.index].encode("utf-8", "replace"))

    def read(self) -> tuple[Node, list[Embedded]]:
        found: list[Node] = []
        try:
            self.events = yaml.parse(self.text, Loader=_LOADER)
            for event in self.events:
                if isinstance(event, yaml.events.NodeEvent):
                    found.append(self.node(event, 0))
        except (yaml.YAMLError, ValueError, RecursionError):
            found.extend(self.lines())
        return Node("block", 0, len(self.source), "file", body=found), self.embedded

    def lines(self) -> list[Node]:
        found = []
        for match in _PAIR.finditer(self.source):
            if self.budget.check():
                break
            value = _scalar(match[2].decode("utf-8", "replace").strip(), True, *match.span(2))
            found.append(Node("map", *match.span(), "line", args=[value], keys=[match[1].decode("utf-8", "replace")]))
        return found

    def node(self, event: Any, depth: int) -> Node:
        """One node; reads the events of what lies in it. Raises ValueError for nesting too deep."""
        if depth > MAX_DEPTH or self.budget.check():
            raise ValueError("nested too deep, or out of time")
        start = self.at(event.start_mark)
        if isinstance(event, yaml.events.ScalarEvent) and event.tag is not None and not event.tag.startswith("tag:"):
            return Node("other", start, self.at(event.end_mark), "tagged")  # !Ref DbPassword, !vault |
        if isinstance(event, yaml.events.ScalarEvent):
            return _scalar(event.value, event.implicit[0], start, self.at(event.end_mark))
        if isinstance(event, yaml.events.SequenceStartEvent):
            items: list[Node] = []
            while not isinstance(below := next(self.events), yaml.events.SequenceEndEvent):
                items.append(self.node(below, depth + 1))
            return Node("collection", start, self.at(below.end_mark), "sequence", args=items)
        if isinstance(event, yaml.events.MappingStartEvent):
            args: list[Node] = []
            keys: list[str | None] = []
            while not isinstance(below := next(self.events), yaml.events.MappingEndEvent):
                self.node(below, depth + 1)
                value = self.node(next(self.events), depth + 1)
                keys.append(below.value if isinstance(below, yaml.events.ScalarEvent) else None)
                args.append(value)
                if keys[-1] in SCRIPT_KEYS:
                    self.embed(value)
            return Node("map", start, self.at(below.end_mark), "mapping", args=args, keys=keys)
        return Node("other", start, start, "alias")

    def embed(self, value: Node) -> None:
        """Scripts in a value: its own text, or that of each item."""
        for item in value.args if value.kind == "collection" else [value]:
            if item.kind == "string":
                start = item.start
                if self.source[start : start + 1] in (b"|", b">"):
                    start = self.source.find(b"\n", start, item.end) + 1 or item.end
                quoted = self.source[start : start + 1] in (b'"', b"'")
                self.embedded.append(Embedded("shell", start + quoted, item.end - quoted))


def _scalar(text: str, plain: bool, start: int, end: int) -> Node:
    if plain and text.lower() in ("true", "false", "yes", "no", "on", "off"):
        return Node("constant", start, end, "scalar", value=text.lower() in ("true", "yes", "on"))
    if plain and text.lower() in ("null", "~", ""):
        return Node("constant", start, end, "scalar", value=None)
    if plain and re.fullmatch(r"[-+]?\d{1,18}", text):
        return Node("number", start, end, "scalar", value=int(text))
    return Node("string", start, end, "scalar", value=text)
