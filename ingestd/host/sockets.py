"""Listening sockets: their addresses, and whether other machines can reach them."""

from __future__ import annotations

import errno
import os
import socket

from ingestd.config.network import is_loopback_ip, show_address

_IN_USE = (
    "address already in use; another program has it: choose another address, like "
    '"127.0.0.1:0" for any port that is free'
)


def show_socket(sock: socket.socket) -> str:
    """The address of a socket: `HOST:PORT`, or `unix:` and its path."""
    name = sock.getsockname()
    if sock.family != socket.AF_UNIX:
        return show_address(*name[:2])
    path = name if isinstance(name, str) else os.fsdecode(name)
    return f"unix:{path.replace(chr(0), '@', 1)}"


_ADVICE = {
    errno.EACCES: "; a port below 1024 needs root or the capability CAP_NET_BIND_SERVICE",
    errno.EADDRNOTAVAIL: "; no network interface of this machine has it",
}


def listen_fault(error: OSError | ValueError, how_to_share: str = "") -> str:
    """The reason why a socket could not be bound, in one line and without its address.

    Args:
        error: that it raised.
        how_to_share: added if another program has the port.
    """
    if isinstance(error, UnicodeError):
        return "not a host name"
    number, text = getattr(error, "errno", None), getattr(error, "strerror", None) or str(error)
    if isinstance(error, socket.gaierror) or not number:
        return text
    if number == errno.EADDRINUSE:
        return f"{_IN_USE}{how_to_share}"
    return os.strerror(number).lower() + _ADVICE.get(number, "")


def is_local(sock: socket.socket) -> bool:
    """Returns True if only this machine can reach it; the file of a unix socket has permissions."""
    return sock.family == socket.AF_UNIX or is_loopback_ip(sock.getsockname()[0].partition("%")[0])
