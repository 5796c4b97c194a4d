"""Pictures in the rows of training data, from a data URL or a file beside the data to what a pass sees."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from puna.engine.picture_parts import PLACE, content_of, source_of
from puna.errors import PunaError
from puna.model import Decoder
from puna.model.pictures import PassPictures
from puna.sight import Picture, read_picture, tile
from puna.text.pictures import IMAGE_PARTS, VIDEO_PARTS, Vision
from puna.text.tokenizer import Tokenizer
from puna.train.read import Fields

FIELDS = ("messages", "prompt", "chosen", "rejected")  # of a row, which may hold messages


@dataclass(frozen=True)
class PictureFile:
    """A picture as it was given: the bytes of its file, and whether one tile is to be all of it (`detail: low`)."""

    data: bytes
    low: bool

    def cut(self, vision: Vision, name: str = "picture") -> Picture:
        """Its tiles. Raises PunaError that begins with the name."""
        return tile(read_picture(self.data, name=name), replace(vision, max_tiles=1) if self.low else vision)


@dataclass(frozen=True)
class ShownPicture:
    """What stands in a message in place of a picture part's source."""

    file: PictureFile
    grid: tuple[int, int]
    vision: Vision


class Shows(Protocol):
    """A document, as far as its pictures go."""

    @property
    def tokens(self) -> NDArray[np.uint32]:
        """Token ids [n]."""
        ...

    @property
    def pictures(self) -> tuple[PictureFile, ...]:
        """In the order of their places."""
        ...


def open_pictures(row: Fields, vision: Vision, folder: Path) -> Fields:
    """The row with its picture parts read: each is {"type": "image", "image": ShownPicture}. A name instead of a data
    URL is a file in `folder` or below. Raises PunaError that begins with the field."""
    read = _Reader(row, vision, folder)
    changed = {name: read.messages(value, name) for name in FIELDS if isinstance(value := dict.get(row, name), list)}
    return row.with_(changed) if changed else row


@dataclass(frozen=True)
class _Reader:
    """Reads the picture parts of one row."""

    row: Fields
    vision: Vision
    folder: Path

    def messages(self, messages: list[Any], field: str) -> list[Any]:
        """With what was read in their parts."""
        opened = []
        for at, message in enumerate(messages):
            content = message.get("content") if isinstance(message, Mapping) else None
            if isinstance(content, list):
                parts = [self._part(part, f"{field}[{at}].content[{place}]") for place, part in enumerate(content)]
                message = {**message, "content": parts}
            opened.append(message)
        return opened

    def _part(self, part: Any, where: str) -> Any:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in VIDEO_PARTS:
            raise PunaError(f"{where}: a video; puna trains on pictures, so give its frames as such")
        if kind not in IMAGE_PARTS:
            return part
        source, asked, where = source_of(part, where)
        if isinstance(source, Mapping) and isinstance(source.get("bytes"), bytes):  # Hugging Face's, in Parquet
            source = source["bytes"]
        if isinstance(source, str) and ":" not in source.partition("/")[0]:
            source = self._beside(source, where)
        given = content_of(source, where, "image")
        assert isinstance(given, bytes), "rows hold no paths"
        file = PictureFile(given, asked.get("detail") == "low")
        return {"type": "image", "image": ShownPicture(file, file.cut(self.vision, where).grid, self.vision)}

    def _beside(self, name: str, where: str) -> bytes:
        path = (self.folder / name).resolve()
        if not path.is_relative_to(self.folder.resolve()):
            raise PunaError(f"{where}: {name!r:.80} lies outside of {self.folder}; keep pictures beside the data")
        self.row.beside = True
        try:
            return path.read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise PunaError(f"{where}: can't read {name!r:.80} beside the data: {reason}") from None


def pictures_in(messages: Sequence[Any]) -> list[ShownPicture]:
    """Those that `open_pictures` has read, in order."""
    contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, Mapping)]
    return [part["image"] for part in parts if isinstance(part.get("image"), ShownPicture)]


def render(tokenizer: Tokenizer, messages: Sequence[Any], tools: Any, prompt: bool) -> list[int]:
    """A chat's ids as the server renders it, its pictures laid out."""
    shown = pictures_in(messages)
    if not shown:
        return tokenizer.render(messages, tools, prompt)
    vision = shown[0].vision
    own = tokenizer.control.get(PLACE[type(vision)])
    ids = tokenizer.render(messages, tools, prompt, [each.grid for each in shown], vision)
    return [vision.image_token_id if id == own else id for id in ids]  # see engine.picture_parts.prepare


def seen(model: Decoder, documents: Sequence[Shows]) -> PassPictures | None:
    """What a pass over these documents, end to end without their last tokens, sees; None where it is text alone.

    The tower doesn't train; cross-attention's keys and values may.
    """
    shares, at = [], 0
    for document in documents:
        ids = document.tokens[:-1].astype(np.int64).tolist()
        if document.pictures:
            assert model.config.vision is not None, "rows with pictures are refused elsewhere"
            cut = [file.cut(model.config.vision) for file in document.pictures]
            pixels = torch.from_numpy(np.concatenate([picture.pixels for picture in cut])).to(model.device)
            features = model.look(pixels, [picture.grid for picture in cut])
            shares.append(model.place(ids, features).share(0, len(ids), at))
        at += len(ids)
    return PassPictures.joined(shares)
