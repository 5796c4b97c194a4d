"""Renders a checkpoint's own chat template (Jinja) so that only the template itself can write control tokens.

Before a template is compiled, every control token in its literal text is replaced by a variable, and each rendering
fills these variables (and bos_token, eos_token, ...) with marks that hold a fresh random number. In what comes out, a
mark is a control token and all else is plain text. A user's text, role, tool name or argument can spell whatever it
likes: it can't hold the number, so it can't become a mark.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Environment, Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from puna.errors import PunaError


@dataclass(frozen=True)
class Control:
    """A control token in a rendered chat, by its name."""

    name: str


Part = str | Control

_VARIABLE = "puna_control_"
# Methods and filters that look for their first argument in a text: there a control token is compared, not written.
_SEARCHES = frozenset({"split", "rsplit", "partition", "rpartition", "startswith", "endswith", "find", "rfind", "index",
                       "count", "strip", "lstrip", "rstrip", "removeprefix", "removesuffix", "replace", "trim"})
# A harmless chat, to see whether a template spells its control tokens from pieces.
_PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]


def strftime_now(pattern: str) -> str:
    """The local date and time; templates and our own formats both ask here."""
    return datetime.now().strftime(pattern)


class ChatTemplate:
    """One compiled template. `knows_tools`, `knows_calls`: whether it has a place for definitions, and for calls."""

    def __init__(self, source: str, control: Sequence[str]) -> None:
        env = _environment()
        try:
            tree = env.parse(source)
        except TemplateSyntaxError as error:
            raise PunaError(f"the checkpoint's chat template, line {error.lineno}: {error.message}; "
                            "mend chat_template.jinja, or take it away to use the built-in format") from error
        self.knows_tools = any(name.name == "tools" for name in tree.find_all(nodes.Name))
        self.knows_calls = "tool_calls" in source
        self._names = [name for name in sorted(control, key=len, reverse=True) if name in source]
        self._template = _compile(env, _MarkControl(self._names).visit(tree))
        self._check_spelling(control)

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None,
               add_generation_prompt: bool, special: Mapping[str, str]) -> list[Part]:
        """The chat as control tokens and plain texts. `special`: bos_token, eos_token, ... by their variable's name."""
        marks = _Marks([*self._names, *special.values()])
        fields: dict[str, Any] = {f"{_VARIABLE}{i}": marks.of(name) for i, name in enumerate(self._names)}
        fields |= {variable: marks.of(name) for variable, name in special.items()}
        try:
            rendered = self._template.render(fields | {"messages": list(messages), "tools": tools, "documents": None,
                                                       "add_generation_prompt": add_generation_prompt})
        except TemplateError as error:
            raise PunaError(f"the checkpoint's chat template refuses these messages: {error.message}") from error
        except Exception as error:  # a template is a program from elsewhere: it may fail in any way
            raise PunaError(f"the checkpoint's chat template fails on these messages: {error!r}") from error
        return marks.split(rendered)

    def _check_spelling(self, control: Sequence[str]) -> None:
        try:
            parts = self.render(_PROBE, None, True, {})
        except PunaError:
            return  # it wants other messages than the probe's
        spelled = [name for name in control for part in parts if isinstance(part, str) and name in part]
        if spelled:
            raise PunaError(f"the checkpoint's chat template puts the control token {spelled[0]} together from pieces, "
                            "which can't be told from a user's text; write it in one piece in chat_template.jinja")


@lru_cache(maxsize=16)
def chat_template(source: str, control: tuple[str, ...]) -> ChatTemplate:
    """The compiled template, kept: compiling takes longer than rendering."""
    return ChatTemplate(source, control)


class _Marks:
    """The marks of one rendering: letters and digits only, so that trim, tojson and the like leave them alone."""

    def __init__(self, names: Sequence[str]) -> None:
        self._nonce = secrets.token_hex(16)
        self._names = list(dict.fromkeys(names))

    def of(self, name: str) -> str:
        return f"{self._nonce}{self._names.index(name):05d}"

    def split(self, rendered: str) -> list[Part]:
        pieces = re.split(f"{self._nonce}([0-9]{{5}})", rendered)
        parts: list[Part] = []
        for i, piece in enumerate(pieces):
            if i % 2:
                parts.append(Control(self._names[int(piece)]))
            elif piece:
                parts.append(piece)
        return parts


class _MarkControl(NodeTransformer):
    """Replaces control tokens in what a template writes by variables; what it only compares with stays as it is."""

    def __init__(self, names: Sequence[str]) -> None:
        self._index = {name: i for i, name in enumerate(names)}
        self._pattern = re.compile("(" + "|".join(map(re.escape, names)) + ")" if names else "((?!))")

    def visit_TemplateData(self, node: nodes.TemplateData) -> Any:
        return self._pieces(node.data, nodes.TemplateData, node.lineno) or node

    def visit_Const(self, node: nodes.Const) -> Any:
        pieces = self._pieces(node.value, nodes.Const, node.lineno) if isinstance(node.value, str) else []
        return nodes.Concat(pieces, lineno=node.lineno) if pieces else node

    def visit_Compare(self, node: nodes.Compare) -> Any:
        return node

    def visit_Test(self, node: nodes.Test) -> Any:
        return node

    def visit_Call(self, node: nodes.Call) -> Any:
        if isinstance(node.node, nodes.Getattr) and node.node.attr in _SEARCHES:
            return self._visit_but_sought(node)
        return self.generic_visit(node)

    def visit_Filter(self, node: nodes.Filter) -> Any:
        return self._visit_but_sought(node) if node.name in _SEARCHES else self.generic_visit(node)

    def _visit_but_sought(self, node: Any) -> Any:
        sought, node.args = node.args[:1], node.args[1:]
        node = self.generic_visit(node)
        node.args = [*sought, *node.args]
        return node

    def _pieces(self, text: str, kind: Any, lineno: int) -> list[nodes.Expr]:
        pieces = self._pattern.split(text)
        if len(pieces) == 1:
            return []
        return [nodes.Name(f"{_VARIABLE}{self._index[piece]}", "load", lineno=lineno) if i % 2
                else kind(piece, lineno=lineno) for i, piece in enumerate(pieces) if piece]  # fmt: skip


class _Generation(Extension):
    """`{% generation %}` marks the assistant's share for training; for a prompt its body is all that matters."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=lineno)


def _environment() -> Environment:
    """Jinja as transformers sets it up (utils/chat_template_utils.py)."""

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
               separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    env.filters["tojson"] = tojson
    env.globals |= {"raise_exception": raise_exception, "strftime_now": lambda pattern: strftime_now(pattern)}
    return env


def _compile(env: Environment, tree: nodes.Template) -> Template:
    try:
        return Template.from_code(env, env.compile(tree), env.make_globals(None))
    except TemplateError as error:
        raise PunaError(f"the checkpoint's chat template does not compile: {error.message}") from error
