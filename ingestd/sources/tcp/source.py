"""A source over TCP: its listeners, bounds, reload and drain; see `ingestd.sources.tcp`."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from ingestd.base.append import AppendCounts
from ingestd.base.bursts import ComputeThread
from ingestd.base.errors import AddressError, ConfigError
from ingestd.base.logging import get_logger
from ingestd.config.network import split_address
from ingestd.host.sockets import is_local, listen_fault, show_socket
from ingestd.http.admission import AdmissionController
from ingestd.http.listener import Listener, bind
from ingestd.http.tls import read_tls
from ingestd.sources.base import Source
from ingestd.sources.tcp.connection import READ_BYTES, TcpConnection, Totals
from ingestd.sources.tcp.settings import TCP, TLS

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator, Mapping

    from ingestd.sources.base import SourceContext
    from ingestd.sources.tcp import Peer, StreamCodec
    from ingestd.sources.tcp.settings import TcpSettings

log = get_logger()

TOLD_SECONDS = 10.0
"""Interval of log lines about connections that were refused or cut: no client can fill the log."""
LOOK_SECONDS = 10.0
"""Interval of looks at certificates, which may expire."""
_BACKLOG = 1024
_SPARE = 256
_NEVER_PUBLIC = (
    "the passed socket {} is reachable from other machines, and every client could send; set"
    " {}.allow_anonymous = true"
)


class TcpSource(Source):
    """A server for one protocol.

    Args:
        settings: addresses and bounds.
        context: the pipeline and the rest.
        codec: makes that of a connection.
        table: the name of the kind, for errors.

    Attributes:
        addresses: where it listens, after `start`; `HOST:PORT` with the real port, `unix:PATH`.

    Raises:
        ConfigError: a certificate or a key is not what it should be.
    """

    def __init__(
        self,
        settings: TcpSettings,
        context: SourceContext,
        codec: Callable[[Peer], StreamCodec],
        *,
        table: str,
    ) -> None:
        self.settings = settings
        self.name = context.name
        self.intake = context.pipelines[context.pipeline]
        self.clock = context.clock
        self.codec = codec
        self.table = table
        self.totals = Totals()
        self.tally = AppendCounts()
        self.is_leaving = False
        self.addresses: list[str] = []
        self._sockets = list(context.sockets)
        self._check_exposure()
        self._tls = read_tls(settings.tls, f"{table}.tls")
        self._warn()
        self._listeners: list[Listener] = []
        self._secured: list[Listener] = []
        self._connections: dict[TcpConnection, None] = {}
        self._greetings: set[TcpConnection] = set()
        self._refused, self._cut = RareLine("connections_refused"), RareLine("connections_cut")

    def _check_exposure(self) -> None:
        """Passed sockets are where they are, whatever `listen` says."""
        settings = self.settings
        if settings.allow_anonymous or settings.tls.client_required or settings.demands_proof:
            return
        for sock in self._sockets:
            if not is_local(sock):
                raise ConfigError(problem=_NEVER_PUBLIC.format(show_socket(sock), self.table))

    def _warn(self) -> None:
        for doubt in self._tls.doubts:
            log.warning("certificate_doubtful", problem=doubt)

    @property
    def authorities(self) -> frozenset[bytes]:
        """Digests of the CAs of client certificates."""
        return self._tls.authorities

    # -- start ---------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listens.

        Raises:
            AddressError: it can't, and why.
        """
        loop = asyncio.get_running_loop()
        settings = self.settings
        self.buffer = memoryview(bytearray(READ_BYTES))
        self.thread = ComputeThread(self.name, loop)
        self.overdraft = asyncio.Lock()
        self.admission = AdmissionController(
            settings.inflight_bytes_max,
            requests_max=settings.connections_max,
            share=settings.client_share,
        )
        try:
            if self._sockets:
                self._listen(self._sockets, secure=self._tls.context is not None, backlog=0)
            else:
                for transport in (TCP, TLS):
                    for address in settings.addresses(transport):
                        found = await self._bind(address)
                        self._listen(found, secure=transport == TLS, backlog=_BACKLOG)
        except BaseException:
            await self.close()
            raise
        self._look = loop.call_later(LOOK_SECONDS, self._look_again)

    async def _bind(self, address: str) -> list[socket.socket]:
        try:
            return await bind(*split_address(address), _BACKLOG)
        except (OSError, ValueError) as error:
            raise AddressError(
                address=address,
                setting=f"{self.table}.listen",
                problem=listen_fault(error),
            ) from error

    def _listen(self, sockets: list[socket.socket], *, secure: bool, backlog: int) -> None:
        context = self._tls.context if secure else None
        listener = Listener(self, sockets, context, backlog=backlog)
        self._listeners.append(listener)
        if secure:
            self._secured.append(listener)
        self.addresses += [show_socket(sock) for sock in sockets]

    def facts(self) -> dict[str, object]:
        """See `Source`."""
        return {"listening": self.addresses}

    def numbers(self) -> Mapping[str, float]:
        """See `Source`."""
        totals, counts = self.totals, self.tally
        context = self._tls.context
        return {
            "records": counts.records,
            "invalid": counts.invalid,
            **({"certificate_until": context.valid_until} if context is not None else {}),
            "connections": len(self._connections),
            "connections_refused": totals.refused,
            "connections_cut": totals.cut,
            "received_bytes": totals.received,
            "framing_faults": totals.faults,
        }

    # -- connections ---------------------------------------------------------------------------

    def has_room_to_say_no(self) -> bool:
        """See `Greeter`; a connection too many is closed without a word."""
        known = len(self._connections) + len(self._greetings)
        if known < self.settings.connections_max + _SPARE:
            return True
        self.totals.refused += 1
        self.tell_refused("", "connections_max")
        return False

    @contextlib.contextmanager
    def greeting(self) -> Iterator[TcpConnection]:
        """See `Greeter`."""
        connection = TcpConnection(self)
        self._greetings.add(connection)
        try:
            yield connection
        finally:
            self._greetings.discard(connection)

    def opened(self, connection: TcpConnection) -> None:
        """See `Owner`."""
        self._greetings.discard(connection)
        self._connections[connection] = None

    def closed(self, connection: TcpConnection) -> None:
        """See `Owner`."""
        self._connections.pop(connection, None)

    def tell_refused(self, peer: str, why: str) -> None:
        """See `Owner`."""
        self._refused.tell(self.clock.monotonic(), source=self.name, last=peer, reason=why)

    def tell_cut(self, peer: str, why: str) -> None:
        """See `Owner`."""
        self._cut.tell(self.clock.monotonic(), source=self.name, last=peer, reason=why)

    def _look_again(self) -> None:
        for connection in self._connections:
            connection.look_again()
        self._look = asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look_again)

    # -- reload --------------------------------------------------------------------------------

    async def prepare(self, settings: TcpSettings) -> Callable[[], None]:
        """See `Source`: certificates, keys and authorities are read anew."""
        loop = asyncio.get_running_loop()
        tls = await loop.run_in_executor(None, read_tls, settings.tls, f"{self.table}.tls")

        def change() -> None:
            self._tls = tls
            self._warn()
            for listener in self._secured:
                listener.context = tls.context
            for connection in self._connections:
                connection.look_again()

        return change

    # -- the end -------------------------------------------------------------------------------

    async def stop_taking(self, deadline: float) -> None:
        """See `Source`; whole frames that arrive within a moment are accepted too."""
        self.is_leaving = True
        for listener in self._listeners:
            listener.close()
        await asyncio.sleep(0)  # what was let in last is greeted in a turn of the loop
        for connection in self._connections:
            connection.leave()
        loop = asyncio.get_running_loop()
        while (tasks := [c.task for c in self._connections if c.task]) and loop.time() < deadline:
            await asyncio.wait(tasks, timeout=deadline - loop.time())

    async def close(self) -> None:
        """Ends every connection. What is not accepted by now is given up, and logged."""
        if hasattr(self, "_look"):
            self._look.cancel()
        for listener in self._listeners:
            listener.close()
            await listener.wait_closed()
        left = list(self._connections)
        unaccepted = sum(connection.unaccepted for connection in left)
        tasks = [connection.task for connection in left if connection.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in left:
            connection.abort()
        self.thread.close()
        if unaccepted:
            log.error("received_bytes_abandoned", source=self.name, bytes=unaccepted)


class RareLine:
    """A log line that sums up what happens often.

    Args:
        event: its name.
    """

    def __init__(self, event: str) -> None:
        self._event = event
        self._count = 0
        self._due = 0.0

    def tell(self, now: float, **facts: object) -> None:
        """Counts one more, and logs all that were not logged yet if it is time.

        Args:
            now: seconds that do not go back.
            facts: of the last one.
        """
        self._count += 1
        if now >= self._due:
            log.warning(self._event, count=self._count, **facts)
            self._count, self._due = 0, now + TOLD_SECONDS
