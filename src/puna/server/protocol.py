"""Requests as OpenAI defines them, with the extra sampling parameters that vLLM's clients send.

A name that is not listed here is refused with 400, as OpenAI does. `IGNORED` lists what is accepted and knowingly does
nothing on a private server: accounting, caching hints and tags. Source: OpenAI API reference (chat/create,
completions/create); vLLM's "extra parameters" of its OpenAI-compatible server.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from puna.engine import Options

Bias = Annotated[float, Field(ge=-100, le=100)]
TokenId = Annotated[int, Field(ge=0)]  # in a prompt and, as JSON's string keys, in logit_bias

# OpenAI's tags and hints, and vLLM's `priority` and `request_id`: nothing here reads them.
IGNORED = ("metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
           "prompt_cache_retention", "priority", "request_id")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # accepted: OpenAI's padding against traffic analysis, not done here
    continuous_usage_stats: bool | None = None  # vLLM's; accepted, but usage comes once, at the end


class SamplingRequest(_Strict):
    """What chat and plain completions share. None means: the model's own default."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=128)
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)  # vLLM, as are min_p, repetition_penalty, ignore_eos and the two below it
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0)
    logit_bias: dict[TokenId, Bias] | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    ignore_eos: bool | None = None
    user: Any = None  # with the API key: among whom the engine is shared fairly
    min_tokens: int | None = Field(None, ge=0)  # taken only where it changes nothing: 0, or with ignore_eos
    skip_special_tokens: Literal[True] | None = None
    # accepted and ignored, see IGNORED
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    priority: Any = None
    request_id: Any = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true")
        if self.min_tokens and not self.ignore_eos:
            raise ValueError("min_tokens is only supported together with ignore_eos")
        return self

    def options(self) -> Options:
        """The engine's sampling options, but for max_tokens, logprobs, schema and tools."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Options(
            temperature=self.temperature, top_p=self.top_p, top_k=None if self.top_k is None else max(self.top_k, 0),
            min_p=self.min_p, repetition_penalty=self.repetition_penalty, presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty, logit_bias=self.logit_bias, seed=self.seed,
            stop=[text for text in stop if text], ignore_eos=self.ignore_eos,
        )


class ToolCallFunction(_Strict):
    name: str
    arguments: str


class MessageToolCall(_Strict):
    id: str
    type: Literal["function"] = "function"
    function: ToolCallFunction
    index: int | None = None  # clients that put stream deltas together send it back


class ContentPart(BaseModel):
    """One part of a message; `puna.text.messages` checks the rest, and which types a model takes."""

    model_config = ConfigDict(extra="allow")
    type: str
    text: str | None = None


class Message(_Strict):
    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    # fields of an answer that clients send back as they got it; nothing here reads them
    refusal: Any = None
    annotations: Any = None
    audio: None = None
    function_call: None = None


class FunctionDefinition(_Strict):
    name: str = Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.-]+$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(_Strict):
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(_Strict):
    name: str


class NamedToolChoice(_Strict):
    type: Literal["function"]
    function: NamedFunction


class JsonSchemaFormat(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class ChatRequest(SamplingRequest):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[ToolDefinition] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None


class CompletionRequest(SamplingRequest):
    """POST /v1/completions."""

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1)
    suffix: None = None
    return_token_ids: bool | None = None  # vLLM: each choice tells its own and its prompt's token ids

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _any_form(cls, given: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(given)
        except ValidationError:
            raise ValueError("give text, a list of token ids (whole numbers from 0), or a list of either") from None

    @model_validator(mode="after")
    def _one_of_n(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of is only supported where it equals n")
        return self
