"""Messages between a process lane and its child: a length, then MessagePack, over a socket.

One side speaks and the other one answers, so there is never more than one message on its way.

The payload of a job usually lies in memory that both sides share (`Slot`) and only its size is in
the message: copied in once and out once, where the socket would need several copies and let other
threads of the daemon in between them. The child's copy is its own, so nothing that a handler keeps
changes under it.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct

import msgspec

from ingestd.handlers.outcome import Job, Result
from ingestd.handlers.runner import Wanted  # noqa: TC001  msgspec reads the annotation

SOCKET_BYTES = 1 << 20
"""Send buffer asked for: a batch that is too large for the slot then leaves in few goes."""
SLOT_BYTES = 1 << 20
"""A payload beyond this goes over the socket."""

_LENGTH = struct.Struct("<Q")
_TIMEVAL = struct.Struct("ll")
_BUFFER_BYTES = 64 * 1024


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
        is_async: with the executor `auto`, calls have to be awaited: a process is not its place.
    """

    load_error: str = ""
    not_ready: str = ""
    is_async: bool = False


class Order(msgspec.Struct, frozen=True):
    """A job as it is sent.

    Attributes:
        job: without its payload, if that is in the slot.
        shared: bytes of payload in the slot.
    """

    job: Job
    shared: int = 0


encode = msgspec.msgpack.Encoder().encode
decode_hello = msgspec.msgpack.Decoder(Hello).decode
decode_ready = msgspec.msgpack.Decoder(Ready).decode
decode_result = msgspec.msgpack.Decoder(Result).decode
_decode_order = msgspec.msgpack.Decoder(Order).decode


class Slot:
    """Shared memory for the payload of the one job that is under way.

    Args:
        fd: the memory's descriptor; stays the caller's, -1 for none: then nothing ever fits.
    """

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, SLOT_BYTES) if fd >= 0 else None

    @staticmethod
    def make() -> int:
        """A descriptor of new memory, or -1 where there is no such thing."""
        if not hasattr(os, "memfd_create"):
            return -1
        try:
            fd = os.memfd_create("ingestd-job")
        except OSError:
            return -1
        try:
            os.ftruncate(fd, SLOT_BYTES)
        except OSError:
            os.close(fd)
            return -1
        return fd

    def pack(self, job: Job) -> bytes:
        """The message for a job; its payload is in the slot if it fits."""
        payload = job.records.payload
        size = len(payload)
        if self._map is None or size > SLOT_BYTES:
            return encode(Order(job))
        self._map[:size] = payload
        return encode(Order(_with_payload(job, b""), size))

    def unpack(self, message: bytes | bytearray) -> Job:
        """The job of a message, complete."""
        order = _decode_order(message)
        if not order.shared or self._map is None:
            return order.job
        return _with_payload(order.job, self._map[: order.shared])

    def close(self) -> None:
        """Gives the memory back."""
        if self._map is not None:
            self._map.close()


def _with_payload(job: Job, payload: bytes) -> Job:
    return Job(job.batch, job.attempt, job.records._replace(payload=payload), job.spans, job.origin)


def set_timeout(sock: socket.socket, seconds: float) -> None:
    """Lets each call on a blocking socket raise `BlockingIOError` after so many seconds.

    The kernel's own timeout: `settimeout` would ask with `poll` before each call, and let other
    threads have the interpreter twice as often.
    """
    whole = int(seconds)
    value = _TIMEVAL.pack(whole, max(int((seconds - whole) * 1e6), 0 if whole else 1))
    for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, option, value)


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


def receive(sock: socket.socket) -> bytes | bytearray | None:
    """Receives one message; `None` when the other side has gone.

    Raises:
        OSError: the connection broke, or the socket's timeout passed.
    """
    begun = sock.recv(_BUFFER_BYTES)  # usually all of it
    while len(begun) < _LENGTH.size:
        more = sock.recv(_BUFFER_BYTES) if begun else b""
        if not more:
            return None
        begun += more
    (length,) = _LENGTH.unpack_from(begun)
    if len(begun) == _LENGTH.size + length:
        return begun[_LENGTH.size :]
    buffer = bytearray(length)
    have = len(begun) - _LENGTH.size
    buffer[:have] = memoryview(begun)[_LENGTH.size :]
    view = memoryview(buffer)
    while have < length:
        got = sock.recv_into(view[have:])
        if got == 0:
            return None
        have += got
    return buffer
