"""What a process that a handler forks must not keep of the daemon.

A handler that runs in a thread of the daemon may use `multiprocessing` or a pool of processes with
the start method fork. Such a child has a copy of every descriptor: with the lock and the journal it
would keep the next daemon from starting, with a listening socket it would keep the port, and a
signal that is sent to it would be written into the daemon's own wake-up pipe. Programs that are
started with exec get none of this: every descriptor of ours is closed there.
"""

from __future__ import annotations

import os
import signal
import socket
from concurrent.futures import thread
from pathlib import Path
from typing import TYPE_CHECKING

from ingestd.base.held import HeldSignals
from ingestd.base.passed import show_socket
from ingestd.base.signals import ALL

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

_FDS = Path("/proc/self/fd")
_OURS = ("journal", "lock")
"""How the names of our files in the data directory begin."""


class Forks:
    """Takes what is the daemon's from every process that is forked, until `forget`.

    Args:
        data_dir: where its journals and locks are.
        fds: more descriptors of its own.
    """

    def __init__(self, data_dir: Path, fds: Collection[int] = ()) -> None:
        self._folder = f"{data_dir.resolve()}{os.sep}"
        self._fds = tuple(fds)
        self._addresses: Callable[[], Collection[str]] = tuple
        self._active = True
        HeldSignals(ALL, self._after)

    def listen(self, addresses: Callable[[], Collection[str]]) -> None:
        """Where the daemon listens: sockets there, and connections to them, are its own."""
        self._addresses = addresses

    def forget(self) -> None:
        """Does nothing any more."""
        self._active = False

    def _after(self) -> None:
        if not self._active:
            return
        self._active = False
        # At its exit the child would wait for the threads of pools: for the one that it is.
        thread._threads_queues = {}  # noqa: SLF001
        signal.set_wakeup_fd(-1)
        for number in ALL:
            signal.signal(number, signal.SIG_DFL)
        # Put in place of what is taken: with a number that is free again SQLite, whose objects are
        # still there, would sooner or later write into somebody else's file.
        nothing = os.open("/", os.O_PATH | os.O_CLOEXEC)
        for fd in self._ours():
            os.dup2(nothing, fd, inheritable=False)
        os.close(nothing)

    def _ours(self) -> list[int]:
        socket.setdefaulttimeout(None)  # which a socket object would give to what it stands for
        addresses = set(self._addresses())
        ports = {address.rpartition(":")[2] for address in addresses}
        open_now = [int(link.name) for link in _FDS.iterdir()]
        return [fd for fd in open_now if fd in self._fds or self._is_ours(fd, addresses, ports)]

    def _is_ours(self, fd: int, addresses: set[str], ports: set[str]) -> bool:
        try:
            target = os.readlink(_FDS / str(fd))  # noqa: PTH115  text, also if it is no path
            if target.startswith("socket:"):
                return _is_at(fd, addresses, ports)
        except OSError:
            return False
        return target.startswith(self._folder) and os.path.basename(target).startswith(_OURS)  # noqa: PTH119


def _is_at(fd: int, addresses: set[str], ports: set[str]) -> bool:
    sock = socket.socket(fileno=fd)
    try:
        shown = show_socket(sock)
    finally:
        sock.detach()
    if sock.family in {socket.AF_INET, socket.AF_INET6}:
        return shown.rpartition(":")[2] in ports
    return shown in addresses
