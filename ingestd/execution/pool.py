"""Worker pools: the interface of a worker, and pools that own workers and hand jobs to them."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from ingestd.base.logging import get_logger
from ingestd.execution.job_queue import JobQueue, PrefetchLimit
from ingestd.handlers.outcome import POSTPONED, Failure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ingestd.execution.job_queue import QueuedJob
    from ingestd.handlers.outcome import Job, Result


START_TIMEOUT = 120.0
"""Seconds for a worker to load the handler; some load models."""
START_AGAIN_SECONDS = 2.0
"""How long a batch waits at least when no worker could be started for it."""


def not_started(why: str) -> Failure:
    """The failure of a job for which there is no worker: it waits, and spends no try."""
    return Failure(POSTPONED, f"no worker could be started: {why}", "", START_AGAIN_SECONDS)


class Worker(Protocol):
    """One worker. Its pool owns it."""

    async def start(self) -> None:
        """Loads the handler.

        Raises:
            HandlerLoadError: it can't be loaded.
        """
        ...

    async def close(self, deadline: float) -> bool:
        """Ends the worker, by force after `deadline` (loop time).

        Returns:
            Whether it is really gone; a thread that hangs can't be ended.
        """
        ...


class TaskWorker(Worker, Protocol):
    """A worker on the event loop."""

    async def run(self, job: Job) -> Result:
        """Runs one job; whatever goes wrong in it comes back as the result's failure."""
        ...


class ThreadedWorker(Worker, Protocol):
    """A worker with a thread of the daemon; the thread is the worker, or speaks with it."""

    def serve(self, shelf: JobQueue) -> None:
        """From now on its thread takes jobs from the shelf, until that is closed."""
        ...


# -- pools -----------------------------------------------------------------------------------------

log = get_logger()

L = TypeVar("L", bound=Worker)


class Pool(Generic[L]):
    """Owns the lanes, and the places that jobs have before and on them.

    Args:
        lanes: one for each worker.
    """

    def __init__(self, lanes: Sequence[L]) -> None:
        self.lanes = lanes
        self._taken = 0
        self._freed = asyncio.Event()

    async def start(self) -> None:
        """Starts all lanes at once.

        Raises:
            HandlerLoadError: the handler can't be loaded. Lanes that started are closed.
        """
        await self._start(self.lanes)

    async def _start(self, lanes: Sequence[L]) -> None:
        started = await asyncio.gather(*(lane.start() for lane in lanes), return_exceptions=True)
        errors = [error for error in started if error is not None]
        if errors:
            await self.close(asyncio.get_running_loop().time() + 5.0)
            raise errors[0]

    @property
    def places(self) -> int:
        """Bound of the jobs that run or lie ready."""
        return len(self.lanes)

    @property
    def has_free(self) -> bool:
        """Returns True if `acquire` would succeed at once."""
        return self._taken < self.places

    async def acquire(self) -> None:
        """A place for one job, now the caller's until `release`."""
        while self._taken >= self.places:
            self._freed.clear()
            await self._freed.wait()
        self._taken += 1

    def release(self) -> None:
        """Gives a place back."""
        self._taken -= 1
        self._freed.set()

    async def run(self, job: Job) -> Result:
        """Runs one job as soon as a lane is free; needs a place."""
        raise NotImplementedError

    async def close(self, deadline: float) -> bool:
        """Ends all workers, by force after `deadline` (loop time).

        Returns:
            Whether all are really gone.
        """
        return all(await asyncio.gather(*(lane.close(deadline) for lane in self.lanes)))


class TaskPool(Pool[TaskWorker]):
    """Lanes on the event loop: a job has a place when a lane is free for it."""

    async def start(self) -> None:
        """See `Pool.start`."""
        self._free: asyncio.Queue[TaskWorker] = asyncio.Queue()
        for lane in self.lanes:
            self._free.put_nowait(lane)
        await super().start()

    async def run(self, job: Job) -> Result:
        """See `Pool.run`."""
        lane = await self._free.get()
        try:
            return await lane.run(job)
        finally:
            self._free.put_nowait(lane)


class ThreadedPool(Pool[ThreadedWorker]):
    """Lanes with a thread each, which take their jobs from one shelf.

    Args:
        lanes: one for each worker.
        overrun: seconds after which a job is reported as overrunning; `None` where the lanes end
            such a job themselves.
        first: so many lanes are started before `start` returns, and say whether the handler can be
            loaded; the others start in their own threads. `None` for all.
    """

    def __init__(
        self,
        lanes: Sequence[ThreadedWorker],
        *,
        overrun: float | None = None,
        first: int | None = None,
    ) -> None:
        super().__init__(lanes)
        self._first = first
        self._overrun = overrun
        self._ahead = PrefetchLimit(len(lanes))

    async def start(self) -> None:
        """See `Pool.start`."""
        self._shelf = JobQueue()
        await self._start(self.lanes[: self._first])
        for lane in self.lanes:
            lane.serve(self._shelf)

    @property
    def places(self) -> int:
        """See `Pool.places`."""
        return len(self.lanes) + self._ahead.jobs

    async def run(self, job: Job) -> Result:
        """See `Pool.run`."""
        ticket = self._shelf.put(job)
        if self._overrun is not None:
            await self._watch(ticket, self._overrun)
        result = await ticket.done
        self._ahead.ran(result.seconds, failed=result.failure is not None)
        return result

    async def _watch(self, ticket: QueuedJob, overrun: float) -> None:
        """Until it is done, or has taken too long, which is said."""
        while not ticket.done.done():
            # Before it, others may be running: the time counts from its own beginning.
            left = ticket.began + overrun - time.monotonic() if ticket.began else overrun
            if left <= 0:
                log.warning("handler_overran", lane=ticket.lane, timeout=overrun)
                return
            await asyncio.wait({ticket.done}, timeout=left)

    async def close(self, deadline: float) -> bool:
        """See `Pool.close`."""
        self._shelf.close(len(self.lanes))
        return await super().close(deadline)
