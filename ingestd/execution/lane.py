"""What a lane is: one worker that runs one job at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ingestd.handlers.outcome import Job, Result


class Lane(Protocol):
    """One worker. Its pool owns it.

    Attributes:
        depth: how many jobs it may be given at once. A lane with a thread takes one more than it
            runs, so that the worker does not wait for a round trip over the event loop.
    """

    depth: int

    async def start(self) -> None:
        """Loads the handler.

        Raises:
            HandlerLoadError: it can't be loaded.
        """
        ...

    async def run(self, job: Job) -> Result:
        """Runs one job; whatever goes wrong in it comes back as the result's failure."""
        ...

    async def close(self, deadline: float) -> bool:
        """Ends the worker, by force after `deadline` (loop time).

        Returns:
            Whether it is really gone; a thread that hangs can't be ended.
        """
        ...
