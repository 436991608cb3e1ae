"""Order by key: a batch is given only when each earlier batch with one of its keys is settled.

With `batch.key` a batch has the keys of its records, as hashes: two keys with one hash wait for
each other, and nothing else is wrong with that. `KeyTable` is a table of locks: for each key the
batches that hold it, in the order in which the records of that key were accepted. A batch is *free*
if it is the first holder of all its keys, else it is *blocked*.

Invariants, each with a test:

1. Of two batches with a common key the earlier one is settled, in a commit that was synced, before
   the later one is given. So a worker's next jobs, however many lie ready before it, share no key
   with one that runs.
2. A batch keeps its place through all of its tries and waits. When it is replaced (by its halves,
   or by a batch of the records that are to be tried again), its successors stand in its place, in
   their own order; keys that none of them has are free.
3. After a restart the sealed batches stand in the order of their records, whatever their numbers:
   the halves of a batch have later numbers than a batch that waits behind them.
4. A blocked batch delays no other: what is free is given, whatever stands before it.

A blocked batch is *cold* if it stands behind one that waits for a retry, maybe for hours. It gives
its payload back (the journal has it), and does not count as sealed ahead of the workers: many may
wait while others go on. `LOOK_AHEAD` and `KEYS_MAX` bound them; there no new batch is sealed until
one is settled, and the rest of the records stays in the journal. Once nothing waits for a retry any
more nothing is cold; until then one that was may count as cold for longer than it is.

Records without a key (the pointer leads nowhere in them, or to `null`) have no order. A dead letter
that is requeued is accepted anew, and comes behind all others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from ingestd.base.batch import SealedBatch
from ingestd.codecs.pointer import ValueReader
from ingestd.execution.ready_queue import AHEAD_MAX, Load, ReadyQueue
from ingestd.execution.retry import RetryRecords

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from ingestd.base.record import Records, Span

LOOK_AHEAD = 10_000
"""Batches that may stand behind others, each about a KiB beside its keys."""
KEYS_MAX = 300_000
"""Keys that batches may hold together, a key that several hold as many times; about 50 MB."""


class BatchKeys(ValueReader[int]):
    """Reads the keys of records, each as a number of 64 bits.

    Args:
        text: `batch.key`.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text, hash)

    async def of(self, records: Records | None) -> frozenset[int]:
        """Reads the keys of a batch."""
        if records is None:
            return frozenset()
        return frozenset(key for key in await self.read(records) if key is not None)

    async def load(
        self,
        spans: Sequence[Span],
        load: Callable[[Sequence[Span]], Awaitable[Records | None]],
    ) -> frozenset[int]:
        """Reads the keys of a batch of an earlier life, also if some of its chunks are damaged."""
        records = await load(spans)
        if records is not None or len(spans) == 1:
            return await self.of(records)
        found = [await self.of(await load([span])) for span in spans]
        return frozenset().union(*found)

    async def apart(
        self, records: Records, again: tuple[RetryRecords, ...], *, split: bool
    ) -> tuple[tuple[RetryRecords, ...], list[frozenset[int]]]:
        """Decides which records of a batch come again together, and reads the keys of each group.

        Args:
            records: of the batch.
            again: the groups, as they were decided without an order.
            split: they are its parts, in their order.
        """
        keys = await self.read(records)
        again = again if split else grouped(keys, again)
        return again, [
            frozenset(key for index in one.indices if (key := keys[index]) is not None)
            for one in again
        ]


def grouped(
    keys: Sequence[int | None], again: tuple[RetryRecords, ...]
) -> tuple[RetryRecords, ...]:
    """Puts records of one key that are to be tried again into one batch, due when the last is.

    Args:
        keys: of all records of the batch.
        again: as the handler asked for it.
    """
    if len(again) < 2:
        return again
    due: dict[int, float] = {}
    for one in again:
        for index in one.indices:
            if (key := keys[index]) is not None:
                due[key] = max(one.after, due.get(key, 0.0))
    waits: dict[float, list[int]] = {}
    for one in again:
        for index in one.indices:
            key = keys[index]
            waits.setdefault(one.after if key is None else due[key], []).append(index)
    return tuple(RetryRecords(tuple(sorted(some)), after) for after, some in waits.items())


class KeyTable:
    """The holders of each key. Pure.

    Attributes:
        size: pairs of a key and a batch that holds it.
    """

    def __init__(self) -> None:
        self.size = 0
        self._holders: dict[int, list[SealedBatch]] = {}
        self._ahead: dict[int, int] = {}  # of each batch: keys of which it is not the first holder

    def __contains__(self, batch: SealedBatch) -> bool:
        return batch.number in self._ahead

    def is_free(self, batch: SealedBatch) -> bool:
        """Returns True if a batch is the first holder of all its keys."""
        return not self._ahead[batch.number]

    def before(self, batch: SealedBatch) -> set[int]:
        """Returns the numbers of the batches directly before one."""
        found = set()
        for key in batch.keys:
            last = None
            for one in self._holders[key]:
                if one is batch:
                    break
                last = one
            if last is not None:
                found.add(last.number)
        return found

    def enter(self, batch: SealedBatch) -> set[int]:
        """Adds a batch behind all others; returns the numbers of those directly before it."""
        before, blocked = set(), 0
        for key in batch.keys:
            holders = self._holders.setdefault(key, [])
            if holders:
                blocked += 1
                before.add(holders[-1].number)
            holders.append(batch)
        self._ahead[batch.number] = blocked
        self.size += len(batch.keys)
        return before

    def leave(self, batch: SealedBatch, successors: Sequence[SealedBatch]) -> list[SealedBatch]:
        """Puts batches, each with some of its keys, into the place of a free one.

        Returns:
            Those behind it that are free now.
        """
        for one in successors:
            self._ahead[one.number] = 0
            self.size += len(one.keys)
        freed = []
        for key in batch.keys:
            heirs = [one for one in successors if key in one.keys]
            for one in heirs[1:]:
                self._ahead[one.number] += 1
            holders = self._holders[key]
            holders[:1] = heirs
            if not holders:
                del self._holders[key]
            elif not heirs:
                first = holders[0]
                self._ahead[first.number] -= 1
                if self.is_free(first):
                    freed.append(first)
        del self._ahead[batch.number]
        self.size -= len(batch.keys)
        return freed


class _Wait(NamedTuple):
    """The arguments of `park` for a blocked batch."""

    due: float
    load: Load
    asked: bool
    rank: int


class _Blocked(NamedTuple):
    """A blocked batch, and its wait if it has one."""

    batch: SealedBatch
    wait: _Wait | None


class OrderedQueue(ReadyQueue[SealedBatch]):
    """A ready queue that gives free batches alone; see above. Takes what `ReadyQueue` takes."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._table = KeyTable()
        self._blocked: dict[int, _Blocked] = {}
        self._parked: set[int] = set()
        self._cold: set[int] = set()  # of those that are blocked

    @property
    def _warm(self) -> int:
        """Blocked batches that stand behind none that waits for a retry."""
        return len(self._blocked) - len(self._cold)

    @property
    def empty(self) -> bool:
        """See `ReadyQueue.empty`; what is cold waits for no worker."""
        return not self._new and not self._warm

    @property
    def ahead(self) -> int:
        """See `ReadyQueue.ahead`; blocked ones too."""
        return len(self._new) + sum(one.wait is None for one in self._blocked.values())

    @property
    def waiting(self) -> int:
        """See `ReadyQueue.waiting`; blocked ones too."""
        blocked = sum(one.wait is not None for one in self._blocked.values())
        return super().waiting + blocked

    @property
    def is_long(self) -> bool:
        """See `ReadyQueue.is_long`."""
        return (
            len(self._new) + self._warm >= AHEAD_MAX
            or len(self._blocked) >= LOOK_AHEAD
            or self._table.size >= KEYS_MAX
        )

    def resume(self, batch: SealedBatch) -> None:
        """See `ReadyQueue.resume`."""
        if self._enters(batch, None):
            super().resume(batch)

    def park(
        self,
        batch: SealedBatch,
        due: float,
        load: Load,
        *,
        asked: bool = False,
        rank: int = 0,
    ) -> None:
        """See `ReadyQueue.park`; the wait of a blocked batch is kept, and is no load."""
        wait = _Wait(due, load, asked, rank)
        if batch in self._table:
            is_free = self._table.is_free(batch)
            if not is_free:  # a successor, behind another one
                self._blocked[batch.number] = _Blocked(batch, wait)
                if self._is_behind_a_wait(self._table.before(batch)):
                    self._cool(batch)
                    self._cool_behind(batch)
        else:
            is_free = self._enters(batch, wait)
        if is_free:
            self._park(batch, wait)

    def _park(self, batch: SealedBatch, wait: _Wait) -> None:
        super().park(batch, wait.due, wait.load, asked=wait.asked, rank=wait.rank)
        self._parked.add(batch.number)
        self._cool_behind(batch)
        self._shorter.set()
        if self.empty:
            self._on_empty()

    def _cool_behind(self, batch: SealedBatch) -> None:
        """Cools all that stands behind a batch, also behind others that do.

        A successor comes later in `_blocked` than what stands behind it, so one look through that
        is not always enough.
        """
        keys, cooled = set(batch.keys), True
        while cooled:
            cooled = False
            for number, (blocked, _) in self._blocked.items():
                if number not in self._cold and not keys.isdisjoint(blocked.keys):
                    self._cool(blocked)
                    keys |= blocked.keys
                    cooled = True

    def _cool(self, batch: SealedBatch) -> None:
        self._cold.add(batch.number)
        self.on_cold(batch)

    def _enters(self, batch: SealedBatch, wait: _Wait | None) -> bool:
        """Adds a batch to the table; returns True if it is free."""
        before = self._table.enter(batch)
        if before:
            self._blocked[batch.number] = _Blocked(batch, wait)
            if self._is_behind_a_wait(before):
                self._cool(batch)
        return not before

    def _is_behind_a_wait(self, before: set[int]) -> bool:
        return not (before.isdisjoint(self._parked) and before.isdisjoint(self._cold))

    def replaced(self, batch: SealedBatch, successors: Sequence[SealedBatch] = ()) -> None:
        """See `ReadyQueue.replaced`; the successors are parked next."""
        for freed in self._table.leave(batch, successors):
            wait = self._blocked.pop(freed.number).wait
            self._cold.discard(freed.number)
            if wait is None:
                super().resume(freed)
            else:
                self._park(freed, wait)
        self._shorter.set()

    def wake(self, now: float) -> None:
        """See `ReadyQueue.wake`."""
        for number, (batch, wait) in self._blocked.items():
            if wait is not None and not wait.asked:
                earlier = wait._replace(due=min(wait.due, now))
                self._blocked[number] = _Blocked(batch, earlier)
        super().wake(now)

    def parked(self) -> Iterator[SealedBatch]:
        """See `ReadyQueue.parked`; blocked ones too."""
        yield from super().parked()
        for batch, wait in self._blocked.values():
            if wait is not None:
                yield batch

    def _pop_waiting(self, where: list[Any]) -> SealedBatch:
        batch = super()._pop_waiting(where)
        self._parked.discard(batch.number)
        if not self._parked:
            self._cold.clear()
        return batch
