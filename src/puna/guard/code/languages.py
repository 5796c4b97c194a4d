"""The languages that are understood: names, file endings, grammars (loaded on first use), and the tables that lower
them."""

import importlib
from dataclasses import dataclass
from functools import cache

from tree_sitter import Language


@dataclass(frozen=True)
class Spoken:
    """One language: its grammar wheel and the function in it, the table in `grammars/`, what people call it, and how
    its files end."""

    package: str
    function: str
    table: str
    aliases: tuple[str, ...]
    endings: tuple[str, ...]


LANGUAGES: dict[str, Spoken] = {
    "python": Spoken(
        "tree_sitter_python", "language", "python", ("py", "python3", "pycon", "ipython"), (".py", ".pyi", ".pyw")
    ),
    "javascript": Spoken(
        "tree_sitter_javascript",
        "language",
        "javascript",
        ("js", "jsx", "node", "mjs"),
        (".js", ".jsx", ".mjs", ".cjs"),
    ),
    "typescript": Spoken(
        "tree_sitter_typescript", "language_typescript", "javascript", ("ts",), (".ts", ".mts", ".cts")
    ),
    "tsx": Spoken("tree_sitter_typescript", "language_tsx", "javascript", (), (".tsx",)),
    "java": Spoken("tree_sitter_java", "language", "java", (), (".java",)),
    "c": Spoken("tree_sitter_c", "language", "c", ("h",), (".c", ".h")),
    "cpp": Spoken(
        "tree_sitter_cpp", "language", "c", ("c++", "cc", "cxx", "hpp"), (".cpp", ".cc", ".cxx", ".hpp", ".hh", ".hxx")
    ),
    "csharp": Spoken("tree_sitter_c_sharp", "language", "csharp", ("c#", "cs", "c_sharp"), (".cs",)),
    "php": Spoken("tree_sitter_php", "language_php", "php", (), (".php", ".phtml")),
    "php_only": Spoken("tree_sitter_php", "language_php_only", "php", (), ()),
    "go": Spoken("tree_sitter_go", "language", "go", ("golang",), (".go",)),
    "ruby": Spoken("tree_sitter_ruby", "language", "ruby", ("rb",), (".rb", ".rake", ".gemspec")),
    "rust": Spoken("tree_sitter_rust", "language", "rust", ("rs",), (".rs",)),
    "kotlin": Spoken("tree_sitter_kotlin", "language", "kotlin", ("kt", "kts"), (".kt", ".kts")),
    "swift": Spoken("tree_sitter_swift", "language", "swift", (), (".swift",)),
    "shell": Spoken(
        "tree_sitter_bash", "language", "shell", ("bash", "sh", "zsh", "console", "shell-session"), (".sh", ".bash")
    ),
}


@dataclass(frozen=True)
class Format:
    """A format without a grammar of its own: what people call it, how its files end, or what they are called."""

    aliases: tuple[str, ...]
    endings: tuple[str, ...]
    names: tuple[str, ...] = ()


FORMATS: dict[str, Format] = {
    "dockerfile": Format(("docker",), (".dockerfile",), ("dockerfile", "containerfile")),
    "yaml": Format(("yml",), (".yaml", ".yml")),
    "json": Format(("jsonc", "json5"), (".json",)),
    "sql": Format(("mysql", "postgresql", "plsql", "tsql", "sqlite"), (".sql",)),
    "text": Format(
        ("ini", "toml", "env", "dotenv", "properties", "conf", "txt"),
        (".ini", ".toml", ".env", ".properties", ".conf", ".cfg", ".pem", ".key", ".tfvars", ".npmrc"),
    ),
}
# the variants of one language share its rules
RULES_OF = {"tsx": "typescript", "php_only": "php"}
_ALL: dict[str, Spoken | Format] = {**LANGUAGES, **FORMATS}
_BY_NAME = {alias: name for name, known in _ALL.items() for alias in (name, *known.aliases)}
_BY_ENDING = {ending: name for name, known in _ALL.items() for ending in known.endings}
_BY_FILE = {file: name for name, known in FORMATS.items() for file in known.names}


def canonical(name: str) -> str | None:
    """`"py"`, `"C++"`, `"bash"` -> the name used here; None for a language that isn't understood."""
    return _BY_NAME.get(name.strip().lower())


def of_file(path: str) -> str | None:
    """The language of a file, by its name: `Dockerfile`, or an ending."""
    name = path.replace("\\", "/").rsplit("/", 1)[-1].lower()
    if (known := _BY_FILE.get(name) or _BY_FILE.get(name.split(".", 1)[0])) is not None:
        return known
    return _BY_ENDING.get("." + name.rsplit(".", 1)[-1]) if "." in name else None


@cache
def grammar(name: str) -> Language:
    """The compiled grammar; loaded once."""
    spoken = LANGUAGES[name]
    return Language(getattr(importlib.import_module(spoken.package), spoken.function)())


@cache
def table(name: str) -> dict:
    """How a grammar's node types are lowered."""
    return importlib.import_module(f"puna.guard.code.grammars.{name}").TABLE


def variant(name: str, source: bytes) -> str:
    """PHP without its opening tag and TypeScript with JSX have grammars of their own."""
    if name == "php" and b"<?" not in source:
        return "php_only"
    if name == "typescript" and (b"</" in source or b"/>" in source):
        return "tsx"
    return name
