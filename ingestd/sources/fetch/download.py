"""One URL's way: ask, decompress, frame, accept; wait and ask again where that has to be.

A *try* is one request. A *round* is as many tries as it takes to have all of the resource, or to
give it up. With `fetch.every` there is a round after the other. A stream has one round, without an
end.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from typing import TYPE_CHECKING

import structlog

from ingestd.sources.fetch import waits
from ingestd.sources.fetch.answer import (
    EVENT_STREAM,
    Finished,
    Take,
    encoding_of,
    ends_by_itself,
    headers_for,
    judge,
    media_type,
)
from ingestd.sources.fetch.appends import Appends
from ingestd.sources.fetch.body import pieces
from ingestd.sources.fetch.failure import Again, Changed, GivenUp
from ingestd.sources.fetch.position import Position, as_bookmark, from_bookmark
from ingestd.sources.fetch.taking import NOTHING, Events, Lines

if TYPE_CHECKING:
    from aiohttp import ClientResponse

    from ingestd.base.bookmark import Bookmark
    from ingestd.base.clock import Clock
    from ingestd.base.settings import FetchSettings
    from ingestd.sources.fetch.appends import Budget
    from ingestd.sources.fetch.client import Client
    from ingestd.sources.fetch.slots import Lease, Slots
    from ingestd.sources.fetch.tally import Tally
    from ingestd.sources.fetch.urls import Link
    from ingestd.sources.intake import Intake

log = structlog.get_logger(__name__)


class Reconnect(Exception):  # noqa: N818 - what to do
    """A stream ended as streams do.

    Attributes:
        after: seconds to wait.
    """

    def __init__(self, after: float) -> None:
        super().__init__()
        self.after = after


class Download:
    """Downloads one URL, from where it was left.

    Args:
        link: the URL.
        settings: how, and the bounds.
        intake: the pipeline.
        client: makes the requests.
        slots: how many run at once.
        budget: how much they may hold together.
        tally: what is counted of all of them.
        clock: where time comes from.

    Attributes:
        reason: why the last round was given up; empty if it was not.
    """

    def __init__(
        self,
        link: Link,
        settings: FetchSettings,
        intake: Intake,
        *,
        client: Client,
        slots: Slots,
        budget: Budget,
        tally: Tally,
        clock: Clock,
    ) -> None:
        self.link = link
        self.reason = ""
        self._settings = settings
        self._intake = intake
        self._client = client
        self._slots = slots
        self._clock = clock
        self._tally = tally
        self._progress = tally.begin()
        self._appends = Appends(intake, budget, tally.accepted)
        self._position = Position()
        self._ranges = True
        self._alive = False  # a stream has sent something in this try

    async def run(self) -> None:
        """Returns when all is accepted, or given up; with `fetch.every` never.

        Raises:
            IngestdError: nothing more can be stored.
        """
        await self._load()
        every = self._settings.every
        if self._position.done and not self._position.has_version and not every:
            self._progress.end()  # nothing would tell whether it has changed
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
            await self._appends.flushed()
            self._progress.end()
            if not every:
                return
            await asyncio.sleep(every)

    async def close(self) -> int:
        """Ends the appends; how many bytes of them are left."""
        return await self._appends.close()

    async def flushed(self) -> None:
        """Returns once everything that was read is accepted."""
        await self._appends.flushed()

    async def _load(self) -> None:
        kept = await self._intake.bookmark(self.link.key)
        try:
            self._position = from_bookmark(kept)
        except ValueError:
            log.error("position_unreadable", url=self.link.shown)  # noqa: TRY400

    # -- a round -------------------------------------------------------------------------------

    async def _round(self) -> None:
        """Tries until all of it is accepted.

        Raises:
            GivenUp: it can't be.
        """
        settings = self._settings
        attempts, furthest = 0, -1
        while True:
            before = self._position
            self._alive = False
            try:
                async with self._slots.lease(self.link.url.host or "") as lease:
                    await self._try(lease)
            except Reconnect as stream:
                attempts = 0
                await asyncio.sleep(stream.after)
                continue
            except Changed:
                failure = Again("it changed while it was downloaded")
                self._changed(before)
                self._position = Position()
            except Again as caught:
                failure = caught
            else:
                return
            # Only what goes beyond everything before is progress: something that changes all the
            # time, and never comes whole, must not be begun for ever.
            moved = self._alive or self._position.offset > max(furthest, before.offset)
            furthest = max(furthest, self._position.offset)
            attempts = 0 if moved else attempts + 1
            if attempts >= settings.attempts_max:
                raise GivenUp(f"{failure.reason} ({attempts} tries without progress)")
            await self._pause(attempts, failure)

    async def _pause(self, attempts: int, failure: Again) -> None:
        settings = self._settings
        after = waits.backoff(
            max(attempts, 1), settings.backoff, settings.backoff_max, random.random
        )
        after = max(after, failure.after or 0.0)
        log.warning(
            "url_postponed",
            url=self.link.shown,
            reason=failure.reason,
            attempts=attempts,
            after=round(after, 3),
        )
        await asyncio.sleep(after)

    # -- a try ---------------------------------------------------------------------------------

    async def _try(self, lease: Lease) -> None:
        """One request, and what comes of it; returns when all of it is accepted."""
        position = Position() if self._settings.follow else self._position
        asked = headers_for(position, url=self.link.url, ranges=self._ranges)
        async with self._client.get(self.link, asked) as response:
            try:
                encoding = "identity"
                if response.ok:
                    encoding = encoding_of(response.headers, self.link.url, response.url)
                verdict = judge(
                    response.status,
                    response.headers,
                    asked=asked,
                    position=position,
                    encoding=encoding,
                )
            except Changed:
                # A whole body tells by its validators and its beginning what has changed.
                self._ranges = False
                raise Again("the rest alone did not come as it was asked for") from None
            except Again as failure:
                failure.after = waits.retry_after(
                    response.headers.get("Retry-After"),
                    response.headers.get("Date"),
                    self._clock.now(),
                    self._settings.retry_after_max,
                )
                raise
            if isinstance(verdict, Finished):
                await self._finish(verdict.position)
            elif media_type(response.headers) == EVENT_STREAM:
                lease.release()  # it has no end: others need the place
                await self._follow_events(response, verdict)
            elif self._settings.follow:
                lease.release()
                await self._follow_lines(response, verdict)
            else:
                await self._read(response, verdict)

    async def _finish(self, position: Position) -> None:
        """All of it is accepted already."""
        if position != self._position:
            self._position = position
            await self._appends.put(NOTHING, self._bookmark())
        await self._appends.flushed()
        log.info("url_done", url=self.link.shown, records=position.records)

    async def _read(self, response: ClientResponse, verdict: Take) -> None:
        """A body with an end."""
        if verdict.changed:
            self._changed(self._position)
        intake, settings = self._intake, self._settings
        taker = Lines(intake.format, intake.record_bytes_max, verdict.position, verdict.skip)
        self._progress.expect(response.content_length)
        stream = pieces(
            response.content,
            verdict.position.encoding,
            settings,
            endless=False,
            read=self._progress.read,
        )
        try:
            async with aclosing(stream):
                async for piece in stream:
                    parsed = taker.feed(piece)
                    if parsed:
                        self._position = taker.position
                        await self._appends.put(parsed, self._bookmark())
                    # A server that is faster than we are must not keep others from running.
                    await asyncio.sleep(0)
        finally:
            self._progress.unexpect()
        if not verdict.whole:
            raise Again("the server sent only a part")
        certain = taker.position.encoding != "identity" or ends_by_itself(response.headers)
        parsed = taker.end(certain=certain)
        self._position = taker.position
        await self._appends.put(parsed or NOTHING, self._bookmark())
        await self._appends.flushed()
        log.info("url_done", url=self.link.shown, records=self._position.records)

    # -- streams -------------------------------------------------------------------------------

    async def _follow_events(self, response: ClientResponse, verdict: Take) -> None:
        intake, settings = self._intake, self._settings
        start = Position(event_id=self._position.event_id, records=self._position.records)
        taker = Events(intake.format, intake.record_bytes_max, start)
        await self._follow(response, verdict.position.encoding, taker)
        raise Reconnect(waits.reconnect(taker.retry, settings.backoff, settings.backoff_max))

    async def _follow_lines(self, response: ClientResponse, verdict: Take) -> None:
        intake, settings = self._intake, self._settings
        taker = Lines(intake.format, intake.record_bytes_max, verdict.position)
        try:
            await self._follow(response, verdict.position.encoding, taker)
            last = taker.end(certain=ends_by_itself(response.headers))
        except BaseException:
            # Nobody sends the rest of it: it is kept as a dead letter.
            if last := taker.cut():
                self._appends.put_now(last, None)
            raise
        if last:
            await self._appends.put(last, None)
        raise Reconnect(waits.reconnect(None, settings.backoff, settings.backoff_max))

    async def _follow(self, response: ClientResponse, encoding: str, taker: Events | Lines) -> None:
        """Takes what comes, until the stream ends."""
        log.info("stream_opened", url=self.link.shown)
        stream = pieces(
            response.content, encoding, self._settings, endless=True, read=self._progress.read
        )
        async with aclosing(stream):
            async for piece in stream:
                self._alive = True
                parsed = taker.feed(piece)
                if isinstance(taker, Events):
                    self._position = taker.position
                if parsed and parsed.total:
                    await self._appends.put(parsed, self._bookmark())
                await asyncio.sleep(0)

    def _bookmark(self) -> Bookmark | None:
        if self._settings.follow and not self._position.event_id:
            return None  # nothing that one could go on from
        return as_bookmark(self.link.key, self._position)

    def _changed(self, before: Position) -> None:
        log.warning(
            "resource_changed",
            url=self.link.shown,
            records_accepted=before.records,
            was_done=before.done,
        )
