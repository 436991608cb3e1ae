"""The batcher: cuts chunks into batches bounded by records, bytes and age. Pure: no I/O, no clock.

`add` gives it a chunk; `take` gives back each batch that is full. What remains is the open batch,
which `close` gives back when it is old enough or the pipeline drains.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

from ingestd.base.record import Records, Span, join


class Cut(NamedTuple):
    """A batch that has been cut and is to be sealed.

    Attributes:
        spans: where its records lie, in order.
        records: the records themselves; `None` if they can't be read.
        size: the bytes that they took in their chunks' payloads.
        accepted_at: when the oldest was accepted, seconds since the epoch.
        cursor: chunk and record behind its last one: where the unsealed records begin.
    """

    spans: tuple[Span, ...]
    records: Records | None
    size: int
    accepted_at: float
    cursor: tuple[int, int]


class _Rest:
    """A chunk that is being cut: what is left of it."""

    __slots__ = ("accepted_at", "chunk", "ends", "first", "records")

    def __init__(self, chunk: int, records: Records, first: int, accepted_at: float) -> None:
        self.chunk = chunk
        self.records = records
        self.first = first
        self.accepted_at = accepted_at
        # Needed only if the chunk has to be cut; most chunks go whole.
        self.ends: list[int] | None = records.ends() if first else None

    @property
    def count(self) -> int:
        return self.records.count - self.first

    def size(self) -> int:
        start = self.ends[self.first - 1] if self.ends and self.first else 0
        return len(self.records.payload) - start

    def fitting(self, records_max: int, bytes_max: int) -> int:
        """How many of the next records fit into both bounds; may be 0."""
        if self.count <= records_max and self.size() <= bytes_max:
            return self.count
        if self.ends is None:
            self.ends = self.records.ends()
        start = self.ends[self.first - 1] if self.first else 0
        upto = bisect_right(self.ends, start + bytes_max, lo=self.first)
        return min(upto - self.first, records_max, self.count)

    def cut(self, count: int) -> tuple[Span, Records]:
        span = Span(self.chunk, self.first, count)
        part = self.records.part(self.first, count, self.ends)
        self.first += count
        return span, part


class Batcher:
    """Holds the open batch.

    Args:
        records_max: records a batch; exact.
        bytes_max: payload bytes a batch; only a record that is larger by itself exceeds it, and
            then stands alone.

    Attributes:
        chunks: how many were added.
    """

    def __init__(self, *, records_max: int, bytes_max: int) -> None:
        self.records_max = records_max
        self.bytes_max = bytes_max
        self.chunks = 0
        self._spans: list[Span] = []
        self._parts: list[Records] = []
        self._count = 0
        self._bytes = 0
        self._accepted_at = 0.0
        self._cursor = (0, 0)
        self._rest: _Rest | None = None

    @property
    def open(self) -> bool:
        """Whether there is an open batch."""
        return self._count > 0

    @property
    def accepted_at(self) -> float:
        """When the open batch's oldest record was accepted; meaningless without one."""
        return self._accepted_at

    def bound(self, *, records_max: int, bytes_max: int) -> None:
        """Other bounds from now on; an open batch that is beyond them goes at the next `take`."""
        self.records_max = records_max
        self.bytes_max = bytes_max

    def add(self, chunk: int, records: Records, *, first: int, accepted_at: float) -> None:
        """Takes the records of a chunk from `first` on. Call `take` until it gives nothing."""
        self.chunks += 1
        self._rest = _Rest(chunk, records, first, accepted_at)

    def take(self) -> Cut | None:
        """The next full batch, or nothing: then all records that were added are in batches."""
        rest = self._rest
        while rest is not None and rest.count:
            if self._count and self._full():
                return self.close()  # the bounds are other ones than when it was filled
            fitting = rest.fitting(self.records_max - self._count, self.bytes_max - self._bytes)
            if fitting == 0 and not self._count:
                fitting = 1
            if fitting:
                self._put(rest, fitting)
            if not fitting or self._full():
                return self.close()
        self._rest = None
        return None

    def close(self) -> Cut | None:
        """The open batch as it is; `None` without one."""
        if not self._count:
            return None
        records = join(self._parts)
        cut = Cut(tuple(self._spans), records, self._bytes, self._accepted_at, self._cursor)
        self._spans, self._parts, self._count, self._bytes = [], [], 0, 0
        return cut

    def _full(self) -> bool:
        return self._count >= self.records_max or self._bytes >= self.bytes_max

    def _put(self, rest: _Rest, count: int) -> None:
        if not self._count:
            self._accepted_at = rest.accepted_at
        span, part = rest.cut(count)
        self._spans.append(span)
        self._parts.append(part)
        self._count += count
        self._bytes += len(part.payload)
        self._cursor = (rest.chunk, rest.first) if rest.count else (rest.chunk + 1, 0)
