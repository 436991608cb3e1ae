"""The admin server: health, metrics and status, on an address of its own.

Every connection carries one request and has seconds to live, and there are few of them. So nothing
that happens here, and nothing that happens where records come in, can lock operators out.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import sys
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import msgspec
from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from ingestd.base.errors import AddressError
from ingestd.base.logging import get_logger
from ingestd.config.network import Hosts, authority_of, is_foreign, is_loopback, parse_listen
from ingestd.host.sockets import is_local, show_socket

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
"""How long `close` waits for answers that are on their way."""

SETTING = "admin.listen"

# Without a name of ours aiohttp would tell everybody its version and Python's.
_HEADERS = {"Cache-Control": "no-store", "Server": "ingestd"}

log = get_logger()


class _Page(NamedTuple):
    """An answer, before it is HTTP."""

    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: int = 200
    headers: dict[str, str] = {}  # noqa: RUF012 - never written to

    def response(self) -> web.Response:
        """As HTTP, the last one of its connection."""
        headers = {**_HEADERS, "Content-Type": self.content_type, **self.headers}
        response = web.Response(body=self.body, status=self.status, headers=headers)
        response.force_close()
        return response


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
        self._pages: dict[str, Callable[[web.BaseRequest], _Page]] = {
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
        self._protocol: _AdminHandler | None = None
        self.addresses: list[str] = []

    async def start(self) -> None:
        """Listens.

        Raises:
            AddressError: it cannot.
            ConfigError: what is set is not an address.
        """
        if not (self._settings.listen or self._sockets):
            return
        self._protocol = _AdminHandler(self._answer)
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

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        return self._page(request).response()

    def _page(self, request: web.BaseRequest) -> _Page:
        if self._hosts is not None and (refusal := self._refusal(request, self._hosts)):
            return refusal
        page = self._pages.get(request.path)
        if page is None:
            return _problem_page(404, "Not Found", f"pages: {' '.join(self._pages)}")
        if request.method not in ("GET", "HEAD"):
            return _problem_page(
                405, "Method Not Allowed", "pages are read with GET or HEAD", Allow="GET, HEAD"
            )
        try:
            return page(request)
        except Exception:  # one page that fails must not look like a dead daemon
            log.exception("admin_page_failed", page=request.path)
            return _problem_page(500, "Internal Server Error", "the log says why")

    def _refusal(self, request: web.BaseRequest, hosts: Hosts) -> _Page | None:
        """Refuses requests that a foreign page may have sent from a browser on this machine."""
        headers = request.headers
        authority = authority_of(request.raw_path, headers.get("Host", ""))
        if not hosts.know(authority) and not self._is_unix(request):
            detail = "Host is neither an IP address nor localhost nor one of admin.hosts"
            return _problem_page(421, "Misdirected Request", detail)
        # A link may be followed from anywhere: no page sees what its reader gets to see.
        site = headers.get("Sec-Fetch-Site", "")
        if headers.get("Sec-Fetch-Mode") == "navigate":
            site = ""
        if self._local and is_foreign(", ".join(headers.getall("Origin", ())), site, authority):
            return _problem_page(403, "Forbidden", "pages of other origins may not read this")
        return None

    @staticmethod
    def _is_unix(request: web.BaseRequest) -> bool:
        sock = request.transport.get_extra_info("socket") if request.transport else None
        return sock is not None and sock.family == socket.AF_UNIX

    def _livez(self, _: web.BaseRequest) -> _Page:
        """Answers `/livez`: an answer proves that the loop turns; the watchdog decides the rest."""
        alive, reason = self._view.alive()
        if alive:
            return _Page(b"alive\n")
        return _problem_page(503, "Hung", reason)

    def _readyz(self, _: web.BaseRequest) -> _Page:
        ready, reason = self._view.ready()
        if ready:
            return _Page(b"ready\n")
        return _problem_page(503, "Not Ready", reason)

    def _metrics_page(self, request: web.BaseRequest) -> _Page:
        return _Page(*self._metrics.render(request.headers.get("Accept", "")))

    def _status(self, _: web.BaseRequest) -> _Page:
        return _Page(msgspec.json.encode(self._view.status()) + b"\n", "application/json")


class _AdminConnection(RequestHandler):
    """A connection whose client may end its own direction before it has its answer."""

    async def start(self) -> None:
        """Answers, unless it was hung up on before."""
        if self.transport is not None:
            await super().start()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answers bytes that are no HTTP without a log line, which every client could fill."""
        if status >= 500:
            return super().handle_error(request, status, exc, message)
        return _problem_page(status, "Bad Request", "it can't be read as HTTP/1.1").response()

    @property
    def asks(self) -> bool:
        """Returns True if a request has come."""
        return self._request_count > 0

    def eof_received(self) -> bool:  # type: ignore[override]  # aiohttp never keeps one open
        """Keeps the connection while a request has no answer yet."""
        # aiohttp waits for a request, has one in its queue, or is at one.
        return bool(self._messages) or (self._waiter is None and self._request_count > 0)


class _AdminHandler(web.Server):
    """Lets few connections in, each for a while."""

    def __init__(self, answer: Callable[[web.BaseRequest], Any]) -> None:
        super().__init__(answer)
        self._inside: dict[RequestHandler, tuple[asyncio.Transport, asyncio.TimerHandle]] = {}

    def __call__(self) -> RequestHandler:
        """A protocol for a connection that has just been accepted."""
        return _AdminConnection(
            self,
            loop=self._loop,
            access_log=None,  # type: ignore[arg-type]  # aiohttp's way to say: no access log
            lingering_time=CLOSE_SECONDS,
        )

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        """Starts the connection's clock, and hangs up on the first idle one of too many.

        Whoever holds connections and asks nothing must not keep a probe from its answer: a service
        manager ends what does not give one.
        """
        super().connection_made(handler, transport)
        if len(self._inside) >= CONNECTIONS_MAX:
            idle = (one for one in self._inside if not cast("_AdminConnection", one).asks)
            given_up, timer = self._inside.pop(next(idle, next(iter(self._inside))))
            timer.cancel()
            given_up.abort()
        # `abort`, not `close`: that would wait for a reader who takes no answer.
        end = asyncio.get_running_loop().call_later(CONNECTION_SECONDS, transport.abort)
        self._inside[handler] = transport, end

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        """Stops the connection's clock."""
        super().connection_lost(handler, exc)
        inside = self._inside.pop(handler, None)
        if inside is not None:
            inside[1].cancel()

    async def hang_up(self) -> None:
        """Ends all connections; those in the middle of an answer get a moment."""
        self.pre_shutdown()
        await self.shutdown(CLOSE_SECONDS)
        for transport, _ in list(self._inside.values()):
            transport.abort()


async def _serve_on(sock: socket.socket, protocol: _AdminHandler) -> asyncio.Server:
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
