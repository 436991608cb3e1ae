"""What a running daemon does with dead letters: takes back marked ones, lets old ones go.

Whoever marks or purges letters is another process, so the keeper looks once a second. It asks an
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
    from ingestd.journal.interface import Journal
    from ingestd.journal.settings import DeadSettings

log = get_logger()

LOOK_SECONDS = 1.0
"""How often it looks."""


class DeadLetterMaintenance:
    """Keeps one pipeline's dead letters. `run` is a task of the pipeline.

    Args:
        pipeline: its name, for the log.
        journal: opened before `run`.
        settings: `[dead]`.
        clock: where time comes from.

    Attributes:
        looked: set after the first look, when everything that was marked before is back.
        looks: set for a moment after each look.
    """

    def __init__(
        self, pipeline: str, journal: Journal, settings: DeadSettings, clock: Clock
    ) -> None:
        self._pipeline = pipeline
        self._journal = journal
        self._age_max = settings.age_max
        self._ages = Ages(clock)
        self._stopped = False
        self.looked = asyncio.Event()
        self.looks = asyncio.Event()

    def stop(self) -> None:
        """From now on nothing is taken back: the pipeline is leaving."""
        self._stopped = True

    async def run(self) -> None:
        """Looks for ever.

        Raises:
            JournalFailed: the journal is poisoned.
        """
        while True:
            try:
                await self.look()
            except Overloaded:
                pass  # the disk is full; the marks stay, and the next look finds them
            self.looked.set()
            self.looks.set()  # wakes who waits now
            self.looks.clear()
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Takes back what is marked, and lets go what is too old.

        Raises:
            Overloaded: the disk is full.
            JournalFailed: the journal is poisoned.
        """
        self._ages.observe()
        marked = await self._journal.look()
        if marked and not self._stopped:
            await self._revive()
        if self._age_max and self._journal.dead_totals.letters:
            await self._expire()

    async def _revive(self) -> None:
        revived = readmitted = unfit = 0
        try:
            while not self._stopped:
                moved = await self._journal.revive()
                if not moved.chunks and not moved.unfit:
                    break
                revived += moved.revived
                readmitted += moved.readmitted
                unfit += moved.unfit
        finally:
            if unfit:
                log.warning("dead_letters_still_invalid", pipeline=self._pipeline, letters=unfit)
            if revived or readmitted:
                log.info(
                    "dead_letters_revived",
                    pipeline=self._pipeline,
                    revived=revived,
                    readmitted=readmitted,
                )

    async def _expire(self) -> None:
        before, since = self._ages.before(self._age_max), self._ages.since(self._age_max)
        expired = 0
        try:
            while gone := (await self._journal.expire(before, since)).expired:
                expired += gone
        finally:
            if expired:
                log.warning("dead_letters_expired", pipeline=self._pipeline, letters=expired)
