"""Threads that wait for the engine, so that the event loop stays free to answer and to notice who hung up."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Generic, TypeVar

from puna.engine.generate import Live
from puna.server.errors import ApiError

T = TypeVar("T")


class Worker:
    """Runs generators side by side: the engine computes them together. `limit` is how many there may be at once."""

    def __init__(self, limit: int = 64) -> None:
        self.limit = limit
        self.jobs: set[Job] = set()  # touched by the event loop only
        self._pool = ThreadPoolExecutor(limit, thread_name_prefix="puna-request")

    def submit(self, start: "Callable[[Job[T]], Iterator[T]]") -> "Job[T]":
        """Queue `start(job)`, whose items the job yields. Raises ApiError (503) when too many wait already."""
        if len(self.jobs) >= self.limit:
            raise ApiError(f"{len(self.jobs)} requests are running or waiting, which is the limit. Try again later.",
                           status=503, code="server_overloaded")
        job = Job(start)
        self.jobs.add(job)
        job.future = self._pool.submit(job.run)
        job.future.add_done_callback(lambda _: job.post(self.jobs.discard, job))
        return job

    def shutdown(self) -> None:
        """End what runs and drop what waits."""
        for job in list(self.jobs):
            job.close()
        self._pool.shutdown(wait=False, cancel_futures=True)


class Job(Generic[T]):
    """One generator's items, awaited. `close` ends it at once; the engine drops it after the step in progress."""

    future: "Future[None]"

    def __init__(self, start: "Callable[[Job[T]], Iterator[T]]") -> None:
        self._start = start
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[tuple[T] | BaseException | None] = asyncio.Queue()
        self._stop = threading.Event()
        self._streams: Sequence[Live] = ()

    def run(self) -> None:
        """In one of the worker's threads: produce until the end, an error, or `close`."""
        end: BaseException | None = None
        try:
            for item in self._start(self):
                self.post(self._items.put_nowait, (item,))
        except BaseException as error:  # handed to the request that waits for it
            end = error
        self.post(self._items.put_nowait, end)

    def post(self, call: Callable, *args: object) -> None:
        """Run `call` on the event loop; nothing happens once that is gone."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *args)

    @contextmanager
    def running(self, streams: Sequence[Live]) -> Iterator[None]:
        """Have `close` end these streams while the block runs, whose end closes them too. In the worker's thread."""
        self._streams = streams
        if self._stop.is_set():  # closed in the moment before
            self._close_streams()
        try:
            yield
        finally:
            self._close_streams()

    def _close_streams(self) -> None:
        for stream in self._streams:
            stream.close()

    @property
    def stopped(self) -> bool:
        """Whether `close` was called: then there is nothing left to do."""
        return self._stop.is_set()

    def close(self) -> None:
        """Stop producing, also from amid a long prompt. Harmless when done already."""
        self._stop.set()
        self.future.cancel()
        self._close_streams()

    async def __aiter__(self) -> AsyncIterator[T]:
        while isinstance(item := await self._items.get(), tuple):
            yield item[0]
        if item is not None:
            raise item
