"""The dispatcher: gives ready batches to free workers, and judges each try of a batch.

It owns the pool of workers and everything that decides which batch is tried next, and when: the
ready queue, the dispatch control, the outage, the splitter and the retry rule. It writes nothing
down.
"""

from __future__ import annotations

import asyncio
import math
import random
from typing import TYPE_CHECKING, Any

from ingestd.base.logging import get_logger
from ingestd.base.scraped import SinkCounts
from ingestd.base.watchdog import Stage
from ingestd.execution.build import start_pool
from ingestd.execution.dispatch_control import DispatchControl, PauseMark, Throttle
from ingestd.execution.failure_log import FailureLog
from ingestd.execution.outage import Outage
from ingestd.execution.ready_queue import Load, ReadyQueue
from ingestd.execution.retry import BatchSplitter, RetryRule, decide, rank, spends_try
from ingestd.handlers.outcome import Job, error_kind

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping
    from pathlib import Path

    from ingestd.base.batch import SealedBatch
    from ingestd.base.clock import Clock
    from ingestd.base.record import Records
    from ingestd.execution.concurrency import ConcurrencyLimit
    from ingestd.execution.dispatch_control import BoundedLetters
    from ingestd.execution.key_order import BatchKeys
    from ingestd.execution.pool import Pool
    from ingestd.execution.retry import Resolve, RetryBatch
    from ingestd.execution.settings import ExecutorSettings, HandlerSettings, RetrySettings
    from ingestd.handlers.outcome import Result

log = get_logger()

BATCH_BYTES = 1024
"""Memory that a batch takes while it waits; its payload is on disk."""


class Dispatcher:
    """The dispatcher of one pipeline.

    Args:
        pipeline: its name.
        retry: `[retry]`.
        clock: for the time of day in logs, and for the throttle.
        folder: of the pipeline, which says whether it is paused.
        letters: the dead letters, which stop it at their bound.
        pending: gives the number of records that are not settled.
        on_idle: called when a worker becomes free, or the last new batch has gone to one.
        on_control: called when a reason why no batch is given out has come or gone.
        key: `batch.key`; empty if batches are in no order.

    Attributes:
        start_pool: starts the workers; a harness for tests has others.
        executor: `process`, `thread`, `async` or `external`; empty before `open`.
        concurrency: decides on the number of workers; `None` if that does not change.
        control: says when a batch may be given out at all.
        queue: the batches that wait for a worker or for their next try.
        running: batches that are with a worker, or lie ready before one.
        sinks: counts by target.
        keys: reads keys of records; `None` if batches are in no order.
        around: called with each job and with what runs it; `None` for nothing.
    """

    around: Callable[[Job, Callable[[Job], Awaitable[Result]]], Awaitable[Result]] | None = None

    def __init__(
        self,
        pipeline: str,
        retry: RetrySettings,
        clock: Clock,
        *,
        folder: Path,
        letters: BoundedLetters,
        pending: Callable[[], int],
        on_idle: Callable[[], None],
        on_control: Callable[[], object],
        key: str = "",
    ) -> None:
        self._pipeline = pipeline
        self._clock = clock
        self._on_idle, self._on_control = on_idle, on_control
        mark = PauseMark(folder)
        self.control = DispatchControl(
            pipeline, letters, mark, clock, on_change=self._control_changed
        )
        self.outage = Outage(retry.backoff_max, random.random)
        self.keys: BatchKeys | None = None
        kind: type[ReadyQueue[SealedBatch]] = ReadyQueue
        if key:
            from ingestd.execution.key_order import BatchKeys, OrderedQueue  # noqa: PLC0415

            self.keys, kind = BatchKeys(key), OrderedQueue
        self.queue = kind(
            waiting_max=Load(retry.waiting_records_max, retry.waiting_bytes_max),
            outage=self.outage,
            on_empty=on_idle,
            free_at=self.control.free_at,
        )
        self.splitter = BatchSplitter(self.outage, retry.attempts_max)
        self.failures = FailureLog(pipeline, self.outage, clock, pending)
        self._rule = RetryRule(
            retry.attempts_max, retry.backoff, retry.backoff_max, retry.give_up_after
        )
        self.sinks: dict[str, SinkCounts] = {}
        self.start_pool = start_pool
        self.concurrency: ConcurrencyLimit | None = None
        self.executor = ""
        self.running = 0
        self._dispatched = 0
        self._stopped_at = 0.0  # loop time; 0 while batches are given
        self._has_place = self._sealing = False

    async def open(
        self,
        executor: ExecutorSettings,
        handler: HandlerSettings,
        *settings: Any,
        **context: Any,
    ) -> None:
        """Starts the workers; takes the arguments of `start_pool` behind the name.

        Raises:
            ConfigError: see `start_pool`.
        """
        self._loop = asyncio.get_running_loop()
        self.sinks = {target: SinkCounts() for target in handler.all_targets}
        await self.control.poll()
        if executor.is_throttled:
            self.control.throttle = Throttle(executor, self._clock.monotonic())
        self.pool: Pool[Any]
        self.pool, self.executor = await self.start_pool(
            self._pipeline, executor, handler, *settings, **context
        )
        if executor.workers_max > executor.workers:
            self._adapt(executor)

    def _adapt(self, executor: ExecutorSettings) -> None:
        from ingestd.execution.concurrency import ConcurrencyLimit  # noqa: PLC0415  most do without

        if self.pool.resizable:
            limits = executor.workers, executor.workers_max
            self.concurrency = ConcurrencyLimit(*limits, self._loop.time())
        else:
            log.warning("workers_fixed", pipeline=self._pipeline, executor=self.executor)

    def tasks(self) -> Mapping[str, Coroutine[None, None, None]]:
        """Coroutines that turn until they are cancelled, by name."""
        found = {"failures": self.failures.run(), "control": self.control.run()}
        if self.concurrency is not None:
            found["concurrency"] = self._resize(self.concurrency)
        return found

    async def _resize(self, limit: ConcurrencyLimit) -> None:
        """Has the pool the workers that it should have; turns until it is cancelled."""
        while True:
            await asyncio.sleep(limit.look_seconds)
            before = limit.workers
            workers = limit.look(self.pool.demand, self._loop.time())
            if workers != before:
                log.info("workers_changed", pipeline=self._pipeline, workers=workers, were=before)
                self.pool.resize(workers)

    def _control_changed(self) -> None:
        now = self._loop.time()
        if self.control.stopped:
            self._stopped_at = self._stopped_at or now
        elif self._stopped_at:
            for batch in self.queue.parked():  # they were not tried: that is no time of failing
                if batch.failing_since is not None:
                    batch.failing_since += now - max(batch.failing_since, self._stopped_at)
            self._stopped_at = 0.0
        self.queue.look_again()
        self._on_control()

    @property
    def stopped(self) -> str:
        """Reason for people why no batch is given out; empty while batches are."""
        return self.control.stopped

    @property
    def workers(self) -> int:
        """Workers that serve now."""
        return self.pool.size

    @property
    def busy(self) -> bool:
        """Tells if a batch that is sealed now would have to wait for a worker."""
        running, workers = self.running, self.workers
        # What stands behind a batch with the same key waits for that, and not for a worker.
        waits = self.queue.has_ready or (running >= workers and not self.queue.empty)
        return waits or running > workers

    async def next(self) -> SealedBatch:
        """Waits for a place with a worker, for a batch, and until its seal is durable."""
        await self.pool.acquire()
        self._has_place = True
        self.control.look()
        batch = await self.queue.next()
        self._has_place = False
        self.control.given(batch.count)
        self.outage.started(batch.number, self._loop.time())
        self.running += 1
        self._dispatched += 1
        if batch.sealed is not None:
            self._sealing = True
            await batch.sealed
            self._sealing = False
        return batch

    async def call(self, batch: SealedBatch, records: Records, journal: str) -> Result:
        """Calls the handler with a batch; `journal` is the id that record ids begin with."""
        name, spans = f"{journal}-{batch.number}", list(batch.spans)
        lineage = [f"{journal}-{number}" for number in batch.lineage]
        job = Job(name, batch.attempts + 1, records, spans, journal, batch.accepted_at, lineage)
        if self.around is not None:
            return await self.around(job, self.pool.run)
        return await self.pool.run(job)

    def ended(self) -> None:
        """Gives the place of a batch back."""
        self.running -= 1
        self.pool.release()
        self._on_idle()

    def waits_beyond(self, deadline: float, *, fed: bool) -> bool:
        """Tells if no batch goes to a worker by `deadline`, loop time, as things are.

        Args:
            deadline: loop time.
            fed: more records are on their way to the queue.
        """
        held = deadline < self.control.free_at() < math.inf
        fed = fed and self.queue.gives_more
        if self.running or (fed and not self.outage.paused and not held):
            return False
        return held or deadline < self.queue.ready_at < math.inf

    def judge(self, batch: SealedBatch, result: Result) -> Resolve | RetryBatch:
        """Decides what becomes of a batch, and takes note of what its try says of the handler."""
        batch.attempts += spends_try(result)
        self._count(result, batch.count)
        now = self._loop.time()
        if self.concurrency is not None:
            self.concurrency.ran(result, batch.count, now, running=self.running + 1)
        self.failures.tried(result, batch.count, batch.attempts)
        context = self.splitter.retry_context(batch, result, now)
        if self.failures.ended(result.failure, now, attempts=batch.attempts, records=batch.count):
            self.queue.wake(now)
        return decide(result, context, rule=self._rule, random=random.random)

    @property
    def throttled_by(self) -> str:
        """The setting whose rate keeps a batch waiting now; empty if none does."""
        return self.control.throttled_by if self.queue.is_held(self._loop.time()) else ""

    def _count(self, result: Result, records: int) -> None:
        """Counts a try at the targets that it called, as far as it tells which."""
        counts = list(self.sinks.values())
        for run in result.runs:
            if 0 <= run.target < len(counts):
                counts[run.target].ran(run.records, run.seconds, run.error)
        if len(counts) == 1 and not result.runs:
            failure = result.failure
            done = 0 if failure else records - len(result.rejections) - len(result.retries)
            error = error_kind(failure) if failure else ""
            counts[0].ran(done, result.seconds, error)

    def memory(self) -> dict[str, int]:
        """See `Pool.memory`."""
        return self.pool.memory()

    def park(self, batch: SealedBatch, after: float, *, asked: bool = False) -> None:
        """Keeps a batch for another try `after` seconds; see `ReadyQueue.park`."""
        load = Load(batch.count, batch.bytes + BATCH_BYTES)
        is_part = batch.family is not None
        place = rank(batch.count, batch.attempts, self._rule.attempts_max, is_part=is_part)
        self.queue.park(batch, self._loop.time() + after, load, asked=asked, rank=place)

    def stage(self) -> Stage:
        """The dispatcher as the watchdog sees it."""
        free = self._has_place or self.pool.has_free
        ready = self.queue.could_give(self._loop.time())
        return Stage("dispatcher", free and ready and not self._sealing, self._dispatched)

    async def close(self, deadline: float) -> bool:
        """Ends the workers; see `Pool.close`. One that runs a batch then gets no time for it."""
        gone = await self.pool.close(self._loop.time() if self.running else deadline)
        if self.keys is not None:  # a batch that ended meanwhile may have been parted by its keys
            self.keys.close()
        return gone
