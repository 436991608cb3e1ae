"""A proxy that loses answers: each tenth request reaches the daemon, and its client never hears."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from typing import Self


class LosingProxy:
    """Relays connections to a port of this machine; use with `with`.

    Args:
        port: of the daemon; may be closed now and then.
        each: of so many answers one is lost, with its connection.
    """

    def __init__(self, port: int, each: int = 10) -> None:
        self._port, self._each = port, each
        self._numbers = itertools.count(1)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.lost = 0

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in tuple(self._open):
            _close(one)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self._port))
                except OSError:
                    client.close()
                    continue
                self._open |= {client, server}
                for way in ((client, server, False), (server, client, True)):
                    threading.Thread(target=self._relay, args=way, daemon=True).start()

    def _relay(self, source: socket.socket, to: socket.socket, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                accepted = answers and data[9:12] in (b"200", b"202")
                if accepted and next(self._numbers) % self._each == 2:
                    self.lost += 1
                    break
                to.sendall(data)
        for one in (source, to):
            _close(one)
            self._open.discard(one)


def _close(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
