"""Listening sockets: their addresses, and whether other machines can reach them."""

from __future__ import annotations

import os
import socket

from ingestd.config.network import is_loopback_ip, show_address


def show_socket(sock: socket.socket) -> str:
    """The address of a socket: `HOST:PORT`, or `unix:` and its path."""
    name = sock.getsockname()
    if sock.family != socket.AF_UNIX:
        return show_address(*name[:2])
    path = name if isinstance(name, str) else os.fsdecode(name)
    return f"unix:{path.replace(chr(0), '@', 1)}"


def is_local(sock: socket.socket) -> bool:
    """Returns True if only this machine can reach it; the file of a unix socket has permissions."""
    return sock.family == socket.AF_UNIX or is_loopback_ip(sock.getsockname()[0].partition("%")[0])
