"""The admin server: health, metrics and status, on an address of its own.

Every connection carries one request and has seconds to live, and there are few of them. So nothing
that happens here, and nothing that happens where records come in, can lock operators out. That is
also why it shares nothing with the server of records but the form of an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import sys
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import async_timeout
import httptools
import msgspec

from ingestd.base.errors import AddressError
from ingestd.base.logging import get_logger
from ingestd.config.network import Hosts, authority_of, is_foreign, is_loopback, parse_listen
from ingestd.host.sockets import is_local, show_socket
from ingestd.http.response import CLOSE, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ingestd.admin.status import AdminView
    from ingestd.base.metrics import Metrics
    from ingestd.settings import AdminSettings

CONNECTIONS_MAX = 64
"""Connections at one time; for one more one of those that ask nothing is hung up on."""
CONNECTION_SECONDS = 10.0
"""A connection's whole life: to send its request and to take its answer."""
CLOSE_SECONDS = 1.0
"""How long `close` waits for answers that are on their way, and an answer for the rest of what its
client sends."""
HEAD_BYTES_MAX = 32 * 1024
"""A request, all of it that is looked at."""

SETTING = "admin.listen"

_HEADERS = {"Cache-Control": "no-store"}

log = get_logger()


class _Request(NamedTuple):
    """The head of a request.

    Attributes:
        method: in capital letters.
        target: as the request line has it.
        headers: names in small letters; values of one name are joined with commas.
        is_unix: it came over a Unix socket.
    """

    method: str
    target: str
    headers: dict[str, str]
    is_unix: bool


class _Page(NamedTuple):
    """An answer, before it is HTTP."""

    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: int = 200
    headers: dict[str, str] = {}  # noqa: RUF012 - never written to

    def encoded(self, *, bodiless: bool = False) -> bytes:
        """As HTTP, the last one of its connection."""
        return encode(
            self.status,
            self.content_type.encode(),
            self.body,
            headers={**_HEADERS, **self.headers},
            connection=CLOSE,
            bodiless=bodiless,
        )


class AdminServer:
    """Answers `/livez`, `/readyz`, `/metrics` and `/v1/status`.

    Args:
        settings: where to listen; with an empty `listen` there is no server and `start` does
            nothing.
        view: who knows.
        metrics: what `/metrics` shows.
        sockets: listening ones to serve on, instead of on one of its own.

    Attributes:
        addresses: where each socket listens, `HOST:PORT` or `unix:PATH`, while it does.
    """

    def __init__(
        self,
        settings: AdminSettings,
        view: AdminView,
        metrics: Metrics,
        *,
        sockets: Sequence[socket.socket] = (),
    ) -> None:
        self._settings = settings
        self._view = view
        self._metrics = metrics
        self._pages: dict[str, Callable[[_Request], _Page]] = {
            "/livez": self._livez,
            "/readyz": self._readyz,
            "/metrics": self._metrics_page,
            "/v1/status": self._status,
        }
        self._sockets = list(sockets)
        self._local = all(map(is_local, self._sockets))
        if not self._sockets and settings.listen:
            self._local = is_loopback(settings.listen)
        self._hosts = Hosts(settings.hosts) if self._local or settings.hosts else None
        self._listeners: list[asyncio.Server] = []
        self._protocol: _Connections | None = None
        self.addresses: list[str] = []

    async def start(self) -> None:
        """Listens.

        Raises:
            AddressError: it cannot.
            ConfigError: what is set is not an address.
        """
        if not (self._settings.listen or self._sockets):
            return
        self._protocol = _Connections(self._page)
        loop = asyncio.get_running_loop()
        if self._sockets:
            self._listeners = [await _serve_on(sock, self._protocol) for sock in self._sockets]
            self.addresses = [show_socket(sock) for sock in self._sockets]
            return
        host, port = parse_listen(self._settings.listen, SETTING)
        try:
            self._listeners = [await loop.create_server(self._protocol, host or None, port)]
        except (OSError, UnicodeError) as error:
            raise AddressError(
                address=self._settings.listen, setting=SETTING, problem=_problem(error)
            ) from error
        self.addresses = [show_socket(s) for one in self._listeners for s in one.sockets]

    async def close(self) -> None:
        """Stops listening, lets answers that are on their way out for a second, hangs up."""
        if not self._listeners or self._protocol is None:
            return
        for listener in self._listeners:
            listener.close()
        await self._protocol.hang_up()
        for listener in self._listeners:
            await listener.wait_closed()
        self._listeners = []
        self.addresses = []

    def _page(self, request: _Request) -> _Page:
        if self._hosts is not None and (refusal := self._refusal(request, self._hosts)):
            return refusal
        page = self._pages.get(_path_of(request.target))
        if page is None:
            return _problem_page(404, "Not Found", f"pages: {' '.join(self._pages)}")
        if request.method not in ("GET", "HEAD"):
            return _problem_page(
                405, "Method Not Allowed", "pages are read with GET or HEAD", Allow="GET, HEAD"
            )
        try:
            return page(request)
        except Exception:  # one page that fails must not look like a dead daemon
            log.exception("admin_page_failed", page=_path_of(request.target))
            return _problem_page(500, "Internal Server Error", "the log says why")

    def _refusal(self, request: _Request, hosts: Hosts) -> _Page | None:
        """Refuses requests that a foreign page may have sent from a browser on this machine."""
        headers = request.headers
        authority = authority_of(request.target, headers.get("host", ""))
        if not hosts.know(authority) and not request.is_unix:
            detail = "Host is neither an IP address nor localhost nor one of admin.hosts"
            return _problem_page(421, "Misdirected Request", detail)
        # A link may be followed from anywhere: no page sees what its reader gets to see.
        site = headers.get("sec-fetch-site", "")
        if headers.get("sec-fetch-mode") == "navigate":
            site = ""
        if self._local and is_foreign(headers.get("origin", ""), site, authority):
            return _problem_page(403, "Forbidden", "pages of other origins may not read this")
        return None

    def _livez(self, _: _Request) -> _Page:
        """Answers `/livez`: an answer proves that the loop turns; the watchdog decides the rest."""
        alive, reason = self._view.alive()
        if alive:
            return _Page(b"alive\n")
        return _problem_page(503, "Hung", reason)

    def _readyz(self, _: _Request) -> _Page:
        ready, reason = self._view.ready()
        if ready:
            return _Page(b"ready\n")
        return _problem_page(503, "Not Ready", reason)

    def _metrics_page(self, request: _Request) -> _Page:
        return _Page(*self._metrics.render(request.headers.get("accept", "")))

    def _status(self, _: _Request) -> _Page:
        return _Page(msgspec.json.encode(self._view.status()) + b"\n", "application/json")


class _Connection(asyncio.Protocol):
    """One connection: reads one head, answers it, and ends.

    Attributes:
        asks: a head has come.
    """

    def __init__(self, connections: _Connections) -> None:
        self._connections = connections
        self._parser: httptools.HttpRequestParser | None = httptools.HttpRequestParser(self)
        self._size = 0
        self._target = b""
        self._headers: dict[str, str] = {}
        self._is_whole = self._is_broken = False
        self.asks = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is none by its class
        self._connections.enter(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """See `asyncio.Protocol`."""
        self._parser = None  # it holds this object
        self._connections.leave(self)

    def eof_received(self) -> bool:
        """Keeps the connection for an answer that is not written out."""
        if self._parser is None:
            self.transport.close()
            return True
        return False

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        parser = self._parser
        if parser is None:
            return  # behind the request
        self._size += len(data)
        try:
            parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # answered like any other request; nothing is upgraded
        except httptools.HttpParserError:
            self._is_broken = not self._is_whole
        if self._is_broken or self._size > HEAD_BYTES_MAX:
            # Without a log line, which every client could fill.
            page = _problem_page(400, "Bad Request", "it can't be read as HTTP/1.1")
            self._answer(page.encoded().replace(b"HTTP/1.1", b"HTTP/1.0", 1))
        elif self.asks:
            method = parser.get_method().decode()
            sock = self.transport.get_extra_info("socket")
            is_unix = sock is not None and sock.family == socket.AF_UNIX
            target = self._target.decode("utf-8", "replace")
            page = self._connections.page(_Request(method, target, self._headers, is_unix))
            self._answer(page.encoded(bodiless=method == "HEAD"))

    def _answer(self, answer: bytes) -> None:
        self._parser = None
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

    def on_message_complete(self) -> None:
        self._is_whole = True


class _Connections:
    """A protocol factory that lets few connections in, each for a while.

    Args:
        page: answers a request.
    """

    def __init__(self, page: Callable[[_Request], _Page]) -> None:
        self.page = page
        self._inside: dict[_Connection, asyncio.TimerHandle] = {}
        self._left = asyncio.Event()

    def __call__(self) -> _Connection:
        """A protocol for a connection that has just been accepted."""
        return _Connection(self)

    def enter(self, connection: _Connection) -> None:
        """Starts the connection's clock, and hangs up on the first idle one of too many.

        Whoever holds connections and asks nothing must not keep a probe from its answer: a service
        manager ends what does not give one.
        """
        if len(self._inside) >= CONNECTIONS_MAX:
            idle = (one for one in self._inside if not one.asks)
            given_up = next(idle, next(iter(self._inside)))
            self._inside.pop(given_up).cancel()
            given_up.transport.abort()
        # `abort`, not `close`: that would wait for a reader who takes no answer.
        abort = connection.transport.abort
        self._inside[connection] = asyncio.get_running_loop().call_later(CONNECTION_SECONDS, abort)

    def leave(self, connection: _Connection) -> None:
        """Stops the connection's clock."""
        timer = self._inside.pop(connection, None)
        if timer is not None:
            timer.cancel()
        self._left.set()

    async def hang_up(self) -> None:
        """Ends all connections; those in the middle of an answer get a moment."""
        for one in list(self._inside):
            if not one.asks:
                one.transport.abort()
        with contextlib.suppress(TimeoutError):
            async with async_timeout.timeout(CLOSE_SECONDS):
                while self._inside:
                    self._left.clear()
                    await self._left.wait()
        for one in list(self._inside):
            one.transport.abort()


def _path_of(target: str) -> str:
    """The path of a request's target."""
    with contextlib.suppress(httptools.HttpParserInvalidURLError):
        return (httptools.parse_url(target.encode()).path or b"").decode()
    return ""


async def _serve_on(sock: socket.socket, protocol: _Connections) -> asyncio.Server:
    """Serves on a passed socket. Its file, if it has one, is not ours to remove."""
    loop = asyncio.get_running_loop()
    if sock.family != socket.AF_UNIX:
        return await loop.create_server(protocol, sock=sock)
    more: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
    return await loop.create_unix_server(protocol, sock=sock, **more)


def _problem_page(status: int, title: str, detail: str, **headers: str) -> _Page:
    """An error as RFC 9457 has it."""
    body = {"type": "about:blank", "title": title, "status": status, "detail": detail}
    return _Page(msgspec.json.encode(body) + b"\n", "application/problem+json", status, headers)


def _problem(error: OSError | UnicodeError) -> str:
    """One line, without the address, which the caller names."""
    if isinstance(error, UnicodeError):
        return "not a host name"
    if isinstance(error, socket.gaierror) or not error.errno:
        return str(error.strerror or error)
    what = os.strerror(error.errno).lower()
    if error.errno == errno.EADDRINUSE:
        what += (
            '; another program has it: choose another address, like "127.0.0.1:0" for any port that'
            ' is free, or "" for none'
        )
    return what
