"""Chats to token ids: the checkpoint's own template where it has one, our own format of its generation where not.

Both give a list of control tokens and plain texts. Plain text is encoded by `Tokenizer.encode`, which never gives a
control id; so no user's text becomes a control token, whichever way is taken.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from puna.errors import PunaError
from puna.family.vision import LLAMA_4_VISION, Llama32Vision
from puna.text.chat_formats import FORMATS, fold_calls, fold_tools
from puna.text.messages import Message, check_messages, check_tools
from puna.text.pictures import VIDEO_PARTS, Grid, PictureReader, Vision, lay_out
from puna.text.template import Control, Part, chat_template


class ChatTokenizer(Protocol):
    """What rendering asks of a tokenizer."""

    chat_template: str | None
    generation: str | None
    control: Mapping[str, int]
    bos_id: int | None
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None

    def encode(self, text: str) -> list[int]: ...


def render(tokenizer: ChatTokenizer, messages: Sequence[Mapping[str, Any]],
           tools: Sequence[Mapping[str, Any]] | None = None, add_generation_prompt: bool = True,
           grids: Sequence[Grid] | None = None, vision: Vision | None = None) -> list[int]:
    """One chat as token ids, with BOS once at the start.

    `messages` and `tools` are OpenAI's. grids: (rows, columns) of tiles of each picture in the messages; their parts
    are not read here, and without grids there may be none. vision: says how a picture is laid out; by default as in the
    released models of the tokenizer's generation. Raises PunaError, naming the field, for what is not; for what the
    template refuses; and where there is neither a template nor a known generation.
    """
    parts = chat_parts(tokenizer, messages, tools, add_generation_prompt, None if grids is None else _picture)
    if grids is None:
        return encode_parts(tokenizer, parts)
    if vision is None:
        vision = LLAMA_4_VISION if "<|patch|>" in tokenizer.control else Llama32Vision(())
    return encode_parts(tokenizer, lay_out(parts, grids, vision))


def _picture(part: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    if part["type"] in VIDEO_PARTS:
        raise PunaError(f"{where}: a video has to be read before it can be rendered; give its frames as pictures")
    return [{"type": "image"}]


def chat_parts(tokenizer: ChatTokenizer, messages: Sequence[Mapping[str, Any]],
               tools: Sequence[Mapping[str, Any]] | None = None, add_generation_prompt: bool = True,
               read_picture: PictureReader | None = None) -> list[Part]:
    """One chat as control tokens and plain texts, before encoding. `read_picture` admits pictures, each of which
    stands as one <|image|> as yet."""
    checked, defined = check_messages(messages, read_picture), check_tools(tools)
    if tokenizer.chat_template is None:
        own = FORMATS.get(tokenizer.generation or "")
        if own is None:
            raise PunaError("this checkpoint has no chat template and its vocabulary is of no known Llama generation; "
                            "put a chat_template.jinja beside the weights, or give a plain text as prompt")
        return own(checked, defined, add_generation_prompt)
    template = chat_template(tokenizer.chat_template, tuple(tokenizer.control))
    if not template.knows_calls:
        checked = fold_calls(checked, "ipython" if (tokenizer.generation or "").startswith("llama3") else "user")
    if defined and not (template.knows_tools and _begins_with_text(checked)):
        checked, defined = fold_tools(checked, defined), None
    return template.render(checked, defined, add_generation_prompt, _special(tokenizer))


def _begins_with_text(messages: Sequence[Message]) -> bool:
    """Whether the user's first message is text alone: beside tools, the templates of the Llama family expect that."""
    first = next((message["content"] for message in messages if message["role"] == "user"), "")
    return isinstance(first, str)


def encode_parts(tokenizer: ChatTokenizer, parts: Sequence[Part]) -> list[int]:
    """Token ids: controls by name, each stretch of plain text between two controls encoded as a whole."""
    ids: list[int] = []
    text = ""
    for part in [*parts, None]:
        if isinstance(part, str):
            text += part
            continue
        if text:
            ids += tokenizer.encode(text)
            text = ""
        if part is not None:
            ids.append(_control_id(tokenizer, part))
    return _begin_once(ids, tokenizer.bos_id)


def _begin_once(ids: list[int], bos: int | None) -> list[int]:
    if bos is None:
        return ids
    start = next((i for i, token in enumerate(ids) if token != bos), len(ids))
    return [bos, *ids[start:]]


def _control_id(tokenizer: ChatTokenizer, part: Control) -> int:
    if part.name not in tokenizer.control:
        raise PunaError(f"the chat format needs the control token {part.name}, which this vocabulary lacks; "
                        "put the checkpoint's own chat_template.jinja beside the weights")
    return tokenizer.control[part.name]


def _special(tokenizer: ChatTokenizer) -> dict[str, str]:
    names = {kind: getattr(tokenizer, kind) for kind in ("bos_token", "eos_token", "pad_token")}
    return {kind: name for kind, name in names.items() if name is not None}
