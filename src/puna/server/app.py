"""The application: routes, limits on what comes in, and who may call."""

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from puna import __version__
from puna.engine import ContextLengthError, Model
from puna.server import errors
from puna.server.chat import chat_completions
from puna.server.completions import completions
from puna.server.errors import ApiError, JsonResponse
from puna.server.images import Allowed
from puna.server.protocol import ChatRequest, CompletionRequest
from puna.server.worker import Worker

MAX_BODY_BYTES = 16 * 2**20  # a million tokens of text is about 4 MB
MAX_BODY_BYTES_WITH_PICTURES = 64 * 2**20  # OpenAI takes 50 MB
CLIENT_GONE = 499  # nginx's "client closed request": nobody reads it, the access log shows it
LOOPBACK = ("localhost", "127.0.0.1", "::1")

Asked = TypeVar("Asked", bound=BaseModel)


def create_app(model: Model, name: str, *, hosts: tuple[str, ...] | None = None,
               pictures: Allowed | None = None) -> FastAPI:
    """The OpenAI API over `model`, which clients call `name`.

    hosts: the Host headers to answer, None for any. On loopback give LOOPBACK: it keeps a web page that has its own
    domain point at 127.0.0.1 (DNS rebinding) from using the model through its visitor's browser.
    pictures: where pictures may come from; by default from the request itself alone.
    """
    worker = Worker()
    most = MAX_BODY_BYTES if model.config.vision is None else MAX_BODY_BYTES_WITH_PICTURES
    created = int(time.time())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        worker.shutdown()

    # docs_url: FastAPI's pages load scripts from a foreign server
    app = FastAPI(title="puna", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    errors.install(app)
    if hosts is not None:
        app.add_middleware(_OnlyHosts, hosts=hosts)

    def card() -> dict[str, Any]:
        return {"id": name, "object": "model", "created": created, "owned_by": "puna",
                "max_model_len": model.context_length}

    def check_name(asked: str) -> None:
        if asked != name:
            raise ApiError(f"The model '{asked}' does not exist. This server has '{name}'.", status=404, param="model",
                           code="model_not_found")

    @app.get("/health")
    async def health() -> JsonResponse:
        return JsonResponse({"status": "ok", "requests": len(worker.jobs)})

    @app.get("/v1/models")
    async def models() -> JsonResponse:
        return JsonResponse({"object": "list", "data": [card()]})

    @app.get("/v1/models/{asked:path}")
    async def one_model(asked: str) -> JsonResponse:
        check_name(asked)
        return JsonResponse(card())

    async def answer(request: Request, kind: type[Asked],
                     handle: Callable[[Request, Any, Model, str, Worker], Awaitable[Response]]) -> Response:
        try:
            asked = await _read(request, kind, most)
            check_name(asked.model)  # type: ignore[attr-defined]
            return await handle(request, asked, model, name, worker)
        except ContextLengthError as error:
            raise errors.context_error(error, "messages" if kind is ChatRequest else "prompt") from None
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer(request, ChatRequest, partial(chat_completions, pictures=pictures or Allowed()))

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await answer(request, CompletionRequest, completions)

    return app


async def _read(request: Request, kind: type[Asked], most: int) -> Asked:
    """The body as `kind`. Only JSON by its name: a foreign web page can't send that type without asking first."""
    declared = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if declared != "application/json":
        raise ApiError(f"The body must be JSON with the header 'Content-Type: application/json', not '{declared}'.",
                       status=415, code="unsupported_content_type")
    too_large = ApiError(f"The body is larger than {most} bytes.", status=413, code="request_too_large")
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > most:
            raise too_large
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"We could not parse the JSON body of your request: {error}.", code="invalid_json") from None
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise errors.validation_error(error.errors(include_url=False, include_context=False), data) from None


class _OnlyHosts:
    """Refuses requests whose Host header names none of `hosts`."""

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...]) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 421."""
        if scope["type"] == "http":
            host = next((value.decode("latin-1") for key, value in scope["headers"] if key == b"host"), "")
            if _hostname(host) not in self.hosts:
                told = ApiError(f"This server does not answer for the host '{host}', only for {', '.join(self.hosts)}.",
                                status=421, code="wrong_host")
                await JsonResponse(told.body, told.status)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
