"""The way of a record, top to bottom: accept, pump, batch, seal, dispatch, run, settle.

Each step is a method below, in that order. Three tasks turn for ever: `_pump` fills the queue,
`_consume` cuts and seals batches, `_dispatch` gives them to free workers. A batch's own task
(`_run`) calls the handler and settles. If one of the three ends, the pipeline is broken and says
so (`broken`); nothing waits for ever on a consumer that is dead.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, NamedTuple

import async_timeout
from structlog.contextvars import bind_contextvars

from ingestd.base.append import RecentIds
from ingestd.base.errors import KeysUnsupported
from ingestd.base.logging import get_logger
from ingestd.base.tasks import OwnedTasks
from ingestd.batching.batcher import BatchDraft, Batcher, unreadable
from ingestd.execution.dispatcher import Dispatcher
from ingestd.journal.build import build_deduplicator, build_journal
from ingestd.journal.idempotency import KeyRule
from ingestd.journal.maintenance import Auditor, DeadLetterMaintenance
from ingestd.journal.reader import ChunkReader, MemoryBudget, UnsettledChunks
from ingestd.settlement import SettlementWriter
from ingestd.waiters import DeliveryWaiters

if TYPE_CHECKING:
    from pathlib import Path

    from ingestd.base.append import Append, DeliveryWaiter, IdempotencyClaim, SourceOffset
    from ingestd.base.batch import SealedBatch
    from ingestd.base.clock import Clock
    from ingestd.base.metrics import PipelineMetrics
    from ingestd.host.process import Surroundings
    from ingestd.journal.interface import Chunk, Ledger, Recovered
    from ingestd.pipeline_settings import BatchSettings, PipelineSettings

log = get_logger()


class DrainReport(NamedTuple):
    """Report of a pipeline's drain.

    Attributes:
        ledger: the counters.
        counted: pending records, counted from the journal's rows; `None` if it can't be read.
        workers_gone: whether every worker really ended.
        durable: whether what is pending is still there at the next start.
        written: whether the journal wrote all that was submitted to it.
        journal_gone: whether its threads ended; they can't while a disk does not answer.
    """

    ledger: Ledger
    counted: int | None
    workers_gone: bool
    durable: bool
    written: bool = True
    journal_gone: bool = True

    @property
    def balanced(self) -> bool:
        """Promise 2: accepted = processed + dead + pending."""
        return self.counted is None or self.counted == self.ledger.pending


class Pipeline:
    """One journal, queue, batcher, executor and handler, under a name.

    Args:
        name: as in `[pipelines.NAME]`, or `default`.
        settings: this pipeline's, complete.
        folder: where its journal lies; exists.
        data_dir: the daemon's, for the handler.
        metrics: what it counts.
        clock: where time comes from.
        keys: how long idempotency keys are kept, and how many.
        surroundings: what worker processes are started with; those of `open` if not given.
    """

    def __init__(
        self,
        name: str,
        settings: PipelineSettings,
        *,
        folder: Path,
        data_dir: Path,
        metrics: PipelineMetrics,
        clock: Clock,
        keys: KeyRule = KeyRule(),  # noqa: B008  immutable
        surroundings: Surroundings | None = None,
    ) -> None:
        self.name = name
        self.format = settings.format
        self.record_bytes_max = settings.record_bytes_max
        self.json_depth_max = settings.json_depth_max
        self.settings = settings
        self.journal = build_journal(
            settings.journal,
            settings.dead,
            folder=folder,
            clock=clock,
            on_commit=metrics.committed,
            keys=keys,
            check=settings.record_fault,
        )
        self.letters = DeadLetterMaintenance(name, self.journal.dead_letters, settings.dead, clock)
        self.auditor = Auditor(name, self.journal.maintenance)
        self.budget = MemoryBudget(settings.queue.bytes_max)
        self.queue: asyncio.Queue[Chunk] = asyncio.Queue(settings.queue.chunks_max)
        self._moved = asyncio.Event()
        self.batcher = Batcher(**settings.batch.bounds(), **settings.batch_window())
        self.dispatcher = Dispatcher(
            name,
            settings.retry,
            clock,
            folder=folder,
            letters=self.letters,
            pending=lambda: self.ledger.pending,
            on_idle=self._retime,
            on_control=self._moved.set,
            key=settings.batch.key,
        )
        self._data_dir, self._surroundings = data_dir, surroundings
        self.unsettled = UnsettledChunks()
        self.waiters = DeliveryWaiters()
        self.recent_ids = RecentIds(keys.ids_max)
        self.deduplicator = build_deduplicator(settings.dedupe, clock)
        self.settlements = SettlementWriter(
            self.journal,
            self.dispatcher,
            self.unsettled,
            self.budget,
            metrics=metrics,
            clock=clock,
            on_settled=self.waiters.settled,
            on_finished=self._finished,
        )
        self._metrics = metrics
        self._clock = clock
        self.is_closing = False
        self._gone = True  # the workers
        self._turning: list[asyncio.Task[None]] = []
        self._timer: asyncio.Timeout | None = None

    # -- start ---------------------------------------------------------------------------------

    async def open(self) -> None:
        """Starts the workers, opens the journal, and feeds what an earlier life left behind.

        Raises:
            HandlerLoadError: the handler can't be loaded; the journal is untouched.
            JournalUnreadable: see `Journal.open`.
            DataDirError: see `Journal.open`.
        """
        self._loop = asyncio.get_running_loop()
        self._tasks = OwnedTasks(self.name)
        self.broken = self._tasks.broken
        await self.dispatcher.open(
            self.settings.executor,
            self.settings.handler,
            self.settings.format,
            data_dir=self._data_dir,
            on_restart=self._metrics.worker_restarted,
            surroundings=self._surroundings,
        )
        try:
            recovered = await self.journal.open(self._durable)
        except BaseException:
            await self.dispatcher.close(self._loop.time() + 5.0)
            raise
        recovered.failed.add_done_callback(self._tasks.break_with)
        try:
            await self._begin(recovered)
        except BaseException:
            # Which gives a lock or a lease back.
            await self.close(self._loop.time() + 5.0, self._loop.time() + 5.0)
            raise

    async def _begin(self, recovered: Recovered) -> None:
        await self._recover(recovered)
        self._turning = [
            self._tasks.start(self._pump(), "pump"),
            self._tasks.start(self._consume(), "consume"),
            self._tasks.start(self._dispatch(), "dispatch"),
            self._tasks.start(self.letters.run(), "letters"),
            self._tasks.start(self.auditor.run(), "auditor"),
            *(self._tasks.start(run, name) for name, run in self.dispatcher.tasks().items()),
        ]
        # Letters that were marked while nothing ran are requeued before anything new is taken.
        polled = self._loop.create_task(self.letters.polled.wait())
        ends: set[asyncio.Future[Any]] = {polled, self.broken}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        polled.cancel()

    async def _recover(self, recovered: Recovered) -> None:
        """Sealed batches first, under their old ids; then the chunks from the cursor on."""
        self._cursor = recovered.cursor
        self.reader = ChunkReader(
            self.journal, self.budget, first=recovered.cursor.chunk, last=recovered.last_chunk
        )
        await self.settlements.recover(recovered)
        self.recent_ids.restore(recovered.ids)
        if self.deduplicator is not None:
            self.deduplicator.restore(recovered.keys)
        if recovered.set_aside:
            log.error("journal_set_aside", pipeline=self.name, moved_to=recovered.set_aside)
        if self.ledger.pending:
            facts = {"pending": self.ledger.pending, "sealed": len(recovered.batches)}
            log.info("journal_recovered", pipeline=self.name, **facts)

    def reload(self, batch: BatchSettings, keys: KeyRule) -> None:
        """Uses other bounds for batches, and another rule for keys, from now on."""
        if self.journal.idempotency is not None:
            self.journal.idempotency.rule = keys
        self.recent_ids.kept_max = keys.ids_max
        self.settings = self.settings.model_copy(update={"batch": batch})
        self.batcher.bound(**batch.bounds())
        self._retime()

    # -- 1. accept: source → journal -----------------------------------------------------------

    async def begin(self, key: str, fingerprint: bytes) -> IdempotencyClaim | bytes:
        """See `Intake.begin`."""
        if self.journal.idempotency is None:
            raise KeysUnsupported
        return await self.journal.idempotency.begin(key, fingerprint)

    def forget(self, claim: IdempotencyClaim) -> None:
        """See `Intake.forget`."""
        if self.journal.idempotency is not None:
            self.journal.idempotency.forget(claim)

    def stop_waiting(self, waiter: DeliveryWaiter) -> None:
        """See `Intake.stop_waiting`."""
        self.waiters.remove(waiter)

    async def offset(self, key: str) -> SourceOffset | None:
        """See `Intake.offset`."""
        offsets = self.journal.offsets
        return None if offsets is None else await offsets.find(key)

    async def accept(self, append: Append) -> None:
        """Returns once all of it is durable; all or nothing.

        Raises:
            Overloaded: the journal is at its bound, or its disk.
            JournalFailed: it is poisoned.
        """
        if self.deduplicator is None:
            placed = self.journal.append(append)
        else:
            append, placed = await self.deduplicator.admit(append, self.journal.append)
        place = await self.recent_ids.follow(append.ids, placed)
        if append.waiter is not None:
            # In time: a record is sealed, in a commit of its own, before anything becomes of it.
            self.waiters.add(place, append.waiter, append.deduplicated)
        self._metrics.accepted(len(append.records.payload))
        for reason in {record.reason for record in append.invalid}:
            sizes = [len(one.payload) for one in append.invalid if one.reason == reason]
            self._metrics.invalid(reason, len(sizes), sum(sizes))
        if append.unkept:
            self._metrics.unkept(append.unkept)

    def _durable(self, chunk: Chunk) -> None:
        """The journal's word that a chunk is durable; comes just before its append resolves."""
        self.reader.push(chunk)

    # -- 2. pump: journal → queue --------------------------------------------------------------

    async def _pump(self) -> None:
        while True:
            chunk = await self.reader.next()
            records = chunk.records
            self.settlements.enter(
                chunk.id,
                records.count - self._first_of(chunk),
                size=records.stored_bytes,
                accepted_at=chunk.accepted_at,
            )
            await self.queue.put(chunk)

    def _first_of(self, chunk: Chunk) -> int:
        """The first record that is not sealed; not 0 only for the recovered cursor's chunk."""
        return self._cursor.record if chunk.id == self._cursor.chunk else 0

    # -- 3. batch: queue → batches -------------------------------------------------------------

    async def _consume(self) -> None:
        while True:
            chunk = await self._next_chunk()
            if chunk is None:
                await self._seal(self.batcher.close())
            elif chunk.damaged:
                await self._seal(self.batcher.close())
                await self._seal(self._damaged(chunk))
            else:
                self._add(chunk)
                while cut := self.batcher.take():
                    await self._seal(cut)

    async def _next_chunk(self) -> Chunk | None:
        """The next chunk, or nothing when the open batch must go as it is."""
        if not self.queue.empty():
            return self.queue.get_nowait()
        if not self.batcher.open:
            return await self.queue.get()
        self._timer = async_timeout.timeout_at(self._due())
        try:
            async with self._timer:
                return await self.queue.get()
        except TimeoutError:
            return None
        finally:
            self._timer = None

    def _due(self) -> float | None:
        """The loop time at which the open batch must go, as things are."""
        wait = self.batcher.due_in(self._clock.now(), busy=self.dispatcher.busy)
        return None if wait is None else self._loop.time() + wait

    @property
    def could_cut(self) -> bool:
        """Tells if a batch could be sealed now: there is something in it, and a place for it."""
        due = self._due()
        overdue = due is not None and due <= self._loop.time()
        return not self.dispatcher.queue.is_long and (not self.queue.empty() or overdue)

    def _retime(self) -> None:
        """Something that decides when the open batch is due has changed."""
        if self._timer is not None and not self._timer.expired():
            self._timer.reschedule(self._due())

    def _add(self, chunk: Chunk) -> None:
        first = self._first_of(chunk)
        if first:
            # The sealed part came with the chunk into memory, but no batch will free it.
            self.budget.free(chunk.records.ends()[first - 1])
        self.batcher.add(chunk.id, chunk.records, first=first, accepted_at=chunk.accepted_at)

    def _damaged(self, chunk: Chunk) -> BatchDraft:
        """A chunk that can't be read, as a batch that no worker will see."""
        first, count = self._first_of(chunk), chunk.records.count
        self.budget.free(chunk.records.held_bytes)
        return unreadable(chunk.id, first, count - first, chunk.accepted_at)

    # -- 4. seal: written down before anyone sees it -------------------------------------------

    async def _seal(self, cut: BatchDraft | None) -> None:
        """Submits the seal; it shares the next commit, and `_dispatch` waits for it."""
        if cut is not None:
            await self.settlements.seal(cut, self.batcher)

    # -- 5. dispatch: `workers` batches run at most, and some more lie ready for them ----------

    async def _dispatch(self) -> None:
        while True:
            batch = await self.dispatcher.next()
            self._tasks.start(self._run(batch), f"batch-{batch.number}")

    async def pause(self) -> None:
        """Gives out no batch until `resume`, also after a restart; see `DispatchControl.pause`."""
        await self.dispatcher.control.pause()

    async def resume(self) -> None:
        """Ends a pause; see `DispatchControl.resume`."""
        await self.dispatcher.control.resume()

    # -- 6. run: one try of one batch ----------------------------------------------------------

    async def _run(self, batch: SealedBatch) -> None:
        # A task has a context of its own: every log line from here on, the handler's in a
        # thread included, says which batch it is about.
        journal_id = self.settlements.journal_id
        bind_contextvars(pipeline=self.name, batch_id=f"{journal_id}-{batch.number}")
        try:
            if batch.records is None:
                await self.settlements.load(batch)
            records = batch.records
            if records is not None:
                result = await self.dispatcher.call(batch, records, journal_id)
        finally:
            self.dispatcher.ended()
        if records is None:
            self.dispatcher.outage.answered(batch.number)
            await self.settlements.set_aside(batch)
            self._moved.set()
            return
        if self.is_closing and result.failure is not None:
            return  # its worker was ended under it: that is not the batch's fault
        verdict = self.dispatcher.judge(batch, result)
        await self.settlements.write(batch, records, verdict, result)
        self._moved.set()

    def _finished(self, chunk: int) -> None:
        if chunk >= self._cursor.chunk:  # older ones were sealed in an earlier life
            self.queue.task_done()

    def end_input(self) -> None:
        """Cuts batches at once from now on: no source hands in more records."""
        self.batcher.draining = True
        self._retime()

    # -- leave ---------------------------------------------------------------------------------

    async def drain(self, deadline: float | None) -> None:
        """Finishes what was accepted; nothing is accepted meanwhile.

        Returns when all of it is settled, when the pipeline broke, at `deadline` (loop time), or
        as soon as all that is left waits for a retry beyond it.
        """
        self.end_input()
        self.letters.stop()
        joined = self._loop.create_task(self._joined(), name=f"{self.name}-join")
        try:
            while not (joined.done() or self.broken.done()):
                left = None if deadline is None else deadline - self._loop.time()
                if left is not None and (left <= 0 or self._only_waits_beyond(deadline)):
                    return
                if self.dispatcher.stopped and not self.dispatcher.running:
                    return  # it does not wait for what will not come
                self._moved.clear()
                moved = self._loop.create_task(self._moved.wait())
                ends: set[asyncio.Future[Any]] = {joined, self.broken, moved}
                await asyncio.wait(ends, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                moved.cancel()
        finally:
            joined.cancel()

    async def _joined(self) -> None:
        await self.reader.emptied()
        await self.queue.join()
        while len(self.unsettled):  # batches of an earlier life did not come through the queue
            self._moved.clear()
            await self._moved.wait()

    def _only_waits_beyond(self, deadline: float | None) -> bool:
        fed = bool(self.reader.waiting or not self.queue.empty() or self.batcher.open)
        return deadline is not None and self.dispatcher.waits_beyond(deadline, fed=fed)

    async def close(self, deadline: float, give_up: float | None = None) -> DrainReport:
        """Ends the workers, then closes the journal; see `end_workers` and `close_journal`."""
        await self.end_workers(deadline)
        return await self.close_journal(give_up)

    async def end_workers(self, deadline: float) -> None:
        """Cancels the tasks that feed the workers, and ends the workers.

        Args:
            deadline: loop time until which an idle worker may take to close its handler.
        """
        self.is_closing = True
        await self._tasks.cancel(self._turning)
        self._gone = await self.dispatcher.close(deadline)
        await self._tasks.cancel()  # whose worker is gone, or was left behind

    async def close_journal(self, give_up: float | None = None) -> DrainReport:
        """Closes the journal; the workers have ended.

        Args:
            give_up: loop time at which a journal whose disk does not answer is left as it is.

        Returns:
            The last numbers.
        """
        if self.deduplicator is not None:
            self.deduplicator.close()
        closed = await self.journal.close(give_up)
        self.dispatcher.failures.sum_up_given_up()
        numbers = closed.ledger, closed.counted
        return DrainReport(*numbers, self._gone, closed.durable, closed.written, closed.gone)

    @property
    def ledger(self) -> Ledger:
        """The counters of its journal."""
        return self.journal.status().ledger
