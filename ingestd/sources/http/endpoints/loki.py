"""Loki's push API: streams of lines with labels.

https://grafana.com/docs/loki/latest/reference/loki-http-api/#ingest-logs

Each entry is a record of its own with the labels of its stream in it; see `docs/clients/loki.md`.

1. A time and a line are JSON in a JSON body already, and stay it: they are pieces of the body until
   a record is put together from them. Labels are read once a stream, and once for many pushes.
2. What is held is little more than the body. Sizes are bounded before objects are made: streams and
   entries by the number of records that there may be, labels and metadata by the size of a record.
   As objects, entries of nine bytes take twenty times as much; so a body in which there may be many
   is taken apart one entry after the other.
3. Labels stand in a body once and in each record, so what the records of a body take together is
   bounded before they are put together.
"""

from __future__ import annotations

import hashlib
import re
import sys
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from pydantic import Field

from ingestd.base.append import ID_BYTES, SenderIds
from ingestd.base.bursts import let_loop_go_first
from ingestd.base.record import InvalidRecord, Layout, Records
from ingestd.codecs.json import is_json
from ingestd.codecs.lines import KEPT_BYTES, Parsed
from ingestd.http import problem
from ingestd.http.body import SNAPPY, demand_snappy
from ingestd.http.problem import ERRORS_MAX, Problem
from ingestd.http.response import Response
from ingestd.sources.http.decode import (
    bound_as_json,
    is_mostly_invalid,
    mostly_invalid,
    nothing_good,
    parse_made,
    too_large_expanded,
    too_many,
)
from ingestd.sources.http.endpoints.base import (
    OPEN,
    QUICK_BYTES,
    BodyCodec,
    Decoded,
    Description,
    Endpoint,
    EndpointSettings,
    RouteSpec,
    Target,
)
from ingestd.sources.http.endpoints.targets import Targets, TargetTable, table_problems

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ingestd.base.record import Format
    from ingestd.sources.http.endpoints.base import BodyLimits, EndpointContext, Head
    from ingestd.sources.http.result import IngestResult

PUSH = "/loki/api/v1/push"
TENANT_HEADER = "X-Scope-OrgID"
_TEXT = b"text/plain; charset=utf-8"
_TENANT = re.compile(r"[A-Za-z0-9!\-_.*'()]{1,150}", re.ASCII)
_BAD = 400
_AGAIN = (408, 409, 429, 500, 503)
_TO_503 = (408, 409)
_OF_RECORDS = (problem.RECORD_TOO_LARGE, problem.TOO_MANY_RECORDS)
_PROTOBUF = ("", "application/x-protobuf", "application/protobuf")
_TAKES = "application/json, application/x-protobuf"


class LokiSettings(EndpointSettings):
    """`[http.endpoints.loki]`."""

    label: str = Field("", description="label of a stream that chooses its pipeline in routes")
    routes: Targets = Field(
        default_factory=dict,
        description="pipelines of streams by the value of that label; others go to pipeline",
    )
    deduplicate: bool = Field(
        False,
        description="accept an entry with the same time, line, labels, metadata and tenant once",
    )


# -- JSON bodies -----------------------------------------------------------------------------------

_COMMAS_FEW = 5_000
"""A JSON body with fewer commas is read in some milliseconds."""
_QUICK_RECORDS_BYTES = 1024 * 1024
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
    if not body.isascii():
        body = body.decode(errors="replace").encode()
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

_FIRST, _SECOND, _THIRD = (number << 3 | 2 for number in (1, 2, 3))
_NANOS = 1_000_000_000
_ENTRIES_TOGETHER = 256
_ENCODER = msgspec.json.Encoder()
_CUT_OFF = "the protobuf is cut off"


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
    left = entries_max
    for tag, at, end in _fields(body, 0, len(body)):
        labels = b""
        entries = []
        for field, begin, stop in _fields(body, at, end) if tag == _FIRST else ():
            if field == _SECOND:
                entries.append(_entry(body, begin, stop, size_max))
                if len(entries) > left:
                    raise TooManyEntries
                if not len(entries) % _ENTRIES_TOGETHER:
                    let_loop_go_first()
            elif field == _FIRST:
                if stop - begin > size_max:
                    raise PushFault(f"the labels of a stream have more than {size_max} bytes")
                labels = body[begin:stop]
        left -= max(len(entries), 1)
        if left < 0:
            raise TooManyEntries
        if entries:
            yield _put_together(labels, entries)


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


def _entry(body: bytes, at: int, end: int, size_max: int) -> tuple[bytes, bytes, bytes]:
    """An entry's time, line and metadata as JSON.

    Entries as clients write them, a time of our days and the line, take a third of the time.
    """
    if (usual := _USUAL.match(body, at, end)) is None:
        return _read_entry(body, at, end, size_max)
    size, seconds, nanos, length = usual.groups(b"\0")
    begin = usual.end()
    stop = begin + _known_varint(length)
    # The time has to end where the line begins, and nothing may follow but metadata.
    if at + 2 + size[0] != begin - 1 - len(length) or stop > end or stop - begin > size_max:
        return _read_entry(body, at, end, size_max)
    metadata = _usual_metadata(body, stop, end) if stop < end else b""
    if metadata is None or end - at > size_max:
        return _read_entry(body, at, end, size_max)
    time = b'"%d"' % (_known_varint(seconds) * _NANOS + _short_varint(nanos))
    return time, _ENCODER.encode(_text(body[begin:stop])), metadata


def _usual_metadata(body: bytes, at: int, end: int) -> bytes | None:
    """Metadata with names and values of less than 128 bytes; `None` if there is anything else."""
    metadata: dict[str, str] = {}
    while at + 4 <= end:
        name = at + 4
        value = name + body[at + 3] + 2
        if value > end or body[at] != _THIRD or body[at + 2] != _FIRST:
            return None
        size = body[value - 1]
        if body[value - 2] != _SECOND or size > 0x7F or at + 2 + body[at + 1] != value + size:
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


def _read_entry(body: bytes, at: int, end: int, size_max: int) -> tuple[bytes, bytes, bytes]:
    """The same of any entry.

    Of what is too large in any case, so much is read that the record is it, too.
    """
    seconds = nanos = 0
    line = b'""'
    metadata: dict[str, str] = {}
    for field, begin, stop in _fields(body, at, end):
        if field == _SECOND:
            line = _ENCODER.encode(_text(body[begin : min(stop, begin + size_max + 1)]))
        elif field == _FIRST:
            for part, number, _ in _fields(body, begin, stop):
                if part == 1 << 3:
                    seconds = number - (number >> 63 << 64)  # two's complement
                elif part == 2 << 3:
                    nanos = number - (number >> 63 << 64)
        elif field == _THIRD and end - at <= size_max:
            pair = {_FIRST: "", _SECOND: ""}
            for name, first, last in _fields(body, begin, stop):
                if name in pair:
                    pair[name] = _text(body[first:last])
            metadata[pair[_FIRST]] = pair[_SECOND]
        elif field == _THIRD and not metadata:
            metadata[""] = _text(body[at : at + size_max + 1])
    time = b'"%d"' % (seconds * _NANOS + nanos)
    return time, line, _ENCODER.encode(metadata) if metadata else b""


def _text(text: bytes) -> str:
    return str(text, "utf-8", "replace")


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yields the fields of a message: tag, first byte and end; of a number, itself and its end."""
    try:
        while at < end:
            tag = data[at]
            at += 1
            if tag > 0x7F:
                tag, at = _varint(data, at - 1)
            kind = tag & 7
            if kind == 2:
                size = data[at]
                at += 1
                if size > 0x7F:
                    size, at = _varint(data, at - 1)
                begin, at = at, at + size
                if at > end:
                    raise PushFault(_CUT_OFF)
                yield tag, begin, at
            elif kind == 0:
                number, at = _varint(data, at)
                if at <= end:
                    yield tag, number, at
            elif kind in {1, 5}:
                at += 8 if kind == 1 else 4
            else:
                raise PushFault(f"the protobuf has a field with the wire type {kind}")
            if tag < 8:
                raise PushFault("the protobuf has a field with the number 0")
    except IndexError:
        raise PushFault(_CUT_OFF) from None
    if at > end:
        raise PushFault(_CUT_OFF)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while shift < 64:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number & 0xFFFF_FFFF_FFFF_FFFF, at
        shift += 7
    raise PushFault("the protobuf has a number of more than 64 bits")


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
    return _ESCAPE.sub(_unescaped, inner).encode("utf-16", "surrogatepass").decode("utf-16")


def _unescaped(escape: re.Match[str]) -> str:
    plain, octal, short, *long, _ = escape.groups()
    if plain:
        return _ESCAPES[plain]
    digits = short or next(filter(None, long), "")
    code = int(octal, 8) if octal else int(digits, 16) if digits else -1
    if not 0 <= code <= (0xFF if octal else sys.maxunicode):
        raise ValueError(f"labels have the escape {escape[0]!r}, which is none")
    return chr(code)


# -- records ---------------------------------------------------------------------------------------


class _PipelineRecords:
    """Records on their way to one pipeline.

    Args:
        limits: of its records.
    """

    def __init__(self, limits: BodyLimits) -> None:
        self._limits = limits
        self._blocks: list[bytes] = []
        self.refused: list[InvalidRecord] = []
        self.count = self.unlisted = 0

    def add(self, lines: bytes, count: int, index: int) -> None:
        """Adds `count` records, each ended by LF; the first is record `index` of the body."""
        listed = ERRORS_MAX - len(self.refused)
        parsed = parse_made(lines, count, self._limits, index, listed_max=listed)
        self.refused += parsed.refused
        self.unlisted += parsed.unlisted
        self._blocks.append(parsed.records.payload)
        self.count += parsed.records.count

    def refuse(self, lines: bytes, count: int, index: int, why: str) -> None:
        """Adds records that are invalid."""
        listed = min(ERRORS_MAX - len(self.refused), count)
        for at, line in enumerate(lines.split(b"\n", listed)[:listed]):
            self.refused.append(InvalidRecord(index + at, "malformed", why, line[:KEPT_BYTES]))
        self.unlisted += count - listed

    def parsed(self) -> Parsed:
        """All of them."""
        payload = self._blocks[0] if len(self._blocks) == 1 else b"".join(self._blocks)
        return Parsed(Records(Layout.LINES, self.count, payload), self.refused, self.unlisted)


class PushCodec(BodyCodec):
    """Reads a push in JSON; a subclass, one in protobuf.

    Args:
        own: the endpoint's settings.
        tenant: of the request; empty if it has none.
    """

    def __init__(self, own: LokiSettings, tenant: str) -> None:
        self._label, self._targets = own.label, TargetTable(own.routes)
        self._deduplicates = own.deduplicate
        self.routes = bool(own.routes)
        self._end = b',"tenant":"%b"}\n' % tenant.encode() if tenant else b"}\n"

    def _streams(self, body: bytes, limits: BodyLimits) -> Iterator[PushStream]:
        return read_json(body, limits.records_max, limits.record_bytes_max)

    def decode(self, body: bytes, limits: BodyLimits) -> Sequence[Decoded]:
        """See `BodyCodec`."""
        parts: dict[str, _PipelineRecords] = {}
        try:
            self._fill(parts, body, limits)
        except PushFault as fault:
            raise Problem(problem.MALFORMED, f"the push is malformed: {fault}") from None
        except TooManyEntries:
            raise too_many(limits) from None
        refused = [one for part in parts.values() for one in part.refused]
        invalid = len(refused) + sum(part.unlisted for part in parts.values())
        good = sum(part.count for part in parts.values())
        if invalid and not good:
            raise nothing_good(refused, invalid - len(refused))
        if is_mostly_invalid(good, invalid):
            raise mostly_invalid(refused)
        return [self._decoded(part.parsed(), to) for to, part in parts.items()]

    def _fill(self, parts: dict[str, _PipelineRecords], body: bytes, limits: BodyLimits) -> None:
        total, left = 0, limits.bytes_max
        for stream in self._streams(body, limits):
            let_loop_go_first()
            if not (count := len(stream.times)):
                continue
            lines = self._records(stream, left, limits)
            left -= len(lines)
            if total + count > limits.records_max:
                raise TooManyEntries
            to = self._targets.find(stream.labels.get(self._label, "")) if self.routes else ""
            part = parts.get(to)
            if part is None:
                part = parts[to] = _PipelineRecords(limits.by_pipeline.get(to, limits))
            if stream.fault:
                part.refuse(lines, count, total, stream.fault)
            else:
                part.add(lines, count, total)
            total += count

    def _records(self, stream: PushStream, bytes_max: int, limits: BodyLimits) -> bytes:
        """Puts the records of a stream together, each ended by LF."""
        count, tail = len(stream.times), b',"labels":' + stream.written
        if count * (len(tail) + len(self._end)) > bytes_max:
            raise too_large_expanded(limits)
        end = tail + self._end
        pieces: list[Any] = [b'{"timestamp":', b"", b',"line":', b"", end] * count
        pieces[1::5] = stream.times
        pieces[3::5] = stream.lines
        if stream.metadata is not None:
            tail += b',"metadata":'
            pieces[4::5] = [tail + one + self._end if one else end for one in stream.metadata]
        return b"".join(pieces)

    def _decoded(self, parsed: Parsed, to: str) -> Decoded:
        if not self._deduplicates or not parsed.records.count:
            return Decoded(parsed, to)
        by_id = {_id_of(item): item for item in parsed.records.items()}
        if len(by_id) < parsed.records.count:
            parsed = parsed._replace(records=Records.lines(list(by_id.values())))
        return Decoded(parsed, to, ids=SenderIds(tuple(by_id), frozenset(by_id)))

    def decode_quickly(self, body: bytes, limits: BodyLimits) -> Sequence[Decoded] | None:
        """See `BodyCodec`."""
        if len(body) >= QUICK_BYTES and body.count(b",") >= _COMMAS_FEW:
            return None
        try:
            return self.decode(body, limits._replace(bytes_max=_QUICK_RECORDS_BYTES))
        except Problem as found:
            if found.kind is problem.PAYLOAD_TOO_LARGE:  # of labels that each record repeats
                return None
            raise


class ProtobufPushCodec(PushCodec):
    """Reads a push in protobuf, which is always a snappy block."""

    encoding = SNAPPY

    def _streams(self, body: bytes, limits: BodyLimits) -> Iterator[PushStream]:
        bound_as_json(body, limits)
        return read_protobuf(body, limits.records_max, limits.record_bytes_max)

    def decode_quickly(self, body: bytes, limits: BodyLimits) -> Sequence[Decoded] | None:
        """See `BodyCodec`."""
        return super().decode_quickly(body, limits) if len(body) < QUICK_BYTES else None


def _id_of(record: bytes) -> bytes:
    return hashlib.blake2b(record, digest_size=ID_BYTES).digest()


# -- the endpoint ----------------------------------------------------------------------------------


class LokiEndpoint(Endpoint):
    """Loki's push API, and the probe of its clients.

    Args:
        context: the pipelines and the settings.
    """

    settings = LokiSettings
    formats = ("json",)
    is_pure = True
    prefix = "/loki"
    request_headers = (TENANT_HEADER,)

    def __init__(self, context: EndpointContext) -> None:
        self._own: LokiSettings = context.own
        to = {"": Target(context.default)}
        self.routes = [
            RouteSpec(PUSH, to),
            RouteSpec("/ready", to, (), OPEN, ("GET", "HEAD")),
        ]

    @classmethod
    def check(cls, own: LokiSettings, formats: Mapping[str, Format]) -> Iterator[tuple[str, str]]:
        """See `Endpoint`."""
        yield from table_problems("routes", own.routes, formats, "json")
        if bool(own.routes) != bool(own.label):
            yield "label", "label and routes need each other"

    def open(self, head: Head) -> BodyCodec:
        """See `Endpoint`."""
        tenant = head.headers.get(TENANT_HEADER, "")
        if tenant and not _TENANT.fullmatch(tenant):
            detail = f"{TENANT_HEADER} has up to 150 letters, digits and characters of !-_.*'()"
            raise Problem(problem.MALFORMED, detail)
        kind = head.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if is_json(kind):
            return PushCodec(self._own, tenant)
        if kind not in _PROTOBUF:
            detail = f"{kind[:80]!r}; one of {_TAKES} is read"
            raise Problem(problem.MEDIA_TYPE, detail, headers={"Accept": _TAKES})
        # Clients say it or not; Loki takes it for granted.
        named = head.headers.get("Content-Encoding", "").strip().lower()
        if named not in ("", SNAPPY):
            raise Problem(problem.ENCODING, f"{named[:80]!r}; protobuf comes as a snappy block")
        demand_snappy()
        return ProtobufPushCodec(self._own, tenant)

    def answer(self, result: IngestResult, head: Head) -> Response:  # noqa: ARG002
        """See `Endpoint`."""
        problems = [part.problem for part in result.parts if part.problem is not None]
        if problems:
            # One that passes comes first: then the client sends all of it again.
            found = max(problems, key=lambda one: one.kind.status in _AGAIN)
            return _said(found, f"{found.detail}; {result.accepted} other entries were accepted")
        if result.stored:  # the text of the first answer
            return Response(_BAD, _TEXT, result.stored)
        if not result.invalid:
            return Response(204, b"", b"")
        text = f"{result.invalid} of {result.accepted + result.invalid} entries were not accepted"
        if result.errors:
            text += f"; entry {result.errors[0].index}: {result.errors[0].detail}"
        return Response(_BAD, _TEXT, f"{text}\n".encode())

    def error(self, problem: Problem, head: Head) -> Response:  # noqa: ARG002
        """See `Endpoint`."""
        return _said(problem, f"{problem.kind.title}: {problem.detail}")

    def probe(self, head: Head) -> Response:  # noqa: ARG002
        """See `Endpoint`."""
        return Response(200, _TEXT, b"ready\n")

    def describe(self, route: RouteSpec, target: str, form: Format | None) -> Description:  # noqa: ARG002
        """See `Endpoint`."""
        return Description(_TAKES, _OPERATION, (("A line as Loki takes it", _EXAMPLE),))


def _said(found: Problem, text: str) -> Response:
    """An error as Loki writes it: after 429 and 5xx clients send the push again, else they drop it.

    Fluent Bit drops it after 400 alone.
    """
    status = _BAD if found.kind in _OF_RECORDS else found.kind.status
    status = 503 if status in _TO_503 else status
    return Response(status, _TEXT, f"{text}\n".encode(), found.headers)


_STREAM_SCHEMA = {
    "type": "object",
    "required": ["values"],
    "properties": {
        "stream": {"type": "object", "additionalProperties": {"type": "string"}},
        "values": {
            "type": "array",
            "items": {
                "type": "array",
                "prefixItems": [
                    {"type": "string", "pattern": "^-?[0-9]{1,19}$"},
                    {"type": "string"},
                    {"type": "object", "additionalProperties": {"type": "string"}},
                ],
                "minItems": 2,
                "maxItems": 3,
            },
        },
    },
}
_PUSH_SCHEMA = {
    "type": "object",
    "required": ["streams"],
    "properties": {"streams": {"type": "array", "items": _STREAM_SCHEMA}},
}
_OPERATION = {
    "summary": "Push log lines as to Loki",
    "description": "204 comes once all entries are durable; errors are plain text.",
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": _PUSH_SCHEMA}, "application/x-protobuf": {}},
    },
    "responses": {"204": {"description": "All entries are durable."}},
}
_EXAMPLE = (
    """--json '{"streams": [{"stream": {"app": "web"},"""
    """ "values": [["1760000000000000000", "a line"]]}]}'"""
)
