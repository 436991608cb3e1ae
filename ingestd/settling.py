"""What a settlement consists of: dead letters and the batches that replace one. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ingestd.base.record import select
from ingestd.batching.batch import Batch
from ingestd.journal.interface import DeadLetter, Sealed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ingestd.base.record import Records, Span
    from ingestd.execution.retry import Again, GivenUp

DAMAGED = "the journal's copy is damaged: its checksum does not fit"


def as_sealed(batch: Batch, due_at: float) -> Sealed:
    """A batch as the journal keeps it; `due_at` in seconds since the epoch, 0 for at once."""
    return Sealed(batch.number, batch.spans, batch.count, batch.attempts, due_at, batch.accepted_at)


def replacements(
    batch: Batch, again: Sequence[Again], *, first_number: int
) -> list[tuple[Batch, float]]:
    """The batches that replace some of a batch's records, and the seconds until each is due."""
    return [
        (
            Batch(
                number,
                select(batch.spans, one.indices),
                len(one.indices),
                attempts=batch.attempts,
                accepted_at=batch.accepted_at,
            ),
            one.after,
        )
        for number, one in enumerate(again, first_number)
    ]


def dead_letters(
    batch: Batch, records: Records, given_up: Sequence[GivenUp], *, origin: str, now: float
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
    places = [(span.chunk, span.first + i) for span in batch.spans for i in range(span.count)]
    return [
        DeadLetter(
            record="{}.{}.{}".format(origin, *places[one.index]),
            reason=one.reason,
            error=one.error,
            traceback=one.traceback,
            payload=payloads[one.index],
            attempts=batch.attempts,
            first_at=batch.accepted_at,
            last_at=now,
        )
        for one in given_up
    ]


def remainder(batch: Batch, spans: Sequence[Span], *, number: int) -> Batch:
    """What is left of a batch, as a batch of its own."""
    count = sum(span.count for span in spans)
    return Batch(
        number, tuple(spans), count, attempts=batch.attempts, accepted_at=batch.accepted_at
    )


def damage_letters(
    batch: Batch, lost: Sequence[Span], *, origin: str, now: float
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
        )
        for span in lost
    ]
