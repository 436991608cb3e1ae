"""Listeners, with TLS and without, beyond what `loop.create_server` can do.

A connection is wrapped here, after it was accepted, because then the context can be another one for
every connection (that is how certificates are renewed without closing the socket), and because a
handshake in progress can be counted, and bounded, like a connection. And a listener that is stopped
has no accepted connection that is never served: a socket that was passed to us goes on, and one of
our own is emptied first, because the kernel resets the connections in the queue of a socket that is
closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from typing import TYPE_CHECKING, Protocol

from ingestd.base.logging import get_logger

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

log = get_logger()

HANDSHAKE_SECONDS = 10.0
SHUTDOWN_SECONDS = 2.0
"""Seconds that the peer may take to send `close_notify`."""
ACCEPTED_A_TURN = 32
"""A connection takes about 0.2 ms; open connections shall not wait long for new ones."""
_RETRY_SECONDS = 0.5


class Greeter(Protocol):
    """Makes the protocols of connections, and bounds these."""

    def has_room_to_say_no(self) -> bool:
        """Returns True if one more connection can at least be refused with a reason."""
        ...

    def greeting(self) -> AbstractContextManager[asyncio.BaseProtocol]:
        """The protocol for a connection whose handshake is in progress, which is counted too."""
        ...


class Listener:
    """Looks like what `loop.create_server` gives.

    Args:
        server: makes the protocols.
        sockets: bound and listening; they are closed with it, and not shut down.
        context: for the connections that come from now on, `None` for no TLS; may be replaced.
        backlog: how many may wait in the queue of each and are let in when it closes; 0 for
            sockets that others have as well, whose queue goes on.
    """

    def __init__(
        self,
        server: Greeter,
        sockets: list[socket.socket],
        context: ssl.SSLContext | None,
        *,
        backlog: int = 0,
    ) -> None:
        self.sockets = sockets
        self.context = context
        self._backlog = backlog
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._handshakes: set[asyncio.Task[None]] = set()
        self._pauses: dict[socket.socket, asyncio.TimerHandle] = {}
        for sock in sockets:
            self._loop.add_reader(sock, self._accept, sock)
        self._serving = True

    def is_serving(self) -> bool:
        """Returns True while connections are accepted."""
        return self._serving

    def close(self) -> None:
        """Accepts the backlog and then stops; connections and handshakes go on."""
        if not self._serving:
            return
        self._serving = False
        for pause in self._pauses.values():
            pause.cancel()
        for sock in self.sockets:
            self._loop.remove_reader(sock)
            self._empty(sock)
            sock.close()

    def _empty(self, listening: socket.socket) -> None:
        """Accepts the backlog; bounded, because more may come all the time."""
        with contextlib.suppress(OSError):
            for _ in range(self._backlog):
                if not self._let_in(listening):
                    return

    async def wait_closed(self) -> None:
        """Ends handshakes, too."""
        await asyncio.sleep(0)  # one that never began could not close its socket
        for task in self._handshakes:
            task.cancel()
        await asyncio.gather(*self._handshakes, return_exceptions=True)

    def _accept(self, listening: socket.socket) -> None:
        """Accepts waiting connections, many at once: those behind them wait for it.

        Accepted in a callback and not in a task, which could be cancelled between the kernel's
        yes and ours.
        """
        try:
            for _ in range(ACCEPTED_A_TURN):
                if not self._let_in(listening):
                    return
        except OSError as error:
            log.error("accept_failed", error=error.strerror)  # noqa: TRY400  known
            self._loop.remove_reader(listening)
            self._pauses[listening] = self._loop.call_later(
                _RETRY_SECONDS, self._loop.add_reader, listening, self._accept, listening
            )

    def _let_in(self, listening: socket.socket) -> bool:
        """Accepts one connection; returns False if none waits.

        Raises:
            OSError: no connection can be accepted, for want of descriptors or memory.
        """
        try:
            sock, _ = listening.accept()
        except BlockingIOError:
            return False  # another process was faster
        except (InterruptedError, ConnectionError):
            return True  # it went before we came
        if self._server.has_room_to_say_no():
            sock.setblocking(False)
            task = self._loop.create_task(self._greet(sock), name="greeting")
            self._handshakes.add(task)
            task.add_done_callback(self._handshakes.discard)
        else:
            sock.close()
        return True

    async def _greet(self, sock: socket.socket) -> None:
        """One handshake; it takes the place of a connection as long as it lasts."""
        context = self.context
        with self._server.greeting() as protocol:
            try:
                if context is None:
                    await self._loop.connect_accepted_socket(lambda: protocol, sock)
                else:
                    from ingestd.http.tls import secure  # noqa: PLC0415  there is a context of it

                    await secure(
                        sock,
                        protocol,
                        context,
                        handshake=HANDSHAKE_SECONDS,
                        shutdown=SHUTDOWN_SECONDS,
                    )
            except (OSError, ssl.SSLError) as error:
                log.debug("handshake_failed", error=type(error).__name__)
                with contextlib.suppress(OSError):
                    sock.close()
            except Exception:
                log.exception("handshake_failed")


async def bind(host: str, port: int, backlog: int, *, shared: bool = False) -> list[socket.socket]:
    """Listening sockets on every address of a host; of every interface if it is empty.

    Args:
        host: a name or an address.
        port: 0 is any free one.
        backlog: how many connections may wait to be accepted, for each socket.
        shared: other processes of this user may listen on the same port, if they say so too.

    Raises:
        OSError: one of them can't be had.
    """
    infos = await asyncio.get_running_loop().getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(infos):
            try:
                sock = socket.socket(family, kind, protocol)
            except OSError:
                continue  # the machine has no IPv6, or no IPv4
            sockets.append(sock)
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(address)
            sock.listen(backlog)
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets
