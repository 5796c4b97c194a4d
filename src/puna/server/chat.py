"""POST /v1/chat/completions. Source of the shapes: OpenAI API reference, "Chat completions" and its chunks."""

import json
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from puna.engine import Model, Options, Piece, TokenLogprob
from puna.server.answers import Answer, Count, Heading, answers, fairness_key
from puna.server.errors import ApiError, JsonResponse
from puna.server.images import Allowed
from puna.server.protocol import ChatRequest
from puna.server.streaming import collect, event_stream
from puna.server.worker import Job, Worker
from puna.text.messages import check_messages
from puna.text.tokenizer import Tokenizer
from puna.text.toolcalls import ToolCall

NOTES = "puna-notes"  # the header that says how pictures were read, such as which frames of a video were used


async def chat_completions(request: Request, asked: ChatRequest, model: Model, name: str, worker: Worker,
                           pictures: Allowed) -> Response:
    """One chat request, streamed or whole. pictures: where its pictures may come from."""
    given = [message.model_dump(exclude_none=True) for message in asked.messages]
    notes: list[str] = []
    tools, options = _tools(asked), _options(asked)
    if tools and asked.tool_choice not in (None, "auto"):
        options["schema"] = _a_call(tools)
    options["tools"] = tools
    options["key"] = fairness_key(request, asked.user)

    def start(job: Job[Answer]) -> Iterator[Answer]:
        messages = check_messages(given, None if model.config.vision is None else pictures.read)
        prompt = model.prepare(messages, tools)
        notes.extend(prompt.notes)
        return answers(job, model, prompt, asked.n or 1, options)

    heading = Heading("chatcmpl", "chat.completion.chunk" if asked.stream else "chat.completion", name)
    chat = _Chat(heading, asked, model)
    job = worker.submit(start)
    if asked.stream:
        response: Response = await event_stream(request, job, chat.chunks, chat.last)
    else:
        for answer in await collect(request, job):
            chat.add(answer)
        response = JsonResponse(chat.whole())
    if notes:
        response.headers[NOTES] = "; ".join(notes).encode("ascii", "replace").decode()
    return response


def _options(asked: ChatRequest) -> Options:
    options = asked.options()
    options["max_tokens"] = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    if asked.logprobs:
        options["logprobs"] = asked.top_logprobs or 0
    elif asked.top_logprobs is not None:
        raise ApiError("top_logprobs is only allowed when logprobs is true.", param="top_logprobs",
                       code="invalid_value")
    form = asked.response_format
    if form is not None and form.type == "json_object":
        options["schema"] = {"type": "object"}
    elif form is not None and form.type == "json_schema":
        if form.json_schema is None or form.json_schema.schema_ is None:
            raise ApiError("Missing required parameter: 'response_format.json_schema.schema'.",
                           param="response_format.json_schema.schema", code="missing_required_parameter")
        options["schema"] = form.json_schema.schema_
    return options


def _tools(asked: ChatRequest) -> list[dict[str, Any]] | None:
    """The tools that the model is shown: all, none (tool_choice "none"), or the one that tool_choice names."""
    choice, tools = asked.tool_choice, asked.tools or []
    if choice not in (None, "none") and not tools:
        raise ApiError("tool_choice is only allowed when tools are given.", param="tool_choice", code="invalid_value")
    if choice == "none":
        return None
    if choice is not None and not isinstance(choice, str):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
        if not tools:
            raise ApiError(f"tool_choice names the function '{choice.function.name}', which is not among the tools.",
                           param="tool_choice", code="invalid_value")
    return [tool.model_dump(exclude_none=True) for tool in tools] or None


def _a_call(tools: list[dict[str, Any]]) -> dict[str, Any]:
    """The schema of a call of one of the tools, in the JSON form that every Llama since 3.1 knows."""
    calls: list[dict[str, Any]] = []
    shared: dict[str, Any] = {}
    for tool in tools:
        function = tool["function"]
        parameters = {"type": "object", **function.get("parameters", {})}
        for name, definition in parameters.pop("$defs", {}).items():  # references start at the whole schema's root
            if shared.setdefault(name, definition) != definition:
                raise ApiError(f"Two tools define '$defs/{name}' differently, which a forced call "
                               "can't combine: give them different names.", param="tools", code="invalid_value")
        calls.append({"type": "object", "required": ["name", "parameters"], "additionalProperties": False,
                      "properties": {"name": {"const": function["name"]}, "parameters": parameters}})
    return {"anyOf": calls, "$defs": shared}


class _Chat:
    """Puts pieces together, as chunks on their way or as one whole."""

    def __init__(self, heading: Heading, asked: ChatRequest, model: Model) -> None:
        self.heading, self.asked = heading, asked
        self.count = Count(asked.stream_options)
        self.choices = [_Choice(index, asked, model) for index in range(asked.n or 1)]

    def add(self, answer: Answer) -> dict[str, Any]:
        """Take a piece; see `_Choice.add`."""
        self.count.add(answer)
        return self.choices[answer.choice].add(answer.piece)

    def chunks(self, answer: Answer) -> Iterable[dict[str, Any]]:
        """The chunks of one piece: role first, then text and tool calls, at the end the finish reason."""
        choice = self.choices[answer.choice]
        if not choice.begun:
            choice.begun = True
            yield self._chunk(choice.index, {"role": "assistant", "content": "", "refusal": None})
        seen_calls = len(choice.calls)
        found = self.add(answer)
        if found["text"] or found["logprobs"]:
            yield self._chunk(choice.index, {"content": found["text"]}, found["logprobs"])
        for at, call in enumerate(choice.calls[seen_calls:], seen_calls):
            whole = _call(call)
            function = whole["function"]
            yield self._chunk(choice.index, {"tool_calls": [
                {"index": at, **whole, "function": {"name": function["name"], "arguments": ""}}]})
            yield self._chunk(choice.index, {"tool_calls": [
                {"index": at, "function": {"arguments": function["arguments"]}}]})
        if choice.finish_reason is not None:
            choice.check()
            yield self._chunk(choice.index, {}, finish_reason=choice.finish_reason)

    def _chunk(self, index: int, delta: dict[str, Any], logprobs: list[dict] | None = None,
               finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": _logprobs(logprobs), "finish_reason": finish_reason}
        return {**self.heading.fields, "choices": [choice], **self.count.in_chunk()}

    def last(self) -> Iterable[dict[str, Any]]:
        """The chunk with usage, where it was asked for."""
        if self.count.asked:
            yield {**self.heading.fields, "choices": [], "usage": self.count.usage()}

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        return {**self.heading.fields, "choices": [choice.whole() for choice in self.choices],
                "usage": self.count.usage()}


class _Choice:
    """One answer as far as it has come."""

    def __init__(self, index: int, asked: ChatRequest, model: Model) -> None:
        self.index, self.asked = index, asked
        self.begun = False
        self.text = ""
        self.calls: list[ToolCall] = []
        self.finish_reason: str | None = None
        self.logprobs: list[dict[str, Any]] | None = [] if asked.logprobs else None
        self._waiting = _Waiting(model.tokenizer, model.stop_ids) if asked.logprobs and model.tokenizer else None

    def add(self, piece: Piece) -> dict[str, Any]:
        """Take a piece; returns its text and its log-probabilities as a client may see them now."""
        self.text += piece.text
        self.calls.extend(piece.tool_calls)
        if self.asked.parallel_tool_calls is False:
            del self.calls[1:]
        self.finish_reason = piece.finish_reason
        found = None
        if self.logprobs is not None and self._waiting is not None:
            found = [_entry(one) for one in self._waiting.shown(piece, bool(self.calls))]
            self.logprobs += found
        return {"text": piece.text, "logprobs": found}

    def check(self) -> None:
        """Raises ApiError where tool_choice asked for a call and none came. 500: clients try such an answer again."""
        wanted = self.asked.tool_choice not in (None, "none", "auto")
        if wanted and not self.calls and self.finish_reason != "length":
            raise ApiError("The model answered without the tool call that tool_choice requires.", status=500,
                           param="tool_choice", code="tool_choice_not_met")

    def whole(self) -> dict[str, Any]:
        self.check()
        message: dict[str, Any] = {"role": "assistant", "content": self.text, "refusal": None, "annotations": []}
        if self.calls:
            message["content"] = self.text or None
            message["tool_calls"] = [_call(call) for call in self.calls]
        return {"index": self.index, "message": message, "logprobs": _logprobs(self.logprobs),
                "finish_reason": self.finish_reason}


class _Waiting:
    """Holds log-probabilities back until their text is shown, so that a stop string and the end token never appear.

    Characters decide, counted from the answer's beginning: an entry leaves when what follows its beginning is shown.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Collection[int]) -> None:
        self._decoder, self._stop_ids = tokenizer.stream(), stop_ids
        self._waiting: deque[tuple[int, TokenLogprob]] = deque()  # with the character it begins at
        self._shown = self._written = 0

    def shown(self, piece: Piece, with_calls: bool) -> list[TokenLogprob]:
        """The entries that may leave with this piece; at the end of a tool call, whose text is never shown, all."""
        self._shown += len(piece.text)
        for one in piece.logprobs or ():
            self._waiting.append((self._written, one))
            self._written += len(self._decoder.push(one.id))
        if piece.finish_reason == "length":
            return [one for _, one in self._waiting]
        if piece.finish_reason and with_calls:
            return [one for _, one in self._waiting if one.id not in self._stop_ids]
        found = []
        while self._waiting and self._waiting[0][0] < self._shown:
            found.append(self._waiting.popleft()[1])
        return found


def _call(call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _entry(one: TokenLogprob) -> dict[str, Any]:
    top = [{"token": other.token, "logprob": other.logprob, "bytes": _bytes(other)} for other in one.top]
    return {"token": one.token, "logprob": one.logprob, "bytes": _bytes(one), "top_logprobs": top}


def _bytes(one: TokenLogprob) -> list[int] | None:
    return None if one.bytes is None else list(one.bytes)


def _logprobs(entries: Sequence[dict[str, Any]] | None) -> dict[str, Any] | None:
    return None if entries is None else {"content": list(entries), "refusal": None}
