"""One connection: requests are read ahead of their turn and answered one after the other.

A connection has state of three lifetimes, and each part of it is freed with its lifetime:

* of the server: who answers, how long heads may take, what all connections hold together;
* of the connection: its transport, its client, what of its input is parsed, its timers;
* of one request: the parser of its head, its body while that arrives, the task that answers it.

Invariants:

1. At any time at most one request is answered, and answers go out in the order of the requests.
2. At most `READ_AHEAD_MAX` more requests are parsed. Bytes behind them wait as they came, and
   nothing more is read. All of that counts as held, and the server bounds it.
3. `last`: nothing behind the requests that are here is looked at. It is set by everything after
   which the next byte could be read in two ways: bytes that are not HTTP, a broken body, something
   behind a chunked body in the same piece.
4. A timer watches whatever may take long without this process being at work: a head on its way,
   an idle connection, answers that are not read, also the last one, the rest of a body that nobody
   wants. A body that is read has its deadlines from its reader (`deadlines.py`).
5. `connection_lost` leaves no timer, wakes whatever waits for the client, and drops the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, cast

import async_timeout

from ingestd.base.logging import get_logger
from ingestd.http import problem
from ingestd.http.deadlines import LATE_SECONDS, is_late
from ingestd.http.heads import HEAD_BYTES_MAX, ChunkDecoder, HeadParser, head_too_large, unreadable
from ingestd.http.peer import client_of
from ingestd.http.problem import Problem
from ingestd.http.request import (
    HEADER_BYTES,
    HTTP10,
    READ_HIGH_BYTES,
    READ_LOW_BYTES,
    BodyBuffer,
    BrokenBody,
    Request,
)
from ingestd.http.response import CLOSE, KEEP, PROBLEM, Response, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ingestd.http.known_heads import KnownHead
    from ingestd.http.server import Server

log = get_logger()

LINGER_SECONDS = 2.0
"""How long what is left of a refused body is read, so that the client gets to see its answer."""
WRITE_BUFFER_BYTES = 16 * 1024
"""From here on a client has to read its answers before its next request is looked at."""
READ_AHEAD_MAX = 4
"""Requests that are read ahead of their answers."""
FRAMING_BYTES_FREE = 64 * 1024
"""What the framing of a chunked body may take beyond as many bytes as the body has so far, and what
it may take without a byte of the body."""
CHUNK_BYTES_MIN = 4
"""Many thousand chunks that are smaller than this on average are too many."""
_CHUNKS_FREE = 8192


class Connection(asyncio.BufferedProtocol):
    """A client's connection.

    Attributes:
        transport: `None` before it begins and after it has ended.
        client: see `client_of`.
        remote: the peer's IP address; empty if it has none.
        last: nothing that comes after the requests that are here already is read.
        held: bytes that wait here for more, or for their turn; the server bounds all of them.
        ending: it ends with the answer that comes next.
        half_closed: the client sends nothing more.
        authorities: see `Access`; those of its handshake.
        reading_paused: nothing is read for now.
    """

    __slots__ = (
        "_answering",
        "_at",
        "_at_end",
        "_buffer",
        "_chunks",
        "_drained",
        "_end_timer",
        "_fed",
        "_head",
        "_head_bytes",
        "_head_timer",
        "_idle_timer",
        "_idle_until",
        "_incoming",
        "_is_next",
        "_known",
        "_left",
        "_loop",
        "_messages",
        "_resting",
        "_server",
        "_skipped",
        "_task_handler",
        "_turn",
        "_unread",
        "_write_paused",
        "authorities",
        "client",
        "ending",
        "half_closed",
        "held",
        "last",
        "reading_paused",
        "remote",
        "transport",
    )

    def __init__(self, server: Server) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        # -- of the connection
        self.transport: asyncio.Transport | None = None
        self.client = self.remote = ""
        self.authorities: frozenset[bytes] = frozenset()
        self.last = self.ending = self.half_closed = self.reading_paused = False
        self.held = self._unread = 0
        self._write_paused = self._resting = False
        self._drained: asyncio.Future[None] | None = None
        self._idle_until = 0.0
        self._idle_timer: asyncio.TimerHandle | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._end_timer: asyncio.TimerHandle | None = None
        self._at_end: Callable[[], None] | None = None
        # -- of its input: `_buffer` from `_at` on is not parsed, but for `_fed` bytes of a head
        self._buffer = b""
        self._at = self._fed = self._skipped = self._head_bytes = 0
        self._head: HeadParser | None = None
        # -- of requests
        self._incoming: Request | None = None
        self._left = 0
        self._chunks: ChunkDecoder | None = None
        self._messages: deque[Request | Problem] = deque()
        self._known: KnownHead | None = None  # the last one, for the next request
        self._answering = False  # in a task, or by the source
        self._is_next = False  # the first message's task has not begun to answer it
        self._turn: asyncio.Future[None] | None = None
        self._task_handler: asyncio.Task[None] | None = None

    # -- its life ------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Accepts the connection, or hands the transport to a protocol that refuses it."""
        transport = cast("asyncio.Transport", transport)  # uvloop's are no subclasses
        peer = transport.get_extra_info("peername")
        self.remote = str(peer[0]) if isinstance(peer, tuple) else ""
        self.client = client_of(self.remote)
        if not self._server.let_in(self, transport):
            return
        self.transport = transport
        transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        self.authorities = self._server.authorities
        sock = transport.get_extra_info("socket")
        if self.remote and sock is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        secured = transport.get_extra_info("ssl_object")
        if secured is not None:
            self._follow(secured)
        self._server.connection_made(self)
        self._start_head_timer()
        if rest := self._server.rest_of(self.client):
            self._loop.call_soon(self._rest, rest)  # reading begins after this

    def _follow(self, secured: object) -> None:
        from ingestd.http.tls import Secured  # noqa: PLC0415  there is no TLS before this

        if isinstance(secured, Secured):
            secured.tell(self._secured_end)

    def _rest(self, seconds: float) -> None:
        """Reads nothing for a while."""
        self._resting = True
        self.adjust_reading()
        self._loop.call_later(seconds, self._end_rest)

    def _end_rest(self) -> None:
        self._resting = False
        self.adjust_reading()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        """Ends its timers, and what waits for the client; frees what will not be answered."""
        if self.transport is None:
            return
        self.transport = None
        self._stop_head_timer()
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        if self._end_timer is not None:
            self._end_timer.cancel()
        if self._at_end is not None:
            self._at_end()
        self._drop_input()
        self._messages.clear()
        self._break_body()
        for future in (self._turn, self._drained):
            if future is not None and not future.done():
                future.set_result(None)
        self._server.connection_lost(self)

    @contextlib.contextmanager
    def at_end(self, call: Callable[[], None]) -> Iterator[None]:
        """Calls this if the client goes within the block, or has gone: half a connection, too.

        A peer that closes and one that sends nothing more look the same from here.
        """
        if self.transport is None or self.half_closed:
            call()
        self._at_end = call
        try:
            yield
        finally:
            self._at_end = None

    @property
    def has_certificate(self) -> bool:
        """Returns True if its client showed a certificate."""
        return self.transport is not None and bool(self.transport.get_extra_info("peercert"))

    @property
    def is_busy(self) -> bool:
        """Returns True while a request is answered, or waits for that."""
        return self._answering or bool(self._messages)

    @property
    def task(self) -> asyncio.Task[None] | None:
        """The task that answers a request."""
        return self._task_handler

    def end_soon(self) -> None:
        """Ends it now if nothing is asked, else with the answer that comes next."""
        self.ending = True
        if not (self.is_busy or self._head_bytes or self._buffer):
            self.close()

    def close(self) -> None:
        """Ends it once what was written is sent, or left unread; nothing more is read."""
        self.last = True
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        if transport.get_write_buffer_size():  # the transport waits for its client for ever
            seconds = self._server.write_timeout
            self._end_timer = self._loop.call_later(seconds, transport.abort)
        transport.close()

    # -- timers --------------------------------------------------------------------------------

    def _start_head_timer(self) -> None:
        seconds = self._server.header_timeout
        self._head_timer = self._loop.call_later(seconds, self._end_head)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _end_head(self) -> None:
        """The head of a request was not there in time."""
        if self._head_timer is not None and is_late(self._head_timer.when(), self._loop.time()):
            self._head_timer = self._loop.call_later(LATE_SECONDS, self._end_head)
            return
        self._head_timer = None
        if self._head_bytes:
            detail = f"no whole head after http.header_timeout = {self._server.header_timeout:g} s"
            self._refuse(Problem(problem.HEADER_TIMEOUT, detail))
        else:
            # Nothing was asked: an answer could be taken for that to the first request.
            self.close()

    def _become_idle(self) -> None:
        """The connection is idle from now on, and may be for a while."""
        self._idle_until = self._loop.time() + self._server.keepalive_timeout
        if self._idle_timer is None:
            self._idle_timer = self._loop.call_at(self._idle_until, self._end_idle)

    def _end_idle(self) -> None:
        self._idle_timer = None
        if self.is_busy or self._head_timer is not None:
            return  # not idle; a head that is on its way has its own deadline
        now = self._loop.time()
        if is_late(self._idle_until, now):
            self._idle_until = now + LATE_SECONDS
        elif now >= self._idle_until:
            self.close()
            return
        self._idle_timer = self._loop.call_at(self._idle_until, self._end_idle)

    # -- what comes ----------------------------------------------------------------------------

    def eof_received(self) -> bool:
        """The client sends nothing more (`nc -N`): what it has asked whole is answered.

        Returns:
            Whether the connection is still needed.
        """
        self.half_closed = True
        self._stop_head_timer()
        if self._at_end is not None:
            self._at_end()
        if self._incoming is None:
            return self.is_busy
        # Half a request is none, but those before it are answered.
        needed = bool(self._messages)
        if needed:
            self._break_body()
        return needed

    def _secured_end(self) -> None:
        """The same under TLS, whose transport does not know half of a connection."""
        if not (self.half_closed or self.eof_received()):
            self.close()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's
        """The buffer of the next read, which all connections share."""
        return self._server.buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Takes bytes that were read."""
        self.data_received(bytes(self._server.buffer[:nbytes]))

    def data_received(self, data: bytes) -> None:
        """Parses what came, as far as there is room for requests, and answers the first one."""
        if self.last or self.half_closed:
            return
        idle = not (self._answering or self._buffer or self._head_bytes or self._write_paused)
        if idle and self._take_quickly(data):
            return
        if self._incoming is not None:
            data = self._take_body(self._incoming, data)
        if data:
            self._buffer = self._buffer[self._at :] + data if self._buffer else data
            self._at = 0
            self._parse()
        if self._buffer or self._messages or self._head_bytes or self.held:
            self._hold()

    def _take_quickly(self, data: bytes) -> bool:
        """Hands a whole request with a known head to the source; returns False for any other."""
        known = self._known
        body = known.body_of(data) if known is not None else None
        if known is None or body is None:
            known = self._server.heads.find(data)
            if known is None or (body := known.body_of(data)) is None:
                return False
        if not known.generation.is_valid:
            self._known = None
            return False
        self._known = known
        self._answering = known.take(self, body)
        if self._answering and self._head_timer is not None:
            self._stop_head_timer()
            self._server.spoke(self)
        return self._answering

    def _parse(self) -> None:
        """Reads requests out of the buffer; the first one is begun if none is answered."""
        while (
            self._buffer
            and not self.last
            and self._incoming is None
            and len(self._messages) < READ_AHEAD_MAX
        ):
            request = self._take_head()
            if request is None or not self._find_body(request):
                break
            self._messages.append(request)
            if not self._answering:
                self._begin()
        self.adjust_reading()

    def _take_head(self) -> Request | None:
        """The next head, if it is whole; else the parser has all there is of it."""
        if self._head is None and not self._skip_line_ends():
            return None
        parser, at = self._head or HeadParser(), self._at
        end = self._buffer.find(b"\r\n\r\n", max(at, at + self._fed - 3)) + 4
        try:
            if end < 4:
                parser.feed(self._buffer[at + self._fed :])
                self._head, self._fed = parser, len(self._buffer) - at
                self._head_bytes = self._skipped + self._fed
                if self._head_bytes > HEAD_BYTES_MAX:
                    raise head_too_large()
                self._await_head()
                return None
            head = self._buffer[at:end]
            parser.feed(head[self._fed :] if self._fed else head)
            request = parser.finish(head, self)
        except Problem as found:
            parser.release()
            self._refuse(found.with_traceback(None))
            return None
        self._stop_head_timer()
        self._head = None
        self._fed = self._skipped = self._head_bytes = 0
        self._move_to(end)
        return request

    def _skip_line_ends(self) -> bool:
        """Skips empty lines before a request (RFC 9112, 2.2); returns True if one may begin."""
        if self._buffer[self._at] not in b"\r\n":
            return True
        rest = self._buffer[self._at :]
        begun = rest.lstrip(b"\r\n")
        self._skipped += len(rest) - len(begun)
        self._head_bytes = self._skipped
        self._buffer, self._at = begun, 0
        if self._head_bytes > HEAD_BYTES_MAX:
            self._refuse(head_too_large())
            return False
        if not begun:
            self._await_head()
        return bool(begun)

    def _await_head(self) -> None:
        if self._head_timer is None and not self.half_closed:
            self._start_head_timer()

    def _move_to(self, at: int) -> None:
        if at >= len(self._buffer):
            self._buffer, at = b"", 0
        self._at = at

    def _find_body(self, request: Request) -> bool:
        """Gives a request its body, as far as that has come; returns False if it is broken."""
        length = request.content_length
        if not (length or request.is_chunked):
            return True
        request.content = BodyBuffer(self)
        self._incoming, self._left = request, length or 0
        self._chunks = None if length else ChunkDecoder()
        if self._buffer:
            end = len(self._buffer) if self._chunks is not None else self._at + self._left
            data = self._buffer[self._at : end]
            self._move_to(end)
            self._take_body(request, data)
            if (error := request.content.exception()) is not None:
                # All of it came at once: that is no request, and not one with a broken body.
                cause = error.__cause__
                self._refuse(cause if isinstance(cause, Problem) else unreadable())
                return False
        if self._incoming is not None and self.half_closed:
            self._break_body()
        return True

    def _take_body(self, request: Request, data: bytes) -> bytes:
        """Takes what came of a body; returns what stands behind it."""
        body = request.content
        if self._chunks is not None:
            self._take_chunks(body, self._chunks, data)
            return b""
        left = self._left
        if len(data) < left:
            body.feed(data)
            self._left -= len(data)
            if body.size >= READ_HIGH_BYTES and not self.reading_paused:
                self.adjust_reading()
            return b""
        body.feed(data if len(data) == left else data[:left])
        body.feed_end()
        self._incoming = None
        return data[left:]

    def _take_chunks(self, body: BodyBuffer, chunks: ChunkDecoder, data: bytes) -> None:
        try:
            piece = chunks.feed(data)
        except Problem as found:
            self.last = True
            self._break_body(found.with_traceback(None))
            return
        if piece:
            body.feed(piece)
        # A chunk costs as much as some hundred bytes do, however small it is.
        framing = chunks.wire_bytes - body.total
        if (
            framing > body.total + FRAMING_BYTES_FREE
            or chunks.bare_bytes > FRAMING_BYTES_FREE
            or (chunks.count > _CHUNKS_FREE and len(piece) < chunks.count * CHUNK_BYTES_MIN)
        ):
            self.last = True
            self._break_body(unreadable())
        elif chunks.ended:
            self.last = self.last or chunks.is_followed
            self._chunks = self._incoming = None
            body.feed_end()
        elif body.size >= READ_HIGH_BYTES:
            self.adjust_reading()

    def _break_body(self, cause: Problem | None = None) -> None:
        """The body that is on its way will not come to its end."""
        if self._chunks is not None:
            self._chunks.release()
            self._chunks = None
        request, self._incoming = self._incoming, None
        if request is not None:
            error = BrokenBody("not a valid body")
            error.__cause__ = cause
            request.content.fail(error)

    def _refuse(self, found: Problem) -> None:
        """Answers this, after what is here already, and closes."""
        self.last = True
        self._stop_head_timer()
        self._drop_input()
        if self.transport is None or self.transport.is_closing():
            return
        self._messages.append(found)
        if not self._answering:
            self._begin()

    def _drop_input(self) -> None:
        self._buffer = b""
        self._at = self._fed = self._skipped = self._head_bytes = 0
        if self._head is not None:
            self._head.release()
            self._head = None

    def adjust_reading(self) -> None:
        """Reads, or reads nothing, as there is room for what may come."""
        transport, incoming = self.transport, self._incoming
        if transport is None or transport.is_closing():
            return
        much = READ_LOW_BYTES if self.reading_paused else READ_HIGH_BYTES
        pause = (
            self._resting
            or self._drained is not None
            or (incoming is not None and incoming.content.size >= much)
            or (bool(self._buffer) and len(self._messages) >= READ_AHEAD_MAX)
        )
        if pause != self.reading_paused:
            self.reading_paused = pause
            if pause:
                transport.pause_reading()
            else:
                transport.resume_reading()

    def _hold(self) -> None:
        """Tells the server what is held: input, requests behind another one, answers."""
        size = self._unread
        waiting = len(self._buffer) - self._at
        if self._head is not None or self._head_bytes:
            lines = self._buffer.count(b"\n", self._at)
            size += 3 * self._head_bytes + HEADER_BYTES * lines
        else:
            size += waiting
        # One that is answered next asks for what it holds when that begins. To count it here would
        # end the connections of a client whose large requests come in one turn of the loop.
        for one in islice(self._messages, self._is_next, None):
            if isinstance(one, Request):
                size += one.held
        self._server.hold(self, size)

    # -- what goes -----------------------------------------------------------------------------

    def _begin(self) -> None:
        """Answers the next request, in a task whose context is its own."""
        self._answering = self._is_next = True
        self._task_handler = self._loop.create_task(self._respond())

    async def _respond(self) -> None:
        asked: Request | Problem | None = None
        goes_on = False
        try:
            self._turn = self._server.turns.take(self.client)
            if self._turn is not None:
                await self._turn
                self._turn = None
            if self.transport is not None:
                asked = self._messages.popleft()
                self._is_next = False
                if self.held:
                    self._hold()
                goes_on = await self._answer(asked)
        except Exception:
            log.exception("connection_failed")
        finally:
            self._ended(asked, goes_on)

    async def _answer(self, asked: Request | Problem) -> bool:
        """Answers a request; returns True if another one may follow."""
        if isinstance(asked, Problem):
            log.debug("request_unreadable", kind=asked.kind.slug)
            answer = Response(asked.kind.status, PROBLEM, asked.body(), close=True)
        else:
            answer = await self._server.answer(asked)
        goes_on = self._send(answer, asked)
        if self._write_paused:
            goes_on = await self._sent(answer.write_timeout) and goes_on
        if isinstance(asked, Request) and not asked.content.is_eof() and self.transport is not None:
            # To close now, with the body unread, would take the answer from the client.
            goes_on = await self._linger(asked.content) and goes_on
        return goes_on

    def finish_quick(self, answer: bytes, *, close: bool, write_timeout: float) -> None:
        """Writes the answer of a request that was taken quickly.

        Args:
            answer: head and body, without `Connection`.
            close: the connection ends with it.
            write_timeout: see `Response`.
        """
        transport = self.transport
        if transport is None or transport.is_closing():
            self._answering = False
            return
        close = close or self.ending or self._is_last
        if close:
            answer = answer.replace(b"\r\n\r\n", b"\r\n" + CLOSE + b"\r\n", 1)
        transport.write(answer)
        if self._write_paused:
            self._task_handler = self._loop.create_task(self._stall(write_timeout, not close))
        elif close or self._buffer or self._messages or self.held:
            self._ended(None, not close)
        else:
            self._answering = False
            self._become_idle()

    async def _stall(self, seconds: float, goes_on: bool) -> None:
        try:
            goes_on = await self._sent(seconds) and goes_on
        finally:
            self._ended(None, goes_on)

    def go_ordinary_way(self, body: bytes, found: Problem | None = None) -> None:
        """Answers a request that was taken quickly like any other, or with a problem."""
        self._answering = False
        if self.transport is not None and self._known is not None:
            self._messages.appendleft(found or self._known.request(self, body))
            self._begin()

    def _send(self, answer: Response, asked: Request | Problem) -> bool:
        """Writes an answer; returns True if the connection is to be kept open after it."""
        transport = self.transport
        if transport is None or transport.is_closing():
            return False
        keeps = not (answer.close or self.ending or self._is_last)
        connection, bodiless = b"" if keeps else CLOSE, False
        if isinstance(asked, Request):
            bodiless = asked.method == "HEAD"
            if asked.close:
                keeps, connection = False, CLOSE
            elif keeps and asked.version == HTTP10:
                connection = KEEP
        transport.write(
            encode(
                answer.status,
                answer.content_type,
                answer.body,
                headers=answer.headers,
                connection=connection,
                bodiless=bodiless,
            )
        )
        return keeps

    @property
    def _is_last(self) -> bool:
        """Returns True if no request is behind the one that is answered, and none will be."""
        return (self.last or self.half_closed) and not self._messages

    def pause_writing(self) -> None:
        """Much of what was written is not sent yet."""
        self._write_paused = True

    def resume_writing(self) -> None:
        """Little of it is left."""
        self._write_paused = False
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    async def _sent(self, seconds: float) -> bool:
        """Waits until the client has read its answers, and reads nothing of it meanwhile."""
        transport = self.transport
        if transport is None:
            return False
        self._drained = self._loop.create_future()
        self.adjust_reading()
        self._unread = transport.get_write_buffer_size()
        self._hold()
        try:
            async with async_timeout.timeout(seconds):
                await self._drained
        except TimeoutError:
            transport.abort()
            return False
        finally:
            self._drained, self._unread = None, 0
        self.adjust_reading()
        return self.transport is not None

    async def _linger(self, body: BodyBuffer) -> bool:
        """Reads what is left of a body for a while; returns True if that was all of it."""
        try:
            async with async_timeout.timeout(LINGER_SECONDS):
                while not body.is_eof():
                    await body.readany()
        except TimeoutError:
            return False
        except BrokenBody:
            return False  # not what it should be, or the client has gone
        return True

    def _ended(self, asked: Request | Problem | None, goes_on: bool) -> None:
        """A request is over: the next one follows, or the connection ends, or it is idle."""
        self._answering = False
        self._task_handler = None
        error = asked.content.exception() if isinstance(asked, Request) else None
        if error is not None:
            # It was raised in frames that hold the request, which holds the body, which holds the
            # error: all of that would last until the next collection of old cycles.
            error.__traceback__ = error.__context__ = error.__cause__ = None
        if self.transport is None:
            return
        if not goes_on:
            self._messages.clear()
            self._drop_input()
            self.close()
            return
        if self._messages:
            self._begin()
        self._parse()
        if not self._answering:
            if self.last or self.half_closed or self.ending:
                self.close()
            else:
                self._become_idle()
        if self.held:
            self._hold()
