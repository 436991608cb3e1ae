"""A batch on its way from its seal to its settlement."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncio import Future

    from ingestd.base.record import Records, Span


class Batch:
    """One sealed batch, as the pipeline holds it. The handler sees another `Batch`.

    Attributes:
        number: unique and growing within its journal.
        spans: which records, in order.
        count: how many.
        attempts: tries that have been made.
        accepted_at: when its oldest record was accepted, seconds since the epoch.
        records: the payload; `None` while it waits for a retry, and after a restart.
        size: the bytes that count as held in memory for it; 0 without a payload.
        alone: tries in this life in which its one record stood alone.
        failing_since: when it, or the batch it is a part of, first failed; loop time.
        family: the number of the batch that it is a part of, if that is being split.
        sealed: resolved when the seal is durable; `None` if it has been for long.
    """

    __slots__ = (
        "accepted_at", "alone", "attempts", "count", "failing_since", "family", "number",
        "records", "sealed", "size", "spans",
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
    ) -> None:
        self.number = number
        self.spans = spans
        self.count = count
        self.accepted_at = accepted_at
        self.attempts = attempts
        self.records = records
        self.size = size
        self.sealed = sealed
        self.alone = 0
        self.failing_since: float | None = None
        self.family: int | None = None
