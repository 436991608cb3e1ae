"""What a lane is: one worker that runs one job at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ingestd.handlers.outcome import POSTPONED, Failure

if TYPE_CHECKING:
    from ingestd.execution.shelf import Shelf
    from ingestd.handlers.outcome import Job, Result

START_TIMEOUT = 120.0
"""Seconds for a worker to load the handler; some load models."""
START_AGAIN_SECONDS = 2.0
"""How long a batch waits at least when no worker could be started for it."""


def not_started(why: str) -> Failure:
    """The failure of a job for which there is no worker: it waits, and spends no try."""
    return Failure(POSTPONED, f"no worker could be started: {why}", "", START_AGAIN_SECONDS)


class Lane(Protocol):
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


class TaskLane(Lane, Protocol):
    """A worker on the event loop."""

    async def run(self, job: Job) -> Result:
        """Runs one job; whatever goes wrong in it comes back as the result's failure."""
        ...


class ThreadedLane(Lane, Protocol):
    """A worker with a thread of the daemon; the thread is the worker, or speaks with it."""

    def serve(self, shelf: Shelf) -> None:
        """From now on its thread takes jobs from the shelf, until that is closed."""
        ...
