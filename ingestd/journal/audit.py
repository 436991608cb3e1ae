"""Counts the journal's rows against its counters while the daemon runs: promise 2, watched.

The start and the end of every life do the same; a daemon that runs for months would otherwise show
numbers that add up only because one of them is made of the others.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from ingestd.journal.store import count_rows

if TYPE_CHECKING:
    import sqlite3

    from ingestd.journal.interface import Journal

log = structlog.get_logger(__name__)

AUDIT_SECONDS = 60.0
"""How often it counts."""
CHUNKS_MAX = 10_000
"""With more chunks that wait it does not count: readers of the journal would wait for it."""


def difference(db: sqlite3.Connection) -> int | None:
    """Pending records by the counters less those that the rows hold, in one snapshot.

    `None` if there are more than `CHUNKS_MAX` rows to count.
    """
    db.execute("BEGIN")
    try:
        pending, waiting = db.execute(
            "SELECT accepted - processed - dead, last_chunk - cursor_chunk FROM meta"
        ).fetchone()
        return None if waiting > CHUNKS_MAX else int(pending) - count_rows(db)
    finally:
        db.execute("COMMIT")


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
            JournalFailed: the journal can't be read.
        """
        while True:
            await self.count()
            await asyncio.sleep(AUDIT_SECONDS)

    async def count(self) -> None:
        """Counts once; says so if it came to something else than before, and not to 0.

        Raises:
            JournalFailed: the journal can't be read.
        """
        found = await self._journal.audit()
        if found is None or found == self.difference:
            return
        self.difference = found
        if found:
            log.error("ledger_mismatch", pipeline=self._pipeline, difference=found)
