"""A body of lines whose length nobody knows: accepted in pieces as it arrives.

The first piece decides. If the body ends within it, it is a request like any other, accepted as a
whole or not at all. Else it is a stream: each piece is durable on its own, the connection is not
read while the pipeline is full, and the answer at the end counts the whole. If a stream breaks,
what was accepted stays accepted, the problem says how much that was, and a line that was begun is
not a record: its sender has no yes for it.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import async_timeout
import structlog

from ingestd.base.errors import Draining, IngestdError, Overloaded
from ingestd.sources.framing import Framer
from ingestd.sources.http import problem
from ingestd.sources.http.body import nothing_good
from ingestd.sources.http.problem import ERRORS_MAX, EXPLAINED, Explained, Problem, explain
from ingestd.sources.http.taken import count_body
from ingestd.sources.inflate import Corrupt, Inflater, TooMuch
from ingestd.sources.overload import again_after

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from io import BytesIO

    from aiohttp import StreamReader

    from ingestd.base.record import Refused
    from ingestd.sources.http.gate import Caller
    from ingestd.sources.intake import Intake
    from ingestd.sources.lines import Parsed

log = structlog.get_logger(__name__)

PIECE_BYTES = 256 * 1024
"""A piece is accepted when it is this large on the wire,"""
PIECE_SECONDS = 0.5
"""or this long after its first byte."""
HELD_BYTES = 4 * PIECE_BYTES
"""What a stream counts for in `http.inflight_bytes_max`: a piece that arrives, what it was
decompressed to, and one that waits for its commit."""
_NO_BOUND = 2**63
REFUSED_FREE = 200
"""So many records may be refused before they have to be fewer than those that are accepted."""


class Stream:
    """One body from the end of its first piece on.

    Args:
        read: the next piece, and whether the body ended with it.
        intake: where its records go.
        caller: who sends it; at its limits it is not read, until it may send again.
        encoding: its `Content-Encoding`.
        ratio_max: `http.inflate_ratio_max`.
        silence: seconds without a byte after which it is ended.
        gone: whether its client has left.

    Attributes:
        accepted: records that are durable.
        rejected: records that were kept as dead letters.
    """

    def __init__(
        self,
        read: Callable[[], Awaitable[tuple[bytes, bool]]],
        intake: Intake,
        caller: Caller,
        *,
        encoding: str,
        ratio_max: int,
        silence: float,
        gone: Callable[[], bool],
    ) -> None:
        self._read = read
        self._intake = intake
        self._caller = caller
        self._silence = silence
        self._gone = gone
        self._framer = Framer(intake.format, intake.record_bytes_max, intake.json_depth_max)
        self._inflater = (
            Inflater(encoding, _NO_BOUND, ratio_max) if encoding != "identity" else None
        )
        self._errors: list[Refused] = []
        self._waiting: asyncio.Task[None] | None = None
        self._timer: asyncio.Timeout | None = None
        self._leaving = asyncio.Event()
        self.accepted = 0
        self.rejected = 0

    async def run(self, begun: bytes) -> bytes:
        """Accepts what has arrived, and all that follows.

        Returns:
            The answer's body.

        Raises:
            Problem: it was ended early; says what was accepted before.
        """
        try:
            try:
                await self._take(begun)
            finally:
                await self._end()
        except (Corrupt, TooMuch, Problem, *EXPLAINED) as error:
            raise self._counted(error) from None
        finally:
            log.info("stream_ended", accepted=self.accepted, rejected=self.rejected)
        return count_body(self.accepted, self.rejected, self._errors)

    def leave(self) -> None:
        """Ends it at the last line that has arrived: the daemon drains."""
        self._leaving.set()
        self._wake()

    def _notice(self, accepting: asyncio.Task[None]) -> None:
        """A piece that can't be stored ends the stream, even if nothing more ever comes."""
        if not accepting.cancelled() and accepting.exception() is not None:
            self._wake()

    def _wake(self) -> None:
        if self._timer is not None and not self._timer.expired():
            self._timer.reschedule(0.0)

    async def _take(self, wire: bytes) -> None:
        ended = False
        while True:
            for data in self._inflated(wire):
                if parsed := self._framer.feed(data):
                    await self._commit(parsed)
            if ended:
                break
            wire, ended = await self._next()
        if self._inflater is not None:
            self._inflater.finish()
        if parsed := self._framer.end():
            await self._commit(parsed)
        await self._committed()

    def _inflated(self, wire: bytes) -> Iterator[bytes]:
        if self._inflater is None:
            yield wire
        else:
            yield from self._inflater.feed(wire)

    async def _next(self) -> tuple[bytes, bool]:
        if self._waiting is not None and self._waiting.done():
            await self._committed()
        if self._leaving.is_set():
            raise Draining
        self._timer = async_timeout.timeout(self._silence)
        try:
            async with self._timer:
                return await self._read()
        except TimeoutError:
            if self._waiting is not None and self._waiting.done():
                await self._committed()
            if self._leaving.is_set():
                raise Draining from None
            detail = f"nothing came for http.stream_silence_max = {self._silence:g} s"
            raise Problem(problem.TIMEOUT, detail) from None
        finally:
            self._timer = None

    async def _commit(self, parsed: Parsed) -> None:
        """Makes a piece durable while the next one arrives, one at a time and in order."""
        await self._committed()
        if not (self._stored or parsed.records.count):
            raise nothing_good(parsed.refused)  # as for any body that begins like this and ends
        refused = self.rejected + len(parsed.refused)
        if refused > REFUSED_FREE + self.accepted + parsed.records.count:
            # Noise without end: each line of it would be a dead letter.
            detail = "more records were refused than accepted"
            raise Problem(problem.MALFORMED, detail, refused=parsed.refused)
        self._waiting = asyncio.create_task(self._accept(parsed), name="stream-accept")
        self._waiting.add_done_callback(self._notice)
        if not self._stored:
            # Until something is stored it can be refused as a whole, before more of it comes.
            await self._committed()

    async def _committed(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            await waiting

    @property
    def _stored(self) -> int:
        return self.accepted + self.rejected

    async def _accept(self, parsed: Parsed) -> None:
        await self._pause(self._caller.wait())
        while True:
            try:
                await self._intake.accept(parsed.records, parsed.refused)
                break
            except Overloaded as overloaded:
                if not self._stored:
                    raise
                if self._leaving.is_set() or self._gone():
                    raise Draining from None
                await self._pause(again_after(overloaded))
        self._caller.charge(parsed.total, len(parsed.records.payload))
        self.accepted += parsed.records.count
        self.rejected += len(parsed.refused)
        self._errors += parsed.refused[: ERRORS_MAX - len(self._errors)]

    async def _pause(self, seconds: float) -> None:
        """So long, or until the daemon drains."""
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                async with async_timeout.timeout(seconds):
                    await self._leaving.wait()

    def _counted(self, error: Explained | Corrupt | TooMuch | Problem) -> Problem:
        if isinstance(error, Corrupt):
            found = Problem(problem.CORRUPT, str(error))
        elif isinstance(error, TooMuch):
            found = Problem(problem.RATIO, str(error))
        else:
            found = error if isinstance(error, Problem) else explain(error)
        found.members = {"accepted": self.accepted, "rejected": self.rejected}
        return found

    async def _end(self) -> None:
        """What was given to the pipeline is counted, even if its stream broke meanwhile."""
        with contextlib.suppress(IngestdError):
            await self._committed()


async def read_piece(content: StreamReader, sink: BytesIO) -> bool:
    """What arrives until the piece is full or old enough; waits for its first byte.

    Args:
        content: the body.
        sink: gets it, also if this is cancelled.

    Returns:
        Whether the body ended with it.
    """
    size = sink.tell() + PIECE_BYTES
    if not (block := await content.readany()):
        return True
    sink.write(block)
    try:
        async with async_timeout.timeout(PIECE_SECONDS):
            while sink.tell() < size:
                if not (block := await content.readany()):
                    return True
                sink.write(block)
    except TimeoutError:
        pass
    return False
