"""Queue of jobs that lie ready for the workers, and the bound of their number."""

from __future__ import annotations

import asyncio
import contextlib
import queue
from collections import deque
from contextvars import Context, copy_context
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ingestd.handlers.outcome import Job, Result


SECONDS = 0.1
"""Work of each worker that lies ready: more than a turn of the event loop takes under load."""
AHEAD_MAX = 64
"""Bound of the jobs of all workers together."""
_WEIGHT = 0.2  # of the newest job in the average


class PrefetchLimit:
    """Bounds the jobs that lie ready by their mean duration.

    One a worker to begin with, and whenever one fails: what lies ready is tried even if everything
    fails by then, and an outage should use up as few tries as possible.

    Args:
        workers: at least one; may change.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._mean = SECONDS

    @property
    def jobs(self) -> int:
        """Number of jobs."""
        ready = int(self.workers * SECONDS / max(self._mean, SECONDS / AHEAD_MAX))
        return min(max(self.workers, ready), max(self.workers, AHEAD_MAX))

    def ran(self, seconds: float, *, failed: bool) -> None:
        """Updates the mean with a job's duration."""
        self._mean = SECONDS if failed else self._mean + _WEIGHT * (seconds - self._mean)


# -- the queue -------------------------------------------------------------------------------------
#
# The threads of all workers take from one queue and put results back into it, without a turn of the
# event loop in between. Under load a turn can take as long as many batches; a worker that had to
# wait for one after each job would be idle most of the time.


class QueuedJob:
    """A job in the queue or with a worker.

    Attributes:
        job: to be run.
        done: resolved on the loop with its result.
        began: when a worker took it, as `time.monotonic()`; 0 before that.
        worker: the name of that worker.
    """

    __slots__ = ("began", "context", "done", "error", "job", "result", "worker")

    def __init__(self, job: Job, done: asyncio.Future[Result]) -> None:
        self.job = job
        self.done = done
        self.began = 0.0
        self.worker = ""
        self.result: Result | None = None
        self.error: BaseException | None = None
        # Log lines of its run, the handler's too, have its batch.
        self.context: Context = copy_context()


class JobQueue:
    """Hands jobs from the event loop to workers' threads, and results back. Made on the loop.

    Args:
        on_dismissed: called on the loop with the name of each worker that was dismissed.

    Attributes:
        queued: the jobs that have no result yet; of the loop.
        closed: no further job is begun.
    """

    def __init__(self, on_dismissed: Callable[[str], object] = lambda _: None) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_dismissed = on_dismissed
        self._dismissals: deque[None] = deque()  # one for each worker that is to end
        # `None` wakes a worker: a job came back, or the queue was closed.
        self._waiting: queue.SimpleQueue[QueuedJob | None] = queue.SimpleQueue()
        self._back: deque[QueuedJob] = deque()
        self._idle: set[str] = set()
        self._results: deque[QueuedJob] = deque()
        self._told = False
        self.queued: set[QueuedJob] = set()
        self.closed = False

    def put(self, job: Job) -> QueuedJob:
        """Queues a job; on the loop."""
        queued = QueuedJob(job, self._loop.create_future())
        self.queued.add(queued)
        self._waiting.put(queued)
        return queued

    def take(self, worker: str) -> QueuedJob | None:
        """Waits for the next job; `None` if the worker is to end. On its thread."""
        self._idle.add(worker)
        try:
            while not self.closed:
                if self._dismissals and self._revoke():
                    with contextlib.suppress(RuntimeError):  # the loop is gone
                        self._loop.call_soon_threadsafe(self._on_dismissed, worker)
                    return None
                queued = self._take_back() or self._waiting.get()
                if queued is not None and not self.closed:
                    queued.worker, queued.began = worker, monotonic()
                    return queued
        finally:
            self._idle.discard(worker)
        return None

    def take_ahead(self, worker: str) -> QueuedJob | None:
        """Takes a job that no idle worker waits for; `None` if there is none at once.

        For a worker that still has another job.
        """
        if self.closed or self._waiting.qsize() <= len(self._idle):
            return None
        queued = self._take_back()
        if queued is None:
            try:
                queued = self._waiting.get_nowait()
            except queue.Empty:
                return None
        if queued is None:
            self._waiting.put(None)  # it is meant for another worker
            return None
        queued.worker, queued.began = worker, monotonic()
        return queued

    def _take_back(self) -> QueuedJob | None:
        try:
            return self._back.popleft()
        except IndexError:
            return None

    def dismiss(self, workers: int) -> None:
        """Has so many workers end, each when it has no job; whichever takes its next one first."""
        for _ in range(workers):
            self._dismissals.append(None)
            self._waiting.put(None)

    def keep(self, workers: int) -> int:
        """Keeps some of the workers that were dismissed and did not end yet; returns how many."""
        return sum(self._revoke() for _ in range(workers))

    def _revoke(self) -> bool:
        try:
            self._dismissals.popleft()
        except IndexError:
            return False
        return True

    def put_back(self, jobs: Iterable[QueuedJob]) -> None:
        """Puts jobs back that were taken and not begun, the oldest first; they are next."""
        returned = list(jobs)
        self._back.extendleft(reversed(returned))
        for queued in returned:
            queued.began = 0.0
            self._waiting.put(None)

    def serve(
        self,
        function: Callable[[Job], Result],
        worker: str,
        after: Callable[[], None] | None = None,
    ) -> None:
        """Runs one job after the other until the queue is closed; on a worker's thread.

        Args:
            function: runs one job, and never raises.
            worker: the name of the worker.
            after: called when a job's result is on its way; never raises.
        """
        while (queued := self.take(worker)) is not None:
            try:
                queued.result = queued.context.run(function, queued.job)
            except BaseException as error:  # noqa: BLE001  a bug of ours; `done` raises it
                queued.error = error
            self.resolve(queued)
            if after is not None:
                after()

    def resolve(self, queued: QueuedJob) -> None:
        """Sends a job's result, or its error, to the event loop; on a worker's thread."""
        self._results.append(queued)
        if not self._told:
            # One word for all results that come before the loop turns.
            self._told = True
            with contextlib.suppress(RuntimeError):  # the loop is gone, and with it the caller
                self._loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        self._told = False
        while self._results:
            queued = self._results.popleft()
            self.queued.discard(queued)
            if queued.done.done():
                continue
            if queued.error is not None:
                queued.done.set_exception(queued.error)
            elif queued.result is not None:
                queued.done.set_result(queued.result)

    def close(self, workers: int) -> None:
        """Ends the workers' threads; no further job is begun."""
        self.closed = True
        for _ in range(workers):
            self._waiting.put(None)
