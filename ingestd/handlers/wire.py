"""Messages between a process worker and its child: a head, then MessagePack, over two sockets.

What the daemon sends is a packet (`send_packet`), and what the child answers comes in a stream. The
next jobs are there before the last one is answered, and the kernel decides which process gets a
packet: the daemon can receive what it sent as well, so that a job which it gets back was not begun,
and one that it does not get back was.

A head says whose message it is: the child's process id and the number of the job. Whatever does not
fit (bytes that a handler wrote to every descriptor it found, an answer from a process that the
worker forked) is a `MessageMismatch`: nothing that comes after it on this connection can be
believed.

The payload of a job usually lies in memory that both sides share (`SharedBuffer`) and its place is
in the message: copied in once and out once, where the socket would need several copies and let
other threads of the daemon in between them. The child's copy is its own, so nothing that a handler
keeps changes under it; and the child can't write to that memory, nor make it shorter.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import socket
import struct
from typing import TYPE_CHECKING

import msgspec

from ingestd.base.record import Records
from ingestd.handlers.outcome import ERROR_CHARS_MAX, Job, Result, SinkFinding
from ingestd.handlers.runner import HandlerConfig  # noqa: TC001  msgspec reads the annotation

if TYPE_CHECKING:
    from collections.abc import Callable

SOCKET_BYTES = 1 << 20
"""Send buffer asked for: a batch that is too large for the slot then leaves in few goes."""
SLOT_BYTES = 1 << 20
"""A payload beyond this goes over the socket."""
ANSWER_BYTES_MAX = 256 * 1024
"""Largest answer beside what it says of single records."""
BUFFER_BYTES = 64 * 1024
"""A message up to this size is usually received at once."""
PACKET_BYTES = 8 * 1024
"""A message up to this size is one packet: some of them never fill a socket's buffer."""

_MAGIC = b"igd\x01"
_HEAD = struct.Struct("<4sIQQ")  # magic, the child's process id, number of the job, length
_TIMEVAL = struct.Struct("ll")
_STEP_BYTES = 4 << 20
_F_SEAL_FUTURE_WRITE = 0x10  # Linux 5.1; not in `fcntl` yet


class InitMessage(msgspec.Struct, frozen=True):
    """First message to a child: its configuration.

    Attributes:
        handler: what to load.
        parent: the daemon's process id.
        checks: a `CheckMessage` follows the child's answer, before the first job is read.
    """

    handler: HandlerConfig
    parent: int
    checks: bool = False


class ReadyMessage(msgspec.Struct, frozen=True):
    """The child's answer.

    Attributes:
        load_error: the handler can't be loaded; the child leaves.
        not_ready: the handler's constructor failed; it is tried again with each job.
        is_async: with the executor `auto`, calls have to be awaited: a process is not its place.
        schema: of the records, from a process that validates; see `Validation.schema`.
    """

    load_error: str = ""
    not_ready: str = ""
    is_async: bool = False
    schema: bytes = b""


class CheckMessage(msgspec.Struct, frozen=True):
    """Message of a child with what the handler's `check()` found.

    Attributes:
        findings: at most `FINDINGS_MAX`.
    """

    findings: list[SinkFinding]


class RunMessage(msgspec.Struct, frozen=True, array_like=True):
    """A job as it is sent.

    Attributes:
        job: without its payload, if that is in the slot.
        shared: bytes of payload in the slot.
        start: where they begin.
    """

    job: Job
    shared: int = 0
    start: int = 0


class ResultMessage(msgspec.Struct, frozen=True, array_like=True):
    """Message of a child with the result of a job.

    Attributes:
        result: what became of it.
        closing: the handler is being closed, and a `ConnectionClosed` follows before the next job
            is read.
    """

    result: Result
    closing: bool = False


class ConnectionClosed(msgspec.Struct, frozen=True):
    """The handler whose call raised is closed; the next job gets a new one.

    Attributes:
        error: one line if its `close()` failed.
    """

    error: str = ""


class Message(msgspec.Struct, frozen=True):
    """A message as it came.

    Attributes:
        number: of the job that it belongs to.
        body: MessagePack.
        rest: what came behind it.
    """

    number: int
    body: bytes | bytearray
    rest: bytes = b""


class MessageMismatch(Exception):  # noqa: N818  the message says what it is
    """A message is not of this worker, or not about this job."""


TRAILING = "there are bytes behind it"

encode = msgspec.msgpack.Encoder().encode
decode_hello = msgspec.msgpack.Decoder(InitMessage).decode
decode_ready = msgspec.msgpack.Decoder(ReadyMessage).decode
decode_check = msgspec.msgpack.Decoder(CheckMessage).decode
decode_answer = msgspec.msgpack.Decoder(ResultMessage).decode
decode_closed = msgspec.msgpack.Decoder(ConnectionClosed).decode
_decode_order = msgspec.msgpack.Decoder(RunMessage).decode


def answer_bytes_max(records: int) -> int:
    """Largest answer to a job of so many records."""
    return ANSWER_BYTES_MAX + records * (4 * ERROR_CHARS_MAX + 64)


class SharedBuffer:
    """Shared memory for the payloads of the jobs that are under way.

    Args:
        fd: the memory's descriptor; stays the caller's, -1 for none: then nothing ever fits.
        ours: whether this is the worker's side, the only one that writes.
    """

    def __init__(self, fd: int, *, ours: bool) -> None:
        access = mmap.ACCESS_WRITE if ours else mmap.ACCESS_READ
        self._map = mmap.mmap(fd, SLOT_BYTES, access=access) if fd >= 0 else None
        if fd >= 0 and ours:
            _seal(fd)

    @staticmethod
    def make() -> int:
        """A descriptor of new memory, or -1 where there is no such thing."""
        if not hasattr(os, "memfd_create"):
            return -1
        try:
            fd = os.memfd_create("ingestd-job", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError:
            return -1
        try:
            os.ftruncate(fd, SLOT_BYTES)
        except OSError:
            os.close(fd)
            return -1
        return fd

    def pack(self, job: Job, start: int = 0) -> bytes:
        """The message for a job; its payload is in the slot, from `start` on, if it fits."""
        layout, count, payload, sizes, names, envelopes = job.records
        size = len(payload)
        if self._map is None or start + size > SLOT_BYTES:
            return encode(RunMessage(job))
        self._map[start : start + size] = payload
        # A `RunMessage` without objects that nothing else needs: their fields, in order.
        records = (layout, count, b"", sizes, names, envelopes)
        facts = (
            job.batch, job.attempt, records, job.spans, job.origin, job.accepted_at, job.lineage,
            job.traceparent,
        )  # fmt: skip
        return encode((facts, size, start))

    def unpack(self, message: bytes | bytearray) -> Job:
        """The job of a message, complete."""
        order = _decode_order(message)
        if not order.shared or self._map is None:
            return order.job
        end = order.start + order.shared
        return _with_payload(order.job, self._map[order.start : end])

    def close(self) -> None:
        """Gives the memory back."""
        if self._map is not None:
            self._map.close()


def _seal(fd: int) -> None:
    """Seals the memory: it can't be shortened, which would kill its writer, or written anew."""
    lasting = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    for seals in (lasting | _F_SEAL_FUTURE_WRITE, lasting):
        with contextlib.suppress(OSError):  # a kernel that does not know the newer one
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            return


def _with_payload(job: Job, payload: bytes) -> Job:
    layout, count, _, sizes, names, envelopes = job.records
    records = Records(layout, count, payload, sizes, names, envelopes)
    return Job(
        job.batch, job.attempt, records, job.spans, job.origin, job.accepted_at, job.lineage,
        job.traceparent,
    )  # fmt: skip


def set_timeout(sock: socket.socket, seconds: float) -> None:
    """Lets each call on a blocking socket raise `BlockingIOError` after so many seconds.

    The kernel's own timeout: `settimeout` would ask with `poll` before each call, and let other
    threads have the interpreter twice as often.
    """
    whole = int(seconds)
    value = _TIMEVAL.pack(whole, max(int((seconds - whole) * 1e6), 0 if whole else 1))
    for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, option, value)


def send(sock: socket.socket, message: bytes, *, worker: int, number: int) -> None:
    """Sends one message.

    Args:
        sock: where to.
        message: its body.
        worker: the child's process id.
        number: of the job.

    Raises:
        OSError: the other side is gone, or the socket's timeout passed.
    """
    head = _HEAD.pack(_MAGIC, worker, number, len(message))
    if len(message) < BUFFER_BYTES:
        data = head + message
        sent = sock.send(data)
        if sent < len(data):
            sock.sendall(data[sent:])
        return
    sent = sock.sendmsg([head, message])
    if sent < len(head):
        sock.sendall(head[sent:])
        sent = len(head)
    if sent < len(head) + len(message):
        sock.sendall(memoryview(message)[sent - len(head) :])


def send_packet(
    packets: socket.socket, stream: socket.socket, message: bytes, *, worker: int, number: int
) -> None:
    """Sends one message as a packet; one that is large goes over the stream behind its head.

    Args:
        packets: keeps the bounds of messages.
        stream: for the other ones.
        message: its body.
        worker: the child's process id.
        number: of the job.

    Raises:
        OSError: the other side is gone, or the socket's timeout passed.
    """
    head = _HEAD.pack(_MAGIC, worker, number, len(message))
    if len(message) <= PACKET_BYTES:
        packets.send(head + message)
        return
    packets.send(head)
    send(stream, message, worker=worker, number=number)


def receive_packet(
    packets: socket.socket, stream: socket.socket, *, worker: int, limit: int
) -> Message | None:
    """Receives one message that was sent by `send_packet`; `None` when the other side has gone.

    Args:
        packets: where from.
        stream: for large messages.
        worker: the child's process id.
        limit: most bytes of a body.

    Raises:
        MessageMismatch: it is no message, or not this child's, or too large.
        OSError: the connection broke.
    """
    packet = packets.recv(BUFFER_BYTES)
    if not packet:
        return None
    if len(packet) < _HEAD.size:
        raise MessageMismatch("it does not begin like a message")
    number, length = _read_head(packet, worker, limit)
    if len(packet) == _HEAD.size + length:
        return Message(number, packet[_HEAD.size :])
    return receive(stream, worker=worker, limit=limit)


def take_packets_back(unread: socket.socket) -> set[int]:
    """Receives the packets that the other side has not received yet; returns their jobs' numbers.

    They need not be the newest ones: the other side may receive one between two of them.

    Args:
        unread: the other side's end.
    """
    numbers = set()
    with contextlib.suppress(OSError):
        while head := unread.recv(_HEAD.size, socket.MSG_DONTWAIT):
            numbers.add(_HEAD.unpack(head)[2])
    return numbers


def body_at_once(begun: bytes, worker: int, number: int) -> bytes | None:
    """Returns the body if these bytes are one whole message about a job; `receive` says what else.

    Args:
        begun: what was received first, at most `BUFFER_BYTES`.
        worker: the child's process id.
        number: of the job.
    """
    if len(begun) >= _HEAD.size and _HEAD.unpack_from(begun) == (
        _MAGIC, worker, number, len(begun) - _HEAD.size
    ):  # fmt: skip
        return begun[_HEAD.size :]
    return None


def receive(
    sock: socket.socket,
    *,
    worker: int,
    limit: int,
    before_more: Callable[[], None] = lambda: None,
    begun: bytes = b"",
    may_follow: bool = False,
) -> Message | None:
    """Receives one message; `None` when the other side has gone.

    Args:
        sock: where from.
        begun: the `rest` of the message before, which is the beginning of this one.
        may_follow: bytes behind the message are its `rest`.
        worker: the child's process id.
        limit: most bytes of a body.
        before_more: called before each piece but the first; may raise.

    Raises:
        MessageMismatch: it is no message, or not this child's, or too large.
        OSError: the connection broke, or the socket's timeout passed.
    """
    begun = begun or sock.recv(BUFFER_BYTES)  # usually all of it
    if len(begun) >= _HEAD.size:  # the common case at once; the rest of this looks closer
        magic, sender, number, length = _HEAD.unpack_from(begun)
        if (
            magic == _MAGIC
            and sender == worker
            and len(begun) == _HEAD.size + length
            and length <= limit
        ):
            return Message(number, begun[_HEAD.size :])
    while len(begun) < _HEAD.size:
        if not _MAGIC.startswith(begun[: len(_MAGIC)]):
            break
        before_more()
        more = sock.recv(BUFFER_BYTES) if begun else b""
        if not more:
            return None
        begun += more
    number, length = _read_head(begun, worker, limit)
    have = len(begun) - _HEAD.size
    if have > length:
        if not may_follow:
            raise MessageMismatch(TRAILING)
        end = _HEAD.size + length
        return Message(number, begun[_HEAD.size : end], begun[end:])
    if have == length:
        return Message(number, begun[_HEAD.size :])
    # Not at once: what came so far is all that is known to be there.
    buffer = bytearray(min(length, max(_STEP_BYTES, have)))
    buffer[:have] = memoryview(begun)[_HEAD.size :]
    while have < length:
        if have == len(buffer):
            buffer.extend(bytes(min(length, 2 * have) - have))
        before_more()
        with memoryview(buffer)[have:] as free:
            got = sock.recv_into(free)
        if got == 0:
            return None
        have += got
    return Message(number, buffer)


def _read_head(begun: bytes, worker: int, limit: int) -> tuple[int, int]:
    if not begun.startswith(_MAGIC):
        raise MessageMismatch("it does not begin like a message")
    _, sender, number, length = _HEAD.unpack_from(begun)
    if sender != worker:
        raise MessageMismatch(f"it is from process {sender}")
    if length > limit:
        raise MessageMismatch(f"it is said to be {length} bytes long")
    return number, length
