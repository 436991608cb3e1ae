"""Counts the journal's rows against its counters: promise 2, watched.

Each life begins with a count, and a daemon that runs for months goes on counting; otherwise it
would show numbers that add up only because one of them is made of the others. A count takes as
many steps as there are chunks, and each step is short: nobody waits for it, and no snapshot that
lasts keeps the WAL from being started over.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

from ingestd.base.logging import get_logger

if TYPE_CHECKING:
    import sqlite3

    from ingestd.journal.interface import Journal

log = get_logger()

AUDIT_SECONDS = 60.0
"""Between the end of a count and the next one."""
CHUNKS_MAX = 2_000
"""Rows that one step reads: other readers of the journal wait for it."""
SHARE = 0.1
"""How much of the reader's time a count takes at most."""
PAUSE_MIN = 0.01
"""Seconds between two steps, at least."""


class Difference(NamedTuple):
    """What the counters say less what the rows hold; anything but 0 is an error.

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


class Auditor:
    """Audits one pipeline's journal. `run` is a task of the pipeline.

    Args:
        pipeline: its name, for the log.
        journal: opened before `run`.

    Attributes:
        difference: records, when last counted: pending by the counters less pending by the rows.
            Anything but 0 is an error of ours, or of the disk.
    """

    def __init__(self, pipeline: str, journal: Journal) -> None:
        self._pipeline = pipeline
        self._journal = journal
        self.difference = 0

    async def run(self) -> None:
        """Counts for ever.

        Raises:
            JournalFailed: the journal can't be read, or the first count found a difference.
        """
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            if await self.count():
                pause = AUDIT_SECONDS
            else:
                pause = max(PAUSE_MIN, (loop.time() - began) * (1 / SHARE - 1))
            await asyncio.sleep(pause)

    async def count(self) -> bool:
        """One step; says so if a count came to something else than before, and not to 0.

        Returns:
            Whether a count came to its end.

        Raises:
            JournalFailed: the journal can't be read, or the first count found a difference.
        """
        found = await self._journal.audit()
        if found is not None and found != self.difference:
            self.difference = found
            if found:
                log.error("ledger_mismatch", pipeline=self._pipeline, difference=found)
        return found is not None
