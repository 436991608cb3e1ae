"""One URL's way: it is tried until all of it is accepted, and with `fetch.every` again after that.

A *try* is one request (`trying.py`). A *round* is as many tries as it takes to have all of the
resource, or to give it up. A stream has one round, without an end.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from ingestd.base.backoff import backoff
from ingestd.base.telemetry import get_logger
from ingestd.sources.fetch.failure import Again, Changed, GivenUp, Reconnect
from ingestd.sources.fetch.position import Position

if TYPE_CHECKING:
    from ingestd.sources.fetch.settings import FetchSettings
    from ingestd.sources.fetch.slots import Slots
    from ingestd.sources.fetch.trying import Tries
    from ingestd.sources.fetch.urls import Link

log = get_logger()


class Download:
    """Downloads one URL, from where it was left.

    Args:
        link: the URL.
        settings: how often, and the waits.
        tries: makes one.
        slots: how many run at once.

    Attributes:
        reason: why the last round was given up; empty if it was not.
    """

    def __init__(self, link: Link, settings: FetchSettings, tries: Tries, slots: Slots) -> None:
        self.link = link
        self.tries = tries
        self.reason = ""
        self._settings = settings
        self._slots = slots

    async def run(self) -> None:
        """Returns when all is accepted, or given up; with `fetch.every` never.

        Raises:
            IngestdError: nothing more can be stored.
        """
        await self.tries.load()
        every, position = self._settings.every, self.tries.position
        if position.done and not position.has_version and not every:
            self.tries.progress.end()  # nothing would tell whether it has changed
            return
        while True:
            try:
                await self._round()
                self.reason = ""
            except GivenUp as failure:
                self.reason = failure.reason
                log.error(  # noqa: TRY400 - one line says it all
                    "url_given_up", url=self.link.shown, reason=failure.reason
                )
            await self.tries.appends.flushed()
            self.tries.progress.end()
            if not every:
                return
            await asyncio.sleep(every)

    async def _round(self) -> None:
        """Tries until all of it is accepted.

        Raises:
            GivenUp: it can't be.
        """
        tries, attempts, furthest = self.tries, 0, -1
        while True:
            before = tries.position
            try:
                async with self._slots.lease(self.link.url.host or "") as lease:
                    await tries.make(lease)
            except Reconnect as stream:
                attempts = 0
                await asyncio.sleep(stream.after)
                continue
            except Changed:
                failure = Again("it changed while it was downloaded")
                tries.changed(before)
                tries.position = Position()
            except Again as caught:
                failure = caught
            else:
                return
            # Only what goes beyond everything before is progress: something that changes all the
            # time, and never comes whole, must not be begun for ever.
            moved = tries.alive or tries.position.offset > max(furthest, before.offset)
            furthest = max(furthest, tries.position.offset)
            attempts = 0 if moved else attempts + 1
            if attempts >= self._settings.attempts_max:
                raise GivenUp(f"{failure.reason} ({attempts} tries without progress)")
            await self._pause(attempts, failure)

    async def _pause(self, attempts: int, failure: Again) -> None:
        settings = self._settings
        after = backoff(max(attempts, 1), settings.backoff, settings.backoff_max, random.random)
        after = max(after, failure.after or 0.0)
        log.warning(
            "url_postponed",
            url=self.link.shown,
            reason=failure.reason,
            attempts=attempts,
            after=round(after, 3),
        )
        await asyncio.sleep(after)
