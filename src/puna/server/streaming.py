"""Answers that stop the work behind them when the client hangs up, whole or as server-sent events."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from puna.server.errors import as_api_error, dumps
from puna.server.worker import Job

T = TypeVar("T")
Result = TypeVar("Result")


async def unless_gone(receive: Receive, work: Awaitable[Result]) -> Result:
    """Await `work`, but cancel it and raise ClientDisconnect as soon as the client hangs up."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def collect(request: Request, job: Job[T]) -> list[T]:
    """All of the job's items. Raises ClientDisconnect, and the job's own error."""

    async def everything() -> list[T]:
        return [item async for item in job]

    try:
        return await unless_gone(request.receive, everything())
    finally:
        job.close()


async def event_stream(request: Request, job: Job[T], chunks: Callable[[T], Iterable[dict]],
                       last: Callable[[], Iterable[dict]]) -> "EventStream":
    """The job's items as server-sent events, `chunks` of each and at the end those of `last`.

    Waits for the first item, so that what is wrong with a request is still told with its own status.
    """
    items = job.__aiter__()

    async def first() -> list[T]:
        with suppress(StopAsyncIteration):
            return [await anext(items)]
        return []

    try:
        begun = await unless_gone(request.receive, first())
    except BaseException:
        job.close()
        raise

    async def events() -> AsyncIterator[dict[str, Any]]:
        for item in begun:
            for chunk in chunks(item):
                yield chunk
        async for item in items:
            for chunk in chunks(item):
                yield chunk
        for chunk in last():
            yield chunk

    return EventStream(events(), job.close)


class EventStream(Response):
    """`data: {...}` for each event, then `data: [DONE]`. An error on the way is sent as an event of its own.

    `close` is called at the end, however it comes.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[dict[str, Any]], close: Callable[[], None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.events, self.close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        """Send the events until they end or the client hangs up."""
        try:
            with suppress(ClientDisconnect, OSError):
                await unless_gone(receive, self._send(send))
        finally:
            self.close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for event in self.events:
                await self._data(send, dumps(event))
        except Exception as error:
            await self._data(send, dumps(as_api_error(error).body))
        else:
            await self._data(send, "[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _data(self, send: Send, data: str) -> None:
        await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
