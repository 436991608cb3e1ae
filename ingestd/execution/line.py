"""The line: sealed batches that stand before the workers.

Due retries go first, then new batches in the order in which they were sealed. When too many
batches wait for a retry, no new one is given: a sink that is down then stops its pipeline, and
the rest stays in the journal instead of being used up in attempts.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from itertools import count
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

AHEAD_MAX = 128
"""Batches that may be sealed ahead of the workers; as many can share one commit."""


class Line(Generic[T]):
    """Holds batches of any type; all methods on the event loop.

    Args:
        waiting_max: batches that may wait for a retry before no new ones are given.
        on_empty: called when the last new batch has been given.
    """

    def __init__(self, *, waiting_max: int, on_empty: Callable[[], None]) -> None:
        self._waiting_max = waiting_max
        self._on_empty = on_empty
        self._new: deque[T] = deque()
        self._waiting: list[tuple[float, int, T]] = []
        self._serial = count()
        self._changed = asyncio.Event()
        self._shorter = asyncio.Event()

    @property
    def empty(self) -> bool:
        """Whether no new batch stands in line."""
        return not self._new

    @property
    def ahead(self) -> int:
        """New batches in line."""
        return len(self._new)

    @property
    def waiting(self) -> int:
        """Batches that wait for a retry."""
        return len(self._waiting)

    @property
    def first_due(self) -> float | None:
        """When the next retry is due, loop time."""
        return self._waiting[0][0] if self._waiting else None

    @property
    def is_long(self) -> bool:
        """Whether `put` waits."""
        return len(self._new) >= AHEAD_MAX

    def could_give(self, now: float) -> bool:
        """Whether `next` would give a batch at `now`, loop time."""
        due = self.first_due
        return (due is not None and due <= now) or (
            bool(self._new) and len(self._waiting) < self._waiting_max
        )

    async def put(self, batch: T) -> None:
        """A new batch; waits while the line is long."""
        while self.is_long:
            self._shorter.clear()
            await self._shorter.wait()
        self._new.append(batch)
        self._changed.set()

    def resume(self, batch: T) -> None:
        """A batch that an earlier life sealed and never tried; in order, before any new one.

        It counts as one: otherwise each life that ends before its handler does anything would seal
        another `AHEAD_MAX`, and the next start would have as many more to take up.
        """
        self._new.append(batch)
        self._changed.set()

    def park(self, batch: T, due: float) -> None:
        """A batch to be tried again at `due`, loop time."""
        heapq.heappush(self._waiting, (due, next(self._serial), batch))
        self._changed.set()

    async def next(self) -> T:
        """The next batch to run."""
        loop = asyncio.get_running_loop()
        while True:
            now = loop.time()
            if self._waiting and self._waiting[0][0] <= now:
                return heapq.heappop(self._waiting)[2]
            if self._new and len(self._waiting) < self._waiting_max:
                return self._pop_new()
            self._changed.clear()
            alarm = loop.call_at(self._waiting[0][0], self._changed.set) if self._waiting else None
            try:
                await self._changed.wait()
            finally:
                if alarm is not None:
                    alarm.cancel()

    def _pop_new(self) -> T:
        batch = self._new.popleft()
        self._shorter.set()
        if not self._new:
            self._on_empty()
        return batch
