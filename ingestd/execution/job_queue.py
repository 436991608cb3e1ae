"""Queue of jobs that lie ready for the workers, and the bound of their number."""

from __future__ import annotations

import asyncio
import queue
from collections import deque
from contextvars import Context, copy_context
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from ingestd.handlers.outcome import Job, Result


SECONDS = 0.1
"""So much work of each worker lies ready: more than a turn of the event loop takes under load."""
AHEAD_MAX = 64
"""Of all workers together."""
_WEIGHT = 0.2  # of the newest job in the average


class PrefetchLimit:
    """Says how many, from how long jobs take.

    One a worker to begin with, and whenever one fails: what lies ready is tried even if everything
    fails by then, and an outage should use up as few tries as possible.

    Args:
        workers: at least one.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._mean = SECONDS

    @property
    def jobs(self) -> int:
        """Number of jobs."""
        ready = int(self._workers * SECONDS / max(self._mean, SECONDS / AHEAD_MAX))
        return min(max(self._workers, ready), max(self._workers, AHEAD_MAX))

    def ran(self, seconds: float, *, failed: bool) -> None:
        """A job has run for so long."""
        self._mean = SECONDS if failed else self._mean + _WEIGHT * (seconds - self._mean)


# -- the queue -------------------------------------------------------------------------------------
#
# The threads of all workers take from one queue and put results back into it, without a turn of the
# event loop in between. Under load a turn can take as long as many batches; a worker that had to
# wait for one after each job would be idle most of the time.


class QueuedJob:
    """A job on its way.

    Attributes:
        job: to be run.
        done: resolved on the loop with its result.
        began: when a lane took it, as `time.monotonic()`; 0 before that.
        lane: the name of that lane.
    """

    __slots__ = ("began", "context", "done", "error", "job", "lane", "result")

    def __init__(self, job: Job, done: asyncio.Future[Result]) -> None:
        self.job = job
        self.done = done
        self.began = 0.0
        self.lane = ""
        self.result: Result | None = None
        self.error: BaseException | None = None
        # Log lines of whoever runs it, the handler's too, say which batch they are about.
        self.context: Context = copy_context()


class JobQueue:
    """Between the event loop and the threads of the lanes. Made on the loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: queue.SimpleQueue[QueuedJob | None] = queue.SimpleQueue()
        self._results: deque[QueuedJob] = deque()
        self._told = False
        self._closed = False

    def put(self, job: Job) -> QueuedJob:
        """A job to be run; on the loop."""
        ticket = QueuedJob(job, self._loop.create_future())
        self._waiting.put(ticket)
        return ticket

    def serve(
        self, function: Callable[[Job], Result], lane: str, after: Callable[[], None] | None = None
    ) -> None:
        """Runs one job after the other until the shelf is closed; on a lane's thread.

        Args:
            function: runs one job, and never raises.
            lane: the name of the lane.
            after: called when a job's result is on its way; never raises.
        """
        while (ticket := self._waiting.get()) is not None and not self._closed:
            try:
                ticket.lane, ticket.began = lane, monotonic()
                ticket.result = ticket.context.run(function, ticket.job)
            except BaseException as error:  # noqa: BLE001  a bug of ours; whoever waits is told
                ticket.error = error
            self._results.append(ticket)
            if not self._told:
                # One word for all results that come before the loop turns.
                self._told = True
                try:
                    self._loop.call_soon_threadsafe(self._tell)
                except RuntimeError:
                    return  # the loop is gone, and with it who asked
            if after is not None:
                after()

    def _tell(self) -> None:
        self._told = False
        while self._results:
            ticket = self._results.popleft()
            if ticket.done.done():
                continue
            if ticket.error is not None:
                ticket.done.set_exception(ticket.error)
            elif ticket.result is not None:
                ticket.done.set_result(ticket.result)

    def close(self, lanes: int) -> None:
        """No further job is begun; so many threads are told."""
        self._closed = True
        for _ in range(lanes):
            self._waiting.put(None)
