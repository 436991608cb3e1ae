"""A batch on its way from its seal to its settlement."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncio import Future

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
        sealed: resolved when the seal is durable; `None` if it has been for long.
    """

    __slots__ = (
        "accepted_at", "attempts", "bytes", "count", "counted", "counted_before", "failing_since",
        "family", "first_failed", "last_failed", "lineage", "number", "records", "sealed", "size",
        "spans",
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
