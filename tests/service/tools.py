"""A service manager, as far as a daemon can see: it passes sockets on and hears what it is told."""

from __future__ import annotations

import contextlib
import http.client
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tests.daemon.harness import Daemon

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LAUNCHER = Path(__file__).with_name("launcher.py")


class Manager:
    """Listens at `$NOTIFY_SOCKET`; `told` is every line that came, in order."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.told: list[str] = []
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(f"\0{address[1:]}" if address.startswith("@") else address)
        self._sock.settimeout(0.1)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._hear, daemon=True)

    def _hear(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(TimeoutError):
                self.told += self._sock.recv(65536).decode().split("\n")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(60)
        self._sock.close()


def until(true: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def passing(sockets: dict[str, socket.socket] | list[socket.socket], **more: str) -> dict[str, Any]:
    """What a daemon has to be started with to get these sockets: names and sockets, or no names."""
    named = sockets if isinstance(sockets, dict) else {}
    fds = [sock.fileno() for sock in (named.values() if named else sockets)]  # type: ignore[union-attr]
    words = [sys.executable, str(LAUNCHER), ":".join(named), ",".join(map(str, fds))]
    return {"prefix": tuple(words), "fds": tuple(fds), "environ": more}


@contextlib.contextmanager
def listening(address: Any = ("127.0.0.1", 0), family: int = socket.AF_INET) -> Iterator[Any]:
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.bind(address)
        sock.listen(128)
        yield sock


def refused(*arguments: str, cwd: Path, **more: Any) -> str:
    """What a daemon that does not start says; it has to leave with 78."""
    with Daemon(*arguments, cwd=cwd, **more) as one:
        assert one.wait() == 78
        return "\n".join(one.other)


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(60)
        self.sock.connect(self._path)
