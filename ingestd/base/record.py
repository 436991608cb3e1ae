"""Records as they travel: bytes, with just enough shape to count and cut them.

The event loop never decodes a record. A run of records is one `bytes` object in one of two
layouts, and it keeps that form from the socket to the worker:

* `Layout.LINES`: every record is followed by one LF and contains none. JSON lines and text arrive
  like this, so the body of a request is stored, queued and handed on without a copy.
* `Layout.SIZED`: the records lie back to back and `sizes` holds their lengths as little-endian
  unsigned 32-bit integers. For records that may contain an LF: `bytes`, pretty-printed JSON.
"""

from __future__ import annotations

import enum
import sys
from array import array
from bisect import bisect_right
from collections import deque
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, NamedTuple

from ingestd.base import envelope

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


Format = Literal["json", "text", "bytes"]
"""The records of a pipeline: JSON values, lines of text, or bytes."""


class Layout(enum.IntEnum):
    """Layout of records in a payload. The numbers are stored in journals and never change."""

    LINES = 0
    SIZED = 1


_FEW = 16
"""Records that are found one by one."""


def pack_sizes(sizes: Iterable[int]) -> bytes:
    """Lengths as little-endian u32, the form `Records.sizes` and the journal keep."""
    packed = array("I", sizes)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_sizes(sizes: bytes) -> array[int]:
    """The inverse of `pack_sizes`."""
    unpacked = array("I")
    unpacked.frombytes(sizes)
    if sys.byteorder == "big":
        unpacked.byteswap()
    return unpacked


class Records(NamedTuple):
    """A run of records: what a chunk holds, and what a batch carries to its handler.

    Attributes:
        layout: how the records lie in `payload`.
        count: how many they are; never negative.
        payload: the bytes.
        sizes: `SIZED` only: one little-endian u32 a record; empty for `LINES`.
        names: the ids of records that got theirs in another place, one a record, and an empty one
            where the place is the name; empty as long as all are where they were accepted.
        envelopes: the records' envelopes, packed (`ingestd.base.envelope`).
    """

    layout: Layout
    count: int  # type: ignore[assignment]  # hides tuple.count
    payload: bytes
    sizes: bytes = b""
    names: tuple[str, ...] = ()
    envelopes: bytes = b""

    @property
    def stored_bytes(self) -> int:
        """Bytes that the records take in a journal, about."""
        return len(self.payload) + len(self.sizes) + len(self.envelopes)

    @property
    def held_bytes(self) -> int:
        """Bytes that the records take in memory, about."""
        return len(self.payload) + len(self.envelopes)

    @classmethod
    def lines(cls, records: Sequence[bytes]) -> Records:
        """Records without an LF in them, as `LINES`."""
        return cls(Layout.LINES, len(records), b"".join([b"%b\n" % r for r in records]))

    @classmethod
    def sized(cls, records: Sequence[bytes]) -> Records:
        """Any records, as `SIZED`."""
        return cls(
            Layout.SIZED, len(records), b"".join(records), pack_sizes([len(r) for r in records])
        )

    def items(self) -> list[bytes]:
        """The records one by one, without terminators."""
        if self.layout is Layout.LINES:
            items = self.payload.split(b"\n")
            items.pop()
            return items
        items, start = [], 0
        for size in unpack_sizes(self.sizes):
            items.append(self.payload[start : start + size])
            start += size
        return items

    def ends(self) -> list[int]:
        """The offset in `payload` behind each record, its terminator included."""
        if self.layout is Layout.LINES:
            lines = self.payload.split(b"\n")
            lines.pop()
            return [end + i for i, end in enumerate(accumulate(map(len, lines)), 1)]
        return list(accumulate(unpack_sizes(self.sizes)))

    def skip(self, start: int, count: int) -> int:
        """The offset behind `count` more records from the offset `start` on; `LINES` only.

        Only these are looked at, where `ends` looks at all.

        Raises:
            ValueError: there are not as many.
        """
        payload, average = self.payload, len(self.payload) // self.count + 1
        at, left = start, count
        while left > _FEW and at < len(payload):
            piece = payload[at : at + left * average]
            # Deleting and measuring goes by memchr; splitting makes an object of each record.
            found = len(piece) - len(piece.replace(b"\n", b""))
            if found >= 2 * left:
                return at + len(piece) - len(piece.split(b"\n", left)[-1])
            if found >= left:
                return at + len(piece.rsplit(b"\n", found - left + 1)[0]) + 1
            at, left = at + len(piece), left - found
        for _ in range(left):
            at = payload.find(b"\n", at) + 1
            if not at:
                raise ValueError(f"fewer than {count} records from {start} on")
        return at

    def part(self, first: int, count: int) -> Records:
        """Records `first` to `first + count - 1`.

        Args:
            first: from 0.
            count: at least 1, at most what there is behind `first`.
        """
        if count == self.count:
            return self
        ends = self.ends()
        start = ends[first - 1] if first else 0
        payload = self.payload[start : ends[first + count - 1]]
        sizes = self.sizes[4 * first : 4 * (first + count)]
        return Records(self.layout, count, payload, sizes, *self.aside(first, count))

    def aside(self, first: int, count: int) -> tuple[tuple[str, ...], bytes]:
        """The names and the envelopes of records `first` to `first + count - 1`."""
        envelopes = envelope.part(self.envelopes, first, count)
        return self.names[first : first + count], envelopes

    def pick(self, places: Sequence[int], items: Sequence[bytes] = ()) -> Records:
        """The records at some places, in their order; the places are growing.

        Args:
            places: from 0.
            items: all records, where these are known already.
        """
        if len(places) == self.count:
            return self
        items = items or self.items()
        chosen = [items[place] for place in places]
        make = Records.lines if self.layout is Layout.LINES else Records.sized
        names = tuple(self.names[place] for place in places) if self.names else ()
        envelopes = self.envelopes
        if not envelope.is_shared(envelopes):
            runs = envelope.EnvelopeRuns(envelopes, self.count)
            envelopes = envelope.joined([(1, runs.part(place, 1)) for place in places])
        return make(chosen)._replace(names=names, envelopes=envelopes)

    def pieces(self, bytes_max: int) -> list[Records]:
        """The same records in runs of at most so many bytes, or of one record that is larger."""
        if len(self.payload) <= bytes_max or self.count <= 1:
            return [self]
        if self.layout is Layout.SIZED:
            return self._sized_pieces(bytes_max)
        pieces, start, first = [], 0, 0
        while start < len(self.payload):
            end = start + bytes_max
            if end < len(self.payload):
                end = self.payload.rfind(b"\n", start, end) + 1 or self.payload.find(b"\n", end) + 1
            if end >= len(self.payload):
                end, count = len(self.payload), self.count - first
            else:
                count = self.payload.count(b"\n", start, end)
            payload, aside = self.payload[start:end], self.aside(first, count)
            pieces.append(Records(Layout.LINES, count, payload, b"", *aside))
            start, first = end, first + count
        return pieces

    def _sized_pieces(self, bytes_max: int) -> list[Records]:
        ends, pieces, start, first = self.ends(), [], 0, 0
        while first < self.count:
            upto = max(first + 1, bisect_right(ends, start + bytes_max, lo=first))
            sizes, count = self.sizes[4 * first : 4 * upto], upto - first
            payload, aside = self.payload[start : ends[upto - 1]], self.aside(first, count)
            pieces.append(Records(Layout.SIZED, count, payload, sizes, *aside))
            start, first = ends[upto - 1], upto
        return pieces

    def as_sized(self) -> Records:
        """The same records in the layout that holds any record."""
        if self.layout is Layout.SIZED:
            return self
        return Records.sized(self.items())._replace(names=self.names, envelopes=self.envelopes)


def join(runs: Sequence[Records], envelopes: bytes | None = None) -> Records:
    """The records of all runs, in order; `SIZED` as soon as one of them is.

    Args:
        runs: at least one.
        envelopes: of all of them, if they are not the runs' own.
    """
    if len(runs) == 1 and envelopes is None:
        return runs[0]
    count = sum(run.count for run in runs)
    names: tuple[str, ...] = ()
    if any(run.names for run in runs):
        names = tuple(name for run in runs for name in run.names or ("",) * run.count)
    if envelopes is None:
        envelopes = runs[0].envelopes
        if len({run.envelopes for run in runs}) > 1 or not envelope.is_shared(envelopes):
            envelopes = envelope.joined([(run.count, run.envelopes) for run in runs])
    if all(run.layout is Layout.LINES for run in runs):
        payload = b"".join([run.payload for run in runs])
        return Records(Layout.LINES, count, payload, b"", names, envelopes)
    runs = [run.as_sized() for run in runs]
    return Records(
        Layout.SIZED,
        count,
        b"".join([run.payload for run in runs]),
        b"".join([run.sizes for run in runs]),
        names,
        envelopes,
    )


class InvalidRecord(NamedTuple):
    """A record that a source did not accept; it is kept as a dead letter.

    Attributes:
        index: its place in what was sent, counting from 0 over accepted and refused records.
        reason: `malformed`, `too_large`, `unfinished`, `schema` or `unrouted`.
        detail: one line for the sender: what is wrong and where.
        payload: the record, or its beginning if it was too large.
        envelope: its own, packed; empty if it has that of its append.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index
    reason: str
    detail: str
    payload: bytes
    envelope: bytes = b""


class Span(NamedTuple):
    """Records `first` to `first + count - 1` of one chunk."""

    chunk: int
    first: int
    count: int  # type: ignore[assignment]  # hides tuple.count


def select(spans: Iterable[Span], indices: Iterable[int]) -> tuple[Span, ...]:
    """The spans of some records of a batch.

    Args:
        spans: the batch's spans.
        indices: places in the batch, growing.
    """
    chosen: list[Span] = []
    walk = iter(spans)
    span, start = next(walk), 0
    for index in indices:
        while index >= start + span.count:
            start += span.count
            span = next(walk)
        place = span.first + index - start
        last = chosen[-1] if chosen else None
        if last is not None and last.chunk == span.chunk and last.first + last.count == place:
            chosen[-1] = last._replace(count=last.count + 1)
        else:
            chosen.append(Span(span.chunk, place, 1))
    return tuple(chosen)


def without(spans: Iterable[Span], removed: Iterable[Span]) -> tuple[Span, ...]:
    """A batch's spans less removed ones; each of these lies inside one of the batch's."""
    left: list[Span] = []
    gone: dict[int, deque[Span]] = {}
    cut = sorted(removed)
    if not cut:
        return tuple(spans)
    for span in cut:
        gone.setdefault(span.chunk, deque()).append(span)
    for chunk, first, count in sorted(spans):
        start, end, within = first, first + count, gone.get(chunk, _NONE)
        while within and within[0].first < end:
            one = within.popleft()
            if one.first > start:
                left.append(Span(chunk, start, one.first - start))
            start = one.first + one.count
        if start < end:
            left.append(Span(chunk, start, end - start))
    return tuple(left)


_NONE: deque[Span] = deque()
