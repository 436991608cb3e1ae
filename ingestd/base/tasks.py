"""Owned tasks: each has a name, a reference and an end, and one that fails is never overlooked."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from ingestd.base.errors import JournalFailed
from ingestd.base.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable

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
