"""What a settlement consists of: dead letters and the batches that replace one. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ingestd.base.batch import SealedBatch
from ingestd.base.record import select
from ingestd.execution.retry import RetryBatch
from ingestd.journal.interface import DeadLetter, Failing, Place, Sealed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ingestd.base.metrics import Tried
    from ingestd.base.record import Records, Span
    from ingestd.execution.retry import DeadLettered, Resolve, RetryRecords
    from ingestd.handlers.outcome import Result

DAMAGED = "the journal's copy is damaged: its checksum does not fit"


def as_sealed(batch: SealedBatch, due_at: float, now: float = 0.0) -> Sealed:
    """A batch as the journal keeps it.

    Args:
        batch: the batch.
        due_at: seconds since the epoch, 0 for at once.
        now: loop time, for how long it has been failing.
    """
    failing = Failing()
    if batch.failing_since is not None:
        failing = Failing(max(0.0, now - batch.failing_since), batch.counted)
    return Sealed(
        batch.number,
        batch.spans,
        batch.count,
        batch.attempts,
        due_at,
        batch.accepted_at,
        failing,
    )


def resumed(sealed: Sealed, sizes: Mapping[int, int], now: float) -> SealedBatch:
    """A batch of an earlier life.

    Args:
        sealed: as the journal kept it.
        sizes: bytes of each chunk.
        now: loop time.
    """
    batch = SealedBatch(
        sealed.number,
        sealed.spans,
        sealed.count,
        attempts=sealed.attempts,
        accepted_at=sealed.accepted_at,
    )
    batch.bytes = sum(sizes.get(chunk, 0) for chunk in {span.chunk for span in sealed.spans})
    batch.counted = batch.counted_before = sealed.failing.counted
    if sealed.attempts:
        batch.failing_since = now - sealed.failing.seconds
        batch.first_failed = 0
    return batch


def outcome(count: int, result: Result, verdict: Resolve | RetryBatch) -> Tried:
    """How a try counts, for the metrics."""
    if isinstance(verdict, RetryBatch):
        return "retry"
    if result.failure is not None and verdict.again:
        return "split"
    again = sum(len(one.indices) for one in verdict.again)
    if len(verdict.given_up) + again < count:
        return "done"
    return "retry" if again else "failed"


def replacements(
    batch: SealedBatch, again: Sequence[RetryRecords], *, first_number: int
) -> list[tuple[SealedBatch, float]]:
    """The batches that replace some of a batch's records, and the seconds until each is due."""
    return [
        (
            batch.part(number, select(batch.spans, one.indices), len(one.indices)),
            one.after,
        )
        for number, one in enumerate(again, first_number)
    ]


def dead_letters(
    batch: SealedBatch,
    records: Records,
    given_up: Sequence[DeadLettered],
    *,
    origin: str,
    now: float,
) -> list[DeadLetter]:
    """A dead letter for each record that is given up.

    Args:
        batch: the batch, with the attempts made so far.
        records: its payload.
        given_up: which records, and why.
        origin: the journal's id, the first part of a record's id.
        now: seconds since the epoch.
    """
    if not given_up:
        return []
    payloads = records.items()
    places = [Place(span.chunk, span.first + i) for span in batch.spans for i in range(span.count)]
    names = records.names
    return [
        DeadLetter(
            record=(names and names[one.index])
            or "{}.{}.{}".format(origin, *places[one.index][:2]),
            reason=one.reason,
            error=one.error,
            traceback=one.traceback,
            payload=payloads[one.index],
            attempts=batch.attempts,
            first_at=batch.accepted_at,
            last_at=now,
            place=places[one.index],
        )
        for one in given_up
    ]


def remainder(batch: SealedBatch, spans: Sequence[Span], *, number: int) -> SealedBatch:
    """What is left of a batch, as a batch of its own."""
    return batch.part(number, tuple(spans), sum(span.count for span in spans))


def damage_letters(
    batch: SealedBatch, lost: Sequence[Span], *, origin: str, now: float
) -> list[DeadLetter]:
    """One dead letter for each run of records that can't be read; the chunk is kept as it is."""
    return [
        DeadLetter(
            record=f"{origin}.{span.chunk}.{span.first}",
            reason="damaged",
            error=DAMAGED,
            traceback="",
            payload=b"",
            attempts=batch.attempts,
            first_at=batch.accepted_at,
            last_at=now,
            records=span.count,
            place=Place(span.chunk, span.first),
        )
        for span in lost
    ]
