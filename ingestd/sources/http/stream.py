"""A body of lines of unknown length, accepted in pieces as it arrives.

The first piece decides. If the body ends within it, it is a request like any other, accepted as a
whole or not at all. Else it is a stream: each piece is durable on its own, the connection is not
read while the pipeline is full, and the answer at the end counts the whole. If a stream breaks,
what was accepted stays accepted, the problem says how much that was, and a line that was begun is
not a record: its sender has no yes for it.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, TypeVar

import async_timeout

from ingestd.base.append import Append, AppendCounts
from ingestd.base.errors import Draining, IngestdError, Overloaded
from ingestd.base.logging import get_logger
from ingestd.codecs.compression import (
    INFLATED_PIECE_BYTES,
    WINDOW_MAX,
    Corrupt,
    Inflater,
    TooMuch,
    WindowTooLarge,
)
from ingestd.codecs.framing import Framer
from ingestd.http import problem
from ingestd.http.body import PIECE_BYTES
from ingestd.http.problem import ERRORS_MAX, EXPLAINED, Explained, Problem, explain
from ingestd.sources.base import again_after
from ingestd.sources.http.decode import is_mostly_invalid, mostly_invalid, nothing_good
from ingestd.sources.http.result import IngestResult

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from concurrent.futures import Executor

    from ingestd.base.record import InvalidRecord
    from ingestd.codecs.lines import Parsed
    from ingestd.http.admission import Reservation
    from ingestd.http.auth import Principal
    from ingestd.sources.base import Intake

log = get_logger()

T = TypeVar("T")

HELD_BYTES = 4 * PIECE_BYTES
"""What a stream counts for in `http.inflight_bytes_max` at most, beside what it keeps between its
pieces: a piece that arrives, its lines, and those that wait for their commit."""
THREAD_BYTES = 16 * 1024
"""From this size on lines are a thread's work: one that has to be looked at by itself takes 50
times as long as one among many good ones, and may have two bytes."""
ROOM_SECONDS = 0.1
"""How long a stream waits before it asks for room again."""
_COPIES = 2
_INFLATER_BYTES = 64 * 1024
"""What a decompressor holds beside a zstd window: tables, a window of zlib's."""
_INFLATED_BYTES = 2 * INFLATED_PIECE_BYTES
_LINE_FREE = 4 * 1024
_NO_BOUND = 2**63


class Stream:
    """One body from the end of its first piece on.

    Args:
        read: the next piece, and whether the body ended with it.
        intake: where its records go.
        principal: of its sender; at its limits it is not read, until it may send again.
        hold: what it counts as.
        thread: where large pieces are parsed.
        invalid_kept: `http.invalid_kept`.
        encoding: its `Content-Encoding`.
        ratio_max: `http.inflate_ratio_max`.
        silence: seconds without a byte after which it is ended.
        envelope: of its records, packed.
        counts: gets what is accepted.
        gone: whether its client has left.
        allowed: asked again before each piece for its sender; raises a `Problem` when its client
            may not send here any more.
        screen: returns records less those that do not fit, from the index of the first one on;
            `None` where all fit.

    Attributes:
        accepted: records that are durable.
        invalid: records that were not, some of them kept as dead letters.
    """

    def __init__(
        self,
        read: Callable[[], Awaitable[tuple[bytes, bool]]],
        intake: Intake,
        principal: Principal,
        hold: Reservation,
        thread: Executor,
        *,
        invalid_kept: int,
        encoding: str,
        ratio_max: int,
        silence: float,
        envelope: bytes = b"",
        counts: AppendCounts | None = None,
        gone: Callable[[], bool],
        allowed: Callable[[], Principal] | None = None,
        screen: Callable[[Parsed, int], Awaitable[Parsed]] | None = None,
    ) -> None:
        self._screen = screen
        self._allowed = allowed or (lambda: principal)
        self._read = read
        self._intake = intake
        self._principal = principal
        self._silence = silence
        self._envelope = envelope
        self._counts = counts or AppendCounts()
        self._gone = gone
        self._hold = hold
        self._thread = thread
        self._invalid_kept = invalid_kept
        self._framer = Framer(
            intake.format, intake.record_bytes_max, intake.json_depth_max, listed_max=ERRORS_MAX
        )
        self._inflater = (
            Inflater(encoding, _NO_BOUND, ratio_max, window_max=0)
            if encoding != "identity"
            else None
        )
        self._passing = 0  # bytes of a piece that is read and parsed
        self._committing = 0  # of one that waits for its commit
        self._lasting = 0  # between pieces
        self._errors: list[InvalidRecord] = []
        self._waiting: asyncio.Task[None] | None = None
        self._timer: asyncio.Timeout | None = None
        self._leaving = asyncio.Event()
        self._why: Exception = Draining()
        self.accepted = 0
        self.invalid = 0

    async def run(self, begun: bytes) -> IngestResult:
        """Accepts what has arrived, and all that follows.

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
            log.info("stream_ended", accepted=self.accepted, invalid=self.invalid)
        return IngestResult(self.accepted, self.invalid, self._errors)

    def leave(self) -> None:
        """Ends it at the last line that has arrived: the daemon drains."""
        self._leaving.set()
        self._wake()

    def look_again(self) -> None:
        """Ends it if its client may not send here any more; what was accepted stays accepted."""
        try:
            self._principal = self._allowed()
        except Problem as found:
            self._why = found.with_traceback(None)
            self.leave()

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
            await self._make_room(len(wire))
            await self._take_piece(wire)
            self._keep()
            self._passing = 0
            self._count()
            if ended:
                break
            wire, ended = await self._next()
        if self._inflater is not None:
            self._inflater.finish()
        if parsed := self._framer.end():
            await self._commit(parsed)
        await self._committed()

    async def _take_piece(self, wire: bytes) -> None:
        while True:
            try:
                for data in self._inflated(wire):
                    if parsed := await self._feed(data):
                        await self._commit(parsed)
            except WindowTooLarge as found:
                inflater = self._inflater
                if inflater is None or inflater.window_max == WINDOW_MAX:
                    raise
                window = min(found.window, WINDOW_MAX)
                self._keep(window)  # before it is allocated
                inflater.window_max = window
                wire = b""  # it goes on where it stopped
            else:
                return

    async def _feed(self, data: bytes) -> Parsed | None:
        if len(data) < THREAD_BYTES:
            return self._framer.feed(data)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._framer.feed, data)

    # -- what it holds -------------------------------------------------------------------------

    async def _make_room(self, size: int) -> None:
        """Waits until a piece of this size is counted: until then nothing more is read.

        All that it will need is counted at once, so that streams do not wait for each other.
        """
        passing = _COPIES * size + (_INFLATED_BYTES if self._inflater is not None else 0)
        while passing > self._passing:
            try:
                self._hold.set(self._lasting + self._committing + passing)
            except Problem as found:
                if not self._stored or found.kind is problem.PAYLOAD_TOO_LARGE:
                    raise
                if self._leaving.is_set() or self._gone():
                    raise self._why from None
                await self._pause(ROOM_SECONDS)
            else:
                self._passing = passing

    def grow(self, size: int) -> bool:
        """Tells if a piece that has been read so far may still grow; on the way to `_make_room`."""
        passing = _COPIES * size + (_INFLATED_BYTES if self._inflater is not None else 0)
        try:
            self._hold.set(self._lasting + self._committing + passing)
        except Problem:
            return False
        self._passing = passing
        return True

    def _keep(self, window: int = 0) -> None:
        """Counts what it holds between its pieces; `window` is one that it is about to hold."""
        line = self._framer.held
        lasting = line if line > _LINE_FREE else 0
        if self._inflater is not None:
            lasting += _INFLATER_BYTES + max(window, self._inflater.window_max)
        if lasting == self._lasting:
            return
        self._hold.keep(lasting)
        self._hold.set(lasting + self._committing + self._passing)
        self._lasting = lasting

    def _count(self) -> None:
        """Gives back what it does not hold any more."""
        held = self._lasting + self._committing + self._passing
        self._hold.set(min(held, self._hold.bytes - self._hold.base))

    def _inflated(self, wire: bytes) -> Iterator[bytes]:
        if self._inflater is None:
            yield wire
        else:
            yield from self._inflater.feed(wire)

    async def _next(self) -> tuple[bytes, bool]:
        if self._waiting is not None and self._waiting.done():
            await self._committed()
        if self._leaving.is_set():
            raise self._why
        self._timer = async_timeout.timeout(self._silence)
        try:
            async with self._timer:
                return await self._read()
        except TimeoutError:
            if self._waiting is not None and self._waiting.done():
                await self._committed()
            if self._leaving.is_set():
                raise self._why from None
            detail = f"nothing came for http.stream_silence_max = {self._silence:g} s"
            raise Problem(problem.TIMEOUT, detail) from None
        finally:
            self._timer = None

    async def _commit(self, parsed: Parsed) -> None:
        """Makes a piece durable while the next one arrives, one at a time and in order."""
        await self._committed()
        good, invalid = parsed.records.count, parsed.invalid
        if not (self._stored or good):
            # As for any body that begins like this and ends.
            raise nothing_good(parsed.refused, parsed.unlisted)
        if is_mostly_invalid(self.accepted + good, self.invalid + invalid):
            raise mostly_invalid(parsed.refused)  # noise without end
        self._committing = len(parsed.records.payload)
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
        return self.accepted + self.invalid

    async def _accept(self, parsed: Parsed) -> None:
        await self._pause(self._principal.wait())
        screen = self._screen
        if screen is not None:
            before, first = parsed, self._stored
            parsed = await self._patiently(lambda: screen(before, first))
            if not (first or parsed.records.count):
                raise nothing_good(parsed.refused, parsed.unlisted)
            if is_mostly_invalid(
                self.accepted + parsed.records.count, self.invalid + parsed.invalid
            ):
                raise mostly_invalid(parsed.refused)
        kept = parsed.refused[: self._invalid_kept]
        self._invalid_kept -= len(kept)
        append = Append(
            parsed.records,
            kept,
            principal=self._hold.client,
            unkept=parsed.invalid - len(kept),
            envelope=self._envelope,
        )
        await self._patiently(lambda: self._intake.accept(append))
        self._principal.charge(parsed.total, len(parsed.records.payload))
        self._counts.accepted(append)
        self.accepted += parsed.records.count
        self.invalid += parsed.invalid
        self._committing = 0
        self._count()
        self._errors += parsed.refused[: ERRORS_MAX - len(self._errors)]

    async def _patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        """Calls again while there is an overload; before anything is stored it is the answer."""
        while True:
            self._principal = self._allowed()
            try:
                return await call()
            except Overloaded as overloaded:
                if not self._stored:
                    raise
                if self._leaving.is_set() or self._gone():
                    raise self._why from None
                await self._pause(again_after(overloaded))

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
        found.members = {"accepted": self.accepted, "invalid": self.invalid}
        return found

    async def _end(self) -> None:
        """Counts records that the pipeline has taken, even if the stream broke meanwhile."""
        with contextlib.suppress(IngestdError):
            await self._committed()
