"""The command `puna`: a table of commands, each imported only when it is called, so that `puna --help` stays quick."""

import importlib
import io
import os
import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from puna.errors import PunaError

# command -> ("module:attribute", one line of help). The attribute is a function, or a typer.Typer with subcommands.
COMMANDS: dict[str, tuple[str, str]] = {
    "chat": ("puna.cli.chat:chat", "Talk with a model in the terminal."),
    "generate": ("puna.cli.generate:generate", "Continue a prompt once and print the result."),
    "serve": ("puna.cli.serve:serve", "Serve a model over HTTP, in OpenAI's API."),
    "pull": ("puna.cli.pull:pull", "Download a checkpoint from a hub."),
    "list": ("puna.cli.list_models:list_models", "List the Llama family: sizes, context, licence."),
    "show": ("puna.cli.show:show", "Show one model: shape, parameters, memory, claims."),
    "plan": ("puna.cli.plan:plan", "Show how a model splits over processes, and the bytes of each."),
    "tune": ("puna.cli.tune:tune", "Tune a model on your own chats, texts, preferences or tasks."),
    "train": ("puna.cli.train:train", "Train a model from scratch on text and chats."),
    "evaluate": ("puna.cli.evaluate:app", "Measure models and guards, with confidence intervals."),
    "guard": ("puna.cli.guard:app", "Judge what goes in and comes out: insecure code."),
    "export": ("puna.cli.export:export", "Write a checkpoint in another format."),
}


def load_command(name: str) -> Any:
    """Import the module behind `name` and return its command object.

    A function becomes one command, whose long help is the function's docstring; a typer.Typer becomes a group.
    """
    path, short_help = COMMANDS[name]
    module, attribute = path.split(":")
    target = getattr(importlib.import_module(module), attribute)
    if not isinstance(target, typer.Typer):
        single = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
        single.command(name, short_help=short_help, no_args_is_help=False)(target)
        target = single
    return typer.main.get_command(target)


class LazyGroup(TyperGroup):
    """Lists COMMANDS from the table alone, and imports only the command that is called."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, (_, short_help) in COMMANDS.items():
            self.commands[name] = TyperCommand(name, help=short_help)

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - click's signature
        return list(self.commands)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, load_command(name) if name in COMMANDS else command, rest


app = typer.Typer(
    cls=LazyGroup, no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from puna import __version__

        typer.echo(f"puna {__version__}")
        raise typer.Exit()


@app.callback(epilog="Example: puna chat")
def _root(
    version: bool = typer.Option(False, "--version", help="Print the version.", callback=_print_version, is_eager=True),
) -> None:
    """Run, customise, guard and serve open-weight Llama models on your own hardware."""


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 an error the user can mend, 2 wrong usage, 130 Ctrl-C."""
    for stream in (sys.stdin, sys.stdout):  # bytes that are not UTF-8, a terminal that lacks a character: no traceback
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        app(prog_name="puna")
    except PunaError as error:
        typer.echo(typer.style("Error: ", fg="red") + str(error), err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader (head, less) has gone: stop quietly, and keep the interpreter from flushing into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # of a file that nothing closer says more about: its name is too long, its disk is full
        if error.filename is None:
            raise
        typer.echo(typer.style("Error: ", fg="red") + f"{error.filename}: {error.strerror}", err=True)
        sys.exit(1)
