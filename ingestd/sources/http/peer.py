"""Who is on the other side of a connection, as far as the kernel says it."""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiohttp import web

_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


def peer_of(request: web.BaseRequest) -> str:
    """An IP address; `uid N` on a unix socket; empty if it has gone."""
    if request.remote or request.transport is None:
        return request.remote or ""
    sock = request.transport.get_extra_info("socket")
    if sock is None or sock.family != socket.AF_UNIX:
        return ""
    whose = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return f"uid {_CREDENTIALS.unpack(whose)[1]}"
