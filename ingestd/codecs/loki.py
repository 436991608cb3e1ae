"""Pushes of Loki's clients: streams of entries, read from JSON with as few objects as possible.

A time and a line are JSON in a JSON body already, and stay it: they are pieces of the body until a
record is put together from them. Labels are read once a stream, and once for many pushes.

What is held is little more than the body. Sizes are bounded before objects are made: streams and
entries by the number of records that there may be, labels and metadata by the size of a record. As
objects, entries of nine bytes take twenty times as much; so a body in which there may be many is
taken apart one entry after the other.
"""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

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


class _Stream(msgspec.Struct, gc=False):
    values: list[_Entry]
    stream: msgspec.Raw = _NO_LABELS


class _UnreadStream(msgspec.Struct, gc=False):
    values: msgspec.Raw
    stream: msgspec.Raw = _NO_LABELS


class _Push(msgspec.Struct):
    streams: list[_Stream]


class _UnreadPush(msgspec.Struct):
    streams: list[_UnreadStream]


_PUSH = msgspec.json.Decoder(_Push)
_UNREAD_PUSH = msgspec.json.Decoder(_UnreadPush)
_TEXTS = msgspec.json.Decoder(dict[str, str])


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
            yield _read_stream(_Stream(entries, unread.stream), size_max)
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


def _read_stream(stream: _Stream, size_max: int) -> PushStream:
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
    texts = _TEXTS.decode(metadata)
    return msgspec.json.encode(texts) if texts else b""


def _labels(stream: bytes) -> tuple[Mapping[str, str], bytes]:
    labels = _TEXTS.decode(stream)
    return labels, msgspec.json.encode(labels)


_cached_labels = lru_cache(maxsize=1024)(_labels)
