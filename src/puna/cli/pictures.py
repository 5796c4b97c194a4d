"""Pictures and videos in files, shown to a model from the command line."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.errors import PunaError

if TYPE_CHECKING:
    from puna.engine import Model

IMAGE_HELP = "A picture to show with the prompt. May be given several times."
VIDEO_HELP = "A video, of which up to 16 frames are shown. May be given several times."

Part = dict[str, Any]


def check_files(files: Sequence[str]) -> None:
    """Tell before a long load which files can't be read. Raises PunaError."""
    for file in files:
        try:
            with Path(file).expanduser().open("rb"):
                pass
        except OSError as error:
            raise PunaError(f"{file} can't be read: {error.strerror}") from None


class Album:
    """The pictures and videos of one conversation, each read once.

    Messages hold them as parts of OpenAI's kind with file: URLs, fit for JSON; `shown` puts what was read in their
    place. `notes` has a sentence for each file of which not everything is seen.
    """

    def __init__(self, model: "Model") -> None:
        self._vision = model.config.vision
        self._read: dict[str, Any] = {}
        self.notes: list[str] = []

    def add(self, kind: str, file: str) -> Part:
        """A part that shows this file; kind: "image" or "video". Raises PunaError naming the file."""
        from puna.sight import read_picture, read_video, tile

        if self._vision is None:
            raise PunaError(f"{file}: this model reads text only; leave the {kind} out or load a model with vision")
        path = Path(file).expanduser()
        url = path.absolute().as_uri()
        if url not in self._read:
            found: Any = read_video(path, self._vision) if kind == "video" else tile(read_picture(path), self._vision)
            self._read[url] = found
            if found.note:
                self.notes.append(f"{file}: {found.note}")
        return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}

    def shown(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The messages with what was read."""
        return [{**message, "content": self._content(message["content"])} for message in messages]

    def _content(self, content: str | Sequence[Part]) -> Any:
        if isinstance(content, str):
            return content
        return [part if part["type"] == "text" else self._part(part) for part in content]

    def _part(self, part: Part) -> Part:
        kind = part["type"].removesuffix("_url")
        return {"type": kind, kind: self._read[part[part["type"]]["url"]]}


def with_parts(parts: Sequence[Part], text: str) -> Any:
    """A message's content: pictures first, as the models were trained; the text alone where there are none."""
    return [*parts, {"type": "text", "text": text}] if parts else text
