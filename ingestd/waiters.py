"""Delivery waiters by the records that they wait for: settlements are told to them."""

from __future__ import annotations

from bisect import bisect_right, insort
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ingestd.base.append import Deduplicated, DeliveryWaiter
    from ingestd.base.record import Span
    from ingestd.journal.dead_letters import DeadLetter
    from ingestd.journal.interface import Place


class _Placed(NamedTuple):
    """A waiter, and those of its records that lie in one chunk.

    Attributes:
        first: place of the run in the chunk.
        count: how many.
        before: how many of its records lie in the chunks before.
        stored: which of the append's records these are, growing; empty if none was left out.
    """

    first: int
    count: int  # type: ignore[assignment]  # hides tuple.count
    before: int
    waiter: DeliveryWaiter
    stored: Sequence[int]

    def runs(self, start: int, count: int) -> Iterator[tuple[int, int]]:
        """Yields the runs of its append's records that lie at a place of the chunk."""
        index = self.before + start - self.first
        if not self.stored:
            yield index, count
        else:
            for own in self.stored[index : index + count]:
                yield own, 1


def _first(placed: _Placed) -> int:
    return placed.first


class DeliveryWaiters:
    """The waiters of one pipeline. Records without a waiter cost nothing.

    Attributes:
        on_settled: gets what `settled` gets, of all records; `None` for no call.
    """

    def __init__(self) -> None:
        self.on_settled: Callable[[Sequence[Span], Sequence[DeadLetter]], None] | None = None
        self._chunks: dict[int, list[_Placed]] = {}
        self._homes: dict[DeliveryWaiter, range] = {}

    def __len__(self) -> int:
        return len(self._homes)

    def add(
        self, place: Place, waiter: DeliveryWaiter, deduplicated: Deduplicated | None = None
    ) -> None:
        """Tells a waiter of its records from now on; they are at `place`, and none is settled.

        Those that were left out because they had come before are settled now.
        """
        stored: Sequence[int] = ()
        if deduplicated is not None and deduplicated.left_out:
            stored = deduplicated.stored
            for index in sorted(set(range(waiter.count)).difference(stored)):
                waiter.settled(index, 1)
            if not stored:
                return
        counts = place.counts or (len(stored) or waiter.count,)
        self._homes[waiter] = range(place.chunk, place.chunk + len(counts))
        first, before = place.first, 0
        for chunk, count in enumerate(counts, place.chunk):
            placed = self._chunks.setdefault(chunk, [])
            insort(placed, _Placed(first, count, before, waiter, stored), key=_first)
            first, before = 0, before + count

    def remove(self, waiter: DeliveryWaiter) -> None:
        """Forgets a waiter; does nothing if it is not there."""
        for chunk in self._homes.pop(waiter, ()):
            placed = [one for one in self._chunks.pop(chunk, []) if one.waiter is not waiter]
            if placed:
                self._chunks[chunk] = placed

    def settled(self, spans: Sequence[Span], dead: Sequence[DeadLetter]) -> None:
        """Reports the outcomes of some records.

        Args:
            spans: all that are settled.
            dead: the letters among them.
        """
        if self.on_settled is not None:
            self.on_settled(spans, dead)
        if not self._chunks:
            return
        for letter in dead:
            if letter.place is None:
                continue
            chunk, first, _ = letter.place
            for placed, start, count in self._among(chunk, first, letter.records):
                for index, own in placed.runs(start, count):
                    placed.waiter.died(index, own, letter.reason, letter.error)
        for span in spans:
            for placed, start, count in self._among(span.chunk, span.first, span.count):
                for index, own in placed.runs(start, count):
                    placed.waiter.settled(index, own)

    def _among(self, chunk: int, first: int, count: int) -> Iterator[tuple[_Placed, int, int]]:
        """Yields each waiter with records in a run, and its part of it: first and count."""
        placed = self._chunks.get(chunk, [])
        end = first + count
        at = max(0, bisect_right(placed, first, key=_first) - 1)
        while at < len(placed) and placed[at].first < end:
            one = placed[at]
            start = max(first, one.first)
            own = min(end, one.first + one.count) - start
            if own > 0:
                yield one, start, own
            at += 1
