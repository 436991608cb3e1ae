"""Tasks of a pipeline that look after its journal: dead letters, and the count of its rows.

Letters are marked and purged by another process, so they are polled once a second. That asks an
index and one row: `PRAGMA data_version` would tell less, because it changes with every commit of
the daemon itself.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from ingestd.base.clock import Ages
from ingestd.base.errors import Overloaded
from ingestd.base.logging import get_logger

if TYPE_CHECKING:
    from ingestd.base.clock import Clock
    from ingestd.journal.dead_letters import DeadLetterStore
    from ingestd.journal.interface import FreeSpace, Maintenance
    from ingestd.journal.settings import DeadSettings

log = get_logger()

LOOK_SECONDS = 1.0
"""Between two polls."""
AUDIT_SECONDS = 60.0
"""Between the end of a count and the next one."""
AUDIT_SHARE = 0.1
"""The part of the reader's time that a count takes at most."""
AUDIT_PAUSE_MIN = 0.01
"""Seconds between two steps of a count, at least."""


class DeadLetterMaintenance:
    """Requeues marked dead letters and lets old ones go. `run` is a task of the pipeline.

    Args:
        pipeline: its name, for the log.
        letters: of its journal, opened before `run`; without them there is nothing to do.
        settings: `[dead]`.
        clock: where time comes from.

    Attributes:
        polled: set after the first poll, when everything that was marked before is back.
        pause: seconds between two polls.
        bytes_max: bound of the letters of accepted records.
    """

    pause = LOOK_SECONDS

    def __init__(
        self, pipeline: str, letters: DeadLetterStore | None, settings: DeadSettings, clock: Clock
    ) -> None:
        self._pipeline = pipeline
        self._letters = letters
        self._age_max, self.bytes_max = settings.age_max, settings.bytes_max
        self._ages = Ages(clock)
        self._stopped = False
        self.polled = asyncio.Event()

    @property
    def is_full(self) -> bool:
        """Tells if the dead letters of accepted records are at their bound."""
        return self._letters is not None and self._letters.full

    def stop(self) -> None:
        """Requeues nothing from now on: the pipeline is leaving."""
        self._stopped = True

    async def run(self) -> None:
        """Looks until it is cancelled.

        Raises:
            JournalFailed: the journal is poisoned.
        """
        while self._letters is not None:
            try:
                await self.poll()
            except Overloaded:
                pass  # the disk is full; the marks stay, and the next poll finds them
            self.polled.set()
            await asyncio.sleep(self.pause)
        self.polled.set()

    async def poll(self) -> None:
        """Requeues what is marked, and deletes what is too old.

        Raises:
            Overloaded: the disk is full.
            JournalFailed: the journal is poisoned.
        """
        letters = self._letters
        if letters is None:
            return
        self._ages.observe()
        if await letters.poll_marked() and not self._stopped:
            await self._requeue(letters)
        if self._age_max and letters.totals().letters:
            await self._expire(letters)

    async def _requeue(self, letters: DeadLetterStore) -> None:
        requeued = readmitted = unfit = arrived = replayed = 0
        try:
            while not self._stopped:
                moved = await letters.requeue()
                if not (moved.chunks or moved.unfit or moved.more):
                    break
                requeued += moved.requeued
                readmitted += moved.readmitted
                unfit += moved.unfit
                arrived += moved.arrived
                replayed += moved.replayed
        finally:
            if unfit:
                log.warning("dead_letters_still_invalid", pipeline=self._pipeline, letters=unfit)
            if requeued or readmitted or arrived:
                log.info(
                    "dead_letters_requeued",
                    pipeline=self._pipeline,
                    requeued=requeued,
                    readmitted=readmitted,
                    from_other_pipelines=arrived,
                )
            if replayed:
                log.info("records_replayed", pipeline=self._pipeline, records=replayed)

    async def _expire(self, letters: DeadLetterStore) -> None:
        before, since = self._ages.before(self._age_max), self._ages.since(self._age_max)
        expired = 0
        try:
            while gone := (await letters.expire(before, since)).expired:
                expired += gone
        finally:
            if expired:
                log.warning("dead_letters_expired", pipeline=self._pipeline, letters=expired)


class Auditor:
    """Audits one pipeline's journal. `run` is a task of the pipeline.

    Args:
        pipeline: its name, for the log.
        maintenance: of its journal, opened before `run`; without it there is nothing to do.

    Attributes:
        difference: records, when last counted: pending by the counters less pending by the rows.
            Anything but 0 is an error of ours, or of the disk.
    """

    def __init__(self, pipeline: str, maintenance: Maintenance | None) -> None:
        self._pipeline = pipeline
        self._maintenance = maintenance
        self.difference = 0

    async def run(self) -> None:
        """Counts until it is cancelled.

        Raises:
            JournalFailed: the journal can't be read, or the first count found a difference.
        """
        loop = asyncio.get_running_loop()
        while self._maintenance is not None:
            began = loop.time()
            if await self.count():
                pause = AUDIT_SECONDS
            else:
                pause = max(AUDIT_PAUSE_MIN, (loop.time() - began) * (1 / AUDIT_SHARE - 1))
            await asyncio.sleep(pause)

    async def count(self) -> bool:
        """Counts one step; logs a difference that is new, and not 0.

        Returns:
            True if a count came to its end.

        Raises:
            JournalFailed: the journal can't be read, or the first count found a difference.
        """
        found = 0 if self._maintenance is None else await self._maintenance.audit()
        if found is not None and found != self.difference:
            self.difference = found
            if found:
                log.error("ledger_mismatch", pipeline=self._pipeline, difference=found)
        return found is not None

    def free_space(self) -> FreeSpace | None:
        """Asks for the free space of the journal's disk; `None` for a journal without one."""
        return None if self._maintenance is None else self._maintenance.free_space()
