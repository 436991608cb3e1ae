"""Peers of connections: their address as a client, and counts of connections by client."""

from __future__ import annotations

import socket
import struct
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

    from ingestd.http.request import Request

_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


def peer_of(request: Request) -> str:
    """An IP address; `uid N` on a unix socket; empty if it has gone."""
    if request.remote or request.transport is None:
        return request.remote or ""
    return uid_of(request.transport)


def uid_of(transport: asyncio.BaseTransport) -> str:
    """`uid N` of the process at the other side of a unix socket; empty for any other socket."""
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family != socket.AF_UNIX:
        return ""
    whose = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return f"uid {_CREDENTIALS.unpack(whose)[1]}"


# -- clients ---------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def client_of(address: str) -> str:
    """Maps a peer's address to the client that it counts as.

    An IPv4 address stands for itself, also written as an IPv6 one. Of an IPv6 address the first 64
    bits count: the holder of one address has all of its /64 (RFC 6177). Anything else stands for
    itself too: peers of a Unix socket have no address and are one client.
    """
    try:
        parsed = ip_address(address)
    except ValueError:
        return address
    if not isinstance(parsed, IPv6Address):
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return f"{IPv6Address(int(parsed) >> 64 << 64)}/64"


class ClientConnections:
    """Counts connections by client.

    Args:
        connections_max: of one client; 0 for any number.
    """

    def __init__(self, connections_max: int) -> None:
        self._max = connections_max
        self._open: dict[str, int] = {}

    def enter(self, client: str) -> bool:
        """Counts a connection in, unless there are too many."""
        number = self._open.get(client, 0) + 1
        if self._max and number > self._max:
            return False
        self._open[client] = number
        return True

    def leave(self, client: str) -> None:
        """Counts one out that was counted in."""
        left = self._open[client] - 1
        if left:
            self._open[client] = left
        else:
            del self._open[client]
