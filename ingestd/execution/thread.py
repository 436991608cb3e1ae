"""A lane that is a thread of the daemon."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from ingestd.base.telemetry import get_logger

if TYPE_CHECKING:
    from ingestd.execution.shelf import Shelf
    from ingestd.handlers.runner import Runner

log = get_logger()


class ThreadLane:
    """One thread with its own instance of the handler.

    A thread can't be ended from outside: a job that overruns is reported (by the pool) and waited
    for.

    Args:
        name: for the thread and the log.
        runner: loads and calls the handler; used by this thread only.
    """

    def __init__(self, name: str, runner: Runner) -> None:
        self._name = name
        self._runner = runner
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    async def start(self) -> None:
        """See `Lane.start`."""
        error = await asyncio.get_running_loop().run_in_executor(self._thread, self._runner.prepare)
        if error:
            log.warning("handler_not_ready", lane=self._name, error=error)

    def serve(self, shelf: Shelf) -> None:
        """See `ThreadedLane.serve`."""
        self._thread.submit(shelf.serve, self._runner.run, self._name, self._runner.renew)

    def _close(self) -> None:
        failed = self._runner.close()
        if failed:
            log.warning("handler_close_failed", lane=self._name, error=failed)

    async def close(self, deadline: float) -> bool:
        """See `Lane.close`."""
        loop = asyncio.get_running_loop()
        closing = loop.run_in_executor(self._thread, self._close)
        self._thread.shutdown(wait=False)
        done, _ = await asyncio.wait({closing}, timeout=max(0.0, deadline - loop.time()))
        return bool(done)
