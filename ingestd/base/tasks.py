"""Owned tasks and threads: each has a name and an end, and no failure is overlooked."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Executor, Future
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from ingestd.base.errors import JournalFailed
from ingestd.base.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

CANCEL_SECONDS = 2.0

log = get_logger()


class OwnedTasks:
    """The tasks of one pipeline. Made on the loop.

    Args:
        pipeline: its name.

    Attributes:
        broken: fails with the first error that a task ends with.
    """

    def __init__(self, pipeline: str) -> None:
        self._pipeline = pipeline
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self.broken: asyncio.Future[None] = self._loop.create_future()

    def start(self, turn: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
        """Starts a task."""
        task = self._loop.create_task(turn, name=f"{self._pipeline}-{name}")
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not self.broken.done():
            self.broken.set_exception(error)
            if not isinstance(error, JournalFailed):
                log.error(
                    "pipeline_broke", pipeline=self._pipeline, task=task.get_name(), exc_info=error
                )

    def break_with(self, failed: asyncio.Future[None]) -> None:
        """Fails with the error of a future, if it has one."""
        error = None if failed.cancelled() else failed.exception()
        if error is not None and not self.broken.done():
            self.broken.set_exception(error)

    async def cancel(self, tasks: Iterable[asyncio.Task[None]] | None = None) -> None:
        """Cancels some tasks, or all, and waits for their end."""
        cancelled = list(self._tasks if tasks is None else tasks)
        for task in cancelled:
            task.cancel()
        await asyncio.gather(*cancelled, return_exceptions=True)


async def end_tasks(*tasks: asyncio.Task[Any]) -> None:
    """Cancels tasks, again and again until they have ended.

    A library may lose a cancellation: `asyncio.wait_for` does up to Python 3.11 where it meets what
    is waited for. Each task has `CANCEL_SECONDS` to clean up before it is cancelled once more.
    """
    left = {task for task in tasks if not task.done()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=CANCEL_SECONDS)


class OwnThread(Executor):
    """One thread that runs calls one after the other, also those that fork.

    A child that is forked in a thread of a `ThreadPoolExecutor` waits for that thread at its exit,
    and is the thread. Nothing waits for this one but `shutdown`.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._is_shut = False

    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See `Executor.submit`."""
        if self._is_shut:
            raise RuntimeError("the thread has been shut down")
        if self._thread.ident is None:
            self._thread.start()
        future: Future[Any] = Future()
        self._calls.put((future, lambda: call(*args, **kwargs)))
        return future

    def _serve(self) -> None:
        while (queued := self._calls.get()) is not None:
            future, call = queued
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # noqa: BLE001  it is the caller's
                    future.set_exception(error)
            del queued, future, call  # what they hold is not held until the next call

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002
        """See `Executor.shutdown`; calls that are queued still run."""
        self._is_shut = True
        self._calls.put(None)
        if wait and self._thread.ident is not None:
            self._thread.join()
