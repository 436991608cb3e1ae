"""Workers inside the daemon: threads, and coroutines on event loops of their own."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

from ingestd.base.errors import HandlerLoadError
from ingestd.base.logging import get_logger
from ingestd.base.tasks import OwnThread
from ingestd.execution.pool import TaskPool, log_findings, not_started
from ingestd.handlers.failure import failure_of
from ingestd.handlers.outcome import Failure, Result

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ingestd.execution.event_loops import Call, HandlerLoops
    from ingestd.execution.job_queue import JobQueue
    from ingestd.handlers.outcome import Job
    from ingestd.handlers.runner import Runner


log = get_logger()


class ThreadWorker:
    """One thread with its own instance of the handler.

    A thread can't be ended from outside: a job that overruns is reported (by the pool) and waited
    for.

    Args:
        name: for the thread and the log.
        runner: loads and calls the handler; used by this thread only.
        checks: it asks for the findings of the handler's `check()` before its first job.

    Attributes:
        name: see `ThreadedWorker`.
    """

    def __init__(self, name: str, runner: Runner, *, checks: bool = False) -> None:
        self.name = name
        self._runner = runner
        self._checks = checks
        self._thread = OwnThread(name)

    async def start(self) -> None:
        """See `Worker.start`."""
        error = await asyncio.get_running_loop().run_in_executor(self._thread, self._runner.prepare)
        if error:
            log.warning("handler_not_ready", worker=self.name, error=error)

    def serve(self, jobs: JobQueue) -> None:
        """See `ThreadedWorker.serve`."""
        if self._checks:
            self._thread.submit(lambda: log_findings(self.name, self._runner.check()))
        self._thread.submit(jobs.serve, self._runner.run, self.name, self._runner.renew)

    def _close(self) -> None:
        failed = self._runner.close()
        if failed:
            log.warning("handler_close_failed", worker=self.name, error=failed)

    async def close(self, deadline: float) -> bool:
        """See `Worker.close`."""
        loop = asyncio.get_running_loop()
        closing = loop.run_in_executor(self._thread, self._close)
        self._thread.shutdown(wait=False)
        done, _ = await asyncio.wait({closing}, timeout=max(0.0, deadline - loop.time()))
        return bool(done)


# -- coroutines ------------------------------------------------------------------------------------
#
# A call that overruns `executor.timeout` is cancelled. One that has not ended after that, for as
# long again but `GRACE_SECONDS` at most, is given up (see `event_loops.py`): its batch is free,
# with the reason `timeout`, the log says so, and the worker goes on with a new instance of the
# handler.

GRACE_SECONDS = 5.0
"""How long a call may take to end after it was cancelled."""


class CoroutineWorker:
    """One job at a time on the handlers' loop.

    Args:
        name: for the log.
        runners: makes what loads and calls the handler.
        loops: of its pool.
        timeout: seconds after which a job is cancelled.
        checks: it asks for the findings of the handler's `check()` beside its first jobs.
    """

    def __init__(
        self,
        name: str,
        runners: Callable[[], Runner],
        loops: HandlerLoops,
        *,
        timeout: float,
        checks: bool = False,
    ) -> None:
        self.name = name
        self._runners = runners
        self._runner = runners()
        self._loops = loops
        self._checks = checks
        self._timeout = timeout
        self._grace = min(timeout, GRACE_SECONDS)
        self._prepared = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def start(self) -> None:
        """See `Worker.start`."""
        call = self._loops.current.call(partial(_prepare, self._runner))
        await call.ended_within(None)
        error = _CANCELLED if call.done.cancelled() else call.done.result()
        self._prepared = True
        if error:
            log.warning("handler_not_ready", worker=self.name, error=error)
        if self._checks:
            self._loops.current.call(partial(_check, self.name, self._runner))

    async def run(self, job: Job) -> Result:
        """See `Worker.run`."""
        self._idle.clear()
        call = self._loops.current.call(partial(self._called, self._runner, job))
        try:
            if not await call.ended_within(self._timeout):
                return await self._overrun(call)
        except asyncio.CancelledError:
            call.cancel()
            raise
        finally:
            self._idle.set()
        return _result_of(call)

    async def _called(self, runner: Runner, job: Job) -> Result:
        if not self._prepared:  # after the one before was given up
            try:
                runner.prepare()
            except HandlerLoadError as error:
                return Result(failure=not_started(str(error)))
            self._prepared = True
        return await runner.run_async(job)

    async def _overrun(self, call: Call[Result]) -> Result:
        call.cancel()
        if await call.ended_within(self._grace):
            # One that caught it and returned has done its work after all.
            result = _result_of(call)
            if result.failure is None:
                return result
            return self._timed_out("was cancelled")
        if await self._loops.give_up(call, self._grace):
            log.error("handler_abandoned", worker=self.name, timeout=self._timeout)
            self._replace(call)
            return self._timed_out("did not end when it was cancelled; it is left behind")
        log.error("handler_not_abandoned", worker=self.name, left_behind=self._loops.left_behind)
        await call.ended_within(None)
        return self._timed_out("did not end when it was cancelled")

    def _timed_out(self, what: str) -> Result:
        error = f"the handler {what} after {self._timeout:g} s"
        return Result(failure=Failure("timeout", error), seconds=self._timeout)

    def _replace(self, call: Call[Result]) -> None:
        """A new instance: the old one is still in use, and is closed when its call has ended."""
        old, self._runner, self._prepared = self._runner, self._runners(), False
        call.done.add_done_callback(lambda _: call.loop.call(old.close_async))

    async def close(self, deadline: float) -> bool:
        """See `Worker.close`."""
        try:
            async with asyncio.timeout_at(deadline):
                await self._idle.wait()
        except TimeoutError:
            return False
        call = self._loops.current.call(self._runner.close_async)
        if not await call.ended_within(max(0.0, deadline - asyncio.get_running_loop().time())):
            call.cancel()
            return False
        if not call.done.cancelled() and call.done.result():
            log.warning("handler_close_failed", worker=self.name, error=call.done.result())
        return True


class CoroutinePool(TaskPool):
    """Pool of coroutine workers that share a loop of their own.

    Args:
        workers: all of them.
        loops: theirs.
        make: see `Pool`.
    """

    def __init__(
        self,
        workers: Iterable[CoroutineWorker],
        loops: HandlerLoops,
        make: Callable[[int], CoroutineWorker] | None = None,
    ) -> None:
        super().__init__(workers, make)
        self._loops = loops

    async def close(self, deadline: float) -> bool:
        """See `Pool.close`."""
        gone = await super().close(deadline)
        return await self._loops.end(deadline) and gone


_CANCELLED = "the handler cancelled its own task, or closed its loop"


def _result_of(call: Call[Result]) -> Result:
    """The result of a call that has ended, however it did."""
    if call.done.cancelled():
        return Result(failure=Failure("raised", _CANCELLED))
    if error := call.done.exception():
        return Result(failure=failure_of(error))
    return call.done.result()


async def _check(worker: str, runner: Runner) -> None:
    log_findings(worker, await runner.check_async())


async def _prepare(runner: Runner) -> str:
    return runner.prepare()
