"""A lane that is a coroutine on the daemon's own loop, for `async def` handlers."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from ingestd.base.telemetry import get_logger
from ingestd.handlers.outcome import Failure, Result

if TYPE_CHECKING:
    from ingestd.handlers.outcome import Job
    from ingestd.handlers.runner import Runner

log = get_logger()


class CoroutineLane:
    """One job at a time on the event loop; a job that overruns is cancelled.

    Args:
        name: for the log.
        runner: loads and calls the handler.
        timeout: seconds after which a job is cancelled.
    """

    def __init__(self, name: str, runner: Runner, *, timeout: float) -> None:
        self._name = name
        self._runner = runner
        self._timeout = timeout
        self._idle = asyncio.Event()
        self._idle.set()

    async def start(self) -> None:
        """See `Lane.start`."""
        error = self._runner.prepare()
        if error:
            log.warning("handler_not_ready", lane=self._name, error=error)

    async def run(self, job: Job) -> Result:
        """See `Lane.run`."""
        self._idle.clear()
        try:
            async with asyncio.timeout(self._timeout):
                return await self._runner.run_async(job)
        except TimeoutError:
            error = f"the handler was cancelled after {self._timeout:g} s"
            return Result(failure=Failure("timeout", error), seconds=self._timeout)
        finally:
            self._idle.set()

    async def close(self, deadline: float) -> bool:
        """See `Lane.close`."""
        try:
            async with asyncio.timeout_at(deadline):
                await self._idle.wait()
                failed = await self._runner.close_async()
        except TimeoutError:
            return False
        if failed:
            log.warning("handler_close_failed", lane=self._name, error=failed)
        return True
