"""A batch on its way from its seal to its settlement, and the last tries of batches."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from asyncio import Future
    from collections.abc import Callable, Sequence

    from ingestd.base.record import Records, Span


class SealedBatch:
    """One sealed batch, as the pipeline holds it; the handler gets a `handlers.batch.Batch`.

    Attributes:
        number: unique and growing within its journal.
        spans: which records, in order.
        count: how many.
        bytes: what its records take in the journal, about.
        attempts: tries that have been made.
        accepted_at: when its first record was accepted, seconds since the epoch; that of the batch
            that was sealed, in all parts of it.
        lineage: the numbers of the batches that it was split from, oldest first. Each of them held
            all of its records, and no call of them has said what became of these.
        records: the payload; `None` while it waits for a retry, and after a restart.
        size: the bytes that count as held in memory for it; 0 without a payload.
        counted: tries that count against it.
        counted_before: these, at the last success of the pipeline.
        failing_since: when it, or the batch it is a part of, first failed; loop time.
        first_failed: the successes of the pipeline before that, in this life.
        last_failed: the successes of the pipeline before it failed the last time.
        family: the number of the batch that it is a part of, if that is being split.
        sealed: resolved when the seal, or the last change of it, is durable; `None` if it has been
            for long.
        keys: of its records, hashed, where these are in the order of their keys (`batch.key`).
    """

    __slots__ = (
        "accepted_at", "attempts", "bytes", "count", "counted", "counted_before", "failing_since",
        "family", "first_failed", "keys", "last_failed", "lineage", "number", "records", "sealed",
        "size", "spans",
    )  # fmt: skip

    def __init__(
        self,
        number: int,
        spans: tuple[Span, ...],
        count: int,
        *,
        accepted_at: float,
        attempts: int = 0,
        records: Records | None = None,
        size: int = 0,
        sealed: Future[None] | None = None,
        lineage: tuple[int, ...] = (),
    ) -> None:
        self.number = number
        self.spans = spans
        self.count = count
        self.accepted_at = accepted_at
        self.attempts = attempts
        self.records = records
        self.size = size
        self.sealed = sealed
        self.lineage = lineage
        self.bytes = size
        self.counted = self.counted_before = 0
        self.failing_since: float | None = None
        self.first_failed: int | None = None
        self.last_failed = 0
        self.family: int | None = None
        self.keys: frozenset[int] = frozenset()

    def part(self, number: int, spans: tuple[Span, ...], count: int, *, split: bool) -> SealedBatch:
        """Some of its records as a batch of their own, which has failed as often as this one.

        Args:
            number: of the new batch.
            spans: where its records lie.
            count: how many they are.
            split: a sink may have stored them under this batch's id; else the handler has said
                that it did not.
        """
        part = SealedBatch(
            number,
            spans,
            count,
            attempts=self.attempts,
            accepted_at=self.accepted_at,
            lineage=(*self.lineage, self.number) if split else self.lineage,
        )
        part.bytes = self.bytes * count // max(self.count, 1)
        part.counted, part.counted_before = self.counted, self.counted_before
        part.failing_since = self.failing_since
        part.first_failed, part.last_failed = self.first_failed, self.last_failed
        return part


# -- the last tries --------------------------------------------------------------------------------
#
# Bounded, in memory, and forgotten at a restart: for people who look at a daemon, and for their
# tools. A batch costs one tuple and one search among the bounds below, a record nothing.

ERROR_CHARS = 500
"""The part of the error of a try that is kept here; the log and dead letters have all of it."""
BATCHES_MAX = 200
"""Tries of batches that are kept, the last ones."""
AGE_BOUNDS = tuple(0.001 * 2 ** (step / 2) for step in range(54))
"""Seconds, from 1 ms to a day, each a factor of 1.4 from the next: that is how exact shares are."""


class TriedBatch(NamedTuple):
    """One try of a batch.

    Attributes:
        id: of the batch.
        records: that it holds.
        bytes: of their payloads.
        attempts: tries of the batch so far that count.
        seconds: that the handler took; 0 if it was not called.
        outcome: `done`, `retry`, `split` or `failed`; see `Tried`.
        age: seconds from the acceptance of its first record to this moment.
        at: when it was over, seconds since the epoch.
        error: of its failure, or of the first record that was rejected, one line; or empty.
        number: of the try, counted up from 1 since the start.
    """

    id: str
    records: int
    bytes: int
    attempts: int
    seconds: float
    outcome: str
    age: float
    at: float
    error: str = ""
    number: int = 0


class RecentBatches:
    """The ring of one pipeline.

    Attributes:
        batches: the last tries, the newest one last.
        tried: tries since the start.
        ages: counts of the batches that were done with, by the bounds of their ages.
        on_tried: called with each try; `None` for nothing.
    """

    on_tried: Callable[[TriedBatch], None] | None = None

    def __init__(self) -> None:
        self.batches: deque[TriedBatch] = deque(maxlen=BATCHES_MAX)
        self.tried = 0
        self.ages = [0] * (len(AGE_BOUNDS) + 1)

    def add(self, tried: TriedBatch) -> None:
        """Adds a try, under the next number."""
        self.tried += 1
        one = tried._replace(number=self.tried)
        self.batches.append(one)
        if one.outcome in {"done", "failed"}:
            self.ages[bisect_left(AGE_BOUNDS, one.age)] += 1
        if self.on_tried is not None:
            self.on_tried(one)

    def since(self, number: int) -> list[TriedBatch]:
        """The tries behind one with a number, those that are still kept."""
        count = min(self.tried - number, len(self.batches))
        return list(self.batches)[len(self.batches) - count :] if count > 0 else []


def share(ages: Sequence[int], part: float) -> float | None:
    """The age that a part of some batches did not exceed, in seconds; `None` if there are none.

    Args:
        ages: counts by the bounds.
        part: from 0 to 1.
    """
    total = sum(ages)
    left = part * total
    for place, count in enumerate(ages):
        left -= count
        if total and left <= 0:
            return AGE_BOUNDS[min(place, len(AGE_BOUNDS) - 1)]
    return None
