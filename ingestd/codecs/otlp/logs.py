"""Log records of the usual form, read in a run: what SDKs and collectors send, field after field.

A record has the usual form if its fields are there once, in the order of their numbers, as every
generated serializer writes them: a time, then as they are set severity, a text as body, attributes,
flags, trace, span and the time of observation. Each field is looked for where it has to be, in one
function without a call for a field.

1. Whatever else a record is, or is not, ends the run before it: `OtlpMessage.read_from` reads that
   one, and says what is wrong with it. So nothing is decided here, and nothing is refused.
2. A record of a run is the very dict that `OtlpMessage.read_from` makes of it.
3. Places are only checked at a record's end, where its last field has to end: none ends before the
   one before it does, so none was outside of the record.
"""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING, Any

from ingestd.codecs.otlp.messages import known_pair

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_HEAD = struct.Struct("<BQBB").unpack_from  # the time, and tag and first byte of what follows
_TIME, _NUMBER, _TEXT, _BODY, _ATTRIBUTE, _STRING = 0x09, 0x10, 0x1A, 0x2A, 0x32, 0x0A
"""Tags of a record, and that of a text in `AnyValue`."""
_TAIL = re.compile(
    rb"(?:\x45(.{4}))?(?:\x4a\x10(.{16}))?(?:\x52\x08(.{8}))?(?:\x59(.{8}))?", re.DOTALL
).fullmatch
_NO_TRACE, _NO_SPAN = bytes(16), bytes(8)
_UNUSUAL = (ValueError, IndexError, struct.error, RecursionError)


class LogItems:
    """The log records of one scope, in order: usual ones by `read_run`, others by iteration.

    Args:
        data: the body.
        spans: the records in it: first byte and end of each, behind the body.
    """

    def __init__(self, data: bytes, spans: Sequence[tuple[bytes, int, int]]) -> None:
        self._data = data
        self._spans = spans
        self._next = 0

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._next >= len(self._spans):
            raise StopIteration
        _, start, end = self._spans[self._next]
        self._next += 1
        return self._data[start:end]

    def read_run(
        self,
        context: Mapping[str, Any],
        found: list[dict[str, Any]],
        records_max: int,
        bytes_max: int,
    ) -> int:
        """Reads the next records as long as they have the usual form; returns their bytes.

        Args:
            context: what each has beside its fields.
            found: gets a dict for each.
            records_max: of the run.
            bytes_max: of the run.
        """
        first, before = self._next, len(found)
        spans = self._spans[first : first + records_max]
        if not spans:
            return 0
        begin = spans[0][1]
        _read_run(self._data, spans, begin + bytes_max, context, found)
        count = len(found) - before
        self._next += count
        return spans[count - 1][2] - begin if count else 0


def _read_run(  # noqa: PLR0912, PLR0915 - a call a field would take as long as all of this
    data: bytes,
    spans: Sequence[tuple[bytes, int, int]],
    limit: int,
    context: Mapping[str, Any],
    found: list[dict[str, Any]],
) -> None:
    """See `LogItems.read_run`; no record ends behind `limit`."""
    append = found.append
    try:
        for _, start, end in spans:
            kind, time, tag, size = _HEAD(data, start)
            if kind != _TIME or end > limit:
                return
            record = {**context, "timeUnixNano": time}
            at = start + 11  # behind tag and size
            if tag == _NUMBER:
                if size > 127:
                    return
                record["severityNumber"] = size
                tag, size, at = data[at], data[at + 1], at + 2
            if tag == _TEXT:
                if size > 127:
                    return
                stop = at + size
                record["severityText"] = data[at:stop].decode()
                tag, size, at = data[stop], data[stop + 1], stop + 2
            if tag == _BODY:
                if size > 127:
                    more = data[at]
                    if more > 127:
                        return
                    size += more - 1 << 7
                    at += 1
                stop, size = at + size, data[at + 1]
                if data[at] != _STRING:
                    return
                at += 2
                if size > 127:
                    more = data[at]
                    if more > 127:
                        return
                    size += more - 1 << 7
                    at += 1
                if at + size != stop:
                    return
                record["body"] = data[at:stop].decode()
                at = stop
            else:
                at -= 2
            pairs = []
            while at < end and data[at] == _ATTRIBUTE:
                size = data[at + 1]
                at += 2
                if size > 127:
                    more = data[at]
                    if more > 127:
                        return
                    size += more - 1 << 7
                    at += 1
                pairs.append(data[at : at + size])
                at += size
            if pairs:
                record["attributes"] = dict(map(known_pair, pairs))
            if at != end and not _read_tail(data, at, end, record):
                return
            append(record)
    except _UNUSUAL:
        return


def _read_tail(data: bytes, at: int, end: int, record: dict[str, Any]) -> bool:
    """Reads what stands behind the attributes; returns False if that is something else."""
    # A place behind the end of the body is that end to the pattern, where nothing is left to match.
    tail = _TAIL(data, at, end) if at < end else None
    if tail is None:
        return False
    flags, trace, span, observed = tail.groups()
    if flags is not None:
        record["flags"] = int.from_bytes(flags, "little")
    if trace is not None and trace != _NO_TRACE:
        record["traceId"] = trace.hex()
    if span is not None and span != _NO_SPAN:
        record["spanId"] = span.hex()
    if observed is not None:
        record["observedTimeUnixNano"] = int.from_bytes(observed, "little")
    return True
