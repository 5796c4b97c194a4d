"""Picture and video parts of messages, read into tiles and laid out in the prompt."""

import base64
import binascii
import io
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
import torch
from PIL import Image, ImageOps

from puna.engine.gallery import most_tiles
from puna.engine.reply import Inputs
from puna.errors import PunaError
from puna.family.vision import Llama4Vision, Llama32Vision
from puna.sight import Picture, Video, read_picture, read_video, tile
from puna.text.chat import chat_parts, encode_parts
from puna.text.pictures import IMAGE, VIDEO_PARTS, Vision, lay_out
from puna.text.tokenizer import Tokenizer

MOST_PICTURES = 48  # in one prompt; Llama 4 was trained with up to so many (Meta's announcement of 2025-04-05)
PLACE = {Llama4Vision: "<|patch|>", Llama32Vision: IMAGE}  # each of which something of a picture belongs to
FRAMES = 16  # of a video, where nobody asks for another number

_reading = threading.Semaphore(2)  # a picture of 64 megapixels takes half a gigabyte while it is read


def prepare(tokenizer: Tokenizer, vision: Vision, messages: Sequence[Mapping[str, Any]],
            tools: Sequence[Mapping[str, Any]] | None) -> Inputs:
    """A chat as ready inputs. Raises PunaError naming messages[i].content[j] for a picture that can't be read."""
    reader = PartReader(vision)
    parts = chat_parts(tokenizer, messages, tools, read_picture=reader)
    pictures = reader.pictures
    ids = encode_parts(tokenizer, lay_out(parts, [picture.grid for picture in pictures], vision))
    if not pictures:
        return Inputs(ids)
    # Meta's vocabulary has <|image|> amid its control tokens, and the model is fed a row behind them all
    own = tokenizer.control[PLACE[type(vision)]]
    ids = [vision.image_token_id if id == own else id for id in ids]
    pixels = torch.from_numpy(np.concatenate([picture.pixels for picture in pictures]))
    return Inputs(ids, pixels, [picture.grid for picture in pictures], tuple(reader.notes))


class PartReader:
    """Reads the picture parts of one chat, in order. `notes`: what their user should know of how they were read.

    A picture is given as a data URL or, in Python, as bytes, a path (pathlib), a PIL image or a `sight.Picture`; a
    video as a data URL, bytes, a path or a `sight.Video`. Nothing is fetched from elsewhere.
    """

    def __init__(self, vision: Vision) -> None:
        self.vision = vision
        self.pictures: list[Picture] = []
        self.notes: list[str] = []

    def __call__(self, part: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
        """See `puna.text.pictures.PictureReader`."""
        source, asked, where = source_of(part, where)
        with _reading:
            if part["type"] in VIDEO_PARTS:
                return self._video(source, asked, where)
            picture = self._picture(source, asked, where)
        self._add([picture], where)
        return [{"type": "image"}]

    def _picture(self, source: Any, asked: Mapping[str, Any], where: str) -> Picture:
        low = asked.get("detail") == "low"
        if isinstance(source, Picture):
            if low and len(source.pixels) > 1:
                raise PunaError(f"{where}: it is cut into {len(source.pixels)} tiles already; leave out detail")
            return source
        image = _upright(source, where) if isinstance(source, Image.Image) else read_picture(
            content_of(source, where, "image"), name=where)  # fmt: skip
        picture = tile(image, replace(self.vision, max_tiles=1) if low else self.vision)
        if picture.note:
            self.notes.append(f"{where}: {picture.note}")
        return picture

    def _video(self, source: Any, asked: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
        if isinstance(source, Video):
            if "frames" in asked:
                raise PunaError(f"{where}: the frames of this video are chosen already; leave out frames")
        else:
            given = content_of(source, where, "video")
            source = read_video(given, self.vision, asked.get("frames", FRAMES), name=where)
        self._add(source.frames, where)
        self.notes.append(f"{where}: {source.note}")
        parts: list[dict[str, Any]] = []
        for seconds in source.seconds:
            parts += [{"type": "text", "text": f"[{seconds:.1f} s]"}, {"type": "image"}]
        return parts

    def _add(self, pictures: Sequence[Picture], where: str) -> None:
        side = self.vision.tile_side
        for picture in pictures:
            if picture.pixels.shape[1:] != (3, side, side):
                raise PunaError(f"{where}: its tiles have {picture.pixels.shape[-1]} pixels a side, but this model's "
                                f"{side}; cut it with tile(image, model.config.vision)")  # fmt: skip
        self.pictures += pictures
        if len(self.pictures) > MOST_PICTURES:
            raise PunaError(f"{where}: more than {MOST_PICTURES} pictures in one prompt; leave some out")
        tiles, most = sum(len(picture.pixels) for picture in self.pictures), most_tiles(self.vision)
        if tiles > most:
            raise PunaError(f"{where}: the pictures up to this one take {tiles} tiles, more than the {most} that one "
                            "prompt may show; give fewer or smaller ones, or detail low")  # fmt: skip


def _upright(image: Image.Image, where: str) -> Image.Image:
    """A PIL image as `read_picture` would give it."""
    try:
        if image.mode == "RGB":
            return ImageOps.exif_transpose(image)
        file = io.BytesIO()
        image.save(file, "TIFF", exif=image.getexif())
    except Exception as error:  # a file that is opened but not read yet may be damaged
        raise PunaError(f"{where}: this PIL image can't be read ({image.mode}: {error}); convert it to RGB") from None
    return read_picture(file.getvalue(), name=where)


def source_of(part: Mapping[str, Any], where: str) -> tuple[Any, Mapping[str, Any], str]:
    """Where a part has its picture or video, what is asked beside it (detail, frames), and the name of that field.

    {"type": "image_url", "image_url": {"url": ..., "detail": ...}} as OpenAI's chat has it; {"type": "input_image",
    "image_url": ..., "detail": ...} as its responses have it; {"type": "image", "image": ...} with the picture itself;
    and the same with "video". Raises PunaError for anything else.
    """
    kind = "video" if part["type"] in VIDEO_PARTS else "image"
    field = kind if part["type"] == kind else f"{kind}_url"
    asked = {key: value for key, value in part.items() if key not in ("type", field)}
    source = part.get(field)
    if isinstance(source, Mapping) and field != kind:
        where, field = f"{where}.{field}", "url"
        asked |= {key: value for key, value in source.items() if key != "url"}
        source = source.get("url")
    known = ("detail",) if kind == "image" else ("frames",)
    for key, value in list(asked.items()):
        if value is None:
            del asked[key]
        elif key not in known:
            raise PunaError(f"{where}.{key}: not known; beside {field} there may be {known[0]}")
    if source is None:
        raise PunaError(f"{where}.{field}: missing; give a data URL, as in data:{kind}/...;base64,...")
    if asked.get("detail") not in (None, "low", "high", "auto"):
        raise PunaError(f"{where}.detail: {asked['detail']!r} is not supported; use low (one tile), high or auto")
    frames = asked.get("frames", 1)
    if isinstance(frames, bool) or not isinstance(frames, int) or not 1 <= frames <= MOST_PICTURES:
        raise PunaError(f"{where}.frames: a whole number from 1 to {MOST_PICTURES} is needed, not {frames!r:.80}")
    return source, asked, f"{where}.{field}"


def content_of(source: Any, where: str, kind: str) -> bytes | Path:
    """The bytes of a data URL; bytes and paths as they are. Raises PunaError that begins with `where`."""
    if isinstance(source, bytes | Path):
        return source
    if not isinstance(source, str):
        raise PunaError(f"{where}: a data URL is needed (in Python also bytes or a pathlib.Path), not a "
                        f"{type(source).__name__}")  # fmt: skip
    scheme, _, rest = source.partition(":")
    if scheme.lower() != "data":
        raise PunaError(f"{where}: {source!r:.80} is no data URL, and nothing is fetched from other addresses here; "
                        f"send the {kind} itself, as data:{kind}/...;base64,...")  # fmt: skip
    described, comma, data = rest.partition(",")
    declared, *parameters = described.lower().split(";")
    if not comma or "base64" not in parameters:
        raise PunaError(f"{where}: the data URL must have ';base64,' and then the {kind} in base64")
    if declared and not declared.startswith(f"{kind}/") and declared != "application/octet-stream":
        raise PunaError(f"{where}: its type is {declared!r:.80}, but {kind}/... is needed here")
    try:
        return base64.b64decode(b"".join(unquote_to_bytes(data).split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise PunaError(f"{where}: not valid base64 ({error})") from None
