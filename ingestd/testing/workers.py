"""Workers of a harness: those of the daemon, in threads of the test's process, and observed.

`start_workers` stands where `execution.build.start_pool` stands in the daemon. It starts the same
threads, or the same event loop for an `async def` handler, whatever `executor.kind` says: a child
process would not have the test's objects. Around the real pool is an `ObservedPool`:

* it lets no call begin while `may_call` is not set, so that a handler is called in `Harness.run`
  only;
* it gives the outcome that a test planned for a batch, in place of the handler's or after it;
* it keeps what each call was given and what became of it;
* after as many calls as a test planned, it keeps the result to itself: the daemon has crashed.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ingestd.base.logging import get_logger
from ingestd.execution.build import handler_config
from ingestd.execution.inprocess import CoroutinePool, CoroutineWorker, ThreadWorker
from ingestd.execution.pool import Pool, ThreadedPool
from ingestd.handlers.batch import Batch
from ingestd.handlers.call import call
from ingestd.handlers.chain import load_configured
from ingestd.handlers.decode import Decoder
from ingestd.handlers.load import HandlerSpec
from ingestd.handlers.outcome import Failure, Job, Result
from ingestd.handlers.runner import Runner
from ingestd.testing.values import as_sent

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from ingestd.base.record import Format
    from ingestd.execution.settings import ExecutorSettings, HandlerSettings
    from ingestd.handlers.runner import HandlerConfig
    from ingestd.journal.dead_letters import DeadLetter
    from ingestd.testing.fake_time import FakeClock, FakeTimeLoop

log = get_logger()

CLOSE_SECONDS = 5.0
_IN_THREADS = {"process": "auto", "external": "auto"}
"""Kinds of executors whose handlers run in threads here; `async def` is refused as there."""


class BatchCall(NamedTuple):
    """One call of the handler, or one whose outcome the test planned.

    Attributes:
        id: of the batch; the same records under the same id through retries and restarts.
        attempt: 1 for the first try.
        records: as they were accepted: JSON values, text or bytes.
        ids: one a record.
        lineage: ids of the batches that it was split from.
        at: the time of the fake clock.
        reason: of its failure: `raised`, `postponed`, `unavailable`, `blocked`, `timeout`; empty
            if it returned.
        error: of its failure, one line.
        rejected: why records were rejected, by their place in the batch; those that do not fit the
            annotation too.
        retried: why records shall come again, by their place.
    """

    id: str
    attempt: int
    records: list[Any]
    ids: list[str]
    lineage: list[str]
    at: datetime
    reason: str
    error: str
    rejected: Mapping[int, str]
    retried: Mapping[int, str]


class DeadRecord(NamedTuple):
    """A record that became a dead letter.

    Attributes:
        record: as it was accepted.
        reason: `rejected`, `undecodable`, `failed`, `timeout`, …
        error: one line.
        traceback: as Python prints it, or empty.
        attempts: tries that were made.
        id: of the record.
    """

    record: Any
    reason: str
    error: str
    traceback: str
    attempts: int
    id: str

    @classmethod
    def of(cls, letter: DeadLetter, form: str) -> DeadRecord:
        """The record of a dead letter of a pipeline with a format."""
        record = as_sent(letter.payload, form)
        said = letter.reason, letter.error, letter.traceback
        return cls(record, *said, letter.attempts, letter.record)


# -- planned outcomes ------------------------------------------------------------------------------


class PlannedFailure(NamedTuple):
    """The outcome of a call that a test planned.

    Attributes:
        error: raised; `None` for a call that does not come back.
        after: the handler is called before it.
    """

    error: BaseException | None
    after: bool


class CallPlan:
    """Outcomes that a test planned; kept through restarts.

    Attributes:
        crash_in: so many calls return until the daemon crashes; 0 for none.
    """

    def __init__(self) -> None:
        self._failures: dict[int, list[PlannedFailure]] = {}
        self.crash_in = 0

    def add(self, number: int, failure: PlannedFailure, times: int) -> None:
        """Plans the next calls of the batch with a number."""
        self._failures.setdefault(number, []).extend([failure] * times)

    def take(self, job: Job) -> PlannedFailure | None:
        """The failure that is planned for a call; it is used up."""
        planned = self._failures.get(int(job.batch.rpartition("-")[2]))
        return planned.pop(0) if planned else None

    def crashes(self) -> bool:
        """Tells if the daemon crashes now that a call has returned."""
        self.crash_in -= self.crash_in > 0
        return self.crash_in == 0


def raising(error: BaseException, job: Job, form: str) -> Result:
    """The result of a handler that raises an error."""

    def handler(_: Batch[bytes]) -> None:
        raise error.with_traceback(None)

    spec = HandlerSpec("planned", handler, form, False, False, True, Decoder(None))
    return call(spec, handler, job)


# -- workers ---------------------------------------------------------------------------------------


class HarnessRunner(Runner):
    """A runner that closes an instance whose call raised before the test goes on.

    After a crash no instance is closed, as none is when a process is killed.
    """

    crashed = False

    def run(self, job: Job) -> Result:
        """See `Runner.run`."""
        result = super().run(job)
        self.renew()
        return result

    async def run_async(self, job: Job) -> Result:
        """See `Runner.run_async`."""
        result = await super().run_async(job)
        await self.renew_async()
        return result

    def close(self) -> str:
        """See `Runner.close`."""
        return "" if self.crashed else super().close()

    async def close_async(self) -> str:
        """See `Runner.close_async`."""
        return "" if self.crashed else await super().close_async()


class ObservedPool(Pool[Any]):
    """The pool of a harness; see above.

    Args:
        loop: that all of it runs on.
        clock: the fake clock.
        plan: outcomes in place of the handler's.
        on_call: gets each call that has ended, with its job.

    Attributes:
        may_call: set while calls may begin.
        under_way: the batch of a call that has begun last, empty if none is under way.
        crashed: set when the daemon has crashed.
        lost: a call has not come back, and is waited for no more.
    """

    def __init__(
        self,
        loop: FakeTimeLoop,
        clock: FakeClock,
        plan: CallPlan,
        on_call: Callable[[Job, BatchCall], None],
    ) -> None:
        super().__init__(())
        self._loop = loop
        self._clock = clock
        self._plan = plan
        self._on_call = on_call
        self._inner: Pool[Any] = Pool(())
        self._runners: list[HarnessRunner] = []
        self._form = "json"
        self._timeout = 0.0
        self._closing = False
        self.may_call = asyncio.Event()
        self.under_way = ""
        self.crashed = asyncio.Event()
        self.lost = False

    async def start_workers(
        self,
        name: str,
        executor: ExecutorSettings,
        handler: HandlerSettings,
        record_format: Format,
        *,
        data_dir: Path,
        **_: object,
    ) -> tuple[Pool[Any], str]:
        """Starts the workers; takes and gives what `start_pool` does.

        Raises:
            HandlerLoadError: the handler can't be loaded, or not run by the executor.
        """
        self._form, self._timeout = record_format, executor.timeout
        config = handler_config(name, executor, handler, record_format, data_dir)
        kind = _IN_THREADS.get(config.executor, config.executor)
        config = msgspec.structs.replace(config, executor=kind)
        spec = await self._loop.run_in_executor(None, load_configured, config)
        kind = "async" if spec.is_async else "thread"
        config = msgspec.structs.replace(config, executor=kind)
        make = self._coroutines if spec.is_async else self._threads
        self._inner = make(config, [f"{name}-worker-{i}" for i in range(executor.workers)])
        with self._loop.outside():
            await self._inner.start()
        self.size = self._inner.size  # no job lies ready before them: calls begin in order
        return self, kind

    def _runner(self, config: HandlerConfig, worker: str) -> HarnessRunner:
        report = partial(log.warning, "handler_close_failed", worker=worker)
        runner = HarnessRunner(config, lambda error: report(error=error))
        self._runners.append(runner)
        return runner

    def _threads(self, config: HandlerConfig, workers: list[str]) -> Pool[Any]:
        return ThreadedPool([ThreadWorker(one, self._runner(config, one)) for one in workers])

    def _coroutines(self, config: HandlerConfig, workers: list[str]) -> Pool[Any]:
        from ingestd.execution.event_loops import HandlerLoops  # noqa: PLC0415

        loops, timeout = HandlerLoops(config.pipeline), self._timeout
        return CoroutinePool(
            [
                CoroutineWorker(one, partial(self._runner, config, one), loops, timeout=timeout)
                for one in workers
            ],
            loops,
        )

    async def run(self, job: Job) -> Result:
        """See `Pool.run`."""
        await self.may_call.wait()
        if self._closing:
            return Result(failure=Failure("crashed", "the harness was closed"))
        at = datetime.fromtimestamp(self._clock.now(), UTC)
        result = await self._outcome(job)
        if self.crashed.is_set():
            await self._loop.create_future()
        self._on_call(job, self._told(job, at, result))
        if self._plan.crash_in and self._plan.crashes():
            self.crashed.set()
            self.may_call.clear()
            await self._loop.create_future()  # its result is lost with the process
        return result

    async def _outcome(self, job: Job) -> Result:
        planned = self._plan.take(job)
        if planned is None or planned.after:
            self.under_way = job.batch
            with self._loop.outside():
                result = await self._inner.run(job)
            self.under_way = ""
            if planned is None:
                return result
        if planned.error is not None:
            return raising(planned.error, job, self._form)
        await asyncio.sleep(self._timeout)
        error = f"the worker was killed after {self._timeout:g} s"
        return Result(failure=Failure("timeout", error), seconds=self._timeout)

    def _told(self, job: Job, at: datetime, result: Result) -> BatchCall:
        records = [as_sent(one, self._form) for one in job.records.items()]
        failure = result.failure or Failure("", "")
        rejected = {one.index: one.error for one in result.rejections}
        retried = {one.index: one.error for one in result.retries}
        return BatchCall(
            job.batch, job.attempt, records, Batch(None, job).ids, job.lineage, at,
            failure.reason, failure.error, rejected, retried,
        )  # fmt: skip

    async def close(self, deadline: float) -> bool:  # noqa: ARG002  a call under way is waited for
        """See `Pool.close`."""
        if self.lost:
            return False
        for runner in self._runners:
            runner.crashed = self.crashed.is_set()
        with self._loop.outside():
            return await self._inner.close(self._loop.time() + CLOSE_SECONDS)

    def stop(self) -> None:
        """Lets jobs that wait for `may_call` end without a call, once the pipeline is closing."""
        self._closing = True
        self.may_call.set()
