"""aiohttp's low-level server, with a bound on connections and with our words for its errors."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, cast

import async_timeout
import structlog
from aiohttp import web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.web_protocol import RequestPayloadError

from ingestd.sources.http import problem
from ingestd.sources.http.answer import PROBLEM, Answer, encode
from ingestd.sources.http.problem import Problem

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

log = structlog.get_logger(__name__)

HEAD_TIMEOUT = 15.0
"""Seconds for the head of a request on a connection that is not kept alive."""
LINGER_SECONDS = 2.0
"""How long what is left of a refused body is read, so that the client gets to see its answer."""
_TURNED_AWAY_MAX = 256


class Server(web.Server):
    """A protocol factory for a `Listener`.

    Args:
        handler: answers one request; must not raise.
        connections_max: who comes beyond it is told so (503) and let go.
        keepalive_timeout: seconds until an idle connection is closed; also the time that the head
            of a request may take.
    """

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        *,
        connections_max: int,
        keepalive_timeout: float,
    ) -> None:
        super().__init__(self._listen_to)
        self._answer = handler
        self._connections_max = connections_max
        self._keepalive_timeout = keepalive_timeout or HEAD_TIMEOUT
        self._turned_away: set[asyncio.Transport] = set()
        self._welcomed: set[asyncio.BaseProtocol] = set()
        self._silent: set[web.RequestHandler] = set()
        self._spoken = asyncio.Event()
        self.open = 0

    @property
    def _greetings(self) -> int:
        """Handshakes in progress."""
        return len(self._welcomed)

    def has_room_to_say_no(self) -> bool:
        """Whether one more connection could at least be told that it is too many."""
        return self.open + self._greetings < self._connections_max + _TURNED_AWAY_MAX

    @contextlib.contextmanager
    def greeting(self) -> Iterator[asyncio.BaseProtocol]:
        """The protocol for a connection whose handshake is in progress, which is counted too."""
        protocol = self()
        self._welcomed.add(protocol)
        try:
            yield protocol
        finally:
            self._welcomed.discard(protocol)
            self._spoken.set()

    def __call__(self) -> Any:  # the base class names one kind only
        """A protocol for a connection that has just been accepted."""
        if self.open + self._greetings >= self._connections_max:
            return _TurnedAway(self._turned_away)
        # Compressed bodies come as they are: aiohttp would decompress without a bound that we
        # can set, and answer 500 to a corrupt one.
        return _Connection(
            self,
            loop=self._loop,
            keepalive_timeout=self._keepalive_timeout,
            access_log=None,  # type: ignore[arg-type] # aiohttp's way to say: no access log
            auto_decompress=False,
            lingering_time=LINGER_SECONDS,
        )

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        """Counts it."""
        self.open += 1
        self._welcomed.discard(handler)
        self._silent.add(handler)
        super().connection_made(handler, transport)

    def connection_lost(
        self, handler: web.RequestHandler, exc: BaseException | None = None
    ) -> None:
        """Counts it out."""
        self.open -= 1
        self.spoke(handler)
        super().connection_lost(handler, exc)

    async def _listen_to(self, request: web.BaseRequest) -> web.StreamResponse:
        self.spoke(request.protocol)
        return await self._answer(request)

    def spoke(self, handler: web.RequestHandler) -> None:
        """A connection's first request has come, or it has gone."""
        if handler in self._silent:
            self._silent.discard(handler)
            self._spoken.set()

    async def hear_out(self, seconds: float) -> None:
        """Waits for the first request of everybody who was let in and has not said anything yet.

        Args:
            seconds: the longest that it waits.
        """
        try:
            async with async_timeout.timeout(seconds):
                while self._welcomed or self._silent:
                    self._spoken.clear()
                    await self._spoken.wait()
        except TimeoutError:
            pass

    async def close(self, seconds: float) -> None:
        """Closes every connection; requests in progress have some seconds to end."""
        await self.shutdown(seconds)
        for transport in list(self._turned_away):
            transport.abort()


class _Connection(web.RequestHandler):
    __slots__ = ()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # A parse error in the middle of a body is queued as the next request, and who reads the
        # body would wait for the rest until it times out.
        if self._messages and self._current_request is not None:
            failed = hasattr(self._messages[-1][0], "exc")
            content = self._current_request.content
            if failed and not content.is_eof():
                content.set_exception(RequestPayloadError("not a valid body"))

    def handle_error(
        self,
        request: web.BaseRequest,  # noqa: ARG002 - it is aiohttp's stand-in
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 - quotes what came
    ) -> web.StreamResponse:
        """What is answered where no handler is asked: what came is not HTTP."""
        if isinstance(exc, LineTooLong):
            kind, detail = problem.HEADERS_TOO_LARGE, "a line of the head is too long"
        elif status == 400:
            kind, detail = problem.BAD_REQUEST, "it can't be read as HTTP/1.1"
        else:
            kind, detail = problem.INTERNAL, "see the log"
            log.error("request_failed", exc_info=exc)
        log.debug("request_unreadable", kind=kind.slug, error=type(exc).__name__)
        return Answer(kind.status, PROBLEM, Problem(kind, detail).body(), close=True)


class _TurnedAway(asyncio.Protocol):
    """A connection too many: it gets its answer, and a second to read it."""

    def __init__(self, others: set[asyncio.Transport]) -> None:
        self._others = others
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not asserted: uvloop's for TLS is one and does not say so.
        transport = self._transport = cast("asyncio.Transport", transport)
        if len(self._others) >= _TURNED_AWAY_MAX:
            transport.abort()
            return
        self._others.add(transport)
        refusal = Problem(problem.CONNECTIONS, "http.connections_max is reached")
        transport.write(
            encode(
                refusal.kind.status,
                PROBLEM,
                refusal.body(),
                headers=problem.retry_after(1.0),
                connection=b"Connection: close\r\n",
            )
        )
        # Closing now, with the request unread, would reset the connection and take the answer.
        # TLS has no end of one direction alone: there the client reads Content-Length, and goes.
        if transport.can_write_eof():
            transport.write_eof()
        self._timer = asyncio.get_running_loop().call_later(1.0, transport.abort)

    def data_received(self, data: bytes) -> None:
        pass

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._others.discard(self._transport)
        if self._timer is not None:
            self._timer.cancel()
