"""The batcher: cuts chunks into batches bounded by records, bytes and age. Pure: no I/O, no clock.

`add` gives it a chunk; `take` gives back each batch that is full. What remains is the open batch:
`due_in` says when it is old enough, and `close` gives it back.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple, cast

from ingestd.base.envelope import EnvelopeRuns, is_shared
from ingestd.base.record import Layout, Records, Span, join, select

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


class BatchDraft(NamedTuple):
    """A batch that has been cut and is to be sealed.

    Attributes:
        spans: where its records lie, in order.
        records: the records themselves; `None` if they can't be read.
        size: the bytes that they took in memory; a chunk's envelopes are its last batch's.
        accepted_at: when the oldest was accepted, seconds since the epoch.
        cursor: chunk and record behind its last one: where the unsealed records begin.
    """

    spans: tuple[Span, ...]
    records: Records | None
    size: int
    accepted_at: float
    cursor: tuple[int, int]


def unreadable(chunk: int, first: int, count: int, accepted_at: float) -> BatchDraft:
    """Records of a chunk that can't be read, as a batch that no worker will see."""
    return BatchDraft((Span(chunk, first, count),), None, 0, accepted_at, (chunk + 1, 0))


class _ChunkReader:
    """A chunk that is being cut: what is left of it."""

    __slots__ = ("_ends", "_envelopes", "accepted_at", "chunk", "first", "records", "start")

    def __init__(self, chunk: int, records: Records, first: int, accepted_at: float) -> None:
        self.chunk = chunk
        self.records = records
        self.first = first
        self.accepted_at = accepted_at
        # Needed only where batches end by their bytes; most chunks go whole, or are cut by count.
        self._ends: list[int] | None = None
        self._envelopes: EnvelopeRuns | None = None
        self.start = self._all_ends()[first - 1] if first else 0

    @property
    def count(self) -> int:
        return self.records.count - self.first

    def fitting(self, records_max: int, bytes_max: int) -> tuple[int, int]:
        """Counts the next records that fit into both bounds, maybe 0; returns their end, too."""
        count = min(records_max, self.count)
        end = self._end(count)
        if end - self.start <= bytes_max:
            return count, end
        ends = self._all_ends()
        upto = bisect_right(ends, self.start + bytes_max, lo=self.first)
        count = min(upto - self.first, count)
        return count, self._end(count)

    def one(self) -> tuple[int, int]:
        """One record, however large."""
        return 1, self._end(1)

    def _end(self, count: int) -> int:
        """The offset behind the next records."""
        if count == self.count:
            return len(self.records.payload)
        if not count:
            return self.start
        if self._ends is None and self.records.layout is Layout.LINES:
            return self.records.skip(self.start, count)
        return self._all_ends()[self.first + count - 1]

    def _all_ends(self) -> list[int]:
        if self._ends is None:
            self._ends = self.records.ends()
        return self._ends

    def cut(self, count: int, end: int) -> tuple[Span, Records]:
        """The next records, which end at this offset."""
        span, part = Span(self.chunk, self.first, count), self.records
        if count < part.count:
            sizes = part.sizes[4 * self.first : 4 * (self.first + count)]
            names = part.names[self.first : self.first + count]
            payload = part.payload[self.start : end]
            part = Records(part.layout, count, payload, sizes, names, self._envelopes_of(count))
        self.first += count
        self.start = end
        return span, part

    def _envelopes_of(self, count: int) -> bytes:
        """Those of the next records; runs of them are unpacked once for all cuts."""
        packed = self.records.envelopes
        if is_shared(packed):
            return packed
        if self._envelopes is None:
            self._envelopes = EnvelopeRuns(packed, self.records.count)
        return self._envelopes.part(self.first, count)


def part_by_key(
    draft: BatchDraft, keys: Sequence[int | None], *, records_max: int, bytes_max: int, parts: int
) -> list[tuple[BatchDraft, frozenset[int]]]:
    """Cuts records into batches of which no two have a common key, unless one is too full.

    A key goes to the part of its number modulo a power of two, which is as large as the records
    need: of two draughts in a row each part meets few parts of the other one.

    Args:
        draft: with its records.
        keys: of each record; those without one go where there is room for them.
        records_max: of a batch.
        bytes_max: of a batch; a record that is larger by itself stands alone.
        parts: at most so many; a power of two.

    Returns:
        The batches with their keys. Those with a common key are in the order of their records.
    """
    records = draft.records
    if records is None:
        return [(draft, frozenset())]
    count, size = records.count, len(records.payload)
    while (
        parts > 1
        and _filled(parts // 2, records_max) >= count
        and (_filled(parts // 2, bytes_max) >= size)
    ):
        parts //= 2
    places: list[list[int]] = [[] for _ in range(parts)]
    for place, key in enumerate(keys):
        places[(place // records_max if key is None else key) % parts].append(place)
    runs = list(filter(None, places))
    if size > bytes_max or max(map(len, runs)) > records_max:
        ends = records.ends()
        runs = [run for mine in runs for run in _runs(mine, ends, records_max, bytes_max)]
    if len(runs) == 1:
        return [(draft, _known(keys))]
    made: list[tuple[BatchDraft, frozenset[int]]] = []
    items, left = records.items(), draft.size
    for run in runs:
        picked = records.pick(run, items)
        # What is held beside payloads, envelopes, is counted with the last one.
        held = len(picked.payload) if len(made) < len(runs) - 1 else left
        left -= held
        part = draft._replace(spans=select(draft.spans, run), records=picked, size=held)
        made.append((part, _known([keys[place] for place in run])))
    return made


def _known(keys: Iterable[int | None]) -> frozenset[int]:
    found = set(keys)
    found.discard(None)
    return frozenset(cast("set[int]", found))


def _filled(batches: int, bound: int) -> int:
    """The bound of a window: parts differ in size, and each should fit into a batch."""
    return bound if batches == 1 else batches * bound * 3 // 4


def _runs(
    places: list[int], ends: Sequence[int], records_max: int, bytes_max: int
) -> Iterator[list[int]]:
    """Cuts places of records into runs within the bounds."""
    run: list[int] = []
    size = 0
    for place in places:
        own = ends[place] - (ends[place - 1] if place else 0)
        if run and (len(run) >= records_max or size + own > bytes_max):
            yield run
            run, size = [], 0
        run.append(place)
        size += own
    if run:
        yield run


class Batcher:
    """Holds the open batch.

    Args:
        records_max: records a batch; exact.
        bytes_max: payload bytes a batch; only a record that is larger by itself exceeds it, and
            then stands alone.
        window: so many batches are filled as one, for `part_by_key`; 1 without it.
        window_bytes_max: payload bytes of all of them, if that is more than `bytes_max`.
        age_max: seconds after which a batch is due, counted from its oldest record's acceptance.

    Attributes:
        chunks: how many were added.
        draining: no more records come, so an open batch is due at once.
    """

    def __init__(
        self,
        *,
        records_max: int,
        bytes_max: int,
        age_max: float,
        window: int = 1,
        window_bytes_max: int = 0,
    ) -> None:
        self.window, self._window_bytes_max = window, window_bytes_max
        self.bound(records_max=records_max, bytes_max=bytes_max, age_max=age_max)
        self.chunks = 0
        self.draining = False
        self._spans: list[Span] = []
        self._parts: list[Records] = []
        self._count = 0
        self._bytes = self._held = 0
        self._accepted_at = self._age_since = 0.0
        self._cursor = (0, 0)
        self._rest: _ChunkReader | None = None

    @property
    def open(self) -> bool:
        """Tells if there is an open batch."""
        return self._count > 0

    def due_in(self, now: float, *, busy: bool) -> float | None:
        """Seconds until the open batch is due; `None` as long as nothing but a change makes it so.

        Args:
            now: seconds since the epoch. A clock that is set back makes no batch wait for longer
                than `age_max`.
            busy: a sealed batch waits for a worker. While it does, the open one can keep filling:
                it would be called no sooner if it were sealed.
        """
        if not self._count:
            return None
        if self.draining:
            return 0.0
        if busy:
            return None
        if self._count >= self.records_max or self._bytes >= self.bytes_max:
            return 0.0  # of a window: one batch is full, and there is a worker for it
        self._age_since = min(self._age_since, now)  # later looks count from the one after a jump
        return self.age_max - min(now - self._age_since, self.age_max)

    def bound(self, *, records_max: int, bytes_max: int, age_max: float) -> None:
        """Sets other bounds; an open batch that is beyond them goes at the next `take`."""
        self.records_max = records_max
        self.bytes_max = bytes_max
        self.age_max = age_max
        self._records_most = _filled(self.window, records_max)
        room = min(_filled(self.window, bytes_max), self._window_bytes_max)
        self._bytes_most = max(bytes_max, room)

    def add(self, chunk: int, records: Records, *, first: int, accepted_at: float) -> None:
        """Takes the records of a chunk from `first` on. Call `take` until it gives nothing."""
        self.chunks += 1
        self._rest = _ChunkReader(chunk, records, first, accepted_at)

    def take(self) -> BatchDraft | None:
        """The next full batch, or nothing: then all records that were added are in batches."""
        rest = self._rest
        while rest is not None and rest.count:
            if self._count and self._full():
                return self.close()  # the bounds are other ones than when it was filled
            room = self._records_most - self._count, self._bytes_most - self._bytes
            fitting, end = rest.fitting(*room)
            if fitting == 0 and not self._count:
                fitting, end = rest.one()
            if fitting:
                self._put(rest, fitting, end)
            if not fitting or self._full():
                return self.close()
        self._rest = None
        return None

    def close(self) -> BatchDraft | None:
        """The open batch as it is; `None` without one."""
        if not self._count:
            return None
        records = join(self._parts)
        cut = BatchDraft(tuple(self._spans), records, self._held, self._accepted_at, self._cursor)
        self._spans, self._parts, self._count, self._bytes, self._held = [], [], 0, 0, 0
        return cut

    def _full(self) -> bool:
        return self._count >= self._records_most or self._bytes >= self._bytes_most

    def _put(self, rest: _ChunkReader, count: int, end: int) -> None:
        if not self._count:
            self._accepted_at = self._age_since = rest.accepted_at
        span, part = rest.cut(count, end)
        self._spans.append(span)
        self._parts.append(part)
        self._count += count
        self._bytes += len(part.payload)
        self._held += len(part.payload)
        if rest.count:
            self._cursor = (rest.chunk, rest.first)
        else:
            self._cursor = (rest.chunk + 1, 0)
            self._held += len(rest.records.envelopes)
