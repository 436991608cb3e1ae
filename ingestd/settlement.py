"""Settlements: dead letters, the batches that replace one, and the transaction that writes them.

The functions are pure; `SettlementWriter` alone touches the journal.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

from ingestd.base import envelope
from ingestd.base.batch import ERROR_CHARS, RecentBatches, SealedBatch, TriedBatch
from ingestd.base.logging import get_logger
from ingestd.base.record import select, without
from ingestd.batching.batcher import part_by_key
from ingestd.execution.retry import RetryBatch
from ingestd.journal.dead_letters import DeadLetter
from ingestd.journal.interface import Cursor, Failing, Place, Postpone, Seal, Sealed, Settle

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ingestd.base.clock import Clock
    from ingestd.base.metrics import PipelineMetrics, Tried
    from ingestd.base.record import Records, Span
    from ingestd.batching.batcher import BatchDraft, Batcher
    from ingestd.execution.dispatcher import Dispatcher
    from ingestd.execution.key_order import BatchKeys
    from ingestd.execution.retry import DeadLettered, Resolve, RetryRecords
    from ingestd.handlers.outcome import Result
    from ingestd.journal.interface import ChunkSize, Journal, Recovered
    from ingestd.journal.reader import MemoryBudget, UnsettledChunks

log = get_logger()

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
        batch.lineage,
    )


def sealed_from(draft: BatchDraft, number: int) -> SealedBatch:
    """The batch that a draft becomes under its number."""
    return SealedBatch(
        number,
        draft.spans,
        sum(span.count for span in draft.spans),
        accepted_at=draft.accepted_at,
        records=draft.records,
        size=draft.size,
    )


def resumed(sealed: Sealed, sizes: Mapping[int, ChunkSize], now: float) -> SealedBatch:
    """A batch of an earlier life.

    Args:
        sealed: as the journal kept it.
        sizes: of each chunk that is there.
        now: loop time.
    """
    batch = SealedBatch(
        sealed.number,
        sealed.spans,
        sealed.count,
        attempts=sealed.attempts,
        accepted_at=sealed.accepted_at,
        lineage=sealed.lineage,
    )
    for span in sealed.spans:
        if whole := sizes.get(span.chunk):  # the rest of a chunk is another batch's, or settled
            batch.bytes += whole.bytes * span.count // max(whole.records, 1)
    batch.counted = batch.counted_before = sealed.failing.counted
    if sealed.attempts:
        batch.failing_since = now - sealed.failing.seconds
        batch.first_failed = 0
    return batch


def outcome(count: int, result: Result, verdict: Resolve | RetryBatch) -> Tried:
    """The outcome of a try, for the metrics."""
    if isinstance(verdict, RetryBatch):
        return "retry"
    if result.failure is not None and verdict.again:
        return "split"
    again = sum(len(one.indices) for one in verdict.again)
    if len(verdict.given_up) + again < count:
        return "done"
    return "retry" if again else "failed"


def replacements(
    batch: SealedBatch, again: Sequence[RetryRecords], *, first_number: int, split: bool
) -> list[tuple[SealedBatch, float]]:
    """The batches that replace some of a batch's records, and the seconds until each is due."""
    return [
        (
            batch.part(number, select(batch.spans, one.indices), len(one.indices), split=split),
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
    envelopes = envelope.singles(records.envelopes, records.count)
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
            envelope=envelopes[one.index],
        )
        for one in given_up
    ]


def remainder(batch: SealedBatch, spans: Sequence[Span], *, number: int) -> SealedBatch:
    """The remaining records of a batch, as a batch of their own."""
    return batch.part(number, tuple(spans), sum(span.count for span in spans), split=True)


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


# -- what one result changes, in one transaction ---------------------------------------------------


class SettlementWriter:
    """Writes what became of a batch: dead letters, the batches that replace it, finished chunks.

    Args:
        journal: where it is written.
        dispatcher: gets the batches that are to be tried again.
        unsettled: the chunks that still hold unsettled records.
        budget: the memory that payloads take.
        metrics: counts dead letters.
        clock: where time comes from.
        on_settled: called with the spans that are settled and the dead letters among them.
        on_finished: called with each chunk of which all records are settled.

    Attributes:
        journal_id: the first part of each record's id; known after `recover`.
        next_batch: the number of the next batch.
        recent: the last tries of batches.
        on_outcome: called with each batch that was settled, its records, the dead letters by their
            places in it, and the places of what is tried again, while a client looks at them.
    """

    on_outcome: (
        Callable[[SealedBatch, Records, Mapping[int, DeadLetter], frozenset[int]], None] | None
    ) = None
    journal_id = ""
    next_batch = 0

    def __init__(
        self,
        journal: Journal,
        dispatcher: Dispatcher,
        unsettled: UnsettledChunks,
        budget: MemoryBudget,
        *,
        metrics: PipelineMetrics,
        clock: Clock,
        on_settled: Callable[[Sequence[Span], Sequence[DeadLetter]], None],
        on_finished: Callable[[int], None],
    ) -> None:
        self._journal = journal
        self._dispatcher = dispatcher
        self._unsettled = unsettled
        self._budget = budget
        self._metrics = metrics
        self._clock = clock
        self._on_settled = on_settled
        self._on_finished = on_finished
        self.recent = RecentBatches()
        self._keys: BatchKeys | None = dispatcher.keys
        dispatcher.queue.on_cold = self.forget_payload

    async def recover(self, recovered: Recovered) -> None:
        """Takes up the batches of an earlier life, under their old ids."""
        self.journal_id, self.next_batch = recovered.journal, recovered.next_batch
        now, keys, batches = self._clock.now(), self._keys, recovered.batches
        if keys is not None:  # those with a common key are in its order then
            batches = sorted(batches, key=lambda one: min(span[:2] for span in one.spans))
        for sealed in batches:
            for span in sealed.spans:
                chunk = recovered.sizes.get(span.chunk)
                size = chunk.bytes if chunk else 0
                self.enter(span.chunk, span.count, size=size, accepted_at=sealed.accepted_at)
            batch = resumed(sealed, recovered.sizes, _loop_time())
            if keys is not None:
                batch.keys = await keys.load(batch.spans, self._journal.load)
            if not sealed.due_at:
                self._dispatcher.queue.resume(batch)
                continue
            # Before it was accepted? The clock was set back: what is due by the old one is due.
            wait = max(0.0, sealed.due_at - now) if now >= sealed.accepted_at else 0.0
            self._dispatcher.park(batch, min(wait, recovered.waits.get(sealed.number, wait)))

    def enter(self, chunk: int, count: int, *, size: int, accepted_at: float) -> None:
        """Counts records of a chunk as unsettled; see `UnsettledChunks.add`."""
        # In loop time: from here on no clock that is set moves the acceptance.
        since = _loop_time() - max(0.0, self._clock.now() - accepted_at)
        self._unsettled.add(chunk, count, size=size, since=since)

    async def seal(self, draft: BatchDraft, batcher: Batcher) -> None:
        """Submits a seal, which shares the next commit, and hands the batch to the dispatcher.

        With `batch.key` these are several batches, which one seal writes down.
        """
        if self._keys is None or draft.records is None:
            batches = [sealed_from(draft, self.take_numbers())]
        else:
            cut = partial(
                part_by_key,
                draft,
                records_max=batcher.records_max,
                bytes_max=batcher.bytes_max,
                parts=batcher.window,
            )
            parts = await self._keys.apply(draft.records, cut)
            batches = []
            for part, keys in parts:
                batches.append(sealed_from(part, self.take_numbers()))
                batches[-1].keys = keys
        first, *more = [as_sealed(batch, 0.0) for batch in batches]
        written = self._journal.write(Seal(first, Cursor(*draft.cursor), more))
        for batch in batches:
            batch.sealed = written
            await self._dispatcher.queue.put(batch)

    def take_numbers(self, count: int = 1) -> int:
        """Takes numbers for batches; returns the first."""
        first = self.next_batch
        self.next_batch += count
        return first

    async def load(self, batch: SealedBatch) -> None:
        """Brings a batch's payload back from the journal."""
        batch.records = await self._journal.load(batch.spans)
        if batch.records is not None:
            batch.size = batch.records.held_bytes
            self._budget.take(batch.size)

    async def write(
        self,
        batch: SealedBatch,
        records: Records,
        verdict: Resolve | RetryBatch,
        result: Result,
    ) -> None:
        """Counts a try of a batch, and writes what was decided after its result."""
        tried, size = outcome(batch.count, result, verdict), len(records.payload)
        self._metrics.batch_tried(tried, batch.count, size, result.seconds)
        if isinstance(verdict, RetryBatch):
            await self._postpone(batch, verdict)
        else:
            # After a failure what is tried again are parts, else single records.
            await self._settle(batch, records, verdict, split=result.failure is not None)
        now = self._clock.now()
        self.recent.add(
            TriedBatch(
                id=f"{self.journal_id}-{batch.number}",
                records=batch.count,
                bytes=size,
                attempts=batch.attempts,
                seconds=result.seconds,
                outcome=tried,
                age=max(0.0, now - batch.accepted_at),
                at=now,
                error=_error_of(result),
            )
        )

    async def _postpone(self, batch: SealedBatch, verdict: RetryBatch) -> None:
        log.debug("batch_postponed", attempts=batch.attempts, after=round(verdict.after, 3))
        self.forget_payload(batch)
        # Parked before the commit, so that the queue counts it when the next batch is asked for.
        self._dispatcher.park(batch, verdict.after, asked=verdict.asked)
        due_at = self._clock.now() + verdict.after
        # Not tried again before it: while a disk is full or hangs each try would leave a change.
        batch.sealed = self._journal.write(Postpone(as_sealed(batch, due_at, _loop_time())))
        await batch.sealed

    async def _settle(
        self, batch: SealedBatch, records: Records, verdict: Resolve, *, split: bool
    ) -> None:
        now, again, keys = self._clock.now(), verdict.again, list[frozenset[int]]()
        dead = dead_letters(batch, records, verdict.given_up, origin=self.journal_id, now=now)
        if again and self._keys is not None:
            again, keys = await self._keys.apart(records, again, split=split)
        number = self.take_numbers(len(again))
        successors = replacements(batch, again, first_number=number, split=split)
        for (successor, _), its_keys in zip(successors, keys, strict=False):
            successor.keys = its_keys
        if split and successors:
            self._dispatcher.splitter.split(batch, [successor for successor, _ in successors])
            log.debug("batch_split", records=batch.count)
        await self._commit(batch, dead, successors)
        for successor, after in successors:
            self._dispatcher.park(successor, after, asked=not split)
        if self.on_outcome is not None:
            died = {one.index: letter for one, letter in zip(verdict.given_up, dead, strict=True)}
            left = frozenset(index for one in verdict.again for index in one.indices)
            self.on_outcome(batch, records, died, left)

    async def set_aside(self, batch: SealedBatch) -> None:
        """Settles a batch that can't be read: only what lies in damaged chunks is given up."""
        readable = [span for span in batch.spans if await self._journal.load([span]) is not None]
        lost = [span for span in batch.spans if span not in readable]
        letters = damage_letters(batch, lost, origin=self.journal_id, now=self._clock.now())
        successors = []
        if readable:
            left = remainder(batch, readable, number=self.take_numbers())
            left.keys = batch.keys  # perhaps more than it has
            successors.append((left, 0.0))
        await self._commit(batch, letters, successors, damaged=[span.chunk for span in lost])
        for successor, _ in successors:
            self._dispatcher.park(successor, 0.0)

    async def _commit(
        self,
        batch: SealedBatch,
        dead: Sequence[DeadLetter],
        successors: Sequence[tuple[SealedBatch, float]],
        damaged: Sequence[int] = (),
    ) -> None:
        """One transaction; then the chunks that it finished leave the queue."""
        remaining = [span for successor, _ in successors for span in successor.spans]
        settled = without(batch.spans, remaining)
        finished, freed = self._unsettled.settle(settled)
        self.forget_payload(batch)
        now, loop_now = self._clock.now(), _loop_time()
        given_up = sum(letter.records for letter in dead)
        settle = Settle(
            batch=batch.number,
            processed=batch.count - given_up - sum(span.count for span in remaining),
            dead=dead,
            successors=[as_sealed(one, now + after, loop_now) for one, after in successors],
            finished=finished,
            finished_bytes=0 if damaged else freed,
            damaged=damaged,
        )
        await self._journal.write(settle)
        self._dispatcher.queue.replaced(batch, [successor for successor, _ in successors])
        self._on_settled(settled, dead)
        for chunk in finished:
            self._on_finished(chunk)
        self._dispatcher.splitter.settled(batch)
        for reason in {letter.reason for letter in dead}:
            letters = [letter for letter in dead if letter.reason == reason]
            records = sum(letter.records for letter in letters)
            self._metrics.died(reason, records)
            self._dispatcher.failures.given_up(reason, records, letters[0].error)

    def forget_payload(self, batch: SealedBatch) -> None:
        """Frees the memory of a batch's records; `load` brings them back."""
        self._budget.free(batch.size)
        batch.records, batch.size = None, 0


def _error_of(result: Result) -> str:
    """The beginning of the first error of a result, one line; empty if there is none."""
    if result.failure is not None:
        error = result.failure.error
    else:
        error = result.rejections[0].error if result.rejections else ""
    return error if len(error) <= ERROR_CHARS else f"{error[: ERROR_CHARS - 1]}…"


def _loop_time() -> float:
    return asyncio.get_running_loop().time()
