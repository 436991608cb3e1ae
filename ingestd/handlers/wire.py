"""Messages between a process lane and its child: a length, then MessagePack, over a socket."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import msgspec

from ingestd.handlers.outcome import Job, Result
from ingestd.handlers.runner import Wanted  # noqa: TC001  msgspec reads the annotation

if TYPE_CHECKING:
    import socket

_LENGTH = struct.Struct("<Q")
SOCKET_BYTES = 1 << 20
"""Send buffer asked for: a usual batch then leaves in one go."""


class Hello(msgspec.Struct, frozen=True):
    """What the child is told first.

    Attributes:
        handler: what to load.
        parent: the daemon's process id.
    """

    handler: Wanted
    parent: int


class Ready(msgspec.Struct, frozen=True):
    """The child's answer.

    Attributes:
        load_error: the handler can't be loaded; the child leaves.
        not_ready: the handler's constructor failed; it is tried again with each job.
    """

    load_error: str = ""
    not_ready: str = ""


encode = msgspec.msgpack.Encoder().encode
decode_hello = msgspec.msgpack.Decoder(Hello).decode
decode_ready = msgspec.msgpack.Decoder(Ready).decode
decode_job = msgspec.msgpack.Decoder(Job).decode
decode_result = msgspec.msgpack.Decoder(Result).decode


def send(sock: socket.socket, message: bytes) -> None:
    """Sends one message.

    Raises:
        OSError: the other side is gone, or the socket's timeout passed.
    """
    head = _LENGTH.pack(len(message))
    sent = sock.sendmsg([head, message])
    if sent < len(head):
        sock.sendall(head[sent:])
        sent = len(head)
    if sent < len(head) + len(message):
        sock.sendall(memoryview(message)[sent - len(head) :])


def receive(sock: socket.socket) -> bytearray | None:
    """Receives one message; `None` when the other side has gone.

    Raises:
        OSError: the connection broke, or the socket's timeout passed.
    """
    head = _exactly(sock, _LENGTH.size)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    return _exactly(sock, length)


def _exactly(sock: socket.socket, length: int) -> bytearray | None:
    buffer = bytearray(length)
    view, have = memoryview(buffer), 0
    while have < length:
        got = sock.recv_into(view[have:])
        if got == 0:
            return None
        have += got
    return buffer
