"""Worker pools: the interface of a worker, and pools that own workers and hand jobs to them."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

from ingestd.base.logging import get_logger
from ingestd.execution.job_queue import JobQueue, PrefetchLimit
from ingestd.handlers.outcome import POSTPONED, Failure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from ingestd.execution.concurrency import Demand
    from ingestd.execution.job_queue import QueuedJob
    from ingestd.handlers.outcome import Job, Result, SinkFinding


START_TIMEOUT = 120.0
"""Seconds for a worker to load the handler; some load models."""
START_AGAIN_SECONDS = 2.0
"""Shortest wait of a batch for which no worker could be started."""


END_SECONDS = 5.0
"""Time in which a worker that is not needed any more may close its handler."""


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
    """A worker with a thread of the daemon; the thread is the worker, or speaks with it.

    Attributes:
        name: of the thread; no other worker of the pool has it.
    """

    name: str

    def serve(self, jobs: JobQueue) -> None:
        """Has its thread take jobs from the queue until that is closed."""
        ...


# -- pools -----------------------------------------------------------------------------------------

log = get_logger()


def log_findings(worker: str, findings: Iterable[SinkFinding]) -> None:
    """Logs what the `check()` of a sink found in a worker, a line each."""
    write = {"error": log.error, "warning": log.warning, "info": log.info}
    for one in findings:
        write[one.level]("sink_checked", worker=worker, finding=one.text)


L = TypeVar("L", bound=Worker)


class Pool(Generic[L]):
    """Owns workers, and the places of jobs that run or lie ready.

    Where it can make workers, their number changes while it runs (`resize`). More than were ever
    asked for are never alive at once: those that shall end count until they are gone. A worker
    that is to end does so when it has no job.

    Args:
        workers: all of them.
        make: makes one more worker, of a number that no other has; `None` if there are never more.

    Attributes:
        workers: those that serve, or are being started.
        size: how many serve.
        waited: jobs so far that had to wait for a place.
        taken: places so far.
        failed: workers so far that could not be started.
    """

    def __init__(self, workers: Iterable[L], make: Callable[[int], L] | None = None) -> None:
        self.workers = list(workers)
        self.size = len(self.workers)
        self.waited = self.taken = self.failed = 0
        self._make = make
        self._numbers = {worker: number for number, worker in enumerate(self.workers)}
        self._wanted = self.size
        self._resizing: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[bool]] = set()
        self._lost = 0  # that could not be ended
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
        return self.size

    @property
    def has_free(self) -> bool:
        """Returns True if `acquire` would succeed at once."""
        return self._used < self.places

    async def acquire(self) -> None:
        """Waits for a place for one job, the caller's until `release`."""
        self.taken += 1
        self.waited += self._used >= self.places
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

        pids = {self._numbers[worker]: getattr(worker, "pid", 0) for worker in self.workers}
        return {str(number): resident_bytes(pid) for number, pid in pids.items() if pid}

    # -- another number of workers -----------------------------------------------------------------

    @property
    def resizable(self) -> bool:
        """Tells if `resize` can be called."""
        return self._make is not None

    @property
    def demand(self) -> Demand:
        """Numbers that say whether there are enough workers."""
        from ingestd.execution.concurrency import Demand  # noqa: PLC0415  most do without

        return Demand(self.size, self.waited, self.taken, self.failed)

    def resize(self, workers: int) -> None:
        """Has so many workers serve, as soon as these are started; see `size`."""
        self._wanted = workers
        if self._resizing is None or self._resizing.done():
            self._resizing = asyncio.create_task(self._resize(), name="pool-resize")

    async def _resize(self) -> None:
        while self._wanted != self.size:
            if self._wanted < self.size:
                surplus = self.size - self._wanted
                self._serving(-surplus)
                self._dismiss(surplus)
                continue
            self._serving(self._keep(self._wanted - self.size))
            if (more := self._wanted - len(self._numbers)) > 0:
                if not all(await asyncio.gather(*(self._add() for _ in range(more)))):
                    self._wanted = self.size
            elif self._ending:
                await asyncio.wait(self._ending, return_when=asyncio.FIRST_COMPLETED)
            elif self._lost:
                self.failed, self._wanted = self.failed + 1, self.size
            else:
                await asyncio.sleep(0.001)  # one has taken its dismissal, and tells the loop

    def _serving(self, more: int) -> None:
        """Another number of workers serve."""
        self.size += more
        self._freed.set()

    async def _add(self) -> bool:
        """Starts one more worker; tells if it serves."""
        assert self._make is not None  # noqa: S101  `resize` is not called without
        taken = set(self._numbers.values())
        number = next(n for n in range(len(taken) + 1) if n not in taken)
        worker = self._make(number)
        self._numbers[worker] = number
        self.workers.append(worker)
        try:
            async with asyncio.timeout(START_TIMEOUT):
                await worker.start()
        except Exception as error:  # noqa: BLE001  there are others, which go on
            self.failed += 1
            log.warning("worker_not_started", worker=number, error=str(error))
            self._end(worker)
            return False
        self._serve(worker)
        self._serving(1)
        return True

    def _end(self, worker: L) -> None:
        """Ends a worker that serves no more."""
        self.workers.remove(worker)
        ending = asyncio.create_task(
            worker.close(asyncio.get_running_loop().time() + END_SECONDS), name="worker-end"
        )
        self._ending.add(ending)
        ending.add_done_callback(partial(self._ended, worker))

    def _ended(self, worker: L, ending: asyncio.Task[bool]) -> None:
        self._ending.discard(ending)
        if ending.cancelled() or ending.exception() is not None or not ending.result():
            self._lost += 1  # its thread hangs; it counts on, so that there are not ever more
        else:
            del self._numbers[worker]

    def _serve(self, worker: L) -> None:
        """Has a worker that is started take jobs."""
        raise NotImplementedError

    def _dismiss(self, workers: int) -> None:
        """Has so many workers end when they have no job; calls `_end` with each."""
        raise NotImplementedError

    def _keep(self, workers: int) -> int:
        """Keeps some of those that were dismissed and did not end yet; returns how many."""
        raise NotImplementedError

    # -- end ---------------------------------------------------------------------------------------

    async def close(self, deadline: float) -> bool:
        """Ends all workers, by force after `deadline` (loop time).

        Returns:
            Whether all are really gone.
        """
        if self._resizing is not None:
            self._resizing.cancel()  # a worker that is being started is one of `workers`
            await asyncio.gather(self._resizing, return_exceptions=True)
        gone = all(await asyncio.gather(*(worker.close(deadline) for worker in self.workers)))
        if ending := set(self._ending):
            now = asyncio.get_running_loop().time()
            _, late = await asyncio.wait(ending, timeout=max(0.1, deadline - now))
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        return gone and not self._lost


class TaskPool(Pool[TaskWorker]):
    """Pool of workers on the event loop: a job has a place when a worker is free for it."""

    async def start(self) -> None:
        """See `Pool.start`."""
        self._free: asyncio.Queue[TaskWorker] = asyncio.Queue()
        self._running: dict[TaskWorker, tuple[float, Job]] = {}
        self._dismissed = 0
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
            self._serve(worker)

    def _jobs_by_worker(self) -> Iterator[tuple[str, float, Job]]:
        for worker, (began, job) in self._running.items():
            yield getattr(worker, "name", ""), began, job

    def _serve(self, worker: TaskWorker) -> None:
        if self._dismissed:
            self._dismissed -= 1
            self._end(worker)
        else:
            self._free.put_nowait(worker)

    def _dismiss(self, workers: int) -> None:
        self._dismissed += workers
        for _ in range(min(workers, self._free.qsize())):
            self._serve(self._free.get_nowait())

    def _keep(self, workers: int) -> int:
        kept = min(workers, self._dismissed)
        self._dismissed -= kept
        return kept


class ThreadedPool(Pool[ThreadedWorker]):
    """Pool of workers with a thread each, which take their jobs from one queue.

    Args:
        workers: all of them.
        make: see `Pool`.
        overrun: seconds after which a job is reported as overrunning; `None` where the workers end
            such a job themselves.
        first: so many workers are started before `start` returns, and say whether the handler can
            be loaded; the others start in their own threads. `None` for all.
        prefetch: jobs may lie ready before workers that are busy. Without it the rate of jobs is
            that at which places are taken, whatever the workers do.
    """

    def __init__(
        self,
        workers: Iterable[ThreadedWorker],
        make: Callable[[int], ThreadedWorker] | None = None,
        *,
        overrun: float | None = None,
        first: int | None = None,
        prefetch: bool = True,
    ) -> None:
        super().__init__(workers, make)
        self._first = first
        self._overrun = overrun
        self._prefetch = PrefetchLimit(self.size) if prefetch else None

    async def start(self) -> None:
        """See `Pool.start`."""
        self._jobs = JobQueue(self._dismissed)
        await self._start(self.workers[: self._first])
        for worker in self.workers:
            self._serve(worker)

    def _serve(self, worker: ThreadedWorker) -> None:
        worker.serve(self._jobs)

    def _serving(self, more: int) -> None:
        super()._serving(more)
        if self._prefetch is not None:
            self._prefetch.workers = self.size

    def _dismiss(self, workers: int) -> None:
        self._jobs.dismiss(workers)

    def _keep(self, workers: int) -> int:
        return self._jobs.keep(workers)

    def _dismissed(self, name: str) -> None:
        worker = next((one for one in self.workers if one.name == name), None)
        if worker is not None and not self._jobs.closed:
            self._end(worker)

    @property
    def places(self) -> int:
        """See `Pool.places`."""
        return self.size + (0 if self._prefetch is None else self._prefetch.jobs)

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
