"""Delivery waiters by the records that they wait for: settlements are told to them."""

from __future__ import annotations

from bisect import bisect_right, insort
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ingestd.base.append import DeliveryWaiter
    from ingestd.base.record import Span
    from ingestd.journal.dead_letters import DeadLetter
    from ingestd.journal.interface import Place


class _Placed(NamedTuple):
    """A waiter, and those of its records that lie in one chunk.

    Attributes:
        first: place of the run in the chunk.
        count: how many.
        before: how many of its records lie in the chunks before.
    """

    first: int
    count: int  # type: ignore[assignment]  # hides tuple.count
    before: int
    waiter: DeliveryWaiter


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

    def add(self, place: Place, waiter: DeliveryWaiter) -> None:
        """Tells a waiter of its records from now on; they are at `place`, and none is settled."""
        counts = place.counts or (waiter.count,)
        self._homes[waiter] = range(place.chunk, place.chunk + len(counts))
        first, before = place.first, 0
        for chunk, count in enumerate(counts, place.chunk):
            placed = self._chunks.setdefault(chunk, [])
            insort(placed, _Placed(first, count, before, waiter), key=_first)
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
                index = placed.before + start - placed.first
                placed.waiter.died(index, count, letter.reason, letter.error)
        for span in spans:
            for placed, start, count in self._among(span.chunk, span.first, span.count):
                placed.waiter.settled(placed.before + start - placed.first, count)

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
