"""Counts the journal's rows against its counters: promise 2, watched.

Each life begins with a count, and a daemon that runs for months goes on counting; otherwise it
would show numbers that add up only because one of them is made of the others. A count takes as
many steps as there are chunks, and each step is short: no reader waits for it, and no snapshot that
lasts keeps the WAL from being started over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ingestd.journal.interface import FreeSpace

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Awaitable, Callable

    from ingestd.journal.disk_space import DiskSpaceGuard

CHUNKS_MAX = 2_000
"""Rows that one step reads: other readers of the journal wait for it."""


class Difference(NamedTuple):
    """The counters less the rows; anything but 0 is an error.

    Attributes:
        records: pending ones.
        bytes: of all chunks.
    """

    records: int
    bytes: int


class Count:
    """Counts the rows in steps, and is exact although the journal moves meanwhile.

    A chunk that waits never changes. New ones come behind the last, and the cursor passes them in
    order. So it counts from the last one down, towards the cursor that comes up, and adds what is
    new at every step. The step that can count all that is left compares, in one snapshot.
    """

    def __init__(self) -> None:
        self._begin(0)

    def _begin(self, last: int) -> None:
        """Nothing is counted; `_low` to `_high` are the chunks that are."""
        self._low, self._high = last + 1, last
        self._records = self._bytes = 0

    def step(self, db: sqlite3.Connection) -> Difference | None:
        """Counts on; `None` if there is more to count, else the next step begins anew."""
        db.execute("BEGIN")
        try:
            return self._step(db)
        finally:
            db.execute("COMMIT")

    def _step(self, db: sqlite3.Connection) -> Difference | None:
        pending, size, cursor, record, last = db.execute(
            "SELECT accepted - processed - dead, chunk_bytes, cursor_chunk, cursor_record,"
            " last_chunk FROM meta"
        ).fetchone()
        if not self._high or cursor > self._low:  # the cursor was faster: from the beginning
            self._begin(last)
        half = max(1, CHUNKS_MAX // 2)
        new = min(last, self._high + half)
        self._take(db, self._high + 1, new)
        self._high = new
        if self._low - cursor > CHUNKS_MAX:
            # More than half of it is left to the next step, so the cursor does not come past.
            self._take(db, self._low - half, self._low - 1)
            self._low -= half
            return None
        if new < last:
            return None
        self._take(db, cursor, self._low - 1)
        (sealed,) = db.execute("SELECT coalesce(sum(count), 0) FROM batches").fetchone()
        straddles = db.execute("SELECT 1 FROM chunks WHERE id = ?", (cursor,)).fetchone()
        records = sealed + self._records - (record if straddles else 0)
        # Before the cursor lies what is in work: as much as batches may wait.
        _, in_work = _sum(db, 0, cursor - 1)
        found = Difference(pending - records, size - self._bytes - in_work)
        self._begin(0)
        return found

    def _take(self, db: sqlite3.Connection, first: int, last: int) -> None:
        records, size = _sum(db, first, last)
        self._records += records
        self._bytes += size


def _sum(db: sqlite3.Connection, first: int, last: int) -> tuple[int, int]:
    """Records and bytes of some chunks; their columns stand before the payload, which is not read.

    Raises:
        sqlite3.Error, TypeError: the rows are damaged.
    """
    records, size = db.execute(
        "SELECT coalesce(sum(count), 0), coalesce(sum(bytes), 0) FROM chunks"
        " WHERE id BETWEEN ? AND ?",
        (first, last),
    ).fetchone()
    return records, size


class SqliteMaintenance:
    """See `ingestd.journal.interface.Maintenance`.

    Args:
        space: the guard of the disk; without one it counts as endless.
        step: makes one step of a count in the thread that reads.

    Attributes:
        refusal: tells what keeps records out beside the disk; empty if nothing does.
    """

    def __init__(
        self, space: DiskSpaceGuard | None, step: Callable[[], Awaitable[int | None]]
    ) -> None:
        self._space = space
        self._step = step
        self.refusal: Callable[[], str] = str

    def free_space(self) -> FreeSpace:
        """See `Maintenance.free_space`."""
        if self._space is None:
            return FreeSpace(1, 0, self.refusal())
        self._space.check()
        return self._space.left._replace(refusal=self.refusal())

    async def audit(self) -> int | None:
        """See `Maintenance.audit`."""
        return await self._step()
