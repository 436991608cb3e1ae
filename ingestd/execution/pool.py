"""Worker pools: the interface of a worker, and pools that own workers and hand jobs to them."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

from ingestd.base.logging import get_logger
from ingestd.execution.job_queue import JobQueue, PrefetchLimit
from ingestd.handlers.outcome import POSTPONED, Failure

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ingestd.execution.job_queue import QueuedJob
    from ingestd.handlers.outcome import Job, Result


START_TIMEOUT = 120.0
"""Seconds for a worker to load the handler; some load models."""
START_AGAIN_SECONDS = 2.0
"""Shortest wait of a batch for which no worker could be started."""


def not_started(why: str) -> Failure:
    """The failure of a job for which there is no worker: it waits, and spends no try."""
    return Failure(POSTPONED, f"no worker could be started: {why}", "", START_AGAIN_SECONDS)


class WorkerActivity(NamedTuple):
    """State of a worker, and the batch that it has.

    Attributes:
        name: of the worker.
        pid: of its process; 0 if it has none of its own.
        batch: the id of its batch; empty if it is idle.
        attempt: of the batch, from 1 on.
        records: of the batch.
        seconds: that it has had the batch.
        ahead: batches that lie ready before this worker alone.
    """

    name: str
    pid: int = 0
    batch: str = ""
    attempt: int = 0
    records: int = 0
    seconds: float = 0.0
    ahead: int = 0


class Worker(Protocol):
    """Interface of a worker, which its pool owns."""

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

    def serve(self, jobs: JobQueue) -> None:
        """Has its thread take jobs from the queue until that is closed."""
        ...


# -- pools -----------------------------------------------------------------------------------------

log = get_logger()

L = TypeVar("L", bound=Worker)


class Pool(Generic[L]):
    """Owns workers, and the places of jobs that run or lie ready.

    Args:
        workers: all of them.
    """

    def __init__(self, workers: Sequence[L]) -> None:
        self.workers = workers
        self._used = 0
        self._freed = asyncio.Event()

    async def start(self) -> None:
        """Starts all workers at once.

        Raises:
            HandlerLoadError: the handler can't be loaded. Workers that started are closed.
        """
        await self._start(self.workers)

    async def _start(self, workers: Sequence[L]) -> None:
        started = await asyncio.gather(
            *(worker.start() for worker in workers), return_exceptions=True
        )
        errors = [error for error in started if error is not None]
        if errors:
            await self.close(asyncio.get_running_loop().time() + 5.0)
            raise errors[0]

    @property
    def places(self) -> int:
        """Bound of the jobs that run or lie ready."""
        return len(self.workers)

    @property
    def has_free(self) -> bool:
        """Returns True if `acquire` would succeed at once."""
        return self._used < self.places

    async def acquire(self) -> None:
        """Waits for a place for one job, the caller's until `release`."""
        while self._used >= self.places:
            self._freed.clear()
            await self._freed.wait()
        self._used += 1

    def release(self) -> None:
        """Gives a place back."""
        self._used -= 1
        self._freed.set()

    async def run(self, job: Job) -> Result:
        """Runs one job as soon as a worker is free; needs a place."""
        raise NotImplementedError

    def _jobs_by_worker(self) -> Iterator[tuple[str, float, Job]]:
        """Yields the name of a worker, since when it has a job, and the job, the oldest first."""
        return iter(())

    def activity(self) -> list[WorkerActivity]:
        """Tells what each worker does that has a name."""
        now = time.monotonic()
        found = {
            worker.name: WorkerActivity(worker.name, getattr(worker, "pid", 0))
            for worker in self.workers
            if hasattr(worker, "name")
        }
        for name, began, job in self._jobs_by_worker():
            if (one := found.get(name)) is None:
                continue
            if one.batch:
                found[name] = one._replace(ahead=one.ahead + 1)
            else:
                facts = job.batch, job.attempt, job.records.count, now - began
                found[name] = WorkerActivity(name, one.pid, *facts)
        return list(found.values())

    def memory(self) -> dict[str, int]:
        """The bytes of memory of each worker that is a process of its own, by its number."""
        from ingestd.execution.process_monitor import resident_bytes  # noqa: PLC0415

        pids = [getattr(worker, "pid", 0) for worker in self.workers]
        return {str(n): resident_bytes(pid) for n, pid in enumerate(pids) if pid}

    async def close(self, deadline: float) -> bool:
        """Ends all workers, by force after `deadline` (loop time).

        Returns:
            Whether all are really gone.
        """
        return all(await asyncio.gather(*(worker.close(deadline) for worker in self.workers)))


class TaskPool(Pool[TaskWorker]):
    """Pool of workers on the event loop: a job has a place when a worker is free for it."""

    async def start(self) -> None:
        """See `Pool.start`."""
        self._free: asyncio.Queue[TaskWorker] = asyncio.Queue()
        self._running: dict[TaskWorker, tuple[float, Job]] = {}
        for worker in self.workers:
            self._free.put_nowait(worker)
        await super().start()

    async def run(self, job: Job) -> Result:
        """See `Pool.run`."""
        worker = await self._free.get()
        self._running[worker] = time.monotonic(), job
        try:
            return await worker.run(job)
        finally:
            del self._running[worker]
            self._free.put_nowait(worker)

    def _jobs_by_worker(self) -> Iterator[tuple[str, float, Job]]:
        for worker, (began, job) in self._running.items():
            yield getattr(worker, "name", ""), began, job


class ThreadedPool(Pool[ThreadedWorker]):
    """Pool of workers with a thread each, which take their jobs from one queue.

    Args:
        workers: all of them.
        overrun: seconds after which a job is reported as overrunning; `None` where the workers end
            such a job themselves.
        first: so many workers are started before `start` returns, and say whether the handler can
            be loaded; the others start in their own threads. `None` for all.
        prefetch: jobs may lie ready before workers that are busy. Without it the rate of jobs is
            that at which places are taken, whatever the workers do.
    """

    def __init__(
        self,
        workers: Sequence[ThreadedWorker],
        *,
        overrun: float | None = None,
        first: int | None = None,
        prefetch: bool = True,
    ) -> None:
        super().__init__(workers)
        self._first = first
        self._overrun = overrun
        self._prefetch = PrefetchLimit(len(workers)) if prefetch else None

    async def start(self) -> None:
        """See `Pool.start`."""
        self._jobs = JobQueue()
        await self._start(self.workers[: self._first])
        for worker in self.workers:
            worker.serve(self._jobs)

    @property
    def places(self) -> int:
        """See `Pool.places`."""
        return len(self.workers) + (0 if self._prefetch is None else self._prefetch.jobs)

    async def run(self, job: Job) -> Result:
        """See `Pool.run`."""
        queued = self._jobs.put(job)
        if self._overrun is not None:
            await self._watch(queued, self._overrun)
        result = await queued.done
        if self._prefetch is not None:
            self._prefetch.ran(result.seconds, failed=result.failure is not None)
        return result

    def _jobs_by_worker(self) -> Iterator[tuple[str, float, Job]]:
        began = [(one.began, one.worker, one.job) for one in self._jobs.queued if one.began]
        for at, worker, job in sorted(began, key=lambda one: one[0]):
            yield worker, at, job

    async def _watch(self, queued: QueuedJob, overrun: float) -> None:
        """Waits until it is done, or logs that it has taken too long."""
        while not queued.done.done():
            # Before it, others may be running: the time counts from its own beginning.
            left = queued.began + overrun - time.monotonic() if queued.began else overrun
            if left <= 0:
                log.warning("handler_overran", worker=queued.worker, timeout=overrun)
                return
            await asyncio.wait({queued.done}, timeout=left)

    async def close(self, deadline: float) -> bool:
        """See `Pool.close`."""
        self._jobs.close(len(self.workers))
        return await super().close(deadline)
