"""One connection of a source over TCP: read, decode, accept, reply.

A connection has one task and, while records wait for their commit, one more. Bytes wait in
`_pieces` until the task takes all of them at once, so what comes during a commit is the next
append: a connection that sends one line at a time is not slower than its commits, and one that
sends much makes large appends.

Invariants:

1. What is held is in the account of the source: bytes that wait, what becomes of those that are
   decoded (`StreamCodec.cost`, before they are), records that wait for their commit, the codec's
   begun frame. At the bound reading stops, and goes on when there is room again. What was read by
   then is decoded and accepted all the same, or nothing would ever be given back: but for one
   connection of the source after the other.
2. Where there is no room, one more read takes `SMALL_BYTES` at most, so that many connections are
   not many times that which one read can bring.
3. A deadline runs only while the task waits for the peer: for anything, or for the rest of a frame.
   Time that this process takes (a full journal) is not the peer's.
4. The task is the only one that writes, decides and ends; callbacks of the transport wake it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from typing import TYPE_CHECKING, Any, Protocol, cast

import async_timeout

from ingestd.base.append import Append, scoped
from ingestd.base.envelope import Envelope, pack
from ingestd.base.errors import (
    IngestdError,
    KeyInFlight,
    KeyReused,
    KeysFull,
    KeysUnsupported,
    KeyTaken,
    Overloaded,
)
from ingestd.base.logging import get_logger
from ingestd.base.record import join
from ingestd.http import problem
from ingestd.http.credentials import has_expired, names_in, principal_of_certificate
from ingestd.http.deadlines import LATE_SECONDS, MinimumRate, is_late
from ingestd.http.peer import client_of, uid_of
from ingestd.http.problem import Problem
from ingestd.http.tls import Secured
from ingestd.sources.base import AGAIN_SECONDS, accept_patiently, again_after
from ingestd.sources.tcp import Frames, Peer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ingestd.base.append import AppendCounts, IdempotencyClaim
    from ingestd.base.bursts import ComputeThread
    from ingestd.base.clock import Clock
    from ingestd.http.admission import AdmissionController, Reservation
    from ingestd.sources.base import Intake
    from ingestd.sources.tcp import Received, StreamCodec
    from ingestd.sources.tcp.settings import TcpSettings

log = get_logger()

READ_BYTES = 64 * 1024
"""The most that one read takes. There has to be room for it before it comes, so that more of them
make connections wait for each other that have nothing to read."""
WAITING_BYTES = 128 * 1024
"""From here on reading waits until what came is decoded. It counts twice: 64 connections that send
all the time have room for it in the default bound of a source."""
SMALL_BYTES = 4 * 1024
"""The most that one read takes where there is no room."""
PIECE_COST = 2 * 1024**2
PIECE_BYTES = 16 * 1024
"""Bytes of which more would become than this are decoded so many at a time."""
THREAD_BYTES = 16 * 1024
"""From this size on bytes are decoded in a thread."""
ROOM_SECONDS = 0.1
"""How long a connection waits before it asks for room again."""
LEAVE_SECONDS = 1.0
QUIET_SECONDS = 0.2
"""A drain reads what arrives for so long at most, until nothing has come for so long."""
WRITE_SECONDS = 30.0
"""How long a peer may take to read its replies."""
WRITE_BUFFER_BYTES = 64 * 1024
LINGER_SECONDS = 2.0
KEYLESS_SECONDS = 60.0
"""How long a connection does without keys where there is no room for more of them."""
ANONYMOUS = "anonymous"
_GROUPS_TOGETHER = 128
"""So many appends of one connection are under way at a time, each with a task: tens of thousands of
tiny messages with ids would hold the event loop."""
_COPIES = 2  # of what waits: it is joined
_HELD_FREE = 4 * 1024
_APPEND_BYTES = 2048  # what an append of its own costs, about
_REFUSED_BYTES = 256  # what a refused record costs beside its payload, about


class Totals:
    """The numbers of a source over TCP, in this run.

    Attributes:
        refused: connections that were too many.
        cut: connections that were ended at a bound, a deadline or a fault.
        received: bytes.
        datagrams: that were read.
        dropped: of these, dropped because too many waited.
        faults: places in connections at which framing went wrong, and which went on.
    """

    __slots__ = ("cut", "datagrams", "dropped", "faults", "received", "refused")

    def __init__(self) -> None:
        self.refused = self.cut = self.received = self.datagrams = self.dropped = self.faults = 0


class Owner(Protocol):
    """The source, as its connections see it.

    Attributes:
        settings: the bounds.
        name: of the source.
        intake: the pipeline.
        clock: gives the time.
        admission: the account of connections and held bytes.
        thread: decodes large pieces.
        totals: the numbers.
        tally: of the records.
        buffer: of `READ_BYTES`, for one read at a time.
        authorities: digests of the CAs of client certificates.
        codec: makes that of a connection.
        overdraft: held by the connection that may hold more than there is room for.
        is_leaving: the source drains.
    """

    settings: TcpSettings
    name: str
    intake: Intake
    clock: Clock
    admission: AdmissionController
    thread: ComputeThread
    totals: Totals
    tally: AppendCounts
    buffer: memoryview
    codec: Callable[[Peer], StreamCodec]
    overdraft: asyncio.Lock
    is_leaving: bool

    @property
    def authorities(self) -> frozenset[bytes]: ...  # noqa: D102 - see the class

    def opened(self, connection: TcpConnection) -> None:
        """Counts a connection in."""

    def closed(self, connection: TcpConnection) -> None:
        """Counts a connection out."""

    def tell_refused(self, peer: str, why: str) -> None:
        """Logs, now and then, that connections were refused."""

    def tell_cut(self, peer: str, why: str) -> None:
        """Logs, now and then, that connections were cut."""


class _Cut(Exception):  # noqa: N818 - what it is
    """The connection has to end, and why."""


class TcpConnection(asyncio.BufferedProtocol):
    """A peer's connection.

    Args:
        owner: the source.

    Attributes:
        task: reads it; `None` before it begins.
        peer: the other side, once it is connected.
        authorities: see `Owner`; those of its handshake.
    """

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._settings = owner.settings
        self._loop = asyncio.get_running_loop()
        self.task: asyncio.Task[None] | None = None
        self.authorities: frozenset[bytes] = frozenset()
        self._transport: asyncio.Transport | None = None
        # -- of its input
        self._pieces: list[bytes] = []
        self._queued = 0  # bytes in there
        self._waiter: asyncio.Future[None] | None = None
        self._has_ended = self._is_gone = self._is_paused = False
        self._why = ""  # it has to end
        self._leave_by: float | None = None
        # -- of what was taken
        self._passing = self._committing = self._grown = self._expected = 0
        self._lock = threading.Lock()  # of what it holds, while the codec is in a thread
        self._pending: asyncio.Task[None] | None = None
        self._total = self._refused_keys = 0
        self._keyless_until = 0.0
        self._pace: MinimumRate | None = None  # of the frame that was begun
        self._frame_end = 0.0
        # -- of its output
        self._drained: asyncio.Future[None] | None = None
        self._linger: asyncio.TimerHandle | None = None
        self._is_done = self._is_secure = False

    # -- callbacks of the transport ------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begins, or refuses the connection."""
        transport = self._transport = cast("asyncio.Transport", transport)
        owner = self._owner
        self.certificate = transport.get_extra_info("peercert")
        self.peer = self._make_peer(transport)
        try:
            self._hold: Reservation = owner.admission.enter(self.peer.address)
        except Problem as refusal:
            owner.totals.refused += 1
            owner.tell_refused(self.peer.address, refusal.kind.slug)
            transport.abort()
            return
        self.authorities = owner.authorities
        transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        secured = transport.get_extra_info("ssl_object")
        self._is_secure = isinstance(secured, Secured)
        if self._is_secure:
            secured.tell(self._ended)
        self._codec = owner.codec(self.peer)
        self._codec.grow = self._grow
        self.task = self._loop.create_task(self._run(), name=f"{owner.name}-connection")
        owner.opened(self)
        if owner.is_leaving:
            self.leave()

    def _make_peer(self, transport: asyncio.Transport) -> Peer:
        name = transport.get_extra_info("peername")
        address = str(name[0]) if isinstance(name, tuple) else uid_of(transport)
        certificate = self.certificate
        called = next(iter(names_in(certificate)), "") if certificate else ""
        principal = principal_of_certificate(certificate) if certificate else ANONYMOUS
        envelope = Envelope(self._owner.name, client=called, attributes={"peer": address})
        encrypted = transport.get_extra_info("ssl_object") is not None
        return Peer(address, client_of(address), called, principal, encrypted, pack(envelope))

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's
        """The buffer of the next read, for which there is room before it comes."""
        has_room = self._is_done or self._count(_COPIES * READ_BYTES)
        if self._is_secure:  # TLS asks before it knows if there is anything: none of it may stay
            self._count()
        return self._owner.buffer[: READ_BYTES if has_room else SMALL_BYTES]

    def buffer_updated(self, nbytes: int) -> None:
        """Takes bytes that were read."""
        self.data_received(bytes(self._owner.buffer[:nbytes]))

    def data_received(self, data: bytes) -> None:
        """Takes bytes that came."""
        if self.task is None or self._is_done:
            return
        self._pieces.append(data)
        self._queued += len(data)
        self._total += len(data)
        self._owner.totals.received += len(data)
        if not self._count() or self._queued >= WAITING_BYTES:
            self._pause()
        self._wake()

    def eof_received(self) -> bool:
        """Goes on until everything is accepted and answered.

        Under TLS the peer's `close_notify` is that end (`Secured.tell`); this one is a truncation.
        """
        if self._is_secure:
            return False
        self._ended()
        return True

    def _ended(self) -> None:
        self._has_ended = True
        self._count()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        """Ends the connection behind what has arrived."""
        self._is_gone = True
        if self._linger is not None:
            self._linger.cancel()
        self._wake()
        self.resume_writing()

    def pause_writing(self) -> None:
        """Waits for the peer to read its replies."""
        self._drained = self._drained or self._loop.create_future()

    def resume_writing(self) -> None:
        """Goes on."""
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._drained = None

    # -- called by the source ------------------------------------------------------------------

    def leave(self) -> None:
        """Ends it behind what arrives for a moment more: the source drains."""
        if self._leave_by is None:
            self._leave_by = self._loop.time() + LEAVE_SECONDS
            if not (self._codec.replies or self._is_gone):
                self._end_writing()
            self._wake()

    def _end_writing(self) -> None:
        """Tells the peer that nothing more is read, so that it may stop before its next frame.

        Transports of TLS cannot end one direction. A FIN without `close_notify` truncates nothing
        here: nothing is ever sent.
        """
        transport = self._transport
        sock = transport.get_extra_info("socket") if transport is not None else None
        if transport is None or sock is None:
            return
        with contextlib.suppress(OSError, RuntimeError):
            if transport.can_write_eof():
                transport.write_eof()
                return
            with socket.socket(fileno=os.dup(sock.fileno())) as same:
                same.shutdown(socket.SHUT_WR)

    def cut(self, why: str) -> None:
        """Ends it behind what has arrived."""
        self._why = self._why or why
        self._wake()

    def abort(self) -> None:
        """Ends it as it is."""
        if self._transport is not None:
            self._transport.abort()

    @property
    def unaccepted(self) -> int:
        """Bytes that have arrived and are not accepted."""
        return self._queued + self._passing + self._committing

    # -- the task ------------------------------------------------------------------------------

    async def _run(self) -> None:
        why = ""
        try:
            why = await self._serve()
        except IngestdError as error:
            why = str(error)
        except Exception:
            log.exception("connection_failed", source=self._owner.name, peer=self.peer.address)
            why = "internal error"
        finally:
            self._finish(why)

    async def _serve(self) -> str:
        """The way of all bytes; returns why the connection was cut, empty if the peer ended it."""
        why = ""
        try:
            await self._write(self._codec.greet())
            while not why and (data := await self._next()):
                why = await self._take_all(data)
        except _Cut as cut:
            why = str(cut)
        is_whole = self._has_ended and not why
        reason = None if is_whole else why or "the connection was lost"
        self._expected = self._codec.held
        async with contextlib.nullcontext() if self._count() else self._owner.overdraft:
            last = await self._decode(self._codec.end, reason, lambda: True)
            await self._commit(last)
            await self._committed()
        return why or last.fault

    async def _decode(
        self, call: Callable[[Any], Frames], argument: object, is_quick: Callable[[], bool]
    ) -> Frames:
        """Calls the codec, in a thread if that may take long.

        Codecs look at all they hold to tell if they are quick: they are asked while that is little.
        """
        if self._passing + self._codec.held < THREAD_BYTES and is_quick():
            return call(argument)
        return await self._owner.thread.run(call, argument)

    async def _take_all(self, data: bytes) -> str:
        """Takes bytes, in pieces if much would become of them; returns a fault of theirs."""
        codec, why = self._codec, ""
        step = len(data) if codec.cost(data) <= PIECE_COST else PIECE_BYTES
        for at in range(0, len(data), step):
            piece = data[at : at + step]
            self._passing = len(data) - at
            self._expected = codec.cost(piece)
            if self._count():
                why = await self._take(piece)
            else:
                # Only one connection of the source has more than there is room for.
                async with self._owner.overdraft:
                    why = await self._take(piece)
                    await self._committed()
            if why:
                break
        return why

    async def _take(self, data: bytes) -> str:
        """Decodes bytes and has their records accepted; returns a fault of theirs."""
        codec = self._codec
        frames = await self._decode(codec.feed, data, lambda: codec.is_quick(data))
        held = codec.held
        try:
            self._hold.keep(held if held > _HELD_FREE else 0)
        except Problem:
            frames = frames._replace(fault="messages that were begun hold too much")
        await self._commit(frames)
        if not held:
            self._pace = None
        elif self._pace is None or frames.received:
            now = self._loop.time()
            self._pace = MinimumRate(self._settings.frame_rate_min, now)
            self._frame_end = now + self._settings.frame_timeout
        return frames.fault

    async def _next(self) -> bytes:
        """All that has arrived; nothing at the end.

        Raises:
            _Cut: it has to end before that.
        """
        while not self._pieces:
            if self._has_ended or self._is_gone:
                return b""
            if self._why:
                raise _Cut(self._why)
            self._resume()
            await self._wait()
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._passing, self._queued = self._queued, 0
        if self._leaves_now:
            self._pause()  # of a peer that goes on sending this is the last
        self._resume()
        return data

    @property
    def _leaves_now(self) -> bool:
        return self._leave_by is not None and self._loop.time() >= self._leave_by

    async def _wait(self) -> None:
        """Waits until something has come, or there may be room to read again.

        Raises:
            _Cut: nothing came in time, or too little.
        """
        due, why = self._deadline()
        self._waiter = self._loop.create_future()
        try:
            async with async_timeout.timeout_at(due):
                await self._waiter
            why = ""
        except TimeoutError:
            pass
        finally:
            self._waiter = None
        now, pace = self._loop.time(), self._pace
        if pace is not None and now >= pace.due and pace.is_slow(self._total, now):
            raise _Cut(f"slower than frame_rate_min = {self._settings.frame_rate_min} bytes/s")
        if self._pieces or not why:
            return
        # Of a connection that leaves nothing more is read once it is paused.
        if not is_late(due, now) or (self._leaves_now and self._is_paused):
            raise _Cut(why)
        # This process had no time.
        self._frame_end = now + LATE_SECONDS
        if self._leaves_now:
            self._leave_by = now + QUIET_SECONDS

    def _deadline(self) -> tuple[float, str]:
        """The loop time until which something has to come, and why; nothing if it is only a look.

        While there is no room nothing is read, so nothing can come.
        """
        now = self._loop.time()
        if self._leave_by is not None:
            return min(self._leave_by, now + QUIET_SECONDS), "the daemon is shutting down"
        if self._is_paused:
            return now + ROOM_SECONDS, ""
        if self._pace is None:
            limit = self._settings.idle_timeout
            return now + limit, f"nothing came for idle_timeout = {limit:g} s"
        if self._pace.due < self._frame_end:
            return self._pace.due, ""
        limit = self._settings.frame_timeout
        return self._frame_end, f"a message took longer than frame_timeout = {limit:g} s"

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- room ----------------------------------------------------------------------------------

    def _count(self, more: int = 0) -> bool:
        """Counts what it holds, and more; returns False if there is no room for it."""
        if self._is_done:
            return False
        held = self._codec.held
        size = _COPIES * self._queued + self._passing + self._expected + self._committing + held
        try:
            with self._lock:
                self._hold.set(size + self._grown + more)
        except Problem:
            return False
        return True

    def _grow(self, size: int) -> None:
        """See `StreamCodec.grow`; in any thread."""
        with self._lock:
            if self._is_done:
                raise Problem(problem.BUSY, "the connection has ended")
            self._hold.grow(size)
            self._grown += size

    def _pause(self) -> None:
        transport = self._transport
        if not self._is_paused and transport is not None and not transport.is_closing():
            self._is_paused = True
            transport.pause_reading()

    def _resume(self) -> None:
        transport = self._transport
        if self._leaves_now:
            return
        if self._is_paused and transport is not None and self._count():
            self._is_paused = False
            if not transport.is_closing():
                transport.resume_reading()

    # -- acceptance ----------------------------------------------------------------------------

    async def _commit(self, frames: Frames) -> None:
        """Begins to have records accepted, one `Frames` at a time: the next ones arrive meanwhile.

        Its size is known before those before it are accepted, and counts.
        """
        received = frames.received
        self._passing = self._grown = self._expected = 0
        size = sum(_size_of(one) for one in received)
        self._committing += size
        self._count()
        await self._committed()
        self._committing = size
        if received:
            self._pending = self._loop.create_task(
                self._accept(received), name=f"{self._owner.name}-accept"
            )
            self._pending.add_done_callback(self._notice)

    async def _committed(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            await pending
            self._committing = 0

    def _notice(self, accepting: asyncio.Task[None]) -> None:
        """Counts what was accepted, also if nothing more ever comes."""
        if accepting is self._pending:
            self._committing = 0
            self._count()
        if not accepting.cancelled() and (error := accepting.exception()) is not None:
            self.cut(str(error))

    async def _accept(self, received: Sequence[Received]) -> None:
        """Has all of it accepted, and sends the replies."""
        groups = _groups(received)
        if len(groups) == 1:
            await self._write(await self._store(groups[0]))
            return
        for at in range(0, len(groups), _GROUPS_TOGETHER):
            replies = []
            some = map(self._store, groups[at : at + _GROUPS_TOGETHER])
            for done in await asyncio.gather(*some, return_exceptions=True):
                if isinstance(done, BaseException):
                    raise done
                replies.append(done)
            await self._write(b"".join(replies))

    async def _store(self, group: Sequence[Received]) -> bytes:
        """Has one append accepted; returns its replies."""
        first, reply = group[0], b"".join([one.reply for one in group])
        append = self._append_of(group)
        if append is None:
            return reply
        while first.key and (claim := await self._claim(first)) is not None:
            if isinstance(claim, bytes):
                return claim
            claim.answer = reply
            try:
                await accept_patiently(self._owner.intake, append._replace(claim=claim))
                self._owner.tally.accepted(append)
            except KeyTaken:  # now the key has a reply
                continue
            finally:
                self._owner.intake.forget(claim)
            return reply
        await accept_patiently(self._owner.intake, append)
        self._owner.tally.accepted(append)
        return reply

    async def _claim(self, received: Received) -> IdempotencyClaim | bytes | None:
        """Claims a key, or returns the reply that was sent under it; `None` where it has no use.

        A table of keys that is full keeps no record out: what comes then is accepted without.
        """
        key = scoped(received.principal or self.peer.principal, received.key)
        while self._loop.time() >= self._keyless_until:
            try:
                claim = await self._owner.intake.begin(key, received.fingerprint)
            except KeyInFlight:  # of a connection that was lost, and its records are on their way
                await asyncio.sleep(AGAIN_SECONDS)
            except KeysFull as overloaded:
                self._refused_keys += 1
                if self._refused_keys > 1:
                    log.warning("keys_left_out", source=self._owner.name, reason=str(overloaded))
                    self._keyless_until = self._loop.time() + KEYLESS_SECONDS
                    break
                await asyncio.sleep(again_after(overloaded))
            except Overloaded as overloaded:
                await asyncio.sleep(again_after(overloaded))
            except (KeyReused, KeysUnsupported):
                break
            else:
                self._refused_keys = 0
                return claim
        return None

    def _append_of(self, group: Sequence[Received]) -> Append | None:
        parts = [one.parsed for one in group if one.parsed.total]
        if not parts:
            return None
        runs = [part.records for part in parts if part.records.count]
        return Append(
            join(runs) if runs else parts[0].records,
            [record for part in parts for record in part.refused],
            principal=self.peer.name or self.peer.client,
            unkept=sum(part.unlisted for part in parts),
            envelope=self.peer.envelope,
        )

    async def _write(self, data: bytes) -> None:
        """Sends bytes, and waits until the peer has read enough of them.

        Raises:
            _Cut: it does not read.
        """
        transport = self._transport
        if not data or transport is None or self._is_gone or transport.is_closing():
            return
        transport.write(data)
        if self._drained is not None:
            try:
                async with async_timeout.timeout(WRITE_SECONDS):
                    await self._drained
            except TimeoutError:
                raise _Cut("its replies are not read") from None

    # -- the end -------------------------------------------------------------------------------

    def _finish(self, why: str) -> None:
        owner, transport = self._owner, self._transport
        with self._lock:
            self._is_done = True
            self._hold.keep(0)
            self._hold.__exit__(None, None, None)
        if self._pending is not None:
            self._pending.cancel()
        if why and self._leave_by is None:
            owner.totals.cut += 1
            owner.tell_cut(self.peer.address, why)
        owner.closed(self)
        if transport is not None and not self._is_gone:
            transport.close()  # which sends what is left first
            self._linger = self._loop.call_later(LINGER_SECONDS, transport.abort)

    def look_again(self) -> None:
        """Cuts it if its certificate is not valid any more."""
        if not self.certificate:
            return
        if has_expired(self.certificate, self._owner.clock.now()):
            self.cut("its certificate has expired")
        elif not self.authorities <= self._owner.authorities:
            self.cut("an authority has gone since its certificate was verified")


def _size_of(received: Received) -> int:
    parsed = received.parsed
    kept = sum(len(one.payload) + _REFUSED_BYTES for one in parsed.refused)
    return parsed.records.stored_bytes + kept + (_APPEND_BYTES if received.key else 0)


def _groups(received: Sequence[Received]) -> list[list[Received]]:
    """Neighbours without a key together, each one with a key by itself."""
    groups: list[list[Received]] = []
    for one in received:
        if one.key or not groups or groups[-1][0].key:
            groups.append([one])
        else:
            groups[-1].append(one)
    return groups
