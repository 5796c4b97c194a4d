"""Every error leaves in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

import json
import logging
import re
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from puna.engine import ContextLengthError, QueueFullError
from puna.errors import PunaError

log = logging.getLogger("puna.server")

# where `puna.text.messages`, and whoever reads its pictures, says that the mistake is
FIELD = re.compile(r"(messages|tools)([\w.\[\]]*(?=: )|\[[\w.\[\]]*(?= ))")


def dumps(content: Any) -> str:
    """Compact JSON. A lone surrogate that a client sent goes back as the escape it came as: it has no UTF-8."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class JsonResponse(JSONResponse):
    """JSON by `dumps`."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return dumps(content).encode("utf-8")


class ApiError(PunaError):
    """An error with a status and OpenAI's fields. `param` names the request's field, `code` is for programs."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object. Types: OpenAI's guide "Error codes"."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told about `error`. A user's mistake keeps its message; anything else is logged, not shown."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextLengthError):
        return context_error(error)
    if isinstance(error, QueueFullError):
        return ApiError(f"{error}.", status=503, code="server_overloaded")
    if isinstance(error, PunaError):
        where = FIELD.match(str(error))
        return ApiError(str(error), param=where and where[0], code="invalid_value")
    if isinstance(error, HTTPException):
        return _http_error(error)
    log.error("request failed", exc_info=error)
    return ApiError("The server had an error while processing your request. Its log has the details.", status=500,
                    code="internal_error")


def context_error(error: ContextLengthError, param: str | None = None) -> ApiError:
    """A prompt that is too long, in the words that clients look for."""
    return ApiError(f"This model's maximum context length is {error.context_length} tokens. However, your prompt has "
                    f"{error.prompt_tokens} tokens. Please shorten it.", param=param, code="context_length_exceeded")


def _http_error(error: HTTPException) -> ApiError:
    if error.status_code == 404:
        return ApiError("Unknown request URL. The routes are /v1/chat/completions, /v1/completions, /v1/models and "
                        "/health.", status=404, code="unknown_url")
    if error.status_code == 405:
        return ApiError("Not allowed to use this method on this URL: see the Allow header.", status=405,
                        code="method_not_supported")
    return ApiError(str(error.detail), status=error.status_code)


def validation_error(found: list[Any], body: Any = None) -> ApiError:
    """The first of pydantic's findings about `body`, in OpenAI's words; unknown names first, the likeliest cause."""
    paths = [_path(item["loc"], body, missing=item["type"] == "missing") for item in found]
    first = next((at for at, item in enumerate(found) if item["type"] == "extra_forbidden"), 0)
    # of a union's findings, the deepest is about the member that was meant
    best = max((at for at, path in enumerate(paths) if path.startswith(paths[first])), key=lambda at: len(paths[at]))
    item, param = found[best], paths[best]
    if item["type"] == "extra_forbidden":
        return ApiError(f"Unrecognized request argument supplied: {param}", param=param, code="unknown_parameter")
    if item["type"] == "missing":
        return ApiError(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    if item["type"] == "value_error":  # of our own validators, whose words are whole sentences
        said = item["msg"].removeprefix("Value error, ")
        return ApiError(f"Invalid value for '{param}': {said}." if param else f"{said}.", param=param or None,
                        code="invalid_value")
    if not param:
        return ApiError("The body must be a JSON object.", code="invalid_type")
    code = "invalid_type" if item["type"].endswith("_type") else "invalid_value"
    return ApiError(f"Invalid value for '{param}': {item['msg'][:1].lower()}{item['msg'][1:]}.", param=param, code=code)


def _path(loc: tuple[str | int, ...], body: Any, missing: bool) -> str:
    """pydantic's location as "messages[0].content". It also names the union members it tried, which `body` lacks."""
    path = ""
    for place, step in enumerate(loc):
        if isinstance(step, int) and isinstance(body, list):
            path, body = f"{path}[{step}]", body[step] if step < len(body) else None
        elif isinstance(body, dict) and (step in body or (missing and place == len(loc) - 1)):
            path, body = f"{path}.{step}" if path else str(step), body.get(step)
    return path


def install(app: FastAPI) -> None:
    """Have every exception of `app` answered in OpenAI's shape."""

    async def answer(_: Request, error: Exception) -> Response:
        told = as_api_error(error)
        headers = error.headers if isinstance(error, HTTPException) else None
        return JsonResponse(told.body, told.status, headers=dict(headers or {}))

    for kind in (PunaError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
