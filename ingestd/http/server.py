"""HTTP server: bounded connections, problems as errors, fair turns."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from typing import TYPE_CHECKING, cast

import async_timeout

from ingestd.base.logging import get_logger
from ingestd.http import problem
from ingestd.http.known_heads import KnownHeads
from ingestd.http.peer import ClientConnections
from ingestd.http.problem import Problem
from ingestd.http.protocol import Connection
from ingestd.http.response import PROBLEM, encode

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from ingestd.http.request import Request
    from ingestd.http.response import Response


log = get_logger()

HELD_BYTES_MAX = 8 * 1024 * 1024
"""Parts of heads and requests that wait behind others, of all connections together."""

CLIENT_HELD_MAX = HELD_BYTES_MAX // 2
"""The same for the connections of one client."""

READ_BYTES = 128 * 1024
"""The most that one read takes. What was read of a body counts only when its turn comes, so it is
half of what event loops read by themselves."""

CUT_SECONDS = 1.0
"""A client with a connection that was ended for what it held has to wait so long with new ones: to
read until it is too much again costs more than to connect."""

_CUT_MAX = 1024
_HELD_BYTES_FREE = 4 * 1024
_TURNED_AWAY_MAX = 256


class Server:
    """A protocol factory for a `Listener`.

    Args:
        handler: answers one request; must not raise.
        connections_max: a connection beyond it gets 503 and is closed.
        per_client_max: the same (429) for connections of one client; 0 for any number.
        header_timeout: seconds that the head of a request may take.
        keepalive_timeout: seconds until an idle connection is closed; 0 if none is kept open.
        write_timeout: seconds that a connection which ends waits for its client to read.

    Attributes:
        authorities: see `Access`; for the handshakes that come.
        buffer: what a read of any connection takes its bytes to.
        heads: those that were read before.
        turns: whose request is next.
    """

    def __init__(
        self,
        handler: Callable[[Request], Awaitable[Response]],
        *,
        connections_max: int,
        per_client_max: int = 0,
        header_timeout: float = 10.0,
        keepalive_timeout: float,
        write_timeout: float = 30.0,
    ) -> None:
        self._answer = handler
        self._loop = asyncio.get_running_loop()
        self._connections_max = connections_max
        self._clients = ClientConnections(per_client_max)
        self._turned_away: set[asyncio.Transport] = set()
        self._welcomed: set[asyncio.BaseProtocol] = set()
        self._silent: set[Connection] = set()
        self._spoken = asyncio.Event()
        self._held = 0
        self._held_by: Counter[str] = Counter()
        self._cut_until: dict[str, float] = {}
        self.header_timeout = header_timeout
        self.write_timeout = write_timeout
        self.keepalive_timeout = keepalive_timeout or header_timeout
        self._connections: dict[Connection, None] = {}
        self.authorities: frozenset[bytes] = frozenset()
        self.buffer = memoryview(bytearray(READ_BYTES))
        self.turns = FairQueue(self._loop)
        self.heads = KnownHeads()

    @property
    def _greetings(self) -> int:
        """Handshakes in progress."""
        return len(self._welcomed)

    def has_room_to_say_no(self) -> bool:
        """Returns True if one more connection can at least get a 503."""
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

    def __call__(self) -> asyncio.BaseProtocol:
        """A protocol for a connection that has just been accepted."""
        if self.open + self._greetings >= self._connections_max:
            refusal = Problem(problem.CONNECTIONS, "http.connections_max is reached")
            return _Refusal(self._turned_away, refusal)
        return Connection(self)

    def let_in(self, connection: Connection, transport: asyncio.Transport) -> bool:
        """Counts a connection in, or turns its transport away."""
        if self._clients.enter(connection.client):
            return True
        detail = "http.connections_per_client_max is reached"
        other = _Refusal(self._turned_away, Problem(problem.CLIENT_CONNECTIONS, detail))
        transport.set_protocol(other)
        other.connection_made(transport)
        return False

    def connection_made(self, connection: Connection) -> None:
        """Counts it."""
        self._connections[connection] = None
        self._welcomed.discard(connection)
        self._silent.add(connection)

    def connection_lost(self, connection: Connection) -> None:
        """Counts it out."""
        self._connections.pop(connection, None)
        self._clients.leave(connection.client)
        self._hold(connection, 0)
        if not self._held_by[connection.client]:
            del self._held_by[connection.client]
        self.spoke(connection)

    @property
    def connections(self) -> list[Connection]:
        """The connections that were let in."""
        return list(self._connections)

    @property
    def open(self) -> int:
        """Number of connections."""
        return len(self._connections)

    def hold(self, connection: Connection, size: int) -> None:
        """A connection holds that many bytes now; if all of them hold too many, it is ended."""
        self._hold(connection, size)
        if size <= _HELD_BYTES_FREE:
            return
        if self._held <= HELD_BYTES_MAX and self._held_by[connection.client] <= CLIENT_HELD_MAX:
            return
        if connection.transport is not None:
            log.debug("connection_ended", held=size)
            self._cut(connection.client)
            connection.transport.abort()
            self._hold(connection, 0)  # or those that come in this turn would be cut as well

    def _cut(self, client: str) -> None:
        self._cut_until.pop(client, None)
        self._cut_until[client] = self._loop.time() + CUT_SECONDS
        if len(self._cut_until) > _CUT_MAX:
            del self._cut_until[next(iter(self._cut_until))]

    def rest_of(self, client: str) -> float:
        """Seconds for which nothing is read of a new connection: its client was cut before."""
        if client not in self._cut_until:
            return 0.0
        return max(0.0, self._cut_until[client] - self._loop.time())

    def _hold(self, connection: Connection, size: int) -> None:
        more = size - connection.held
        self._held += more
        self._held_by[connection.client] += more
        connection.held = size

    def answer(self, request: Request) -> Awaitable[Response]:
        """Answers one request of a connection."""
        self.spoke(request.protocol)
        return self._answer(request)

    def end_certified(self) -> None:
        """Connections that showed a certificate end, each after the request that it is at."""
        for connection in self.connections:
            if connection.has_certificate:
                connection.end_soon()

    def spoke(self, connection: Connection) -> None:
        """A connection's first request has come, or it has gone."""
        if connection in self._silent:
            self._silent.discard(connection)
            self._spoken.set()

    async def hear_out(self, seconds: float) -> None:
        """Waits for the first request of each connection that has sent nothing yet.

        Args:
            seconds: the longest that it waits.
        """
        try:
            async with async_timeout.timeout(seconds):
                await asyncio.sleep(0)  # the newest connection is made in a turn of the loop
                while self._welcomed or self._silent:
                    self._spoken.clear()
                    await self._spoken.wait()
        except TimeoutError:
            pass

    async def close(self, seconds: float) -> None:
        """Closes every connection; requests in progress have some seconds to end."""
        for connection in self.connections:
            connection.end_soon()
        tasks = [one.task for one in self.connections if one.task is not None]
        if tasks:
            _, left = await asyncio.wait(tasks, timeout=seconds)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
        for connection in self.connections:
            connection.close()
        for transport in list(self._turned_away):
            transport.abort()


class _Refusal(asyncio.Protocol):
    """A connection too many: it gets its answer, and a second to read it."""

    def __init__(self, others: set[asyncio.Transport], refusal: Problem) -> None:
        self._others = others
        self._refusal = refusal
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not asserted: uvloop's for TLS is one and does not say so.
        transport = self._transport = cast("asyncio.Transport", transport)
        if len(self._others) >= _TURNED_AWAY_MAX:
            transport.abort()
            return
        self._others.add(transport)
        transport.write(
            encode(
                self._refusal.kind.status,
                PROBLEM,
                self._refusal.body(),
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


# -- turns of clients ------------------------------------------------------------------------------
#
# As long as the event loop keeps up, each request is answered as it comes. Once the requests of
# one turn of the loop have taken `TURN_SECONDS` the others wait, and from then on it is one of
# each client in rotation: one that sends on 400 connections, or 4,000 requests in one piece, has
# no more of the loop's time than one that sends a single request.

TURN_SECONDS = 0.01
"""How long requests that came together are answered without a look at whose they are."""

REQUESTS_A_TURN = 8
"""Of those that wait, so many are answered in each turn."""

QUICK_COST = 0.125
"""What a quick request (`known_heads.py`) counts for there."""


class FairQueue:
    """On one event loop.

    Args:
        loop: whose turns.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: dict[str, deque[asyncio.Future[None] | Callable[[], None]]] = {}
        self._end = 0.0
        self._begun = False

    def take(self, client: str) -> asyncio.Future[None] | None:
        """Asks for a request of this client to be answered: now, or when the future is done.

        A caller that does not want it any more ends the future.
        """
        if self.is_free(client):
            return None
        waiter = self._loop.create_future()
        self._waiting.setdefault(client, deque()).append(waiter)
        return waiter

    def is_free(self, client: str) -> bool:
        """Returns True if a request of this client may be answered now."""
        now = self._loop.time()
        if not self._begun:
            self._begun = True
            self._end = now + TURN_SECONDS
            self._loop.call_soon(self._next)
            return True
        return now < self._end and client not in self._waiting

    def defer(self, client: str, call: Callable[[], None]) -> None:
        """Calls this when it is the turn of a request of this client, which was not free."""
        self._waiting.setdefault(client, deque()).append(call)

    def _next(self) -> None:
        """A new turn begins."""
        left = float(REQUESTS_A_TURN)
        while self._waiting and left > 0:
            client = next(iter(self._waiting))
            waiters = self._waiting.pop(client)
            waiter = waiters.popleft()
            if waiters:
                self._waiting[client] = waiters  # behind the others
            if not isinstance(waiter, asyncio.Future):
                waiter()
                left -= QUICK_COST
            elif not waiter.done():
                waiter.set_result(None)
                left -= 1
        self._begun = bool(self._waiting)
        if self._begun:
            self._end = self._loop.time() + TURN_SECONDS
            self._loop.call_soon(self._next)
