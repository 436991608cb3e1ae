"""Events of Fluentd and Fluent Bit in MessagePack, as JSON records. No I/O.

https://github.com/fluent/fluentd/wiki/Forward-Protocol-Specification-v1#entry

An event is `[time, record]`, or as Fluent Bit has it `[[time, metadata], record]`. Fluent Bit also
marks groups: an event with the first time below carries what all events up to the second have in
common. A mark is no record, and what it carries goes into each record of the group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ingestd.base.bursts import let_loop_go_first
from ingestd.base.record import InvalidRecord, Layout, Records
from ingestd.codecs.compression import TooMuch
from ingestd.codecs.json import has_longer_line, is_deeper
from ingestd.codecs.lines import KEPT_BYTES, Parsed, too_deep, too_large
from ingestd.codecs.msgpack import (
    ARRAY,
    MessagePackFault,
    encode_json,
    end_of,
    read_head,
    spans,
    to_object,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_GROUP_START = b"4294967295.000000000"  # -1 and -2 as EventTime has them
_GROUP_END = b"4294967294.000000000"
_EVENT_TIMES = (b"\xd7\x00", b"\xc7\x08\x00")
_PAIR = 0x92  # an array of two
_NESTED_TIME = bytes([_PAIR]) + _EVENT_TIMES[0]
_TOGETHER = 64
_HEAD_BYTES = 64  # of an event, before its record


class RecordBounds(NamedTuple):
    """Bounds of the records of a body.

    Attributes:
        records_max: so many are read.
        record_bytes_max: a longer JSON text is invalid.
        depth_max: one that is nested deeper is invalid.
        bytes_max: of all of them.
        listed_max: so many invalid ones are listed, others are counted.
    """

    records_max: int
    record_bytes_max: int
    depth_max: int
    bytes_max: int
    listed_max: int


class TooManyRecords(Exception):  # noqa: N818 - names the condition
    """There are more records than allowed."""


class RecordList:
    """Gathers JSON texts as records, within bounds.

    Args:
        bounds: of them.
        grow: called with the bytes of each, before it is kept.
    """

    def __init__(self, bounds: RecordBounds, grow: Callable[[int], None] | None = None) -> None:
        self._bounds = bounds
        self.record_bytes_max = bounds.record_bytes_max
        self._grow = grow
        self._texts: list[bytes] = []
        self._bytes = 0
        self._refused: list[InvalidRecord] = []
        self._unlisted = 0
        self.begin()

    def begin(self) -> None:
        """Begins a message: the bounds, but for `listed_max`, hold for each."""
        self._index_end = self._index() + self._bounds.records_max
        self._bytes_end = self._bytes + self._bounds.bytes_max
        self._begun = len(self._texts), self._bytes, len(self._refused), self._unlisted

    def give_up(self) -> None:
        """Drops all of the message that was begun last."""
        texts, self._bytes, refused, self._unlisted = self._begun
        del self._texts[texts:], self._refused[refused:]

    def add(self, text: bytes) -> None:
        """Takes a JSON text without an LF in it.

        Raises:
            TooMuch: all of them are more than `bytes_max`.
            TooManyRecords: they are more than `records_max`.
        """
        bounds = self._bounds
        size = len(text)
        if size > bounds.record_bytes_max:
            self.refuse_large(size, text)
        elif size > 2 * bounds.depth_max and is_deeper(text, bounds.depth_max):
            self.refuse(too_deep(bounds.depth_max), text)
        else:
            self._bytes += size + 1
            if self._bytes > self._bytes_end:
                raise TooMuch(f"more than {bounds.bytes_max} bytes of JSON")
            if self._grow is not None:
                self._grow(size + 1)
            self._next()
            self._texts.append(text)

    def refuse_large(self, size: int, head: bytes | bytearray) -> None:
        """Takes a value of `size` bytes that is too large, of which `head` is the beginning.

        Raises:
            TooManyRecords: they are more than `records_max`.
        """
        self._refuse(too_large(self._next(), size, self._bounds.record_bytes_max, bytes(head)))

    def refuse(self, detail: str, payload: bytes | bytearray) -> None:
        """Takes a value that can be no record.

        Raises:
            TooManyRecords: they are more than `records_max`.
        """
        head = bytes(payload[:KEPT_BYTES])
        self._refuse(InvalidRecord(self._next(), "malformed", detail, head))

    def parsed(self) -> Parsed:
        """The records."""
        texts = self._texts
        payload = b"\n".join([*texts, b""])
        return Parsed(Records(Layout.LINES, len(texts), payload), self._refused, self._unlisted)

    def _index(self) -> int:
        return len(self._texts) + len(self._refused) + self._unlisted

    def _next(self) -> int:
        """The index of the next record."""
        index = self._index()
        if index >= self._index_end:
            raise TooManyRecords(f"more than {self._bounds.records_max} records")
        if not index % _TOGETHER:
            let_loop_go_first()
        return index

    def _refuse(self, one: InvalidRecord) -> None:
        if len(self._refused) < self._bounds.listed_max:
            self._refused.append(one)
        else:
            self._unlisted += 1


class LogEvent(NamedTuple):
    """A log event.

    Attributes:
        time: JSON number: seconds since the epoch.
        record: its fields.
        metadata: that Fluent Bit gave it; `None` for none.
        group: of its group, likewise.
    """

    time: bytes
    record: dict[Any, Any]
    metadata: dict[Any, Any] | None
    group: dict[Any, Any] | None


class EventReader:
    """Reads the events of one body or message, in order: groups reach over several."""

    def __init__(self) -> None:
        self._group: dict[Any, Any] | None = None

    def read(self, data: bytes | bytearray, at: int, end: int) -> LogEvent | None:
        """Reads an event; `None` for a mark.

        Args:
            data: holds it.
            at: its offset.
            end: the offset behind it, which was found.

        Raises:
            MessagePackFault: it is none.
        """
        event = to_object(data, at, end, sure=_behind_time(data, at))
        if not isinstance(event, list) or len(event) != 2:
            raise MessagePackFault("an event is an array of time and record")
        head, record = event
        metadata: Any = None
        if isinstance(head, list):
            if len(head) != 2 or not isinstance(head[1], dict):
                raise MessagePackFault("the head of an event is an array of time and metadata")
            head, metadata = head
        time = _time(head)
        if not isinstance(record, dict):
            raise MessagePackFault("the record of an event is not a map")
        if time in (_GROUP_START, _GROUP_END):
            self._group = record if time == _GROUP_START and record else None
            return None
        return LogEvent(time, record, metadata or None, self._group)


def _time(value: Any) -> bytes:
    if isinstance(value, msgspec.Raw):
        return bytes(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        text = msgspec.json.encode(value)
        if text != b"null":
            return text
    raise MessagePackFault("the time of an event is no number of seconds and no EventTime")


def _behind_time(data: bytes | bytearray, at: int) -> int:
    """The offset up to which an event surely holds no bin: its time may have any byte."""
    if data.startswith(_EVENT_TIMES[0], at + 1):
        return at + 11
    return at + 12 if data.startswith(_NESTED_TIME, at + 1) else at


def is_event(data: bytes | bytearray, at: int) -> bool:
    """Tells if a value is an event of Fluent Bit's: its time is an EventTime.

    A number in place of that could be anything else.
    """
    if data[at] != _PAIR or at + 1 == len(data):
        return False
    behind = at + 2 if data[at + 1] == _PAIR else at + 1
    return data.startswith(_EVENT_TIMES, behind)


# -- bodies of the records endpoint ----------------------------------------------------------------


def parse_body(body: bytes, bounds: RecordBounds) -> Parsed:
    """Reads a body of MessagePack.

    An array is one record an element, any other value is one record; several values one behind the
    other are one record each. Events are as Fluent Bit's `format json` writes them.

    Raises:
        MessagePackFault: it is malformed.
        TooMuch: see `RecordList`.
        TooManyRecords: see `RecordList`.
    """
    gathered = RecordList(bounds)
    if not body:
        return gathered.parsed()
    values: Iterable[tuple[int, int]]
    head = None if body[0] < 0x80 or is_event(body, 0) else _array_head(body)
    if head is not None and (plain := _plain_lines(body, head[0], bounds)) is not None:
        return plain
    if head is not None and end_of(body) == len(body):
        count, at = head
        if count > bounds.records_max:
            raise TooManyRecords(f"more than {bounds.records_max} records")
        values = spans(body, at)
    else:
        values = spans(body)
    _gather(body, values, gathered, _as_fluent_bit)
    return gathered.parsed()


_PlainScalar = str | int | float | bool | None
_PLAIN_DEPTH = 2
_PLAIN_BYTES_MAX = 512 * 1024
_PLAIN_BYTES_A_RECORD = 16
"""A shorter map takes many times its size as a dict."""
_decode_plain = msgspec.msgpack.Decoder(
    list[dict[str, _PlainScalar | dict[str, _PlainScalar] | list[_PlainScalar]]]
).decode
_encode_lines = msgspec.json.Encoder().encode_lines


def _plain_lines(body: bytes, count: int, bounds: RecordBounds) -> Parsed | None:
    """Reads an array of maps all at once, as most bodies are; `None` if it has anything else.

    Maps of texts, numbers and of one more such level have the JSON that msgspec writes. Bins, exts,
    other keys and what is beyond a bound are left to those that look at one value at a time.
    """
    size = len(body)
    if not _PLAIN_BYTES_A_RECORD * count <= size <= _PLAIN_BYTES_MAX:
        return None
    if count > bounds.records_max or bounds.depth_max < _PLAIN_DEPTH:
        return None
    try:
        payload = _encode_lines(_decode_plain(body))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    most = bounds.record_bytes_max
    if len(payload) > bounds.bytes_max or (len(payload) > most and has_longer_line(payload, most)):
        return None
    return Parsed(Records(Layout.LINES, count, payload), [])


def parse_events(
    data: bytes | bytearray, values: Iterable[tuple[int, int]], tag: bytes, gathered: RecordList
) -> None:
    """Reads the events of a message of the forward protocol.

    What comes from a fault of their framing on is one invalid record.

    Args:
        data: holds them.
        values: offsets of each, and of their ends.
        tag: of all of them, a JSON text.
        gathered: gets the records.

    Raises:
        TooMuch: see `RecordList`.
        TooManyRecords: see `RecordList`.
    """
    head = b'{"tag":%b,"time":' % tag

    def write(event: LogEvent) -> bytes:
        text = b'%b%b,"record":%b' % (head, event.time, encode_json(event.record))
        if event.metadata is not None:
            text += b',"metadata":%b' % encode_json(event.metadata)
        if event.group is not None:
            text += b',"group":%b' % encode_json(event.group)
        return text + b"}"

    read = 0

    def follow() -> Iterator[tuple[int, int]]:
        nonlocal read
        for at, end in values:
            yield at, end
            read = end

    try:
        _gather(data, follow(), gathered, write, only_events=True)
    except MessagePackFault as fault:
        gathered.refuse(str(fault), data[read : read + KEPT_BYTES])


def _array_head(body: bytes) -> tuple[int, int] | None:
    head = read_head(body, 0) if 0x90 <= body[0] < 0xA0 or body[0] in (0xDC, 0xDD) else None
    return head[1:] if head is not None and head[0] == ARRAY else None


def _gather(
    data: bytes | bytearray,
    values: Iterable[tuple[int, int]],
    gathered: RecordList,
    write: Callable[[LogEvent], bytes],
    *,
    only_events: bool = False,
) -> None:
    events = EventReader()
    for at, end in values:
        # A longer one may have a shorter text, but is not worth the memory.
        if end - at > gathered.record_bytes_max + _HEAD_BYTES:
            gathered.refuse_large(end - at, data[at : at + KEPT_BYTES])
            continue
        try:
            if only_events or is_event(data, at):
                event = events.read(data, at, end)
                if event is not None:
                    gathered.add(write(event))
            else:
                gathered.add(encode_json(to_object(data, at, end)))
        except MessagePackFault as fault:
            gathered.refuse(str(fault), data[at : min(end, at + KEPT_BYTES)])


def _as_fluent_bit(event: LogEvent) -> bytes:
    """An event as Fluent Bit's `format json` writes it: the time as `date`, in front of its fields.

    A field of that name wins over the time.
    """
    parts = [] if "date" in event.record else [b'"date":' + event.time]
    if event.metadata is not None or event.group is not None:
        internal = {"group_attributes": event.group, "log_metadata": event.metadata}
        known = {name: value for name, value in internal.items() if value is not None}
        parts.append(b'"__internal__":' + encode_json(known))
    if event.record:
        parts.append(encode_json(event.record)[1:-1])
    return b"{%b}" % b",".join(parts)
