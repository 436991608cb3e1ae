"""Ready queue: sealed batches that wait for a worker or for a retry.

Due retries go first, then new batches in the order in which they were sealed. What waits holds no
payload in memory, and is bounded by its records and their bytes in the journal; at the bound no new
batch is given. While the handler is paused new ones are still probes, for all that waits may be bad
and what stands behind it good; then the number of batches that wait is the bound.

A batch whose handler asked for its wait spends no try, so it may come due for ever and as often as
it likes: such batches and all others are given by turns, or the others would never be.

While the handler is paused (see `outage.py`) one batch is given at a time, as a probe: by turns a
new one and one of those that wait, so that neither bad batches nor new ones are all that is tried.
Which of those that wait is a matter of their rank then, and not of whether they are due. A wait
that the handler asked for (`raise Retry(after=…)`, `batch.retry(i, after=…)`) is kept all the same.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections import deque
from itertools import count
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ingestd.execution.outage import Outage

T = TypeVar("T")

PROBED_MAX = 10_000
"""Batches that may wait, each about a KiB, while new ones are given beyond the bounds as probes."""
AHEAD_MAX = 128
"""Batches that may be sealed ahead of the workers; as many can share one commit."""


class Load(NamedTuple):
    """Records, and the bytes that they take in the journal."""

    records: int
    bytes: int


class _Waiting(NamedTuple, Generic[T]):
    due: float
    serial: int
    load: Load
    batch: T
    rank: int


class ReadyQueue(Generic[T]):
    """Holds batches of any type; all methods on the event loop.

    Args:
        waiting_max: what may wait for a retry before no new batch is given, but as a probe.
        outage: says whether the handler is paused.
        on_empty: called when the last new batch has been given.
        free_at: gives the loop time from which on any batch may be given; see
            `dispatch_control.py`.

    Attributes:
        on_cold: called with a batch whose payload is not needed for long; see `OrderedQueue`.
    """

    def __init__(
        self,
        *,
        waiting_max: Load,
        outage: Outage,
        on_empty: Callable[[], None],
        free_at: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._waiting_max = waiting_max
        self._outage = outage
        self._on_empty = on_empty
        self._free_at = free_at
        self.on_cold: Callable[[T], None] = lambda _: None
        self._new: deque[T] = deque()
        self._failed: list[_Waiting[T]] = []  # in a backoff of ours; heaps
        self._asked: list[_Waiting[T]] = []  # as long as the handler wants
        self._load = Load(0, 0)
        self._serial = count()
        self._new_is_next = True
        self._others_are_next = False
        self._changed = asyncio.Event()
        outage.on_change = self._changed.set
        self._shorter = asyncio.Event()

    @property
    def empty(self) -> bool:
        """Returns True if no new batch waits."""
        return not self._new

    @property
    def has_ready(self) -> bool:
        """Returns True if a new batch waits for nothing but a worker."""
        return bool(self._new)

    @property
    def ahead(self) -> int:
        """New batches in line."""
        return len(self._new)

    @property
    def waiting(self) -> int:
        """Batches that wait for a retry."""
        return len(self._failed) + len(self._asked)

    @property
    def waiting_load(self) -> Load:
        """Records and bytes of the waiting batches."""
        return self._load

    @property
    def is_long(self) -> bool:
        """Returns True if `put` waits."""
        return len(self._new) >= AHEAD_MAX

    @property
    def ready_at(self) -> float:
        """Loop time at which `next` gives a batch; infinite if there is none."""
        return max(self._free_at(), self._due_at())

    def _due_at(self) -> float:
        asked = self._asked[0].due if self._asked else math.inf
        paused_until = self._outage.next_at
        if paused_until is not None:
            return paused_until if self._has_new() or self._failed else max(paused_until, asked)
        if self._has_new():
            return 0.0
        return min(asked, self._failed[0].due if self._failed else math.inf)

    def is_held(self, now: float) -> bool:
        """Returns True if nothing but `free_at` keeps a batch from being given."""
        return self._due_at() <= now < self._free_at()

    def could_give(self, now: float) -> bool:
        """Returns True if `next` would give a batch at `now`, loop time."""
        return self.ready_at <= now

    @property
    def gives_more(self) -> bool:
        """Returns True if a batch that is sealed next is put and given before what waits is."""
        return not self.is_long and self._gives_new()

    def _gives_new(self) -> bool:
        """Returns True if new batches are given; not while too much waits."""
        load, most = self._load, self._waiting_max
        within = load.records < most.records and load.bytes < most.bytes
        return within or (self._outage.paused and self.waiting < PROBED_MAX)

    def _has_new(self) -> bool:
        return bool(self._new) and self._gives_new()

    async def put(self, batch: T) -> None:
        """A new batch; waits while the line is long."""
        while self.is_long:
            self._shorter.clear()
            await self._shorter.wait()
        self.resume(batch)

    def resume(self, batch: T) -> None:
        """A batch that an earlier life sealed and never tried; in order, before any new one.

        It counts as one: otherwise each life that ends before its handler does anything would seal
        another `AHEAD_MAX`, and the next start would have as many more to take up.
        """
        self._new.append(batch)
        self._changed.set()

    def replaced(self, batch: T, successors: Sequence[T] = ()) -> None:
        """A batch has been settled, and these are in its place; see `OrderedQueue`."""

    def park(self, batch: T, due: float, load: Load, *, asked: bool = False, rank: int = 0) -> None:
        """Keeps a batch that is to be tried again.

        Args:
            batch: the batch.
            due: loop time; it is not given earlier if the handler `asked` for that.
            load: what it holds.
            asked: the wait is the handler's.
            rank: while paused the lowest one is tried first, of equals the one that is due first.
        """
        where = self._asked if asked else self._failed
        heapq.heappush(where, _Waiting(due, next(self._serial), load, batch, rank))
        self._weigh(load)
        self._changed.set()

    def _weigh(self, load: Load, sign: int = 1) -> None:
        records, size = self._load
        self._load = Load(records + sign * load.records, size + sign * load.bytes)

    def wake(self, now: float) -> None:
        """The handler works again: what waits for nothing else is due, in the order it had."""
        self._failed = [one._replace(due=min(one.due, now)) for one in self._failed]
        heapq.heapify(self._failed)
        self._changed.set()

    def parked(self) -> Iterator[T]:
        """The batches that wait for a retry, in no order."""
        return (one.batch for where in (self._failed, self._asked) for one in where)

    def look_again(self) -> None:
        """Asks `free_at` again: it has changed."""
        self._changed.set()

    async def next(self) -> T:
        """The next batch to run."""
        loop = asyncio.get_running_loop()
        while True:
            now, ready_at = loop.time(), self.ready_at
            if ready_at <= now:
                return self._pop(now)
            self._changed.clear()
            alarm = None if ready_at == math.inf else loop.call_at(ready_at, self._changed.set)
            try:
                await self._changed.wait()
            finally:
                if alarm is not None:
                    alarm.cancel()

    def _pop(self, now: float) -> T:
        if self._asked and self._asked[0].due <= now:
            self._others_are_next = not (self._others_are_next and self._have_others(now))
            if self._others_are_next:
                return self._pop_waiting(self._asked)
        if self._outage.paused:
            failed = bool(self._failed) and not (self._new_is_next and self._has_new())
        else:
            failed = bool(self._failed) and self._failed[0].due <= now
        self._new_is_next = failed
        if not failed:
            return self._pop_new()
        if self._outage.paused:
            # All that waits is looked through, but there are few probes: one in 5 ms at most.
            first = min(self._failed, key=lambda one: (one.rank, one.due, one.serial))
            self._failed.remove(first)
            self._failed.append(first._replace(due=-math.inf))
            heapq.heapify(self._failed)
        return self._pop_waiting(self._failed)

    def _have_others(self, now: float) -> bool:
        """Returns True if a batch may be given early, whose wait is only our backoff."""
        if self._has_new():
            return True
        return bool(self._failed) and (self._outage.paused or self._failed[0].due <= now)

    def _pop_waiting(self, where: list[_Waiting[T]]) -> T:
        one = heapq.heappop(where)
        self._weigh(one.load, -1)
        return one.batch

    def _pop_new(self) -> T:
        batch = self._new.popleft()
        self._shorter.set()
        if not self._new:
            self._on_empty()
        return batch
