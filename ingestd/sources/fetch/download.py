"""Downloads of single URLs: tries, rounds, waits, and positions.

A *try* is one request. A *round* is as many tries as it takes to have all of the resource, or to
give it up. A stream has one round, without an end.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from typing import TYPE_CHECKING

from msgspec.structs import replace

from ingestd.base.envelope import Envelope, pack
from ingestd.base.logging import get_logger
from ingestd.base.rate import backoff
from ingestd.sources.fetch import concurrency
from ingestd.sources.fetch.appends import Appends
from ingestd.sources.fetch.client import Ending, pieces
from ingestd.sources.fetch.decoders import NOTHING, EventDecoder, LineDecoder
from ingestd.sources.fetch.failure import (
    DownloadFailed,
    Reconnect,
    ResourceChanged,
    ResponseMismatch,
    TryAgain,
)
from ingestd.sources.fetch.position import (
    EVENT_STREAM,
    BodyToRead,
    Finished,
    Position,
    encoding_of,
    ends_by_itself,
    from_offset,
    headers_for,
    interpret,
    media_type,
    to_offset,
)

if TYPE_CHECKING:
    from aiohttp import ClientResponse

    from ingestd.base.append import SourceOffset
    from ingestd.base.clock import Clock
    from ingestd.sources.base import Intake
    from ingestd.sources.fetch import FetchSettings
    from ingestd.sources.fetch.client import DownloadClient
    from ingestd.sources.fetch.concurrency import (
        DecompressionMemory,
        DownloadSlots,
        InflightBudget,
        SlotLease,
    )
    from ingestd.sources.fetch.totals import DownloadTotals
    from ingestd.sources.fetch.urls import Link


log = get_logger()


class DownloadAttempts:
    """Makes the tries of one URL, one after the other; each goes on where the one before ended.

    Args:
        link: the URL.
        settings: of the source.
        intake: the pipeline.
        client: makes the requests.
        budget: of bytes that all URLs hold together.
        memory: of their zstd windows.
        totals: counters of all of them.
        clock: gives the time.
        source: the name of the source.

    Attributes:
        position: of the URL.
        appends: of its records.
        progress: the URL's own counters.
        alive: a stream has sent something in the last try.
    """

    def __init__(
        self,
        link: Link,
        settings: FetchSettings,
        intake: Intake,
        *,
        client: DownloadClient,
        budget: InflightBudget,
        memory: DecompressionMemory,
        totals: DownloadTotals,
        clock: Clock,
        source: str = "fetch",
    ) -> None:
        self.position = Position()
        self.appends = Appends(intake, budget, totals.accepted)
        self.progress = totals.begin()
        self.alive = False
        self.link = link
        self._settings = settings
        self._intake = intake
        self._client = client
        self._clock = clock
        self._source = source
        self._of_lines = b""
        self._memory = memory
        self._ranges = True
        self._endless = settings.follow

    async def load(self) -> None:
        """Loads the stored position."""
        kept = await self._intake.offset(self.link.key)
        try:
            self.position = from_offset(kept)
        except ValueError:
            log.error("position_unreadable", url=self.link.shown)  # noqa: TRY400

    async def make(self, lease: SlotLease) -> None:
        """Makes one request and reads the answer; returns when all of it is accepted.

        Args:
            lease: its slot among the running downloads; streams release it.

        Raises:
            TryAgain: it failed, and may succeed another time.
            DownloadFailed: it failed, and would fail again.
            ResourceChanged: another version came than the one that was begun.
            Reconnect: a stream ended as streams do.
        """
        self.alive = False
        position = Position() if self._settings.follow else self.position
        asked = headers_for(position, url=self.link.url, ranges=self._ranges, endless=self._endless)
        async with self._client.get(self.link, asked) as response:
            try:
                encoding = "identity"
                if response.ok:
                    encoding = encoding_of(response.headers, self.link.url, response.url)
                verdict = interpret(
                    response.status,
                    response.headers,
                    asked=asked,
                    position=position,
                    encoding=encoding,
                )
            except ResourceChanged:
                raise self._misfit("the rest alone did not come as it was asked for") from None
            except TryAgain as failure:
                failure.after = concurrency.retry_after(
                    response.headers.get("Retry-After"),
                    response.headers.get("Date"),
                    self._clock.now(),
                    self._settings.retry_after_max,
                )
                raise
            self._begin(response)
            if isinstance(verdict, Finished):
                await self._finish(verdict.position)
            elif media_type(response.headers) == EVENT_STREAM:
                lease.release()  # it has no end: others need the slot
                await self._follow_events(response, verdict)
            elif self._settings.follow:
                lease.release()
                await self._follow_lines(response, verdict)
            else:
                await self._read(response, verdict)

    def _begin(self, response: ClientResponse) -> None:
        """Packs the envelopes of an answer's records."""
        content_type = response.headers.get("Content-Type", "")
        envelope = Envelope(
            self._source, content_type=content_type, attributes={"url": self.link.shown}
        )
        self.appends.envelope = pack(envelope)
        self._of_lines = pack(replace(envelope, numbered="line"))

    def _misfit(self, reason: str) -> ResponseMismatch:
        """Requests the whole body next time, whose beginning can be compared."""
        self._ranges = False
        return ResponseMismatch(reason)

    async def _finish(self, position: Position) -> None:
        """Ends a round of which all is accepted already."""
        if position != self.position:
            self.position = position
            await self.appends.put(NOTHING, self._offset())
        await self.appends.flushed()
        self._ranges = True
        log.info("url_done", url=self.link.shown, records=position.records)

    async def _read(self, response: ClientResponse, verdict: BodyToRead) -> None:
        """Reads a body with an end."""
        if verdict.changed:
            self.changed(self.position)
        intake, settings = self._intake, self._settings
        decoder = LineDecoder(
            intake.format,
            intake.record_bytes_max,
            verdict.position,
            verdict.skip,
            depth_max=intake.json_depth_max,
            envelope=self._of_lines,
        )
        begun = verdict.position.offset
        framed = verdict.length is not None or ends_by_itself(response.headers)
        self.progress.expect(verdict.length)
        stream = pieces(
            response.content,
            verdict.position.encoding,
            settings,
            ending=Ending(verdict.length, framed),
            windows=self._memory.downloads,
            read=self.progress.read,
        )
        try:
            async with aclosing(stream):
                async for piece in stream:
                    parsed = decoder.feed(piece)
                    if parsed:
                        self.position = decoder.position
                        await self.appends.put(parsed, self._offset())
                    # A server that is faster than we are must not keep others from running.
                    await asyncio.sleep(0)
        except ResponseMismatch as failure:
            raise self._misfit(failure.reason) from None
        finally:
            self.progress.unexpect()
        if not verdict.whole:
            reason = "the server sent only a part, or did not say that it was all"
            raise TryAgain(reason) if self.position.offset > begun else self._misfit(reason)
        certain = framed or decoder.position.encoding != "identity"
        parsed = decoder.end(certain=certain)
        self.position = decoder.position
        await self.appends.put(parsed or NOTHING, self._offset())
        await self.appends.flushed()
        self._ranges = True
        log.info(
            "url_done",
            url=self.link.shown,
            records=self.position.records,
            # Else nothing but the end of the connection said that this was all.
            **({} if certain else {"end_announced": False}),
        )

    # -- streams -------------------------------------------------------------------------------

    async def _follow_events(self, response: ClientResponse, verdict: BodyToRead) -> None:
        intake, settings = self._intake, self._settings
        start = Position(event_id=self.position.event_id, records=self.position.records)
        decoder = EventDecoder(
            intake.format, intake.record_bytes_max, start, depth_max=intake.json_depth_max
        )
        await self._follow(response, verdict.position.encoding, decoder)
        raise Reconnect(
            concurrency.reconnect(decoder.retry, settings.backoff, settings.backoff_max)
        )

    async def _follow_lines(self, response: ClientResponse, verdict: BodyToRead) -> None:
        intake, settings = self._intake, self._settings
        decoder = LineDecoder(
            intake.format,
            intake.record_bytes_max,
            verdict.position,
            depth_max=intake.json_depth_max,
            envelope=self._of_lines,
        )
        try:
            await self._follow(response, verdict.position.encoding, decoder)
            last = decoder.end(certain=ends_by_itself(response.headers))
        except BaseException:
            # The rest of it is never sent: it is kept as a dead letter.
            if last := decoder.cut():
                self.appends.put_now(last, None)
            raise
        if last:
            await self.appends.put(last, None)
        raise Reconnect(concurrency.reconnect(None, settings.backoff, settings.backoff_max))

    async def _follow(
        self, response: ClientResponse, encoding: str, decoder: EventDecoder | LineDecoder
    ) -> None:
        """Appends records until the stream ends."""
        log.info("stream_opened", url=self.link.shown)
        self._endless = True
        stream = pieces(
            response.content,
            encoding,
            self._settings,
            ending=Ending(None, framed=False, endless=True),
            windows=self._memory.streams,
            read=self.progress.read,
        )
        async with aclosing(stream):
            async for piece in stream:
                self.alive = True
                parsed = decoder.feed(piece)
                if isinstance(decoder, EventDecoder):
                    self.position = decoder.position
                if parsed and parsed.total:
                    await self.appends.put(parsed, self._offset())
                await asyncio.sleep(0)

    def _offset(self) -> SourceOffset | None:
        if self._settings.follow and not self.position.event_id:
            return None  # nothing that one could go on from
        return to_offset(self.link.key, self.position)

    def changed(self, before: Position) -> None:
        """Logs that there is a new version of a resource that was accepted up to a position."""
        log.warning(
            "resource_changed",
            url=self.link.shown,
            records_accepted=before.records,
            was_done=before.done,
        )


# -- rounds ----------------------------------------------------------------------------------------


class Download:
    """Downloads one URL, from its stored position, and with `fetch.every` again and again.

    Args:
        link: the URL.
        settings: of the source.
        tries: makes one.
        slots: bound the running downloads.

    Attributes:
        reason: of the last round, if it was given up; else empty.
    """

    def __init__(
        self, link: Link, settings: FetchSettings, tries: DownloadAttempts, slots: DownloadSlots
    ) -> None:
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
            except DownloadFailed as failure:
                self.reason = failure.reason
                self.tries.progress.give_up()
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
            DownloadFailed: it can't be.
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
            except ResourceChanged:
                failure = TryAgain("it changed while it was downloaded")
                tries.changed(before)
                tries.position = Position()
            except TryAgain as caught:
                failure = caught
            else:
                return
            # Only what goes beyond everything before is progress: something that changes all the
            # time, and never comes whole, must not be begun for ever.
            moved = tries.alive or tries.position.offset > max(furthest, before.offset)
            furthest = max(furthest, tries.position.offset)
            attempts = 0 if moved else attempts + 1
            if attempts >= self._settings.attempts_max:
                raise DownloadFailed(f"{failure.reason} ({attempts} tries without progress)")
            await self._pause(attempts, failure)

    async def _pause(self, attempts: int, failure: TryAgain) -> None:
        settings = self._settings
        after = backoff(max(attempts, 1), settings.backoff, settings.backoff_max, random.random)
        after = max(after, failure.after or 0.0)
        self.tries.progress.postpone()
        log.warning(
            "url_postponed",
            url=self.link.shown,
            reason=failure.reason,
            attempts=attempts,
            after=round(after, 3),
        )
        await asyncio.sleep(after)
