"""The source `syslog`: connections as of any source over TCP, and datagrams.

Datagrams are read as they come into a queue with a bound of its own, of all addresses together; one
task takes all that wait, parses them and has them accepted as one append, so they are joined while
an append is under way. Beyond the bound new ones are dropped and counted, and so are those that the
kernel drops because its buffer is full: a sender of datagrams cannot be made to wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections import deque
from itertools import groupby
from typing import TYPE_CHECKING

from ingestd.base.append import Append
from ingestd.base.envelope import Envelope, joined, pack
from ingestd.base.errors import AddressError, IngestdError
from ingestd.base.logging import get_logger
from ingestd.base.record import InvalidRecord, Layout, Records
from ingestd.codecs.lines import Parsed, too_large
from ingestd.config.network import split_address
from ingestd.host.sockets import listen_fault, show_socket
from ingestd.sources.base import accept_patiently
from ingestd.sources.syslog.codec import RecordMaker, SyslogCodec, fold
from ingestd.sources.syslog.parser import MessageParser
from ingestd.sources.tcp.connection import THREAD_BYTES
from ingestd.sources.tcp.settings import UDP
from ingestd.sources.tcp.source import RareLine, TcpSource

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ingestd.sources.base import SourceContext
    from ingestd.sources.syslog import SyslogSettings
    from ingestd.sources.tcp import Peer

log = get_logger()

DATAGRAM_BYTES = 65536
DATAGRAMS_A_TURN = 128
"""So many are read before others have their turn."""
APPEND_BYTES = 1024**2
"""Size up to which datagrams that wait are joined to one append."""
DATAGRAM_COST = 128
"""What a datagram takes in memory beside its bytes, about."""
_SO_RCVBUFFORCE = 33
_SO_MEMINFO = 55  # of Linux: nine numbers, the last one is what was dropped
_MEMINFO = struct.Struct("9I")
_TERMINATORS = b"\n\r\0"


class SyslogSource(TcpSource):
    """The server for messages.

    Args:
        settings: addresses and bounds.
        context: the pipeline and the rest.
    """

    settings: SyslogSettings

    def __init__(self, settings: SyslogSettings, context: SourceContext) -> None:
        parser = (
            MessageParser(settings.timezone, context.clock.now)
            if settings.records == "parsed"
            else None
        )
        intake = context.pipelines[context.pipeline]
        self._maker = RecordMaker(parser, intake.record_bytes_max)
        super().__init__(settings, context, self._make_codec, table="syslog")
        self._datagrams: Datagrams | None = None
        self._faults = RareLine("syslog_lengths_wrong")

    def _make_codec(self, peer: Peer) -> SyslogCodec:
        def tell() -> None:
            self.totals.faults += 1
            self._faults.tell(self.clock.monotonic(), source=self.name, last=peer.address)

        return SyslogCodec(self._maker, json.dumps(peer.address).encode(), tell)

    async def start(self) -> None:
        """See `Source`."""
        await super().start()
        addresses = self.settings.addresses(UDP)
        if not addresses:
            return
        self._datagrams = Datagrams(self, self._maker)
        try:
            for address in addresses:
                sockets = await bind_datagrams(address, self.settings.udp_buffer)
                self._datagrams.listen(sockets)
                self.addresses += [f"udp://{show_socket(sock)}" for sock in sockets]
        except BaseException:
            await self.close()
            raise

    def numbers(self) -> Mapping[str, float]:
        """See `Source`."""
        datagrams, numbers = self._datagrams, super().numbers()
        if datagrams is None:
            return numbers
        dropped = self.totals.dropped + datagrams.dropped_by_kernel()
        more = {"datagrams": self.totals.datagrams, "datagrams_dropped": dropped}
        return {**numbers, **more}

    async def stop_taking(self, deadline: float) -> None:
        """See `Source`."""
        work = [super().stop_taking(deadline)]
        if self._datagrams is not None:
            work.append(self._datagrams.stop_taking(deadline))
        await asyncio.gather(*work)

    async def close(self) -> None:
        """See `Source`."""
        if self._datagrams is not None:
            await self._datagrams.close()
        await super().close()


async def bind_datagrams(address: str, buffer: int) -> list[socket.socket]:
    """Opens sockets for datagrams on every address of a host.

    Args:
        address: `HOST:PORT`.
        buffer: bytes of the receive buffer of each, as far as the machine allows it.

    Raises:
        AddressError: one of them can't be had.
    """
    host, port = split_address(address)
    sockets: list[socket.socket] = []
    try:
        infos = await asyncio.get_running_loop().getaddrinfo(
            host or None, port, type=socket.SOCK_DGRAM, flags=socket.AI_PASSIVE
        )
        for family, kind, protocol, _, at in dict.fromkeys(infos):
            sock = socket.socket(family, kind, protocol)
            sockets.append(sock)
            sock.setblocking(False)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            for option in (_SO_RCVBUFFORCE, socket.SO_RCVBUF):
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, option, buffer)
                    break
            sock.bind(at)
    except (OSError, ValueError) as error:
        for sock in sockets:
            sock.close()
        raise AddressError(
            address=f"udp://{address}", setting="syslog.listen", problem=listen_fault(error)
        ) from error
    return sockets


class Datagrams:
    """The datagrams of a source.

    Args:
        source: whose they are.
        maker: of their records.
    """

    def __init__(self, source: SyslogSource, maker: RecordMaker) -> None:
        self._source = source
        self._maker = maker
        self._loop = asyncio.get_running_loop()
        self._sockets: list[socket.socket] = []
        self._waiting: deque[tuple[str, bytes]] = deque()
        self._held = 0
        self._bytes_max = source.settings.udp_queue_bytes_max
        self._task: asyncio.Task[None] | None = None
        self._dropped = RareLine("datagrams_dropped")
        self._dropped_before = 0  # by the kernel, of sockets that are closed
        self._envelopes: dict[str, bytes] = {}

    def listen(self, sockets: Sequence[socket.socket]) -> None:
        """Reads some more sockets; they are closed with it."""
        for sock in sockets:
            self._sockets.append(sock)
            self._loop.add_reader(sock, self._read, sock)

    def dropped_by_kernel(self) -> int:
        """Datagrams that came and did not fit into the receive buffers."""
        return self._dropped_before + sum(map(_dropped, self._sockets))

    def _read(self, sock: socket.socket, most: int = DATAGRAMS_A_TURN) -> int:
        """Reads datagrams that are there; returns how many."""
        totals, count = self._source.totals, 0
        with contextlib.suppress(OSError):  # none is left, or one that was sent could not be
            while count < most:
                data, address = sock.recvfrom(DATAGRAM_BYTES)
                count += 1
                totals.received += len(data)
                cost = len(data) + DATAGRAM_COST
                if self._held + cost > self._bytes_max:
                    totals.dropped += 1
                    self._tell_dropped(address[0])
                elif data:
                    self._held += cost
                    self._waiting.append((address[0], data))
        totals.datagrams += count
        if self._waiting and self._task is None:
            self._task = self._loop.create_task(self._run(), name=f"{self._source.name}-datagrams")
        return count

    def _tell_dropped(self, peer: str) -> None:
        source = self._source
        reason = "udp_queue_bytes_max"
        self._dropped.tell(source.clock.monotonic(), source=source.name, last=peer, reason=reason)

    async def _run(self) -> None:
        """Has all that wait accepted, as many at once as there are."""
        try:
            while self._waiting:
                taken, cost = self._take()
                try:
                    await self._accept(taken, cost - DATAGRAM_COST * len(taken))
                except IngestdError as error:
                    log.error("datagrams_lost", source=self._source.name, error=str(error))  # noqa: TRY400
                except Exception:
                    log.exception("datagrams_lost", source=self._source.name)
                self._held -= cost  # also of what is lost: others have its place
        finally:
            self._task = None

    async def _accept(self, taken: list[tuple[str, bytes]], size: int) -> None:
        if size < THREAD_BYTES:
            append = self._append_of(taken)
        else:
            append = await self._source.thread.run(self._append_of, taken)
        if append.records.count or append.invalid:
            await accept_patiently(self._source.intake, append)
            self._source.tally.accepted(append)

    def _take(self) -> tuple[list[tuple[str, bytes]], int]:
        """The datagrams of one append, and what they cost."""
        taken: list[tuple[str, bytes]] = []
        cost = 0
        while self._waiting and cost < APPEND_BYTES:
            taken.append(self._waiting.popleft())
            cost += len(taken[-1][1]) + DATAGRAM_COST
        return taken, cost

    def _append_of(self, taken: list[tuple[str, bytes]]) -> Append:
        """Makes records of datagrams; each is one message."""
        bound = self._maker.record_bytes_max
        refused: list[InvalidRecord] = []
        peers: list[str] = []
        messages: list[bytes] = []
        for index, (peer, data) in enumerate(taken):
            message = data.strip(_TERMINATORS)
            if len(message) > bound:
                one = too_large(index, len(message), bound, message)
                refused.append(one._replace(envelope=self._envelope_of(peer)))
            elif message:
                peers.append(peer)
                messages.append(message)
        block, stand_in = fold(messages) if messages else (b"", b"")
        parsed = Parsed(Records(Layout.LINES, len(messages), block), refused)
        runs = [(peer, len(list(run))) for peer, run in groupby(peers)]
        shown = [json.dumps(peer).encode() for peer, _ in runs]
        if len(runs) > 1:
            shown = [one for one, (_, count) in zip(shown, runs, strict=True) for _ in range(count)]
        made = self._maker.make(parsed, shown, stand_in)
        envelopes = joined([(count, self._envelope_of(peer)) for peer, count in runs])
        if made.records.count != len(messages):
            envelopes = self._envelope_of("")  # some objects were too large: places have changed
        return Append(
            made.records._replace(envelopes=envelopes), made.refused, principal=taken[0][0]
        )

    def _envelope_of(self, peer: str) -> bytes:
        known = self._envelopes.get(peer)
        if known is None:
            if len(self._envelopes) >= 4096:
                self._envelopes = {}
            attributes: dict[str, str | int] = {"peer": peer} if peer else {}
            known = pack(Envelope(self._source.name, attributes=attributes))
            self._envelopes[peer] = known
        return known

    async def stop_taking(self, deadline: float) -> None:
        """Reads what has arrived, closes the sockets, and waits until all of it is accepted."""
        for sock in self._sockets:
            self._loop.remove_reader(sock)
            self._read(sock, self._bytes_max // DATAGRAM_COST)
            self._dropped_before += _dropped(sock)
            sock.close()
        self._sockets.clear()
        while (task := self._task) is not None and (left := deadline - self._loop.time()) > 0:
            await asyncio.wait([task], timeout=left)

    async def close(self) -> None:
        """Ends it; datagrams that are not accepted by now are lost, and logged."""
        for sock in self._sockets:
            self._loop.remove_reader(sock)
            sock.close()
        self._sockets.clear()
        if (task := self._task) is not None:
            task.cancel()
            await asyncio.wait([task])
        if self._held:
            log.error("datagrams_abandoned", source=self._source.name, bytes=self._held)


def _dropped(sock: socket.socket) -> int:
    with contextlib.suppress(OSError, struct.error):
        found: int = _MEMINFO.unpack(sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 36))[-1]
        return found
    return 0
