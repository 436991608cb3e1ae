"""The pool: hands each job to a free lane, and owns the lanes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ingestd.execution.lane import Lane


class Pool:
    """Owns the lanes. A lane runs one job at a time, and may hold the next one.

    Args:
        lanes: one for each worker.
    """

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._lanes = lanes
        # First in, first out: every lane has one place before any has a second.
        self._free: asyncio.Queue[Lane] = asyncio.Queue()

    async def start(self) -> None:
        """Starts all lanes at once.

        Raises:
            HandlerLoadError: the handler can't be loaded. Lanes that started are closed.
        """
        started = await asyncio.gather(
            *(lane.start() for lane in self._lanes), return_exceptions=True
        )
        errors = [error for error in started if error is not None]
        if errors:
            await self.close(asyncio.get_running_loop().time() + 5.0)
            raise errors[0]
        for depth in range(max(lane.depth for lane in self._lanes)):
            for lane in self._lanes:
                if depth < lane.depth:
                    self._free.put_nowait(lane)

    @property
    def has_free(self) -> bool:
        """Whether `acquire` would give a lane at once."""
        return not self._free.empty()

    async def acquire(self) -> Lane:
        """A free lane, now the caller's until `release`."""
        return await self._free.get()

    def release(self, lane: Lane) -> None:
        """Gives a lane back."""
        self._free.put_nowait(lane)

    async def close(self, deadline: float) -> bool:
        """Ends all workers, by force after `deadline` (loop time).

        Returns:
            Whether all are really gone.
        """
        return all(await asyncio.gather(*(lane.close(deadline) for lane in self._lanes)))
