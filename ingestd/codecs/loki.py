"""Pushes of Loki's clients: streams of entries, read from JSON and protobuf with few objects.

https://grafana.com/docs/loki/latest/reference/loki-http-api/#ingest-logs, and push.proto of Loki.

1. A time and a line are JSON in a JSON body already, and stay it: they are pieces of the body until
   a record is put together from them. Labels are read once a stream, and once for many pushes.
2. What is held is little more than the body. Sizes are bounded before objects are made: streams and
   entries by the number of records that there may be, labels and metadata by the size of a record.
   As objects, entries of nine bytes take twenty times as much; so a body in which there may be many
   is taken apart one entry after the other.
"""

from __future__ import annotations

import re
import sys
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ingestd.base.bursts import let_loop_go_first
from ingestd.codecs.protobuf import (
    LENGTH,
    VARINT,
    FieldBudget,
    TooManyFields,
    WireFault,
    WireTable,
    read,
    signed,
    spans,
    tag_of,
)
from ingestd.codecs.utf8 import replace_faults

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

# -- JSON bodies -----------------------------------------------------------------------------------

FEW_COMMAS = 5_000
"""A JSON body with fewer commas is read in some milliseconds."""
_COMMAS_SURE = 200_000
_KNOWN_BYTES = 2048
_NONE = msgspec.Raw(b"")
_NO_LABELS = msgspec.Raw(b"{}")
_TIMES = re.compile(rb'"-?[0-9]{1,19}"(?:,"-?[0-9]{1,19}")*+')
_QUOTE = {ord('"')}
_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_ENTRY = re.compile(
    rb'[\s,]*+\[\s*+("-?[0-9]{1,19}")\s*+,\s*+(%b)\s*+(?:,\s*+(\{(?:[^"{}]++|%b)*+\})\s*+)?\]'
    % (_STRING, _STRING),
    re.DOTALL,
)
"""An entry of an array that is JSON; `\\s` are all of JSON's white space and more."""
_VALUES_KEY = re.compile(
    rb'"(?:v|\\u0076)(?:a|\\u0061)(?:l|\\u006[cC])(?:u|\\u0075)(?:e|\\u0065)(?:s|\\u0073)"'
)
_SHAPE = (
    "an entry is a timestamp, a string of nanoseconds since the epoch, a line, and metadata or not"
)


class PushFault(ValueError):  # noqa: N818 - names the condition
    """A body that is no push; its text says why."""


class TooManyEntries(ValueError):  # noqa: N818 - names the condition
    """A push has more entries than there may be records in a body."""


class PushStream(NamedTuple):
    """The entries of one stream.

    Attributes:
        labels: of the stream.
        written: the labels as JSON.
        times: nanoseconds since the epoch of each entry, as a string in JSON.
        lines: of each entry, as a string in JSON.
        metadata: of each entry as an object in JSON, empty where it has none; `None` if none has.
            More than `size_max` bytes are as they came.
        fault: why the labels are none; empty if they are.
    """

    labels: Mapping[str, str]
    written: bytes
    times: Sequence[Any]
    lines: Sequence[Any]
    metadata: Sequence[bytes] | None = None
    fault: str = ""


class _Entry(msgspec.Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    time: msgspec.Raw
    line: msgspec.Raw
    metadata: msgspec.Raw = _NONE


class _PushStream(msgspec.Struct, gc=False):
    values: list[_Entry]
    stream: msgspec.Raw = _NO_LABELS


class _UnreadPushStream(msgspec.Struct, gc=False):
    values: msgspec.Raw
    stream: msgspec.Raw = _NO_LABELS


class _Push(msgspec.Struct):
    streams: list[_PushStream]


class _UnreadPush(msgspec.Struct):
    streams: list[_UnreadPushStream]


_PUSH = msgspec.json.Decoder(_Push)
_UNREAD_PUSH = msgspec.json.Decoder(_UnreadPush)
_TEXTS = msgspec.json.Decoder(dict[str, str])
_VALUES = msgspec.json.Decoder(dict[str, msgspec.Raw])
_TEXT_IN = msgspec.json.Decoder(str)


def read_json(body: bytes, entries_max: int, size_max: int) -> Iterator[PushStream]:
    """Yields the streams of `{"streams": [{"stream": {…}, "values": [[time, line], …]}]}`.

    Bytes that are not UTF-8 are replaced, as Loki itself shows them.

    Args:
        body: the push.
        entries_max: most entries.
        size_max: most bytes of a stream's labels.

    Raises:
        PushFault: it is none.
        TooManyEntries: there are more, where they would take much memory.
    """
    body = replace_faults(body)
    try:
        if body.count(b",") < _COMMAS_SURE:
            for one in _PUSH.decode(body).streams:
                yield _read_stream(one, size_max)
            return
        if next(islice(_VALUES_KEY.finditer(body), entries_max, None), None):
            raise TooManyEntries
        left = entries_max
        for unread in _UNREAD_PUSH.decode(body).streams:
            entries = _take_apart(bytes(unread.values), left)
            left -= len(entries)
            yield _read_stream(_PushStream(entries, unread.stream), size_max)
    except (msgspec.DecodeError, RecursionError) as error:
        raise PushFault(str(error)) from None


def _take_apart(values: bytes, left: int) -> list[_Entry]:
    """Returns the entries of an array, at most so many."""
    entries: list[_Entry] = []
    at, end = 1, len(values) - 1
    if values[:1] != b"[":
        raise PushFault(_SHAPE)
    while found := _ENTRY.match(values, at, end):
        if len(entries) == left:
            raise TooManyEntries
        entries.append(_Entry(*(msgspec.Raw(part) for part in found.groups() if part)))
        at = found.end()
    if values[at:end].strip():
        raise PushFault(_SHAPE)
    return entries


def _read_stream(stream: _PushStream, size_max: int) -> PushStream:
    if len(memoryview(stream.stream)) > size_max:
        raise PushFault(f"the labels of a stream have more than {size_max} bytes")
    text, entries = bytes(stream.stream), stream.values
    labels, written = _cached_labels(text) if len(text) < _KNOWN_BYTES else _labels(text)
    times = [entry.time for entry in entries]
    lines = [entry.line for entry in entries]
    views: Any = map(memoryview, lines)
    if entries and (
        _TIMES.fullmatch(b",".join(times)) is None or {line[0] for line in views} != _QUOTE
    ):
        raise PushFault(_SHAPE)
    metadata = [entry.metadata for entry in entries]
    if all(one is _NONE for one in metadata):
        return PushStream(labels, written, times, lines)
    read = [_read_metadata(one, size_max) for one in metadata]
    return PushStream(labels, written, times, lines, read)


def _read_metadata(metadata: msgspec.Raw, size_max: int) -> bytes:
    if metadata is _NONE:
        return b""
    if len(memoryview(metadata)) > size_max:
        return bytes(metadata).replace(b"\n", b" ")
    texts = _read_texts(metadata)
    return msgspec.json.encode(texts) if texts else b""


def _labels(stream: bytes) -> tuple[Mapping[str, str], bytes]:
    labels = _read_texts(stream)
    return labels, msgspec.json.encode(labels)


def _read_texts(members: bytes | msgspec.Raw) -> dict[str, str]:
    """Labels or metadata; numbers and the like become texts, as in Loki."""
    try:
        return _TEXTS.decode(members)
    except msgspec.ValidationError:
        values = _VALUES.decode(members)
    texts = {name: bytes(value).decode() for name, value in values.items()}
    return {k: _TEXT_IN.decode(v) if v[:1] == '"' else v for k, v in texts.items()}


_cached_labels = lru_cache(maxsize=1024)(_labels)


# -- protobuf bodies -------------------------------------------------------------------------------
#
# PushRequest{1: Stream}, Stream{1: labels, 2: Entry}, Entry{1: Timestamp, 2: line, 3: LabelPair},
# Timestamp{1: seconds, 2: nanoseconds}, LabelPair{1: name, 2: value}; other fields are skipped.
# Labels are a text, `{app="web"}`, with quotes and escapes as in Go.

_FIRST, _SECOND, _THIRD = (tag_of(number, LENGTH) for number in (1, 2, 3))
_TIME = WireTable(
    {tag_of(1, VARINT): ("seconds", signed), tag_of(2, VARINT): ("nanos", signed)},
    {}, -1, "", lambda _: ("", ""),
)  # fmt: skip
_FIELDS_AN_ENTRY = 64
_NANOS = 1_000_000_000
_ENTRIES_TOGETHER = 256
_ENCODER = msgspec.json.Encoder()


class _PushBounds(NamedTuple):
    """Bounds of a push in protobuf.

    Attributes:
        size_max: bytes of a record.
        budget: of its fields.
    """

    size_max: int
    budget: FieldBudget


def read_protobuf(body: bytes, entries_max: int, size_max: int) -> Iterator[PushStream]:
    """Yields the streams of a `PushRequest`.

    Args:
        body: the push.
        entries_max: most entries, and most streams.
        size_max: most bytes of a stream's labels.

    Raises:
        PushFault: it is none.
        TooManyEntries: there are more.
    """
    bounds = _PushBounds(size_max, FieldBudget(_FIELDS_AN_ENTRY * entries_max))
    left = entries_max
    try:
        for number, at, end in spans(body, 0, len(body), bounds.budget):
            if number != 1:
                continue
            labels, entries = _read_parts(body, at, end, left, bounds)
            left -= max(len(entries), 1)
            if left < 0:
                raise TooManyEntries
            if entries:
                yield _put_together(labels, entries)
    except WireFault as fault:
        raise PushFault(f"the protobuf is none: {fault}") from None
    except TooManyFields:
        raise TooManyEntries from None


def _read_parts(
    body: bytes, at: int, end: int, left: int, bounds: _PushBounds
) -> tuple[bytes, list[tuple[bytes, bytes, bytes]]]:
    """The labels of a stream, and its entries."""
    labels = b""
    entries = []
    for number, begin, stop in spans(body, at, end, bounds.budget):
        if number == 2:
            entries.append(_entry(body, begin, stop, bounds))
            if len(entries) > left:
                raise TooManyEntries
            if not len(entries) % _ENTRIES_TOGETHER:
                let_loop_go_first()
        elif number == 1:
            if stop - begin > bounds.size_max:
                raise PushFault(f"the labels of a stream have more than {bounds.size_max} bytes")
            labels = body[begin:stop]
    return labels, entries


def _put_together(labels: bytes, entries: list[tuple[bytes, bytes, bytes]]) -> PushStream:
    found, written, fault = (
        _cached_text(labels) if len(labels) < _KNOWN_BYTES else _labels_in(labels)
    )
    times, lines, metadata = zip(*entries, strict=True)
    return PushStream(found, written, times, lines, metadata if any(metadata) else None, fault)


_USUAL = re.compile(
    rb"\x0a([\x06-\x0c])\x08([\x80-\xff]{4}[\x00-\x7f])(?:\x10([\x80-\xff]{0,4}[\x00-\x7f]))?"
    rb"\x12([\x80-\xff]{0,3}[\x00-\x7f])",
    re.DOTALL,
)


def _entry(body: bytes, at: int, end: int, bounds: _PushBounds) -> tuple[bytes, bytes, bytes]:
    """An entry's time, line and metadata as JSON.

    Entries as clients write them, a time of our days and the line, take a third of the time.
    """
    if (usual := _USUAL.match(body, at, end)) is None:
        return _read_entry(body, at, end, bounds)
    size, seconds, nanos, length = usual.groups(b"\0")
    begin = usual.end()
    stop = begin + _known_varint(length)
    # The time has to end where the line begins, and nothing may follow but metadata.
    if at + 2 + size[0] != begin - 1 - len(length) or stop > end or stop - begin > bounds.size_max:
        return _read_entry(body, at, end, bounds)
    metadata = _usual_metadata(body, stop, end) if stop < end else b""
    if metadata is None or end - at > bounds.size_max:
        return _read_entry(body, at, end, bounds)
    time = b'"%d"' % (_known_varint(seconds) * _NANOS + _short_varint(nanos))
    return time, _ENCODER.encode(_text(body[begin:stop])), metadata


def _usual_metadata(body: bytes, at: int, end: int) -> bytes | None:
    """Metadata with names and values of less than 128 bytes; `None` if there is anything else."""
    metadata: dict[str, str] = {}
    while at + 4 <= end:
        name, length, name_size = at + 4, body[at + 1], body[at + 3]
        value = name + name_size + 2
        if value > end or body[at] != _THIRD or body[at + 2] != _FIRST:
            return None
        size = body[value - 1]
        # None of the three lengths has more than one byte.
        if body[value - 2] != _SECOND or (length | name_size | size) > 0x7F:
            return None
        if at + 2 + length != value + size:
            return None
        at = value + size
        if at > end:
            return None
        metadata[_text(body[name : value - 2])] = _text(body[value:at])
    return _ENCODER.encode(metadata) if at == end else None


@lru_cache(maxsize=4096)
def _known_varint(number: bytes) -> int:
    return _short_varint(number)


def _short_varint(number: bytes) -> int:
    """A number of at most five bytes, the last one of which is its end."""
    n = int.from_bytes(number, "little")
    low = n & 0x7F | n >> 1 & 0x3F80 | n >> 2 & 0x1FC000
    return low | n >> 3 & 0xFE00000 | n >> 4 & 0x7F0000000


def _read_entry(body: bytes, at: int, end: int, bounds: _PushBounds) -> tuple[bytes, bytes, bytes]:
    """The same of any entry.

    Of what is too large in any case, so much is read that the record is it, too.
    """
    time: dict[str, int] = {}
    line = b'""'
    metadata: dict[str, str] = {}
    for number, begin, stop in spans(body, at, end, bounds.budget):
        if number == 1:
            time = read(_TIME, body[begin:stop], {})
        elif number == 2:
            line = _ENCODER.encode(_text(body[begin : min(stop, begin + bounds.size_max + 1)]))
        elif number == 3 and end - at <= bounds.size_max:
            pair = ["", ""]
            for place, first, last in spans(body, begin, stop, bounds.budget):
                if place <= 2:
                    pair[place - 1] = _text(body[first:last])
            metadata[pair[0]] = pair[1]
        elif number == 3 and not metadata:
            metadata[""] = _text(body[at : at + bounds.size_max + 1])
    nanos = time.get("seconds", 0) * _NANOS + time.get("nanos", 0)
    return b'"%d"' % nanos, line, _ENCODER.encode(metadata) if metadata else b""


def _text(text: bytes) -> str:
    return str(text, "utf-8", "replace")


_LABEL = re.compile(
    r"""[\s,]*+(?P<name>[a-zA-Z_:][a-zA-Z0-9_:.]*+|"(?:[^"\\]++|\\.)*+")\s*+=\s*+"""
    r"""(?P<value>"(?:[^"\\\n]++|\\.)*+"|'(?:[^'\\\n]++|\\.)*+'|`[^`]*+`)\s*+(?=[,}])""",
    re.DOTALL,
)
_ESCAPE = re.compile(
    r"""\\(?:([abfnrtv\\'"])|([0-7]{3})|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.?))""",
    re.DOTALL,
)
_ESCAPES = dict(zip("abfnrtv\\'\"", "\a\b\f\n\r\t\v\\'\"", strict=True))


def _labels_in(text: bytes) -> tuple[Mapping[str, str], bytes, str]:
    """The labels in a text, as JSON, and why they are none; then the text is the JSON."""
    try:
        labels = read_labels(text.decode(errors="replace"))
    except ValueError as fault:
        return {}, _ENCODER.encode(text.decode(errors="replace")), str(fault)
    return labels, _ENCODER.encode(labels), ""


_cached_text = lru_cache(maxsize=1024)(_labels_in)


def read_labels(text: str) -> dict[str, str]:
    """Returns the labels of a text such as `{app="web", level="info"}`; an empty one has none.

    Raises:
        ValueError: it is none; says where.
    """
    text = text.strip()
    labels: dict[str, str] = {}
    at, end = 1, len(text) - 1
    if text and (text[:1] != "{" or text[-1:] != "}" or end < 1):
        raise ValueError("labels are not in braces")
    while found := _LABEL.match(text, at):
        name = found["name"]
        labels[_unquoted(name) if name[0] == '"' else name] = _unquoted(found["value"])
        at = found.end()
    if text[at:end].strip(", \t\r\n"):
        raise ValueError(f"labels are malformed at character {at + 1}")
    return labels


def _unquoted(quoted: str) -> str:
    inner = quoted[1:-1]
    if quoted[0] == "`" or "\\" not in inner:
        return inner
    text = _ESCAPE.sub(_unescaped, inner)
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise ValueError("labels have an escape that is half a surrogate pair") from None


def _unescaped(escape: re.Match[str]) -> str:
    plain, octal, short, *long, _ = escape.groups()
    if plain:
        return _ESCAPES[plain]
    digits = short or next(filter(None, long), "")
    code = int(octal, 8) if octal else int(digits, 16) if digits else -1
    if not 0 <= code <= (0xFF if octal else sys.maxunicode):
        raise ValueError(f"labels have the escape {escape[0]!r}, which is none")
    return chr(code)
