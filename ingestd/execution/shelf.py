"""Jobs that lie ready for whichever worker is free next.

The threads of all lanes take from one shelf and put results back on it, without a turn of the event
loop in between. Under load a turn can take as long as many batches; a worker that had to wait for
one after each job would be idle most of the time.
"""

from __future__ import annotations

import asyncio
import queue
import time
from collections import deque
from contextvars import Context, copy_context
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from ingestd.handlers.outcome import Job, Result


class Ticket:
    """A job on its way.

    Attributes:
        job: to be run.
        done: resolved on the loop with its result.
        began: when a lane took it, as `time.monotonic()`; 0 before that.
        lane: the name of that lane.
    """

    __slots__ = ("_context", "began", "done", "error", "job", "lane", "result")

    def __init__(self, job: Job, done: asyncio.Future[Result]) -> None:
        self.job = job
        self.done = done
        self.began = 0.0
        self.lane = ""
        self.result: Result | None = None
        self.error: BaseException | None = None
        # Log lines of whoever runs it, the handler's too, say which batch they are about.
        self._context: Context = copy_context()

    def run(self, function: Callable[[Job], Result], lane: str) -> Result:
        """Runs the job on a lane's thread."""
        self.lane, self.began = lane, time.monotonic()
        return self._context.run(function, self.job)


class Shelf:
    """Between the event loop and the threads of the lanes. Made on the loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._results: deque[Ticket] = deque()
        self._told = False
        self._closed = False

    def put(self, job: Job) -> Ticket:
        """A job to be run; on the loop."""
        ticket = Ticket(job, self._loop.create_future())
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
                ticket.result = ticket.run(function, lane)
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
