"""Messages of a log: a head and a piece of an entry, and what the last one tells of the log.

The first byte of an entry says what it is. `OPENED` begins a life of an owner, with the id of the
journal if the log begins with it. `COMMIT` is a group commit. `DRAINED` is the last message of an
owner that left nothing pending, `RETIRED` the last one of the log; both have the numbers.
"""

from __future__ import annotations

import secrets
import struct
import zlib
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ingestd.journal.interface import Ledger

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ingestd.journal.log.interface import LogMessage

_HEAD = struct.Struct(">B16sIIQI")
HEAD_BYTES = _HEAD.size
_VERSION = 1
OPENED, COMMIT, DRAINED, RETIRED = b"\0", b"\1", b"\2", b"\3"


class MessageHead(NamedTuple):
    """The head of a message.

    Attributes:
        version: of this format.
        entry: of all its parts.
        part: counts from 0.
        parts: of the entry.
        after: the number of the message before.
        crc: CRC-32 of the rest.
    """

    version: int
    entry: bytes
    part: int
    parts: int
    after: int
    crc: int


class LogEnd(msgspec.Struct, array_like=True, frozen=True):
    """The numbers of a log with nothing pending.

    Attributes:
        journal: its id.
        at: seconds since the epoch, by the clock of the daemon that wrote it.
        accepted: see `Ledger`.
        processed: see there, and so on.
        letters: dead letters that are kept in it.
    """

    journal: str
    at: float
    accepted: int
    processed: int
    dead: int
    invalid: int
    letters: int


class _Commit(msgspec.Struct, array_like=True):
    """The part of a `LogEntry` that has the counters."""

    version: int
    meta: list[int]


class LastMessage(NamedTuple):
    """The last message of a log.

    Attributes:
        number: of it.
        kind: `OPENED`, and so on; empty if it is not a whole entry.
        ledger: the counters after it; `None` if it does not have them.
        end: of a log that is drained or retired.
    """

    number: int
    kind: bytes
    ledger: Ledger | None = None
    end: LogEnd | None = None


def pieces(data: bytes, room: int) -> Iterator[tuple[bytes, int, int, bytes]]:
    """An entry cut for its messages: the entry's id, which part, of how many, and its bytes."""
    entry, parts = secrets.token_bytes(16), -(-len(data) // room)
    for part in range(parts):
        yield entry, part, parts, data[part * room : (part + 1) * room]


def barrier(after: int) -> bytes:
    """A message that says nothing, behind which no other one can come after `after`."""
    return packed(secrets.token_bytes(16), 0, 1, after, OPENED)


def packed(entry: bytes, part: int, parts: int, after: int, piece: bytes) -> bytes:
    """A message, to be appended after the one of the number `after`."""
    return _HEAD.pack(_VERSION, entry, part, parts, after, zlib.crc32(piece)) + piece


def taken_apart(message: LogMessage) -> tuple[MessageHead, bytes]:
    """The head of a message, and its piece of an entry.

    Raises:
        ValueError: it is damaged, or of another version.
    """
    data = message.data
    if len(data) < HEAD_BYTES or data[0] != _VERSION:
        raise ValueError(f"message {message.number} is not of this version")
    head, piece = MessageHead(*_HEAD.unpack_from(data)), data[HEAD_BYTES:]
    if zlib.crc32(piece) != head.crc:
        raise ValueError(f"message {message.number} is damaged")
    return head, piece


def end_entry(kind: bytes, end: LogEnd) -> bytes:
    """An entry that ends a log (`RETIRED`), or an owner's part of it (`DRAINED`)."""
    return kind + msgspec.msgpack.encode(end)


def ending(message: LogMessage) -> LastMessage:
    """Reads the last message of a log.

    Raises:
        ValueError: it is damaged, or of another version.
    """
    head, piece = taken_apart(message)
    if head.parts != 1:
        return LastMessage(message.number, b"")
    kind = piece[:1]
    if kind == COMMIT:
        counters = msgspec.msgpack.decode(piece[1:], type=_Commit).meta
        return LastMessage(message.number, kind, Ledger(*counters[:4]))
    if kind in {DRAINED, RETIRED}:
        end = msgspec.msgpack.decode(piece[1:], type=LogEnd)
        numbers = Ledger(end.accepted, end.processed, end.dead, end.invalid)
        return LastMessage(message.number, kind, numbers, end)
    begins = kind == OPENED and not head.after
    return LastMessage(message.number, kind, Ledger(0, 0, 0, 0) if begins else None)
