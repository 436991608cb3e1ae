"""Harness of a handler: records in, outcomes out, on a clock that needs no waiting.

A harness is a daemon without sources, sockets and processes. It owns a loop on fake time
(`fake_time.py`), a thread in which that loop turns while a method of the harness runs and at no
other time, and a pipeline on it, whose journal lies in a folder of its own.

Real are the pipeline (`ingestd/pipeline.py`), the journal with its commits and its recovery, the
decoding, the batches, every decision about retries, splits and dead letters, and the workers'
threads or event loop. Not real are

* the time of the pipeline: batches' ages, backoffs, `executor.timeout` and all that stands in the
  journal follow the fake clock. The handler's own sleeps take real time, during which the fake
  clock stands still;
* the processes: a handler runs in threads of the test's process, as with the executor `thread`,
  and cannot be killed. One that does not come back for `executor.timeout` real seconds ends
  `run` with an error;
* outcomes that a test plans (`fail_batch`, `hang`, `crash_after`).

Invariants, each with a test:

1. The handler is called in `run` alone, and time passes in `run` alone.
2. `processed` and `dead` have a record when the commit is durable that says so, once, and
   `sent = processed + dead + pending` after every method.
3. After `crash_after` the next life finds the files as the last commit left them: what a call did
   before the crash is done, what it returned is lost, and its batch comes again under its id.
4. `run` comes to an end, whatever the handler does: with all records settled, or with an error that
   says what they wait for.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from ingestd.base import envelope as envelopes
from ingestd.base.append import Append
from ingestd.base.errors import IngestdError
from ingestd.base.logging import use_library_logging
from ingestd.base.metrics import Metrics
from ingestd.base.tasks import OwnThread
from ingestd.pipeline import Pipeline
from ingestd.settings import DEFAULT_PIPELINE
from ingestd.testing.fake_time import FakeClock, FakeTimeLoop
from ingestd.testing.values import (
    GivenHandlers,
    HarnessError,
    as_sent,
    check_count,
    records_of,
    settings_from,
)
from ingestd.testing.workers import (
    CLOSE_SECONDS,
    BatchCall,
    CallPlan,
    DeadRecord,
    ObservedPool,
    PlannedFailure,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
    from concurrent.futures import Future

    from ingestd.base.envelope import Envelope
    from ingestd.base.record import Span
    from ingestd.handlers.outcome import Job
    from ingestd.journal.dead_letters import DeadLetter

T = TypeVar("T")

FRUITLESS_MAX = 500
"""Calls in a row that settle no record, after which a `run` without a time gives up."""
RUN_SECONDS_MAX = 7 * 86400.0
"""Fake time of one `run` without a time."""
FIRST_DAY = datetime(2026, 1, 1, tzinfo=UTC)
_POLL_SECONDS = 3600.0  # no operator marks dead letters of a harness
_JOURNAL_FILES = ("journal.db", "journal.db-wal")


class HarnessCore:
    """Base of both harnesses of `harness.py`; they differ in how a test waits for a method.

    Args:
        handler: a function, a class or another callable, `module:name`, or the name of a sink.
        options: of a handler that is a class, or of a sink.
        transform: a function in front of it, or `module:callable`.
        config: a file of settings, such as `ingestd.toml`; the environment is not read.
        pipeline: whose settings in the file are taken.
        data_dir: for the handler's files, kept; a temporary folder if not given.
        begin: the fake clock's time at the beginning; with a time zone.
        settings: more settings by dotted names: `**{"batch.records_max": 10}`. `executor.workers`
            is 1 if nothing is said here, so that batches are handled in order.

    Attributes:
        settings: of the pipeline.
        data_dir: the folder that the handler has as its data directory.
        processed: records that are done, in order.
        dead: records that became dead letters, in order.
        batches: all calls so far, in the order in which they ended.
        lives: starts of the pipeline: 1, and one more for each restart and crash.

    Raises:
        ConfigError: a setting is wrong.
        HandlerLoadError: the handler can't be loaded, or does not take its options.
        HarnessError: the handler is none.
    """

    _loads_at_once: ClassVar[bool] = True

    def __init__(
        self,
        handler: Callable[..., Any] | str,
        *,
        options: Mapping[str, object] | None = None,
        transform: Callable[[Any], Any] | str = "",
        config: str | Path | None = None,
        pipeline: str = DEFAULT_PIPELINE,
        data_dir: str | Path | None = None,
        begin: datetime = FIRST_DAY,
        **settings: object,
    ) -> None:
        self._given = GivenHandlers()
        named = {"executor.workers": 1, "handler.target": self._given.name(handler), **settings}
        if options is not None:
            named["handler.options"] = dict(options)
        if transform:
            named["handler.transform"] = self._given.name(transform)
        self.settings = settings_from(named, config, pipeline)
        self._own = Path(tempfile.mkdtemp(prefix="ingestd-harness-"))
        self._journal = self._own / "journal"
        self._journal.mkdir()
        self.data_dir = self._own / "data" if data_dir is None else Path(data_dir).absolute()
        self.data_dir.mkdir(exist_ok=True, parents=True)
        self.processed: list[Any] = []
        self.dead: list[DeadRecord] = []
        self.batches: list[BatchCall] = []
        self.lives = 0
        self._plan = CallPlan()
        self._known: dict[tuple[int, int], bytes] = {}
        self._loop = FakeTimeLoop()
        self._clock = FakeClock(self._loop, begin)
        self._thread = OwnThread("ingestd-harness")
        self._pipeline: Pipeline | None = None
        self._pool = self._new_pool()
        self._changed = asyncio.Event()
        self._closed = self._hangs = False
        self._fruitless = 0
        self._unlog = use_library_logging()
        if self._loads_at_once:
            try:
                self._do(self._open)
            except BaseException:
                self.close_now()
                raise

    # -- facts -------------------------------------------------------------------------------------

    @property
    def now(self) -> datetime:
        """The time of the fake clock, in UTC."""
        return datetime.fromtimestamp(self._clock.now(), UTC)

    @property
    def pending(self) -> int:
        """Records that are accepted and neither processed nor dead."""
        return self._pipeline.ledger.pending if self._pipeline is not None else 0

    # -- planned outcomes --------------------------------------------------------------------------

    def fail_batch(
        self,
        number: int,
        error: BaseException | type[BaseException],
        *,
        times: int = 1,
        after: bool = False,
    ) -> None:
        """Plans that calls of a batch raise, in place of the handler.

        Args:
            number: of the batch, at the end of its id: 1 for the first one.
            error: any exception, `Reject`, `Retry`, `Unavailable` and `Blocked` too.
            times: so many calls.
            after: the handler is called before it: its work is done, and it fails all the same, as
                when the connection breaks after the commit.

        Raises:
            HarnessError: no call has such a number, or that is no exception.
        """
        made = error() if isinstance(error, type) else error
        if not isinstance(made, BaseException):
            raise HarnessError(problem=f"fail_batch raises an exception, not {made!r:.80}")
        check_count("the number of a batch", number)
        check_count("times", times)
        self._plan.add(number, PlannedFailure(made, after), times)

    def hang(self, number: int, *, times: int = 1) -> None:
        """Plans that calls of a batch do not come back, and end by `executor.timeout`.

        Args:
            number: of the batch; see `fail_batch`.
            times: so many calls.

        Raises:
            HarnessError: no call has such a number.
        """
        check_count("the number of a batch", number)
        check_count("times", times)
        self._plan.add(number, PlannedFailure(None, after=False), times)

    def crash_after(self, calls: int) -> None:
        """Plans a crash when so many more calls have ended, before the last outcome is written.

        `run` then goes on in a new life on the same journal, as after a `kill -9` and a restart.
        Instances of a handler class are made anew, and the old ones are not closed.

        Raises:
            HarnessError: the journal does not outlive a crash, or `calls` is below 1.
        """
        self._survives("crash_after")
        check_count("the calls before a crash", calls)
        self._plan.crash_in = calls

    def _survives(self, what: str) -> None:
        if self.settings.journal.kind != "sqlite":
            kind = self.settings.journal.kind
            raise HarnessError(
                problem=f'{what} needs journal.kind = "sqlite": nothing is left of {kind!r}'
            )

    # -- one life of the pipeline ------------------------------------------------------------------

    def _begin(self, work: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        """Has the loop turn in its thread until some work is done."""
        if self._closed:
            raise HarnessError(problem="this harness is closed")
        return self._thread.submit(lambda: self._loop.run_until_complete(work()))

    def _do(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Does some work, and waits for it.

        Raises:
            IngestdError: what the test did wrong, without the frames in between: pytest shows them.
        """
        doing = self._begin(work)
        try:
            return doing.result()
        except IngestdError as error:
            raise error.with_traceback(None) from error.__cause__
        except KeyboardInterrupt:
            self._loop.call_soon_threadsafe(self._stalled)  # the handler may never come back
            raise

    def _new_pool(self) -> ObservedPool:
        return ObservedPool(self._loop, self._clock, self._plan, self._called)

    async def _open(self) -> Pipeline:
        """The pipeline; starts it if it does not run."""
        if self._pipeline is not None:
            return self._pipeline
        pipeline = Pipeline(
            DEFAULT_PIPELINE,
            self.settings,
            folder=self._journal,
            data_dir=self.data_dir,
            metrics=Metrics("harness").pipeline(DEFAULT_PIPELINE),
            clock=self._clock,
        )
        pipeline.dispatcher.start_pool = self._pool.start_workers
        pipeline.waiters.on_settled = self._settled
        pipeline.letters.pause = pipeline.dispatcher.control.poll_seconds = _POLL_SECONDS
        self._loop.busy = lambda: pipeline.journal.status().unanswered > 0
        await pipeline.open()
        pipeline.broken.add_done_callback(lambda _: self._changed.set())
        self._pipeline = pipeline
        self.lives += 1
        return pipeline

    async def _end(self) -> None:
        """Ends the pipeline: as it leaves, or all that a crash would have ended."""
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is None:
            return
        self._pool.stop()
        await pipeline.close(self._loop.time() + CLOSE_SECONDS)
        if not self._hangs:
            await self._loop.quiet()
        if pipeline.broken.done() and not pipeline.broken.cancelled():
            pipeline.broken.exception()  # `run` has raised it
        self._pool = self._new_pool()

    async def _restart(self) -> None:
        self._survives("restart")
        await self._end()
        await self._open()

    async def _crash(self) -> None:
        await self._loop.quiet()  # no commit is under way
        left = await self._loop.run_in_executor(None, self._copied_journal)
        await self._end()
        self._journal = left
        await self._open()

    def _copied_journal(self) -> Path:
        """The files as they are now; what ends in good order may write to the others."""
        folder = self._own / f"journal-{self.lives + 1}"
        folder.mkdir()
        for name in _JOURNAL_FILES:
            if (self._journal / name).exists():
                shutil.copy(self._journal / name, folder / name)
        return folder

    def _called(self, job: Job, call: BatchCall) -> None:
        payloads = iter(job.records.items())
        for span in job.spans:
            for index in range(span.first, span.first + span.count):
                self._known[span.chunk, index] = next(payloads)
        self.batches.append(call)
        self._fruitless += 1
        self._changed.set()

    def _settled(self, spans: Sequence[Span], dead: Sequence[DeadLetter]) -> None:
        if not spans:
            return
        self._fruitless = 0
        form = self.settings.format
        gone = {letter.place[:2] for letter in dead if letter.place is not None}
        for chunk, first, count in spans:
            for index in range(first, first + count):
                payload = self._known.pop((chunk, index), b"")
                if (chunk, index) not in gone:
                    self.processed.append(as_sent(payload, form))
        self.dead += [DeadRecord.of(letter, form) for letter in dead]
        self._changed.set()

    # -- the methods of both harnesses -------------------------------------------------------------

    async def _send(self, records: Iterable[object], origin: Envelope) -> None:
        accepted = records_of(records, self.settings)
        pipeline = await self._open()
        if accepted.count:
            await pipeline.accept(Append(accepted, envelope=envelopes.pack(origin)))

    async def _run(self, seconds: float | None) -> None:
        if seconds is not None and not (isinstance(seconds, int | float) and seconds >= 0):
            raise HarnessError(problem=f"run takes seconds, 0 or more, not {seconds!r:.80}")
        began, calls, self._fruitless = self._loop.time(), len(self.batches), 0
        until = began + (RUN_SECONDS_MAX if seconds is None else seconds)
        self._loop.patience, self._loop.on_stall = self.settings.executor.timeout, self._stalled
        try:
            while True:
                pipeline = await self._open()
                if self._pool.crashed.is_set():
                    await self._crash()
                elif pipeline.broken.done():
                    await pipeline.broken
                elif self._hangs:
                    raise HarnessError(problem=self._hang())
                elif self._loop.time() >= until if seconds is not None else not self.pending:
                    break
                elif self._loop.time() >= until or (
                    seconds is None and self._fruitless >= FRUITLESS_MAX
                ):
                    raise HarnessError(problem=self._no_end(pipeline, began, calls))
                else:
                    await self._wait(until)
            await self._loop.quiet()  # what is due at this very time is done
        finally:
            self._pool.may_call.clear()
            self._loop.patience = None

    async def _wait(self, until: float) -> None:
        self._pool.may_call.set()
        self._changed.clear()
        try:
            async with asyncio.timeout_at(until):
                await self._changed.wait()
        except TimeoutError:
            pass

    def _stalled(self) -> None:
        self._hangs = self._pool.lost = True
        self._changed.set()

    def _hang(self) -> str:
        return (
            f"the handler has not come back from batch {self._pool.under_way} for"
            f" {self.settings.executor.timeout:g} real seconds (executor.timeout)"
        )

    def _no_end(self, pipeline: Pipeline, began: float, calls: int) -> str:
        passed = timedelta(seconds=round(self._loop.time() - began))
        why = pipeline.dispatcher.stopped
        if not why and self.batches:
            last = self.batches[-1]
            again = "; ".join(dict.fromkeys(last.retried.values()))
            why = f"the last call ended with {last.error or again or 'no error'}"
        return (
            f"{pipeline.ledger.pending} records are still pending after"
            f" {len(self.batches) - calls} calls in {passed} of the fake clock: {why};"
            " run(seconds) goes on for a time, and leaves them pending"
        )

    async def _close(self) -> None:
        try:
            await self._end()
        finally:
            current = asyncio.current_task()
            left = [task for task in asyncio.all_tasks() if task is not current]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    def close_now(self) -> None:
        """Closes the harness, and waits for that."""
        if self._closed:
            return
        try:
            self._do(self._close)
        finally:
            self._end_all()

    def _end_all(self) -> None:
        """Ends loop, thread and folder, when the pipeline has ended."""
        self._closed = True
        self._unlog()
        self._given.forget()
        try:
            self._thread.submit(self._loop.close).result()
        finally:
            self._thread.shutdown(wait=False)
            shutil.rmtree(self._own, ignore_errors=True)
