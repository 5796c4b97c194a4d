"""One row to token ids: texts, chats by the server's own rendering, preferences. Errors begin with the field."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from puna.errors import PunaError
from puna.text.pictures import IMAGE_PARTS, VIDEO_PARTS
from puna.text.tokenizer import Tokenizer
from puna.train.method import Document, Example, Row
from puna.train.pictures import ShownPicture, pictures_in, render

# what other trainers call their rows, and what to do with it
OTHERS = {
    ("conversations",): "ShareGPT's `conversations`: write `messages` with `role` and `content`",
    ("instruction",): "Alpaca's `instruction` and `output`: write `messages` of the user and the assistant",
    ("completion", "label"): "single answers with a `label` are for method kto",
    ("completion",): "`prompt` and `completion`: write `messages` of the user and the assistant",
    ("preferred_output",): "OpenAI's preferences: write `prompt`, `chosen` and `rejected`",
    ("chosen", "rejected"): "preferences are for method dpo",
}


def learnable(row: Row, tokenizer: Tokenizer) -> Example:
    """A row with `text` (all of it carries loss) or `messages` (loss on what the assistant says)."""
    if ("text" in row) == ("messages" in row):
        raise PunaError(_neither(row, "either `text` or `messages`"))
    return text_example(row, tokenizer) if "text" in row else chat_example(row, tokenizer)


def text_example(row: Row, tokenizer: Tokenizer) -> Example:
    """`text`, begun with BOS; every token after the first carries loss."""
    text = row.get("text")
    if not isinstance(text, str) or not text:
        raise PunaError("text: must be a string that is not empty; mend or delete the line")
    ids = [*([] if tokenizer.bos_id is None else [tokenizer.bos_id]), *tokenizer.encode(text)]
    return Example((document(ids, [True] * len(ids)),))


def chat_example(row: Row, tokenizer: Tokenizer) -> Example:
    """`messages` (and `tools`) as the server renders them; loss on what the assistant says, up to and with its end of
    turn, but for messages with OpenAI's `"weight": 0`."""
    if "messages" not in row:
        raise PunaError(_neither(row, "`messages`"))
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise PunaError("messages: must be a list that is not empty; mend or delete the line")
    found = _marked(messages, row.get("tools"), tokenizer, 0)
    if not found.counted.any():
        raise PunaError("messages: no assistant message to learn from; add one, or delete the line")
    return Example((found,))


def preference_example(row: Row, tokenizer: Tokenizer) -> Example:
    """`chosen` and `rejected` answers to one `prompt`, in this order, with loss on the answers alone.

    The prompt is a text or messages, an answer a text or messages, which may repeat the prompt's; without `prompt` both
    answers are whole chats that begin with the same messages. `tools` as in a chat.
    """
    for name in ("chosen", "rejected"):
        if name not in row:
            raise PunaError(f"{name}: missing; {_neither(row, '`prompt`, `chosen` and `rejected`')}")
    answers = {name: _messages(row[name], name, "assistant") for name in ("chosen", "rejected")}
    if "prompt" in row:
        prompt = _messages(row["prompt"], "prompt", "user")
        answers = {n: a[len(prompt) :] if a[: len(prompt)] == prompt else a for n, a in answers.items()}
    else:
        prompt = _common(answers["chosen"], answers["rejected"])
        answers = {name: answer[len(prompt) :] for name, answer in answers.items()}
        if not prompt:
            raise PunaError("prompt: missing, and `chosen` and `rejected` begin with different messages")
    if answers["chosen"] == answers["rejected"]:
        raise PunaError("rejected: is the same as `chosen`; there is nothing to prefer: mend or delete the line")
    return Example(tuple(_answered(prompt, answer, name, row, tokenizer) for name, answer in answers.items()))


def _answered(prompt: list[Any], answer: list[Any], name: str, row: Row, tokenizer: Tokenizer) -> Document:
    """A prompt with the answer of the field `name`, which alone carries loss."""
    if not any(isinstance(message, Mapping) and message.get("role") == "assistant" for message in answer):
        raise PunaError(f"{name}: no assistant message in it; mend or delete the line")
    try:
        found = _marked([*prompt, *answer], row.get("tools"), tokenizer, len(prompt))
    except PunaError as error:
        raise PunaError(f"prompt + {name}: {error}") from None
    if not found.counted.any():
        raise PunaError(f"{name}: nothing in it can be learned, its weights are 0; mend or delete the line")
    return found


def completion_example(row: Row, tokenizer: Tokenizer) -> Example:
    """One `completion` of a `prompt`, each a text or messages, with loss on the completion alone; `label` says whether
    it is good. Without `prompt` the completion is a whole chat, which ends with the assistant's answer."""
    for name in ("completion", "label"):
        if name not in row:
            raise PunaError(f"{name}: missing; {_neither(row, '`prompt`, `completion` and `label`')}")
    good = row["label"]
    if not isinstance(good, bool):
        raise PunaError(f"label: must be true (a good answer) or false, not {good!r:.40}; mend or delete the line")
    answer = _messages(row["completion"], "completion", "assistant")
    if "prompt" in row:
        prompt = _messages(row["prompt"], "prompt", "user")
        answer = answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer
    else:
        prompt, answer = answer[:-1], answer[-1:]
        if not prompt:
            raise PunaError("prompt: missing, and `completion` is no chat that has one")
    return Example((_answered(prompt, answer, "completion", row, tokenizer),), {"label": good})


def prompt_ids(row: Row, tokenizer: Tokenizer) -> list[int]:
    """`messages` (without what the assistant says at their end) or `prompt` of a row that is to be answered, ready for
    generation."""
    name = "messages" if "messages" in row else "prompt"
    if name not in row:
        raise PunaError(_neither(row, "`messages` or `prompt`"))
    messages = _messages(row[name], name, "user")
    _check(messages)
    if pictures_in(messages):
        raise PunaError(f"{name}: shows a picture; grpo answers texts alone, take the row out")
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise PunaError(f"{name}: only the assistant speaks; begin with the user, or delete the line")
    return tokenizer.render(messages, _tools(row.get("tools")))


def document(ids: Sequence[int], counted: Sequence[bool], shown: Sequence[ShownPicture] = ()) -> Document:
    """From lists; the first token never counts, because nothing tells it."""
    marks = np.array(counted, np.bool_)
    marks[:1] = False
    return Document(np.array(ids, np.uint32), marks, tuple(each.file for each in shown))


def _marked(messages: list[Any], tools: Any, tokenizer: Tokenizer, first: int) -> Document:
    """The chat up to the last thing that the assistant says, which counts in messages[first:]."""
    tools = _tools(tools)
    ids: list[int] = []
    counted: list[bool] = []
    shown: list[ShownPicture] = []
    _check(messages)
    for end, message in enumerate(messages, 1):
        if message["role"] != "assistant" or end <= first:
            continue
        if end == 1:
            raise PunaError("messages[0].role: a chat to learn from begins with the user or the system")
        prompt = render(tokenizer, messages[: end - 1], tools, prompt=True)
        whole = render(tokenizer, messages[:end], tools, prompt=False)
        if whole[: len(prompt)] != prompt or prompt[: len(ids)] != ids:
            raise PunaError(
                f"messages[{end - 1}]: the chat template does not only append; such a chat can't be trained on"
            )
        learned = bool(message.get("weight", 1))
        counted += [False] * (len(prompt) - len(ids)) + [learned] * (len(whole) - len(prompt))
        ids, shown = whole, pictures_in(messages[:end])
    return document(ids, counted, shown)


def _check(messages: list[Any]) -> None:
    """What the rendering would not say by field, or says of serving, or lets pass there."""
    called = False
    for at, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise PunaError(f"messages[{at}]: each is an object with `role` and `content`")
        content = message.get("content")
        for place, part in enumerate(content if isinstance(content, list) else ()):
            if (isinstance(part, Mapping) and part.get("type") in (*IMAGE_PARTS, *VIDEO_PARTS)
                    and not isinstance(part.get("image"), ShownPicture)):  # fmt: skip
                raise PunaError(
                    f"messages[{at}].content[{place}]: a picture, but this run reads texts alone: its base has no "
                    "tower, or several processes share it; take the row out"
                )
        if "weight" in message and (message["weight"] not in (0, 1) or message["role"] != "assistant"):
            raise PunaError(f"messages[{at}].weight: 0 or 1, and of the assistant's messages alone")
        if message["role"] == "assistant" and not _says(content) and not message.get("tool_calls"):
            raise PunaError(f"messages[{at}].content: the assistant says nothing; give it words or tool_calls")
        called = called or bool(message.get("tool_calls"))
        if message["role"] == "tool" and not called:
            raise PunaError(f"messages[{at}]: a tool's result, but nothing was called before it; give the call too")


def _says(content: Any) -> bool:
    """Whether there is more than white space in it; what is no text or list of parts, others judge."""
    if isinstance(content, list):
        return any(not isinstance(part, Mapping) or part.get("type") != "text" or _says(part.get("text"))
                   for part in content)  # fmt: skip
    return bool(content.strip() if isinstance(content, str) else content)


def _tools(tools: Any) -> Any:
    """As a list, or as JSON of one: columns of Parquet would give every tool the fields of all."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise PunaError(f"tools: not valid JSON ({error})") from None
    if tools is not None and not isinstance(tools, list):
        raise PunaError(f"tools: must be a list of tool definitions, not a {type(tools).__name__}")
    return tools


def _messages(value: Any, name: str, role: str) -> list[Any]:
    if isinstance(value, str) and value:
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise PunaError(f"{name}: must be a text or a list of messages that is not empty; mend or delete the line")
    return value


def _common(one: list[Any], other: list[Any]) -> list[Any]:
    same = 0
    while same < min(len(one), len(other)) and one[same] == other[same]:
        same += 1
    return one[:same]


def _neither(row: Row, wanted: str) -> str:
    for names, advice in OTHERS.items():
        if all(name in row for name in names):
            return f"{names[0]}: {advice}"
    has = ", ".join(map(repr, row)) or "nothing"
    return f"a row is an object with {wanted}, this has {has}; mend the line"
