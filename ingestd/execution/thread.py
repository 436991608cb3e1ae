"""A lane that is a thread of the daemon."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TYPE_CHECKING

import structlog

from ingestd.handlers.outcome import Failure, Result

if TYPE_CHECKING:
    from ingestd.handlers.outcome import Job
    from ingestd.handlers.runner import Runner

log = structlog.get_logger(__name__)


class ThreadLane:
    """One thread with its own instance of the handler.

    A thread can't be ended from outside: a job that overruns `timeout` is reported and waited for.

    Args:
        name: for the thread and the log.
        runner: loads and calls the handler; used by this thread only.
        timeout: seconds after which a job is reported as overrunning.
    """

    depth = 2

    def __init__(self, name: str, runner: Runner, *, timeout: float) -> None:
        self._name = name
        self._runner = runner
        self._timeout = timeout
        self._closing = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    async def start(self) -> None:
        """See `Lane.start`."""
        error = await asyncio.get_running_loop().run_in_executor(self._thread, self._runner.prepare)
        if error:
            log.warning("handler_not_ready", lane=self._name, error=error)

    async def run(self, job: Job) -> Result:
        """See `Lane.run`."""
        began: list[float] = []
        running = asyncio.get_running_loop().run_in_executor(
            self._thread, copy_context().run, self._run, job, began
        )
        while not running.done():
            # Before it, another job may be running: the time counts from its own beginning.
            left = began[0] + self._timeout - time.monotonic() if began else self._timeout
            if left <= 0:
                log.warning("handler_overran", lane=self._name, timeout=self._timeout)
                break
            await asyncio.wait({running}, timeout=left)
        return await running

    def _run(self, job: Job, began: list[float]) -> Result:
        if self._closing:
            return Result(failure=Failure("crashed", "the daemon leaves"))
        began.append(time.monotonic())
        return self._runner.run(job)

    def _close(self) -> None:
        failed = self._runner.close()
        if failed:
            log.warning("handler_close_failed", lane=self._name, error=failed)

    async def close(self, deadline: float) -> bool:
        """See `Lane.close`."""
        self._closing = True
        loop = asyncio.get_running_loop()
        closing = loop.run_in_executor(self._thread, self._close)
        self._thread.shutdown(wait=False)
        done, _ = await asyncio.wait({closing}, timeout=max(0.0, deadline - loop.time()))
        return bool(done)
