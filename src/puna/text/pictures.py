"""How a picture stands in a prompt: the placeholder tokens of each generation, and the parts of messages that show one.

Sources: transformers `processing_llama4.py`, `processing_mllama.py`; llama-models `llama4/chat_format.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from puna.errors import PunaError
from puna.family.vision import Llama4Vision, Llama32Vision
from puna.text.template import Control, Part

IMAGE = "<|image|>"
IMAGE_PARTS = ("image_url", "image", "input_image")
VIDEO_PARTS = ("video_url", "video", "input_video")

Vision = Llama4Vision | Llama32Vision
Grid = tuple[int, int]  # rows and columns of a picture's tiles

# Reads a picture part at a place in the messages; gives what a chat format may read in its stead: {"type": "image"} for
# each picture (several for a video), and texts.
PictureReader = Callable[[Mapping[str, Any], str], list[dict[str, Any]]]


def placeholders(grid: Grid, vision: Vision) -> list[str]:
    """The control tokens of one picture, by name. Llama 3.2: one. Llama 4: a token for each patch, tiles row by row
    with separators, and a global tile at the end where there are several."""
    if isinstance(vision, Llama32Vision):
        return [IMAGE]
    rows, columns = grid
    tile = ["<|patch|>"] * vision.tokens_per_tile
    names = ["<|image_start|>"]
    for _ in range(rows if rows * columns > 1 else 0):
        for column in range(columns):
            names += tile
            names += ["<|tile_x_separator|>"] if column < columns - 1 else ["<|tile_y_separator|>"]
    return [*names, IMAGE, *tile, "<|image_end|>"]


def lay_out(parts: Sequence[Part], grids: Sequence[Grid], vision: Vision) -> list[Part]:
    """A rendered chat, in which each picture stands as one <|image|>, with its pictures at their full length.

    Raises PunaError where the chat shows another number of pictures than there are grids.
    """
    shown = sum(part == Control(IMAGE) for part in parts)
    if shown != len(grids):
        raise PunaError(
            f"the chat has {len(grids)} pictures, of which its template shows {shown}; put a chat_template.jinja that "
            "knows pictures beside the weights, or take it away to use the built-in format"
        )
    left = iter(grids)
    laid_out: list[Part] = []
    for part in parts:
        if part == Control(IMAGE):
            laid_out += map(Control, placeholders(next(left), vision))
        else:
            laid_out.append(part)
    return laid_out


def written(content: Any, strip: bool = False) -> list[Part]:
    """A message's content: its text, or its texts and pictures in turn as they stand. strip: white space around a
    content that is text alone."""
    if isinstance(content, str):
        return [content.strip() if strip else content]
    return [Control(IMAGE) if part["type"] == "image" else part["text"] for part in content]


def joined(*contents: Any) -> Any:
    """Contents one after the other: a text where all are texts, else a list of parts."""
    if all(isinstance(content, str) for content in contents):
        return "".join(contents)
    lists = ([{"type": "text", "text": one}] if isinstance(one, str) else one for one in contents)
    return [part for parts in lists for part in parts]
