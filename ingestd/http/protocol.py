"""One connection: aiohttp's, with deadlines, bounds and strictness that it does not have.

What comes goes through `data_received`, which sees to it that it is a request as it should be;
`start` answers one request after the other.
"""

from __future__ import annotations

import contextlib
from itertools import chain
from typing import TYPE_CHECKING, cast

import async_timeout
from aiohttp import HttpVersion10, web, web_protocol
from aiohttp.http_exceptions import BadHttpMessage, LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import ERROR, RequestPayloadError, _ErrInfo
from structlog.contextvars import clear_contextvars

from ingestd.base.logging import get_logger
from ingestd.http import problem
from ingestd.http.deadlines import LATE_SECONDS, is_late
from ingestd.http.peer import client_of
from ingestd.http.problem import Problem
from ingestd.http.response import CLOSE, KEEP, PROBLEM, Response, encode
from ingestd.http.routing import fault, line_is_spaced
from ingestd.http.tls import Secured

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator, Sequence

    from aiohttp.abc import AbstractStreamWriter
    from aiohttp.http import RawRequestMessage
    from aiohttp.streams import StreamReader

    from ingestd.http.server import Server

log = get_logger()

HEAD_BYTES_MAX = 32 * 1024
"""The head of one request, all lines together."""
FRAMING_BYTES_FREE = 64 * 1024
"""What the framing of a chunked body may take beyond as many bytes as the body has so far."""
CHUNK_BYTES_MIN = 4
"""Many thousand chunks that are smaller than this on average are too many."""
LINGER_SECONDS = 2.0
"""How long what is left of a refused body is read, so that the client gets to see its answer."""
WRITE_BUFFER_BYTES = 16 * 1024
"""From here on a client has to read its answers before its next request is looked at."""

READ_BYTES = 128 * 1024
"""aiohttp's read buffer of a body: it stops reading at twice that, or at a sixteenth in chunks."""

READ_AHEAD_MAX = 4
"""Requests that are read ahead of their answers. aiohttp's 32 are a MiB of objects, if their heads
are many small lines."""

HEADER_BYTES = 400
"""What a line of a head takes beside its own bytes, of which there are three copies."""

web_protocol.MAX_MSG_QUEUE_SIZE = READ_AHEAD_MAX  # no argument says it

READ_LOW_BYTES = 32 * 1024
READ_HIGH_BYTES = 64 * 1024
"""From here on a body is not read before its reader has taken some of it."""

_CHUNKS_MAX = READ_BYTES // 16
_CHUNK_BYTES = 64
_CHUNKED_END = b"\r\n0\r\n\r\n"
_HEAD_TOO_LARGE = Problem(
    problem.HEADERS_TOO_LARGE, f"the head of the request has more than {HEAD_BYTES_MAX} bytes"
)
_NO_WRITER = cast("AbstractStreamWriter", None)
"""Answers are written without one."""


def size_of_head(headers: Sequence[tuple[bytes, bytes]]) -> int:
    """Size of a head in memory: as it came, decoded, and as a map."""
    return 3 * sum(map(len, chain.from_iterable(headers))) + HEADER_BYTES * len(headers)


def _let_go(body: StreamReader) -> None:
    """Frees the unread rest of a body that broke.

    Its error was raised in frames that hold the request, which holds the body, which holds the
    error: all of that would last until the next collection of old cycles.
    """
    error = body.exception()
    if error is not None:
        error.__traceback__ = error.__context__ = None
        body._buffer.clear()  # noqa: SLF001


class Connection(web.RequestHandler):
    """A client's connection.

    Attributes:
        last: nothing that comes after the requests that are here already is read.
        held: bytes that wait here for more, or for their turn; the server bounds all of them.
        ending: it ends with the answer that comes next.
        half_closed: the client sends nothing more.
        authorities: see `Access`; those of its handshake.
    """

    __slots__ = (
        "_at_end",
        "_body",
        "_chunked",
        "_end",
        "_end_waits",
        "_head_bytes",
        "_head_lines",
        "_head_timer",
        "_line",
        "_paused_at",
        "_turn",
        "_unread",
        "_wire_bytes",
        "authorities",
        "client",
        "ending",
        "half_closed",
        "held",
        "last",
    )

    _manager: Server

    def __init__(self, server: Server, **settings: object) -> None:
        super().__init__(server, **settings)  # type: ignore[arg-type]
        self.client = ""
        self.last = False
        self.ending = False
        self.half_closed = False
        self.authorities: frozenset[bytes] = frozenset()
        self.held = 0
        self._at_end: Callable[[], None] | None = None
        self._end_waits = False  # under TLS, for what the parser still holds
        self._body: StreamReader = EMPTY_PAYLOAD
        self._chunked = False
        self._end = b""
        self._wire_bytes = 0
        self._paused_at = 0
        self._head_bytes = 0
        self._head_lines = 0
        self._unread = 0
        self._line = b""
        self._head_timer: asyncio.TimerHandle | None = None
        self._turn: asyncio.Future[None] | None = None

    # -- its life ------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Accepts the connection, or hands the transport to a protocol that refuses it."""
        transport = cast("asyncio.Transport", transport)  # uvloop's are no subclasses
        peer = transport.get_extra_info("peername")
        self.client = client_of(str(peer[0]) if isinstance(peer, tuple) else "")
        if not self._manager.let_in(self, transport):
            return
        transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        self.authorities = self._manager.authorities
        secured = transport.get_extra_info("ssl_object")
        if isinstance(secured, Secured):
            secured.tell(self._secured_end)
        super().connection_made(transport)
        self._start_head_timer()
        if rest := self._manager.rest_of(self.client):
            self._loop.call_soon(self._rest, rest)  # reading begins after this

    def _rest(self, seconds: float) -> None:
        """Reads nothing for a while."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.pause_reading()
            self._loop.call_later(seconds, self._end_rest)

    def _end_rest(self) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Ends its timer, and tasks whose answer would not be read."""
        self._stop_head_timer()
        if self._at_end is not None:
            self._at_end()
        super().connection_lost(exc)
        # What nobody will answer is freed now, and not in the next collection of old cycles.
        self._messages.clear()
        self._line = b""
        if not self._request_in_progress:
            self._body = EMPTY_PAYLOAD
        if self._turn is not None and not self._turn.done():
            self._turn.set_result(None)

    @contextlib.contextmanager
    def at_end(self, call: Callable[[], None]) -> Iterator[None]:
        """Calls this if the client goes within the block, or has gone: half a connection, too.

        Whoever closes and whoever sends nothing more looks the same from here.
        """
        if self.transport is None or self.half_closed:
            call()
        self._at_end = call
        try:
            yield
        finally:
            self._at_end = None

    def _process_keepalive(self) -> None:
        if self._head_timer is not None:
            self._keepalive_handle = None  # not idle: a head is on its way, with its own deadline
            return
        now = self._loop.time()
        if is_late(self._next_keepalive_close_time, now):
            self._next_keepalive_close_time = again = now + LATE_SECONDS
            self._keepalive_handle = self._loop.call_at(again, self._process_keepalive)
            return
        super()._process_keepalive()

    def _start_head_timer(self) -> None:
        seconds = self._manager.header_timeout
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
            detail = f"no whole head after http.header_timeout = {self._manager.header_timeout:g} s"
            self._refuse(Problem(problem.HEADER_TIMEOUT, detail))
        else:
            # Nothing was asked: an answer could be taken for that to the first request.
            self.force_close()

    @property
    def has_certificate(self) -> bool:
        """Returns True if its client showed a certificate."""
        return self.transport is not None and bool(self.transport.get_extra_info("peercert"))

    def end_soon(self) -> None:
        """Ends it now if nothing is asked, else with the answer that comes next."""
        self.ending = True
        idle = not (self._messages or self._request_in_progress or self._head_bytes)
        if idle:
            self.force_close()

    # -- what comes ----------------------------------------------------------------------------

    def eof_received(self) -> bool:  # type: ignore[override]  # aiohttp never keeps one open
        """The client sends nothing more (`nc -N`): what it has asked whole is answered.

        Returns:
            Whether the connection is still needed.
        """
        waiting = len(self._messages) + self._request_in_progress
        if not self._body.is_eof():
            waiting -= 1
            if waiting:
                self._break_body()
        self.half_closed = self.last = True
        self._stop_head_timer()
        if self._at_end is not None:
            self._at_end()
        return waiting > 0

    def _secured_end(self) -> None:
        """The same under TLS, whose transport does not know half of a connection."""
        if self._reading_paused:
            self._end_waits = True  # a body that came with it is not read yet
        elif not (self.half_closed or self.eof_received()) and self.transport is not None:
            self.transport.close()

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Goes on with what the parser holds, and with the end that came behind it."""
        web.RequestHandler.resume_reading(self, resume_parser)  # `super()` costs as much again
        if self._end_waits and not self._reading_paused:
            self._end_waits = False
            self._secured_end()

    def data_received(self, data: bytes) -> None:
        """Parses what came, and sees to what the parser does not."""
        if self.last:
            return
        before = len(self._messages)
        in_body = not self._body.is_eof()
        super().data_received(data)
        if self._chunked:
            self._see_chunks(len(data))
        # Of what came with the last line of a head, too: the body's end may lie on both sides.
        self._end = data[-7:] if len(data) > 6 else (self._end + data)[-7:]
        if self._chunked or len(self._messages) != before:
            self._see_messages(before, data)
        elif data and not in_body:
            self._see_part_of_a_head(data)
        if len(self._messages) > 1 or self._head_bytes or self.held:
            self._manager.hold(self, self._count_held(len(data)))

    def _see_part_of_a_head(self, data: bytes) -> None:
        if self._head_timer is None:
            self._start_head_timer()
        if b"\n" not in self._line:
            self._line += data
        self._head_bytes += len(data)
        self._head_lines += data.count(b"\n")
        if self._head_bytes > HEAD_BYTES_MAX:
            self._refuse(_HEAD_TOO_LARGE)

    def _see_chunks(self, size: int) -> None:
        """Bounds what is not the body in a chunked body: sizes, extensions, trailers.

        A chunk costs as much as some hundred bytes do, however small it is.
        """
        self._wire_bytes += size
        total = self._body.total_bytes
        if self._reading_paused:
            # Not all of it is parsed: aiohttp has as many bytes, or as many chunks, as it may.
            grown, self._paused_at = total - self._paused_at, total
            if grown >= _CHUNKS_MAX // 2 * CHUNK_BYTES_MIN:
                return
        elif self._wire_bytes - total <= total + FRAMING_BYTES_FREE:
            return
        self._break_body()
        self._end_after(0)
        self._chunked = False

    def _see_messages(self, before: int, data: bytes) -> None:
        """Looks at what has become whole: heads, or the end of a chunked body."""
        messages = self._messages
        if self._chunked and self._body.is_eof():
            self._chunked = False
            if len(messages) != before or not self._ended_as_most():
                self._end_after(before)
        large = self._head_bytes + len(data) > HEAD_BYTES_MAX  # one of the heads may be
        if self._line:
            self._line, data = b"", self._line + data
        for index in range(before, len(messages)):
            self._stop_head_timer()
            self._head_bytes = self._head_lines = 0
            message, body = messages[index]
            if isinstance(message, _ErrInfo):
                self.last = True
                self._break_body()
                return
            detail = fault(message)
            if not detail and index == before and line_is_spaced(data, message):
                detail = "the request line has more than one space between its words"
            if detail or (large and _head_size(message) > HEAD_BYTES_MAX):
                self._end_after(index)
                self._refuse(Problem(problem.BAD_REQUEST, detail) if detail else _HEAD_TOO_LARGE)
                return
            self._body = body
            whole = body.is_eof()
            if not whole:
                # The number of chunks goes by READ_BYTES; of bytes it need not be as much.
                body._low_water = READ_LOW_BYTES  # noqa: SLF001
                body._high_water = READ_HIGH_BYTES  # noqa: SLF001
            self._chunked = message.chunked and not whole
            self._wire_bytes = self._paused_at = 0
            if message.upgrade:  # CONNECT too; answered like any other, and then it is over
                messages[index] = (message._replace(should_close=True), body)
            more = index + 1 < len(messages)
            if message.chunked and whole and (more or not self._ended_as_most()):
                self._end_after(index + 1)
                return

    def _ended_as_most(self) -> bool:
        """Returns True if the data is the usual end of a chunked body, without trailers.

        aiohttp's parser takes the last trailer for a header of the next request.
        """
        paused = self._buffer_paused or self._reading_paused  # something may have been left over
        return self._end == _CHUNKED_END and not paused

    def _end_after(self, number: int) -> None:
        """The requests that wait are this many, and no more are read."""
        self.last = True
        while len(self._messages) > number:
            self._messages.pop()

    def _break_body(self) -> None:
        # An error in the middle of a body is queued as the next request, and who reads the body
        # would wait for the rest until it times out. It also is at its end, or aiohttp would read
        # what is left of it and log what it finds.
        if not self._body.is_eof():
            self._body.set_exception(RequestPayloadError("not a valid body"))
            self._body.feed_eof()

    def _count_held(self, size: int) -> int:
        """Counts the bytes held: a part of a head, requests behind another one, an answer."""
        if not self._messages:
            return self._unread + 3 * self._head_bytes + HEADER_BYTES * self._head_lines
        bodies = self._unread
        for message, body in self._messages:
            if isinstance(message, _ErrInfo):
                continue
            bodies += size_of_head(message.raw_headers)
            if body is not EMPTY_PAYLOAD:
                bodies += body.total_bytes
                if message.chunked:  # each chunk is an object or two
                    bodies += min(body.total_bytes, _CHUNKS_MAX) * _CHUNK_BYTES
        return max(bodies + size, 0 if size else self.held)

    def _refuse(self, found: Problem) -> None:
        """Answers this, after what is here already, and closes."""
        self.last = True
        self._stop_head_timer()
        # Whose loss is on its way is not woken any more: aiohttp's task would find nothing to
        # work with.
        if self.transport is None or self.transport.is_closing():
            return
        self._messages.append((_ErrInfo(found.kind.status, found, ""), EMPTY_PAYLOAD))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    @property
    def is_last(self) -> bool:
        """Returns True if the request that is being answered is the last one."""
        return self.last and not self._messages

    @property
    def is_waiting(self) -> bool:
        """Returns True if something is held now; `held` may be out of date."""
        return bool(self._messages or self._head_bytes or self._unread)

    # -- what goes -----------------------------------------------------------------------------

    async def start(self) -> None:
        """Answers one request after the other, in the connection's own task.

        aiohttp's own makes a task for each, whose context variables end with it. A task costs as
        much as a small request's records, and the one variable that we set is set anew each time.
        """
        while not self._force_close:
            if not self._messages:
                try:
                    self._waiter = self._loop.create_future()
                    await self._waiter
                finally:
                    self._waiter = None
            turn = self._manager.turns.take(self.client)
            if turn is not None:
                self._turn = turn
                await turn
                self._turn = None
                if self.transport is None:
                    return
            message, body = self._messages.popleft()
            if self.held and not self.is_waiting:
                self._manager.let_go(self)
            if self._parser is not None:
                self._parser.message_consumed()
            if self._buffer_paused and len(self._messages) <= self._msg_queue_resume_size:
                self._resume_reading_if_drained()
            try:
                goes_on = await self._respond(message, body)
            except Exception:
                log.exception("connection_failed")
                self.force_close()
                return
            if not goes_on or self._close or self._force_close or self.is_last:
                break
            self._await_next()
        if not self._force_close:
            self._task_handler = None
            if self.transport is not None:
                self.transport.close()

    async def _respond(self, message: RawRequestMessage | _ErrInfo, body: StreamReader) -> bool:
        """Answers a request; returns True if another one may follow."""
        self._request_in_progress = True
        try:
            if isinstance(message, _ErrInfo):
                clear_contextvars()  # it is none of those before it
                answer, message = self._explain(message), ERROR
            else:
                request = web.BaseRequest(
                    message, body, self, _NO_WRITER, self._task_handler, self._loop  # type: ignore[arg-type]
                )  # fmt: skip
                self._current_request = request
                try:
                    answer = await self._manager.answer(request)
                finally:
                    self._current_request = None
            goes_on = await self._send(answer, message)
            transport = self.transport
            if not body.is_eof() and transport is not None and not transport.is_closing():
                # To close now, with the body unread, would take the answer from the client.
                goes_on = await self._linger(body) and goes_on
            return goes_on
        finally:
            self._request_in_progress = False
            # Looked at without a call: it is for each request.
            if body is not EMPTY_PAYLOAD and body._exception is not None:  # noqa: SLF001
                _let_go(body)
            if self._handler_waiter is not None:
                self._handler_waiter.set_result(None)

    async def _send(self, answer: Response, message: RawRequestMessage) -> bool:
        """Writes an answer; whether the connection is to be kept open after it."""
        transport = self.transport
        if transport is None or transport.is_closing():
            return False
        keeps = not (answer.close or message.should_close or self.is_last or self.ending)
        connection = b"" if keeps else CLOSE
        if keeps and message.version == HttpVersion10:
            connection = KEEP
        transport.write(
            encode(
                answer.status,
                answer.content_type,
                answer.body,
                headers=answer.headers,
                connection=connection,
                bodiless=message.method == "HEAD",
            )
        )
        if self._paused:
            return await self._sent(transport, answer.write_timeout) and keeps
        return keeps

    async def _sent(self, transport: asyncio.Transport, seconds: float) -> bool:
        """Waits until the client has read its answers, and reads nothing of it meanwhile."""
        self._pause_reading_for_buffer()
        self._unread = transport.get_write_buffer_size()
        self._manager.hold(self, self._count_held(0))
        try:
            async with async_timeout.timeout(seconds):
                await self._drain_helper()
        except (TimeoutError, ConnectionError):
            transport.abort()
            return False
        finally:
            self._unread = 0
        if len(self._messages) <= self._msg_queue_resume_size:
            self._resume_reading_if_drained()
        return True

    async def _linger(self, body: StreamReader) -> bool:
        """Reads what is left of a body for a while; whether that was all of it."""
        try:
            async with async_timeout.timeout(LINGER_SECONDS):
                while not (body.is_eof() or self._force_close):
                    await body.readany()
        except TimeoutError:
            return False
        except RequestPayloadError:
            return False  # not what it should be, or the client has gone
        return True

    def _await_next(self) -> None:
        """The connection is idle from now on, and may be for a while."""
        self._keepalive = True
        self._next_keepalive_close_time = due = self._loop.time() + self._keepalive_timeout
        if self._keepalive_handle is None:
            self._keepalive_handle = self._loop.call_at(due, self._process_keepalive)

    def _explain(self, error: _ErrInfo) -> Response:
        """The answer to bytes that are not HTTP."""
        exc = error.exc
        if isinstance(exc, Problem):
            found = exc
        elif isinstance(exc, LineTooLong):
            found = Problem(problem.HEADERS_TOO_LARGE, "a line of the head is too long")
        elif isinstance(exc, BadHttpMessage) and exc.message.startswith("Too many headers"):
            found = Problem(problem.HEADERS_TOO_LARGE, "the head has too many lines")
        elif error.status == 400:
            found = Problem(problem.BAD_REQUEST, "it can't be read as HTTP/1.1")
        else:
            found = Problem(problem.INTERNAL, "see the log")
            log.error("request_failed", exc_info=exc)
        log.debug("request_unreadable", kind=found.kind.slug, error=type(exc).__name__)
        return Response(found.kind.status, PROBLEM, found.body(), close=True)


def _head_size(message: RawRequestMessage) -> int:
    """Bytes of a head, without the white space that may stand around values."""
    lines = sum(len(name) + len(value) + 4 for name, value in message.raw_headers)
    return len(message.method) + len(message.path) + len(" HTTP/1.1\r\n\r\n") + 1 + lines
