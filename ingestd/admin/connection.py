"""Connections of the admin server: one request each, few at one time, and seconds to live.

A connection reads one head, and the body of a `POST`, and gives the request to the server. The
answer is one write, or a stream, whose connection lives on beside the others: it does not count
among them, and the page that opens it bounds their number. A reader that takes nothing of a stream
for a while is hung up on, so a stream holds no more than one piece beyond what the kernel takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING, NamedTuple, cast

import async_timeout
import httptools

from ingestd.base.logging import get_logger
from ingestd.http import problem
from ingestd.http.peer import uid_of
from ingestd.http.problem import Problem
from ingestd.http.response import CLOSE, PROBLEM, Response, encode

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping

    from ingestd.admin.access import Need

CONNECTIONS_MAX = 64
"""Connections at one time; for one more one of those that ask nothing is hung up on."""
CONNECTION_SECONDS = 10.0
"""A connection's whole life: to send its request and to take its answer."""
ANSWER_SECONDS = 60.0
"""A connection's life from a whole request on whose answer takes a look at a disk."""
STALL_SECONDS = 10.0
"""Time after which a reader that takes nothing of a stream is hung up on."""
CLOSE_SECONDS = 1.0
"""How long `close` waits for answers that are on their way, and an answer for the rest of what its
client sends."""
ANSWERS_BYTES_MAX = 32 * 1024 * 1024
"""Answers that wait for their readers, beside one; for one more the oldest are given up."""
HEAD_BYTES_MAX = 32 * 1024
"""A request, all of it that is looked at, without the body of a change."""
BODY_BYTES_MAX = 256 * 1024
"""The body of a change."""
PIECE_BYTES = 256 * 1024
"""The part of a stream's lines that is made at once, beside one line."""

_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

log = get_logger()


class AdminRequest(NamedTuple):
    """A request.

    Attributes:
        method: in capital letters.
        target: as the request line has it.
        headers: names in small letters; values of one name are joined with commas.
        is_unix: it came over a Unix socket.
        peer: its sender, for the log.
        body: of a `POST`.
        principal: the name of its token, once it was let in; empty without one.
    """

    method: str
    target: str
    headers: dict[str, str]
    is_unix: bool = False
    peer: str = ""
    body: bytes = b""
    principal: str = ""


class Outlet:
    """The body of a stream, as it is written.

    Args:
        transport: of its connection.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.flows = asyncio.Event()
        self.flows.set()

    async def send(self, data: bytes) -> None:
        """Writes a piece, and waits until the reader has taken most of it.

        Raises:
            TimeoutError: it takes nothing.
        """
        if data:
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        if not self.flows.is_set():
            async with async_timeout.timeout(STALL_SECONDS):
                await self.flows.wait()


class StreamedResponse(NamedTuple):
    """An answer whose body is written piece by piece, in chunks of HTTP/1.1.

    Attributes:
        content_type: of the body.
        write: writes it; ends, or is cancelled when its reader has gone.
        is_allowed: tells if it may go on, after a reload.
        headers: more of them.
    """

    content_type: str
    write: Callable[[Outlet], Awaitable[None]]
    is_allowed: Callable[[], bool]
    headers: Mapping[str, str] = {}


def pieced(lines: Iterator[bytes]) -> bytes:
    """Takes the next piece of a stream's lines; empty at their end."""
    found, size = [], 0
    for line in lines:
        found.append(line)
        size += len(line)
        if size >= PIECE_BYTES:
            break
    return b"".join(found)


Answer = Response | StreamedResponse


class AdminPage(NamedTuple):
    """A page, or an action, of the admin address.

    Attributes:
        need: the right that it needs.
        answer: gives the answer, at once, or later if it has to wait; raises `Problem`.
    """

    need: Need
    answer: Callable[[AdminRequest], Response | Awaitable[Answer]]


def as_response(problem: Problem) -> Response:
    """The answer that a problem is."""
    return Response(problem.kind.status, PROBLEM, problem.body() + b"\n", problem.headers)


def encoded(response: Response, *, bodiless: bool = False) -> bytes:
    """An answer as HTTP, the last one of its connection."""
    return encode(
        response.status,
        response.content_type,
        response.body,
        headers={**_HEADERS, **response.headers},
        connection=CLOSE,
        bodiless=bodiless,
    )


class _Connection(asyncio.Protocol):
    """One connection: reads one request, answers it, and ends.

    Attributes:
        asks: a head has come.
        is_allowed: see `StreamedResponse`.
    """

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._parser: httptools.HttpRequestParser | None = httptools.HttpRequestParser(self)
        self._size = 0
        self._target = b""
        self._headers: dict[str, str] = {}
        self._body = bytearray()
        self._is_whole = self._is_broken = False
        self._outlet: Outlet | None = None
        self._task: asyncio.Task[None] | None = None
        self.asks = False
        self.is_allowed: Callable[[], bool] = lambda: True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is none by its class
        self._connections.enter(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """See `asyncio.Protocol`."""
        self._parser = None  # it holds this object
        if self._task is not None:
            self._task.cancel()
        self._connections.leave(self)

    def eof_received(self) -> bool:
        """Keeps the connection for an answer that is not written out."""
        if self._parser is None and self._task is None:
            self.transport.close()
            return True
        return self._task is not None

    def pause_writing(self) -> None:
        """See `asyncio.Protocol`."""
        if self._outlet is not None:
            self._outlet.flows.clear()

    def resume_writing(self) -> None:
        """See `asyncio.Protocol`."""
        if self._outlet is not None:
            self._outlet.flows.set()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        parser = self._parser
        if parser is None:
            return  # behind the request
        self._size += len(data)
        asked = self.asks
        try:
            parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # answered like any other request; nothing is upgraded
        except httptools.HttpParserError:
            self._is_broken = not self._is_whole
        has_body = self.asks and parser.get_method() == b"POST"
        bound = HEAD_BYTES_MAX + (BODY_BYTES_MAX if has_body else 0)
        if self._is_broken or self._size > bound:
            # Without a log line, which every client could fill.
            page = as_response(Problem(problem.BAD_REQUEST, "it can't be read as HTTP/1.1"))
            self._write(encoded(page).replace(b"HTTP/1.1", b"HTTP/1.0", 1))
        elif has_body and not self._is_whole:
            if not asked and self._headers.get("expect", "").lower() == "100-continue":
                self.transport.write(_CONTINUE)
        elif self.asks:
            self._ask(parser)

    def _ask(self, parser: httptools.HttpRequestParser) -> None:
        method, version = parser.get_method().decode(), parser.get_http_version()
        sock, peer = self.transport.get_extra_info("socket"), uid_of(self.transport)
        name = self.transport.get_extra_info("peername")
        request = AdminRequest(
            method,
            self._target.decode("utf-8", "replace"),
            self._headers,
            is_unix=sock is not None and sock.family == socket.AF_UNIX,
            peer=peer or (str(name[0]) if name else ""),
            body=bytes(self._body),
        )
        answer = self._connections.page(request)
        if isinstance(answer, Response):
            self._write(encoded(answer, bodiless=method == "HEAD"))
            return
        self._parser = None
        self._connections.prolong(self, ANSWER_SECONDS)
        self._task = asyncio.get_running_loop().create_task(
            self._answer_later(answer, bodiless=method == "HEAD", chunked=version == "1.1"),
            name="admin-answer",
        )

    async def _answer_later(
        self, answer: Awaitable[Answer], *, bodiless: bool, chunked: bool
    ) -> None:
        found = await answer
        if isinstance(found, Response):
            self._write(encoded(found, bodiless=bodiless))
            return
        try:
            if not chunked:
                text = "this answer is a stream, which needs HTTP/1.1"
                self._write(encoded(as_response(Problem(problem.BAD_REQUEST, text))))
                return
            head = {"Content-Type": found.content_type, "Transfer-Encoding": "chunked"}
            whole = Response(200, b"", b"", {**head, **found.headers})
            self.transport.write(encoded(whole, bodiless=True))
            if not bodiless:
                self._connections.prolong(self, None)
                self.is_allowed = found.is_allowed
                self._outlet = Outlet(self.transport)
                await found.write(self._outlet)
                self.transport.write(b"0\r\n\r\n")
            self.transport.close()
        except TimeoutError:
            self.transport.abort()  # its reader takes nothing
        except Exception:
            # Without its last chunk, so that it is not taken for a whole one.
            log.exception("admin_stream_failed")
            self.transport.abort()

    def _write(self, answer: bytes) -> None:
        self._parser = None
        self._connections.make_room(len(answer))
        self.transport.write(answer)
        if self._is_whole and not self._is_broken:
            self.transport.close()
            return
        # What is not read would make the kernel throw the answer away with the connection.
        if self.transport.can_write_eof():
            self.transport.write_eof()
        asyncio.get_running_loop().call_later(CLOSE_SECONDS, self.transport.close)

    # -- what the parser calls -----------------------------------------------------------------

    def on_url(self, url: bytes) -> None:
        self._target += b"" if self._is_whole else url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_whole:
            return  # of another request
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        before = self._headers.get(key)
        self._is_broken |= key == "host" and before is not None
        self._headers[key] = text if before is None else f"{before}, {text}"

    def on_headers_complete(self) -> None:
        self.asks = True

    def on_body(self, body: bytes) -> None:
        if not self._is_whole:
            self._body += body

    def on_message_complete(self) -> None:
        self._is_whole = True


class Connections:
    """A protocol factory that lets few connections in, each for a while.

    Args:
        page: answers a request, at once or later.
    """

    def __init__(self, page: Callable[[AdminRequest], Response | Awaitable[Answer]]) -> None:
        self.page = page
        self._inside: dict[_Connection, asyncio.TimerHandle] = {}
        self._streaming: set[_Connection] = set()
        self._left = asyncio.Event()

    def __call__(self) -> _Connection:
        """A protocol for a connection that has just been accepted."""
        return _Connection(self)

    def enter(self, connection: _Connection) -> None:
        """Starts the connection's clock, and hangs up on the first idle one of too many.

        A client that holds connections and asks nothing must not keep a probe from its answer: a
        service manager ends what does not give one.
        """
        if len(self._inside) >= CONNECTIONS_MAX:
            idle = (one for one in self._inside if not one.asks)
            given_up = next(idle, next(iter(self._inside)))
            self._inside.pop(given_up).cancel()
            given_up.transport.abort()
        self.prolong(connection, CONNECTION_SECONDS)

    def prolong(self, connection: _Connection, seconds: float | None) -> None:
        """Gives a connection so many seconds from now on; with `None` it is a stream."""
        timer = self._inside.pop(connection, None)
        if timer is not None:
            timer.cancel()
        if seconds is None:
            self._streaming.add(connection)
            return
        # `abort`, not `close`: that would wait for a reader that takes no answer.
        abort = connection.transport.abort
        self._inside[connection] = asyncio.get_running_loop().call_later(seconds, abort)

    def make_room(self, size: int) -> None:
        """Hangs up on the readers that took nothing for longest, until an answer has room."""
        waiting = [(one, one.transport.get_write_buffer_size()) for one in self._inside]
        excess = size + sum(held for _, held in waiting) - ANSWERS_BYTES_MAX
        for one, held in waiting:
            if excess <= 0:
                break
            if held:
                excess -= held
                one.transport.abort()

    def leave(self, connection: _Connection) -> None:
        """Stops the connection's clock."""
        timer = self._inside.pop(connection, None)
        if timer is not None:
            timer.cancel()
        self._streaming.discard(connection)
        self._left.set()

    def look_again(self) -> None:
        """Ends the streams that may not go on."""
        for one in [*self._streaming]:
            if not one.is_allowed():
                one.transport.abort()

    async def hang_up(self) -> None:
        """Ends all connections; those in the middle of an answer get a moment."""
        for one in [*self._inside, *self._streaming]:
            if not one.asks or one in self._streaming:
                one.transport.abort()
        with contextlib.suppress(TimeoutError):
            async with async_timeout.timeout(CLOSE_SECONDS):
                while self._inside:
                    self._left.clear()
                    await self._left.wait()
        for one in list(self._inside):
            one.transport.abort()
