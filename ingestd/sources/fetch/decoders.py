"""Decoders of downloads: lines and server-sent events to records and their positions.

Server-sent events: https://html.spec.whatwg.org/#server-sent-events
"""

from __future__ import annotations

import re
import zlib
from typing import TYPE_CHECKING, NamedTuple, Protocol

from msgspec.structs import replace

from ingestd.base.record import InvalidRecord, Records
from ingestd.codecs.framing import MARK_BYTES, Framer, LineNumbers, marked
from ingestd.codecs.json import DEPTH_MAX
from ingestd.codecs.lines import BOM, KEPT_BYTES, Parsed, json_fault, too_large
from ingestd.sources.fetch.failure import DownloadFailed, ResourceChanged, TryAgain

if TYPE_CHECKING:
    from ingestd.base.record import Format
    from ingestd.sources.fetch.position import Position


ID_CHARS_MAX = 1024
"""A longer id is not used: it has to be kept, and sent as a header."""
_ENDS = re.compile(rb"\r\n|\n|\r")
_FIELD_BYTES = 64  # a field's name, a colon and a space; much more than any field needs
_RETRY_DIGITS_MAX = 12


class Event(NamedTuple):
    """The data of one event.

    Attributes:
        data: its lines, joined by LF; the beginning, if that was too long.
        size: how long it was.
    """

    data: bytes
    size: int


class EventParser:
    """Parses a stream of events in reads of any size. Holds a bounded part of one event.

    Args:
        record_bytes_max: of longer data only the beginning is kept.
        last_id: of the stream before this one.

    Attributes:
        last_id: the id of the last event that was complete.
        retry: seconds that the stream asks to wait before a reconnect.
    """

    def __init__(self, record_bytes_max: int, last_id: str = "") -> None:
        self.last_id = last_id
        self.retry: float | None = None
        self._bytes_max = record_bytes_max
        self._id = last_id
        self._bom = BOM
        self._cr = False
        self._line = bytearray()
        self._line_size = 0
        self._data = bytearray()
        self._data_size = 0
        self._events: list[Event] = []

    def feed(self, data: bytes) -> list[Event]:
        """The events that `data` completes."""
        if self._bom:
            data = self._skip_bom(data)
        if self._cr and data:
            # The line ended with the CR already: live events do not wait for an LF.
            data = data.removeprefix(b"\n")
            self._cr = False
        if data:
            self._cr = data.endswith(b"\r")
            *whole, rest = _ENDS.split(data)
            for part in whole:
                self._hold(part)
                self._end_line()
            self._hold(rest)
        events, self._events = self._events, []
        return events

    def _skip_bom(self, data: bytes) -> bytes:
        data = bytes(self._line) + data
        self._line.clear()
        self._line_size = 0
        if len(data) < len(BOM) and BOM.startswith(data):
            self._hold(data)
            return b""
        self._bom = b""
        return data.removeprefix(BOM)

    def _hold(self, part: bytes) -> None:
        self._line_size += len(part)
        room = self._bytes_max + _FIELD_BYTES - len(self._line)
        if room > 0:
            self._line += part[:room]

    def _end_line(self) -> None:
        line, size = bytes(self._line), self._line_size
        self._line.clear()
        self._line_size = 0
        if not line:
            self._dispatch()
            return
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        cut = size - len(line)
        if field == b"data":
            self._add(value, len(value) + cut)
        elif cut:
            return  # a comment, or a field that is useless at that length
        elif field == b"id" and b"\0" not in value:
            self._id = _usable(value, self._id)
        elif field == b"retry" and value.isdigit() and len(value) <= _RETRY_DIGITS_MAX:
            self.retry = int(value) / 1000

    def _add(self, value: bytes, size: int) -> None:
        """Adds a line of data; each is followed by an LF until the event is complete."""
        self._data_size += size + 1
        room = self._bytes_max + 2 - len(self._data)
        if room > 0:
            self._data += value[:room]
            if len(value) < room:
                self._data += b"\n"

    def _dispatch(self) -> None:
        self.last_id = self._id
        if not self._data_size:
            return
        size = self._data_size - 1
        data = bytes(self._data[:size])
        self._data.clear()
        self._data_size = 0
        self._events.append(Event(data, size))


def _usable(value: bytes, before: str) -> str:
    """Returns an id that can be sent in a header; the one before, if it can't."""
    name = value.decode(errors="replace")
    plain = all(ord(c) >= 0x20 and c != "\x7f" for c in name)
    return name if plain and len(name) <= ID_CHARS_MAX else before


def records_of(
    events: list[Event],
    form: Format,
    record_bytes_max: int,
    first: int,
    depth_max: int = DEPTH_MAX,
) -> Parsed:
    """Makes each event a record, by the rules for lines; data of many lines stays one record.

    Args:
        events: in order.
        form: what the records are; in `json` and `text` pipelines blank ones are left out.
        record_bytes_max: a longer one is refused.
        first: the index of the first record.
        depth_max: JSON that is nested deeper is refused.
    """
    good: list[bytes] = []
    refused: list[InvalidRecord] = []
    for data, size in events:
        index = first + len(good) + len(refused)
        if size > record_bytes_max:
            refused.append(too_large(index, size, record_bytes_max, data[:KEPT_BYTES]))
        elif not (data.strip(b" \t\r\n") if form == "json" else data) and form != "bytes":
            continue
        elif form == "json" and (detail := json_fault(data, depth_max)):
            refused.append(InvalidRecord(index, "malformed", detail, data))
        else:
            good.append(data)
    several = any(b"\n" in data for data in good)
    return Parsed(Records.sized(good) if several else Records.lines(good), refused)


# -- decoders --------------------------------------------------------------------------------------


class RecordDecoder(Protocol):
    """Decodes one decompressed body to records.

    Attributes:
        position: behind the last record that `feed` or `end` gave.
    """

    position: Position

    def feed(self, piece: bytes) -> Parsed | None:
        """Returns the records that a piece completes; `None` if it completes none."""
        ...

    def end(self, *, certain: bool) -> Parsed | None:
        """Returns the last records, at the end of the body.

        Args:
            certain: it was sent whole, and the connection did not just end.
        """
        ...

    def cut(self) -> Parsed | None:
        """Returns the last records of a body that was left and will not be sent again."""
        ...


class LineDecoder:
    """Decodes one record a line.

    Args:
        form: what the records are.
        record_bytes_max: a longer one is refused.
        position: where the body's first new byte lies.
        skip: bytes that come before it; compared with what was accepted.
        depth_max: JSON that is nested deeper is refused.
        envelope: of the records, packed; names the attribute of their lines' numbers.
    """

    def __init__(
        self,
        form: Format,
        record_bytes_max: int,
        position: Position,
        skip: int = 0,
        *,
        depth_max: int = DEPTH_MAX,
        envelope: bytes = b"",
    ) -> None:
        self.position = position
        self._skip = skip
        self._crc = 0 if skip else position.crc
        self._head: bytes | None = b"" if position.offset == 0 and form != "bytes" else None
        self._end = position.offset  # of everything that was fed
        begun = position.offset > 0
        uncounted = begun and not position.lines
        self._numbers = LineNumbers(form, envelope, None if uncounted else position.lines)
        self._framer = Framer(
            form, record_bytes_max, depth_max, begun=begun, index=position.records
        )

    def feed(self, piece: bytes) -> Parsed | None:
        """See `RecordDecoder`.

        Raises:
            ResourceChanged: it does not begin with the accepted bytes.
            DownloadFailed: it is compressed without a hint, or it is UTF-16 or UTF-32.
        """
        if self._skip:
            piece = self._pass_over(piece)
        if not piece:
            return None
        if self._head is not None:
            self._look_at(piece)
        held, index = self._framer.held, self._framer.index
        parsed = self._framer.feed(piece)
        size = held + len(piece) - self._framer.held
        parsed = self._numbers.number(piece, parsed, size=size, index=index)
        end = piece.rfind(b"\n") + 1
        if end:
            self._crc = zlib.crc32(memoryview(piece)[:end], self._crc)
            self._move(self._end + end)
        self._crc = zlib.crc32(memoryview(piece)[end:], self._crc)
        self._end += len(piece)
        return parsed

    def _look_at(self, piece: bytes) -> None:
        """Fails for content that would give nothing but dead letters."""
        head = self._head = (self._head or b"") + piece[:MARK_BYTES]
        if found := marked(head):
            unsaid = "compressed" in found.what
            more = ", although neither its headers nor its name say so" if unsaid else ", not UTF-8"
            raise DownloadFailed(f"it is {found.what}{more}")
        if len(head) >= MARK_BYTES:
            self._head = None

    def _pass_over(self, piece: bytes) -> bytes:
        head = piece[: self._skip]
        self._crc = zlib.crc32(head, self._crc)
        self._skip -= len(head)
        if not self._skip and self._crc != self.position.crc:
            raise ResourceChanged
        return piece[len(head) :]

    def end(self, *, certain: bool) -> Parsed | None:
        """See `RecordDecoder`. A line whose end may be missing is refused as `unfinished`.

        Raises:
            ResourceChanged: it is shorter than the accepted bytes.
            TryAgain: it may only have been cut there.
        """
        if self._skip:
            raise (
                ResourceChanged if certain else TryAgain("the body ended before what was accepted")
            )
        parsed = self._last(certain=certain)
        self._move(self._end)
        self.position = replace(self.position, done=True)
        return parsed

    def cut(self) -> Parsed | None:
        """See `RecordDecoder`."""
        return self._last(certain=False)

    def _last(self, *, certain: bool) -> Parsed | None:
        index = self._framer.index
        parsed = self._framer.end() if certain else self._framer.cut()
        return self._numbers.number(b"\n", parsed, size=-1, index=index) if parsed else None

    def _move(self, offset: int) -> None:
        self.position = replace(
            self.position,
            offset=offset,
            crc=self._crc,
            records=self._framer.index,
            lines=self._numbers.lines,
        )


class EventDecoder:
    """Decodes one record an event.

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
        """Seconds that the stream asks to wait before a reconnect."""
        return self._parser.retry

    def feed(self, piece: bytes) -> Parsed | None:
        """See `RecordDecoder`."""
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
        """See `RecordDecoder`; drops an event that is not complete, as the specification says."""
        return None

    def cut(self) -> Parsed | None:
        """See `RecordDecoder`; the server sends it again, if it knows its id."""
        return None


NOTHING = Parsed(Records.lines([]), [])
"""No records, for a position alone."""
