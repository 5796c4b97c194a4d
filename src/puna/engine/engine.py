"""The engine: one thread that steps while there is work, and everybody's way to hand it work."""

import threading
import time
import weakref
from contextlib import suppress
from queue import Empty, SimpleQueue

import torch

from puna.engine.core import RUN_AHEAD, Core, Delivery, Task
from puna.engine.stats import Stats
from puna.errors import PunaError
from puna.model import pages

PATIENCE = 0.05  # seconds between looks at work that can't go on just now
EXIT_SECONDS = 30.0  # the interpreter waits so long for the step in progress


class QueueFullError(PunaError):
    """Too many requests wait already."""


class Engine:
    """Requests from any thread, computed together.

    queue: how many may wait. threaded: steps run in a thread of the engine's own, started with the first request; else
    in the thread of whoever waits for a result, one step at a time: for processes that must all take the same steps.
    """

    def __init__(self, core: Core, queue: int = 1024, threaded: bool = True) -> None:
        self.core, self.queue, self.threaded = core, queue, threaded
        # a queue, not an Event: a stream that is garbage-collected amid a call of ours may put into it as well
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._turn = threading.Lock()  # starting the thread; stepping without one
        self._thread: threading.Thread | None = None
        self._finalizer: weakref.finalize | None = None

    def submit(self, task: Task) -> None:
        """Hand a request over. Raises QueueFullError."""
        core = self.core
        waiting = len(core.state.waiting) + len(core.inbox)
        if waiting >= self.queue:
            raise QueueFullError(f"{waiting} requests wait already, which is the limit; try again later")
        if task.seconds is not None:
            task.deadline = time.monotonic() + task.seconds
        core.threads = torch.get_num_threads()
        core.inbox.append(task)
        if self.threaded:
            self._start()
            self._wake.put(None)

    def receive(self, task: Task) -> Delivery:
        """The next thing in a task's outbox, waited for."""
        if not self.threaded:
            return self._step_until(task)
        item = task.outbox.get()
        if task.paused and task.outbox.qsize() <= RUN_AHEAD // 2:
            self._wake.put(None)
        return item

    def cancel(self, task: Task) -> None:
        """Drop a task after the step in progress. Whoever waits for it is told at once."""
        task.cancelled = True
        task.outbox.put(None)
        if self.threaded:
            self._wake.put(None)
        elif self._turn.acquire(blocking=False):  # else the step in progress is followed by another look
            try:
                self.core.drop_cancelled()
            finally:
                self._turn.release()

    def stats(self) -> Stats:
        """How the engine is doing."""
        return self.core.stats()

    def _step_until(self, task: Task) -> Delivery:
        while True:
            try:
                return task.outbox.get_nowait()
            except Empty:
                pass
            with self._turn, torch.no_grad():
                if task.outbox.empty():
                    self.core.take_in()
                    self.core.step()

    def _start(self) -> None:
        if self._thread is not None and self._thread.is_alive():
            return
        with self._turn:
            if self._thread is None or not self._thread.is_alive():  # not so after a fork, too
                # without a reference to the engine, so that it can be collected and the thread then ends
                self._thread = threading.Thread(target=_run, args=(self.core, self._wake), daemon=True,
                                                name="puna-engine")
                if self._finalizer is not None:
                    self._finalizer.detach()
                self._finalizer = weakref.finalize(self, _finish, self.core, self._wake, self._thread)
                self._thread.start()


def _run(core: Core, wake: "SimpleQueue[None]") -> None:
    """The thread: step while something can be computed, else move weights into large pages, else sleep."""
    with torch.no_grad():  # not inference_mode: a caller may write into the logits it gets
        while not core.stopping:
            while not wake.empty():
                wake.get()
            try:
                core.take_in()
                busy = core.step()
            except Exception as error:  # not of one request: all of them are told
                for task in core.tasks():
                    core.finish(task, error)
                continue
            if not busy and (core.tasks() or not pages.enlarge()):
                waits = any(not task.paused or task.deadline is not None for task in core.tasks())
                with suppress(Empty):
                    wake.get(timeout=PATIENCE if waits else None)


def _finish(core: Core, wake: "SimpleQueue[None]", thread: threading.Thread) -> None:
    """When the engine is collected, or the interpreter ends: no thread may be in PyTorch while that is torn down."""
    core.stopping = True
    wake.put(None)
    if thread is not threading.current_thread():
        thread.join(EXIT_SECONDS)
