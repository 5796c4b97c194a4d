"""`puna chat`: a conversation in the terminal. The conversation itself is `Conversation`; the rest is paper and ink."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from puna.cli.memory import in_bytes, show_forecast, show_notes, show_used
from puna.cli.pictures import IMAGE_HELP, VIDEO_HELP, Album, Part, check_files, with_parts
from puna.cli.ranks import refuse_many
from puna.errors import PunaError

if TYPE_CHECKING:
    from puna.engine import Model, Reply

SMALL_MODEL = (
    "cria is a very small model, trained from scratch on little text: its English is fluent, but what it says about "
    "the world will mostly be wrong."
)
HELP = """\
/help          this list
/system TEXT   set the system message (without TEXT: show it)
/image FILE    show a picture with the next message; /video FILE a video
/save FILE     write the conversation to FILE as JSON
/reset         begin anew (the system message stays)
/quit          leave (so does Ctrl-D)
Ctrl-C         stop the answer, not the program"""


def chat(
    model: str = typer.Argument("cria", help="Bundled name, hub id, folder or file."),
    system: str | None = typer.Option(None, "--system", "-s", help="The system message."),
    image: list[str] = typer.Option([], "--image", help=IMAGE_HELP),
    video: list[str] = typer.Option([], "--video", help=VIDEO_HELP),
    temperature: float | None = typer.Option(None, "--temperature", "-t", help="0 always takes the likeliest token."),
    top_p: float | None = typer.Option(None, "--top-p", help="Draw from the likeliest tokens of this joint share."),
    max_tokens: int | None = typer.Option(None, "--max-tokens", "-n", min=1, help="Most tokens in one answer."),
    repetition_penalty: float = typer.Option(1.1, "--repetition-penalty", help="1 leaves the model alone."),
    seed: int | None = typer.Option(None, "--seed", help="Same seed, same answers."),
    device: str = typer.Option("cpu", "--device", help="Where to run, as torch names it."),
    dtype: str | None = typer.Option(None, "--dtype", help="float32, bfloat16 or float16; default: as stored."),
    context: int | None = typer.Option(None, "--context", help="Cap the context length, in tokens."),
    quantize: str | None = typer.Option(None, "--quantize", help="Weights in int8 or int4; default: as stored."),
    kv: str | None = typer.Option(None, "--kv", help="int8 keeps keys and values in 8 bits."),
    memory: float | None = typer.Option(None, "--memory", min=0.01, help="Most memory to use, in GB."),
    adapter: str | None = typer.Option(None, "--adapter", help="A PEFT adapter's folder, beside the weights."),
) -> None:
    """Talk with a model in the terminal.

    Example: puna chat --system "You are brief."

    Lines can also be piped in: echo "Hello" | puna chat PATH

    With a picture: puna chat PATH --image chart.png
    """
    refuse_many("chat")
    check_files([*image, *video])
    screen = Screen()
    if Path(model).name == "cria":
        screen.note(SMALL_MODEL)
    with screen.waiting(f"loading {model}"):
        from puna.engine import Sampling, load

        options = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed,
                   "repetition_penalty": repetition_penalty}  # fmt: skip
        Sampling().with_options(options)  # a wrong flag is told before a long load
        llama = load(model, device=device, dtype=dtype, context=context, quantize=quantize, kv=kv,
                     memory=in_bytes(memory), tell=show_forecast, adapter=adapter)  # fmt: skip
    show_notes(llama)
    if llama.tokenizer is None:
        raise PunaError(f"chat needs a tokenizer, and {model} has none; use: puna generate {model} --ids 1,2,3")
    if sys.stdin.isatty():
        screen.note("/help lists the commands, Ctrl-D leaves.")
    session = Session(llama, Conversation(system), options, screen)
    for kind, files in (("image", image), ("video", video)):
        for file in files:
            session.show(kind, file)
    session.run()
    show_used(llama)


@dataclass
class Conversation:
    """The messages so far. Nothing is ever dropped from it silently."""

    system: str | None = None
    turns: list[dict[str, Any]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """All messages, the system's first."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def save(self, path: Path) -> None:
        """Write the messages as JSON. PunaError where `path` exists already or can't be written."""
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(json.dumps(self.messages, ensure_ascii=False, indent=2) + "\n")
        except FileExistsError:
            raise PunaError(f"{path} exists already; choose another name") from None
        except OSError as error:
            raise PunaError(f"{path} can't be written: {error.strerror}") from None


class Session:
    """Reads lines, answers them, obeys commands."""

    def __init__(self, llama: "Model", conversation: Conversation, options: dict[str, Any], screen: "Screen") -> None:
        self.llama, self.conversation, self.options, self.screen = llama, conversation, options, screen
        self.album = Album(llama)
        self.pending: list[Part] = []  # pictures to be shown with the next message

    def run(self) -> None:
        """Until the end of input or /quit. Ctrl-C at the prompt clears the line."""
        while True:
            try:
                line = self.screen.read()
                if line is None:
                    return
                if line.startswith("/"):
                    if not self.command(line):
                        return
                elif line.strip():
                    self.answer(line)
            except KeyboardInterrupt:
                self.screen.line("")
            except PunaError as error:
                self.screen.error(str(error))

    def show(self, kind: str, file: str) -> None:
        """Read a picture or a video, to be shown with the next message. Raises PunaError naming the file."""
        seen = len(self.album.notes)
        self.pending.append(self.album.add(kind, file))
        for note in self.album.notes[seen:]:
            self.screen.note(note)

    def command(self, line: str) -> bool:
        """Obey one slash command; False to leave."""
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if name == "/quit":
            return False
        if name == "/help":
            self.screen.line(HELP)
        elif name == "/reset":
            self.conversation.turns.clear()
            self.pending.clear()
            self.screen.note("The conversation begins anew.")
        elif name == "/system":
            if rest:
                self.conversation.system = rest
            self.screen.note(f"System message: {self.conversation.system or '(none)'}")
        elif name in ("/image", "/video"):
            if not rest:
                raise PunaError(f"{name} needs a file name, as in: {name} llama.{'png' if name == '/image' else 'mp4'}")
            self.show(name[1:], rest)
            self.screen.note(f"{rest} is shown with your next message.")
        elif name == "/save":
            if not rest:
                raise PunaError("/save needs a file name, as in: /save talk.json")
            self.conversation.save(Path(rest).expanduser())
            self.screen.note(f"Saved {len(self.conversation.messages)} messages to {rest}.")
        else:
            raise PunaError(f"unknown command {name}; /help lists the commands")
        return True

    def answer(self, text: str) -> None:
        """Ask the model and show its answer as it comes. What was shown before Ctrl-C stays in the conversation."""
        from puna.engine import ContextLengthError

        turns = self.conversation.turns
        turns.append({"role": "user", "content": with_parts(self.pending, text)})
        shown: list[str] = []
        times: list[float] = [time.perf_counter()]  # begin, then one for each token
        stream = None
        try:
            stream = self.llama.stream(self.album.shown(self.conversation.messages), **self.options)
            with stream, self.screen.answering() as show:
                for piece in stream:
                    times.extend(time.perf_counter() for _ in piece.token_ids)
                    shown.append(piece.text)
                    show(piece.text)
        except KeyboardInterrupt:
            self.screen.note("(stopped)")
        except ContextLengthError as error:
            raise PunaError(
                f"this conversation would need {error.prompt_tokens} tokens, more than the {error.context_length} that "
                "the model can see. Nothing was dropped: ask something shorter, or begin anew with /reset"
            ) from None
        finally:
            if any(shown):
                turns.append({"role": "assistant", "content": "".join(shown)})
                self.pending.clear()
            else:
                turns.pop()
        self._account(stream.reply if stream else None, times)

    def _account(self, reply: "Reply | None", times: list[float]) -> None:
        count, writing = len(times) - 1, times[-1] - times[min(1, len(times) - 1)]
        speed = f"{(count - 1) / writing:.1f} tokens/s" if writing > 0 else "- tokens/s"
        prompt = f"{reply.usage.prompt_tokens} tokens in, " if reply else ""
        wait = f", first after {times[1] - times[0]:.2f} s" if count else ""
        self.screen.aside(f"{prompt}{count} out, {speed}{wait}")
        if reply and reply.finish_reason == "length":
            if reply.usage.total_tokens >= self.llama.context_length:
                self.screen.note(f"The context of {self.llama.context_length} tokens is full: begin anew with /reset.")
            else:
                self.screen.note("The answer was cut at --max-tokens.")


class Screen:
    """The terminal: styled with streaming markdown on a tty, plain text elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(highlight=False)
        self.styled = sys.stdout.isatty() and not self.console.is_dumb_terminal
        if sys.stdin.isatty():
            _line_editing()

    def read(self) -> str | None:
        """The next line of the user, or None at the end of input."""
        try:
            return input("\n> " if sys.stdin.isatty() else "")
        except EOFError:
            return None

    def line(self, text: str) -> None:
        """Plain words."""
        self.console.print(text, markup=False, soft_wrap=not self.styled)

    def note(self, text: str) -> None:
        """A word from the program, not from the model."""
        self.console.print(text, style="yellow", markup=False, soft_wrap=not self.styled)

    def aside(self, text: str) -> None:
        """Numbers, dim; on standard error where standard output is read by a program."""
        if self.styled:
            self.console.print(text, style="dim", markup=False)
        else:
            sys.stderr.write(text + "\n")

    def error(self, text: str) -> None:
        """Something the user can mend."""
        self.console.print(f"Error: {text}", style="red", markup=False, soft_wrap=not self.styled)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Shows that something takes a while."""
        if not self.styled:
            yield
            return
        with self.console.status(what):
            yield

    @contextmanager
    def answering(self) -> Iterator[Callable[[str], None]]:
        """Gives a function that shows the next text of an answer."""
        if self.styled:
            writer = MarkdownWriter(self.console)
            try:
                yield writer.push
            finally:
                writer.finish()
            return

        def plain(text: str) -> None:
            sys.stdout.write(text)
            sys.stdout.flush()

        try:
            yield plain
        finally:
            plain("\n")


class MarkdownWriter:
    """Markdown as it grows: finished blocks are printed for good, only the last one is redrawn.

    So answers longer than the screen scroll as usual, and redrawing costs the same at every length.
    """

    def __init__(self, console: Any) -> None:
        from rich.live import Live
        from rich.spinner import Spinner

        self._console = console
        self._open = ""  # the block in progress
        self._live = Live(Spinner("dots"), console=console, refresh_per_second=12, transient=True,
                          vertical_overflow="ellipsis")
        self._live.start()

    def push(self, text: str) -> None:
        """More text; control characters, which could steer the terminal, are left out."""
        from rich.markdown import Markdown

        text = "".join(c for c in text if c in "\n\t" or (ord(c) >= 32 and not 127 <= ord(c) < 160))
        if not text:
            return
        self._open += text
        done = finished_blocks(self._open)
        if done:
            self._live.console.print(Markdown(self._open[:done]))
            self._open = self._open[done:]
        self._live.update(Markdown(self._open))

    def finish(self) -> None:
        """The last block, for good."""
        from rich.markdown import Markdown

        self._live.update("")  # stopping draws once more
        self._live.stop()
        if self._open.strip():
            self._console.print(Markdown(self._open))


def finished_blocks(text: str) -> int:
    """How many characters of markdown can no longer change: up to the last empty line outside a code fence."""
    fence: str | None = None
    done = at = 0
    for line in text.splitlines(keepends=True):
        at += len(line)
        mark = line.lstrip()[:3]
        if mark in ("```", "~~~") and fence in (None, mark):
            fence = mark if fence is None else None
        elif fence is None and line.endswith("\n") and not line.strip() and text[:at].strip():
            done = at
    return done


def _line_editing() -> None:
    """Arrow keys and history at the prompt, where the platform has them."""
    try:
        import readline  # noqa: F401
    except ImportError:
        return
