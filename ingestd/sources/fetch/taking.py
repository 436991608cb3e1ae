"""Decompressed pieces of a body into records, and the position behind them."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Protocol

from msgspec.structs import replace

from ingestd.base.record import Records
from ingestd.sources.depth import DEPTH_MAX
from ingestd.sources.fetch.events import EventParser, records_of
from ingestd.sources.fetch.failure import Again, Changed, GivenUp
from ingestd.sources.framing import Framer
from ingestd.sources.lines import Parsed
from ingestd.sources.sniff import MARK_BYTES, marked

if TYPE_CHECKING:
    from ingestd.base.record import Format
    from ingestd.sources.fetch.position import Position


class Taker(Protocol):
    """What makes records out of one body.

    Attributes:
        position: behind the last record that `feed` or `end` gave.
    """

    position: Position

    def feed(self, piece: bytes) -> Parsed | None:
        """The records that a piece completes; nothing if it completes none."""
        ...

    def end(self, *, certain: bool) -> Parsed | None:
        """What is left at the end of the body.

        Args:
            certain: it was sent whole, and the connection did not just end.
        """
        ...

    def cut(self) -> Parsed | None:
        """What is left where the body was left, and will not be sent again."""
        ...


class Lines:
    """One record a line.

    Args:
        form: what the records are.
        record_bytes_max: a longer one is refused.
        position: where the body's first new byte lies.
        skip: bytes that come before it; compared with what was accepted.
        depth_max: JSON that is nested deeper is refused.
    """

    def __init__(
        self,
        form: Format,
        record_bytes_max: int,
        position: Position,
        skip: int = 0,
        *,
        depth_max: int = DEPTH_MAX,
    ) -> None:
        self.position = position
        self._skip = skip
        self._crc = 0 if skip else position.crc
        self._head: bytes | None = b"" if position.offset == 0 and form != "bytes" else None
        self._end = position.offset  # of everything that was fed
        begun = position.offset > 0
        self._framer = Framer(
            form, record_bytes_max, depth_max, begun=begun, index=position.records
        )

    def feed(self, piece: bytes) -> Parsed | None:
        """See `Taker`.

        Raises:
            Changed: it does not begin with what was accepted.
            GivenUp: it is compressed and nothing said so, or it is UTF-16 or UTF-32.
        """
        if self._skip:
            piece = self._pass_over(piece)
        if not piece:
            return None
        if self._head is not None:
            self._look_at(piece)
        parsed = self._framer.feed(piece)
        end = piece.rfind(b"\n") + 1
        if end:
            self._crc = zlib.crc32(memoryview(piece)[:end], self._crc)
            self._move(self._end + end)
        self._crc = zlib.crc32(memoryview(piece)[end:], self._crc)
        self._end += len(piece)
        return parsed

    def _look_at(self, piece: bytes) -> None:
        """Nothing but dead letters would come of it."""
        head = self._head = (self._head or b"") + piece[:MARK_BYTES]
        if found := marked(head):
            unsaid = "compressed" in found.what
            more = ", although neither its headers nor its name say so" if unsaid else ", not UTF-8"
            raise GivenUp(f"it is {found.what}{more}")
        if len(head) >= MARK_BYTES:
            self._head = None

    def _pass_over(self, piece: bytes) -> bytes:
        head = piece[: self._skip]
        self._crc = zlib.crc32(head, self._crc)
        self._skip -= len(head)
        if not self._skip and self._crc != self.position.crc:
            raise Changed
        return piece[len(head) :]

    def end(self, *, certain: bool) -> Parsed | None:
        """See `Taker`. A line whose end may be missing is refused as `unfinished`.

        Raises:
            Changed: it is shorter than what was accepted.
            Again: it may only have been cut there.
        """
        if self._skip:
            raise Changed if certain else Again("the body ended before what was accepted")
        parsed = self._framer.end() if certain else self._framer.cut()
        self._move(self._end)
        self.position = replace(self.position, done=True)
        return parsed

    def cut(self) -> Parsed | None:
        """See `Taker`."""
        return self._framer.cut()

    def _move(self, offset: int) -> None:
        records = self._framer.index
        self.position = replace(self.position, offset=offset, crc=self._crc, records=records)


class Events:
    """One record an event.

    Args:
        form: what the records are.
        record_bytes_max: a longer one is refused.
        position: which event was the last one.
        depth_max: JSON that is nested deeper is refused.
    """

    def __init__(
        self,
        form: Format,
        record_bytes_max: int,
        position: Position,
        *,
        depth_max: int = DEPTH_MAX,
    ) -> None:
        self.position = position
        self._form = form
        self._bytes_max = record_bytes_max
        self._depth_max = depth_max
        self._parser = EventParser(record_bytes_max, position.event_id)

    @property
    def retry(self) -> float | None:
        """What the stream asks to wait before it is asked again, seconds."""
        return self._parser.retry

    def feed(self, piece: bytes) -> Parsed | None:
        """See `Taker`."""
        events = self._parser.feed(piece)
        if not events:
            return None
        parsed = records_of(
            events, self._form, self._bytes_max, self.position.records, self._depth_max
        )
        self.position = replace(
            self.position,
            event_id=self._parser.last_id,
            records=self.position.records + parsed.total,
        )
        return parsed

    def end(self, *, certain: bool) -> Parsed | None:  # noqa: ARG002
        """See `Taker`; an event that is not complete is dropped, as the specification says."""
        return None

    def cut(self) -> Parsed | None:
        """See `Taker`; the server sends it again, if it knows its id."""
        return None


NOTHING = Parsed(Records.lines([]), [])
"""No records, for a position alone."""
