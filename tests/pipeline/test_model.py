"""The whole pipeline against a model: append, seal, done, retry, reject, split, fed again, crash.

A hypothesis state machine drives the real journal, tail, batcher, line and settlements; only the
worker is the test's own, so that it decides each outcome. A crash is what a SIGKILL leaves: the
files as they are after the last commit, copied away and opened anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ingestd.base import envelope
from ingestd.base.append import Append
from ingestd.base.clock import SystemClock
from ingestd.base.envelope import Envelope, EnvelopeRuns
from ingestd.base.errors import Overloaded
from ingestd.base.metrics import Metrics
from ingestd.base.record import InvalidRecord, Records
from ingestd.codecs.lines import json_fault
from ingestd.execution.pool import TaskPool
from ingestd.handlers.batch import Batch
from ingestd.handlers.outcome import Failure, Job, Rejection, Result, RetryRequest
from ingestd.journal import log as log_journal
from ingestd.journal.dead_letters import LetterFilter
from ingestd.journal.log import LogJournal
from ingestd.journal.sqlite import writer
from ingestd.journal.sqlite.dead_letters import letters, mark
from ingestd.journal.sqlite.offline import opened
from ingestd.pipeline import Pipeline
from ingestd.registry import JOURNALS
from ingestd.settings import Settings
from tests.journal.memory_log import DOWN, FULL, LATE, LOST, Engine, MemoryLog

if TYPE_CHECKING:
    from collections.abc import Iterator

ATTEMPTS = 2
CLIENTS = [envelope.pack(Envelope("http", client=name)) for name in ("shop", "till")]
FILE = envelope.pack(Envelope("fetch", attributes={"url": "u"}, numbered="line"))
ORIGINS = [b"", *CLIENTS, FILE]


class Desk:
    """A worker whose jobs lie on a desk until the test decides about them."""

    def __init__(self, jobs: list[tuple[Job, asyncio.Future[Result]]]) -> None:
        self._jobs = jobs

    async def start(self) -> None:
        pass

    async def run(self, job: Job) -> Result:
        decided: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._jobs.append((job, decided))
        return await decided

    async def close(self, _deadline: float) -> bool:
        return True


class PipelineAgainstModel(RuleBasedStateMachine):
    """`pending`, `done`, `dead` are what the model says; `batches` what each id has meant."""

    batch: ClassVar[dict[str, str]] = {}
    kind, file = "sqlite", "journal.db"

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = Path(tempfile.mkdtemp(prefix="ingestd-model-"))
        self.lives = 0
        self.next = 0
        self.refused = 0
        self.pending: set[int] = set()
        self.done: set[int] = set()
        self.dead: set[int] = set()
        self.batches: dict[str, list[bytes]] = {}
        self.names: dict[bytes, str] = {}
        self.origins: dict[int, Envelope] = {}
        self.turn = itertools.count()
        self.turns: dict[int, int] = {}  # by number: when it was accepted, the last time
        self.facts: dict[str, tuple[Any, list[str]]] = {}
        self.returned: set[str] = set()
        self.start()

    def start(self) -> None:
        self.jobs: list[tuple[Job, asyncio.Future[Result]]] = []
        one = Settings(
            batch={"records_max": 3, "bytes_max": "64KiB", "age_max": 0, **self.batch},
            queue={"bytes_max": "64KiB", "chunks_max": 4},
            retry={"attempts_max": ATTEMPTS, "backoff": 0, "backoff_max": 0},
            journal={"kind": self.kind},
        ).pipeline_settings()["default"]
        self.pipeline = Pipeline(
            "default",
            one,
            folder=self.folder,
            data_dir=self.folder,
            metrics=Metrics("test").pipeline("default"),
            clock=SystemClock(),
        )

        async def start_pool(*_: object, **__: object) -> tuple[TaskPool, str]:
            pool = TaskPool([Desk(self.jobs), Desk(self.jobs)])
            await pool.start()
            return pool, "thread"

        self.pipeline.dispatcher.start_pool = start_pool
        self.loop.run_until_complete(self.pipeline.open())
        self.settle_down()

    def record(self, number: int) -> bytes:
        return b"%d" % number

    def number(self, record: bytes) -> int:
        return int(record)

    def settle_down(self) -> None:
        """Until everything that was begun is committed and the next jobs lie on the desk."""

        async def quiet() -> None:
            same, before = 0, None
            while same < 4:
                with contextlib.suppress(Overloaded):
                    await self.pipeline.journal.append(Append(Records.lines([])))
                for _ in range(12):
                    await asyncio.sleep(0)
                pipeline, line = self.pipeline, self.pipeline.dispatcher.queue
                stages = (line.ahead, line.waiting, pipeline.queue.qsize(), pipeline.reader.waiting)
                now = (len(self.jobs), pipeline.journal.ledger, *stages)
                # A batch that runs and has no job here waits for its records from disk.
                resting = pipeline.dispatcher.running == len(self.jobs)
                resting = resting and bool(self.jobs or not pipeline.journal.ledger.pending)
                same, before = (same + 1 if resting and now == before else 0), now
                if not resting:
                    await asyncio.sleep(0.001)

        self.loop.run_until_complete(asyncio.wait_for(quiet(), 120))

    @rule(
        count=st.integers(1, 8),
        bad=st.integers(0, 2),
        sized=st.booleans(),
        origin=st.sampled_from(ORIGINS),
    )
    def append(self, count: int, bad: int, sized: bool, origin: bytes) -> None:
        numbers = list(range(self.next, self.next + count))
        self.next += count
        made = [self.record(n) for n in numbers]
        self.turns |= {n: next(self.turn) for n in numbers}
        records = Records.sized(made) if sized else Records.lines(made)
        if origin == FILE:  # the number of a record is its line
            records = records._replace(envelopes=envelope.numbered(FILE, count, numbers[0]))
        refused = [InvalidRecord(i, "malformed", "x", b"{") for i in range(bad)]
        append = Append(records, refused, envelope=origin)
        self.accept(append)
        known = EnvelopeRuns(records.envelopes or origin, count)
        self.origins |= {n: known.of(i) for i, n in enumerate(numbers)}
        self.pending |= set(numbers)
        self.refused += bad
        self.settle_down()

    def accept(self, append: Append) -> None:
        self.loop.run_until_complete(self.pipeline.accept(append))

    def decide(self, result: Result, which: int) -> Job:
        job, decided = self.jobs.pop(which % len(self.jobs))
        decided.set_result(result)
        return job

    def values(self, job: Job) -> list[int]:
        return [self.number(item) for item in job.records.items()]

    @precondition(lambda self: self.jobs)
    @rule(which=st.integers(0, 1), data=st.data())
    def finish(self, which: int, data: st.DataObject) -> None:
        job, _ = self.jobs[which % len(self.jobs)]
        values = self.values(job)
        marks = data.draw(
            st.lists(
                st.sampled_from(["done", "done", "reject", "retry"]),
                min_size=len(values),
                max_size=len(values),
            )
        )
        rejected = [i for i, mark in enumerate(marks) if mark == "reject"]
        again = [i for i, mark in enumerate(marks) if mark == "retry"]
        self.returned.add(job.batch)
        self.decide(
            Result(
                [Rejection(i, "rejected", "no") for i in rejected],
                [RetryRequest(i, 0.0, "later") for i in again],
            ),
            which,
        )
        for i, value in enumerate(values):
            if i in rejected:
                self.pending.remove(value)
                self.dead.add(value)
            elif i not in again:
                self.pending.remove(value)
                self.done.add(value)
        self.settle_down()
        # What shall come again is given up all together, or not at all: the ledger says which.
        died = self.pipeline.journal.ledger.dead - len(self.dead)
        assert died in (0, len(again))
        if died:
            assert job.attempt >= ATTEMPTS
            assert self.done  # never while nothing has succeeded
            self.dead |= {values[i] for i in again}
            self.pending -= self.dead

    @precondition(lambda self: self.jobs)
    @rule(which=st.integers(0, 1))
    def fail(self, which: int) -> None:
        """It is postponed, split, or a lone record is given up; the ledger says which."""
        before = self.pipeline.journal.ledger.dead
        job = self.decide(Result(failure=Failure("raised", "no")), which)
        values = self.values(job)
        self.settle_down()
        died = self.pipeline.journal.ledger.dead - before
        assert died in (0, 1)
        if died:
            assert len(values) == 1
            assert job.attempt >= ATTEMPTS
            assert self.done  # never while nothing has succeeded
            self.pending.remove(values[0])
            self.dead.add(values[0])

    @precondition(lambda self: self.dead)
    @rule(data=st.data())
    def feed_again(self, data: st.DataObject) -> None:
        """Some dead letters, by their numbers, as a person marks them; refused ones are no JSON."""
        path = self.folder / self.file
        with opened(path) as db:
            kept = {one.id: one.letter for one in letters(db, LetterFilter(), whole=True)}
        records = {self.number(one.payload): one.record for one in kept.values() if one.record}
        assert records == {value: self.names[self.record(value)] for value in self.dead}
        for one in kept.values():
            origin = EnvelopeRuns(one.envelope, 1).of(0)
            if one.record:
                assert origin == self.origins[self.number(one.payload)]
            else:
                assert one.envelope in ORIGINS
        ids = data.draw(st.sets(st.sampled_from(sorted(kept)), min_size=1))
        with opened(path, write=True) as db:
            marked = mark(db, LetterFilter(ids=tuple(ids)), max(ids), json_fault)
        fed = [self.number(kept[number].payload) for number in sorted(ids) if kept[number].record]
        again = set(fed)
        self.turns |= {n: next(self.turn) for n in fed}
        assert marked == (len(again), len(ids) - len(again))
        self.poll_letters()
        self.dead -= again
        self.pending |= again
        self.settle_down()

    def poll_letters(self) -> None:
        self.loop.run_until_complete(self.pipeline.letters.poll())

    @rule()
    def crash(self) -> None:
        """The files as they are, under a new name; the old life is thrown away."""
        self.lives += 1
        folder = Path(tempfile.mkdtemp(prefix="ingestd-model-"))
        for name in ("journal.db", "journal.db-wal"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(self.folder / name, folder / name)
        self.stop()
        self.folder = folder
        self.start()

    @rule()
    def restart(self) -> None:
        self.loop.run_until_complete(self.pipeline.close(self.loop.time() + 5))
        self.start()

    def stop(self) -> None:
        self.loop.run_until_complete(self.pipeline.close(self.loop.time()))
        shutil.rmtree(self.folder)

    @invariant()
    def the_ledger_is_the_models(self) -> None:
        ledger = self.pipeline.journal.ledger
        assert ledger.accepted == self.next
        assert ledger.processed == len(self.done)
        assert ledger.dead == len(self.dead)
        assert ledger.pending == len(self.pending)
        assert ledger.invalid == self.refused

    @invariant()
    def a_batch_keeps_its_records_and_a_record_its_id(self) -> None:
        on_desk: list[int] = []
        for job, _ in self.jobs:
            items = job.records.items()
            assert self.batches.setdefault(job.batch, items) == items
            assert 1 <= len(items) <= 3
            for name, item in zip(Batch[bytes](None, job).ids, items, strict=True):
                assert self.names.setdefault(item, name) == name
            self.check_facts(Batch[bytes](None, job))
            on_desk += [self.number(item) for item in items]
        assert len(on_desk) == len(set(on_desk))
        assert set(on_desk) <= self.pending

    def check_facts(self, batch: Batch[bytes]) -> None:
        """Envelopes are the records' own; time and lineage are the same for every try of a batch,
        and the batches that it was split from held all of its records and never returned."""
        for i, item in enumerate(batch):
            assert batch.envelope(i) == self.origins[self.number(item)]
        facts = batch.accepted_at, batch.lineage
        assert self.facts.setdefault(batch.id, facts) == facts
        assert not self.returned.intersection(batch.lineage)
        for place, ancestor in enumerate(batch.lineage):
            assert set(batch) < set(self.batches[ancestor])
            assert self.facts[ancestor] == (batch.accepted_at, batch.lineage[:place])

    @invariant()
    def what_is_pending_gets_to_a_worker(self) -> None:
        if self.pending:
            assert self.jobs
        else:
            assert not self.jobs
            assert self.pipeline.budget.bytes == 0
            journal = self.pipeline.journal
            assert journal.bytes == journal.dead_totals.accepted_bytes
            assert not len(self.pipeline.unsettled)

    def teardown(self) -> None:
        """Everything left is done; then nothing is missing and nothing came twice."""
        for _ in range(10_000):
            if not self.jobs:
                break
            job = self.decide(Result(), 0)
            for value in self.values(job):
                self.pending.remove(value)
                self.done.add(value)
            self.settle_down()
        assert not self.pending
        report = self.loop.run_until_complete(self.pipeline.close(self.loop.time() + 5))
        assert report.counted == 0
        assert report.balanced
        assert self.done | self.dead == set(range(self.next))
        assert not self.done & self.dead
        assert len(set(self.names.values())) == len(self.names)
        shutil.rmtree(self.folder)
        self.loop.close()


class OrderedAgainstModel(PipelineAgainstModel):
    """The same with `batch.key`: keys a to d, and records without one."""

    batch: ClassVar[dict[str, str]] = {"key": "/k"}

    def record(self, number: int) -> bytes:
        key = self.key(number)
        return b'{"n":%d,"k":%b}' % (number, b'"%b"' % key if key else b"null")

    def number(self, record: bytes) -> int:
        return int(json.loads(record)["n"])

    def key(self, number: int) -> bytes:
        return (b"", b"a", b"b", b"c", b"d")[zlib.crc32(b"%d" % number) % 5]

    @invariant()
    def of_each_key_the_earliest_are_tried(self) -> None:
        seen: set[bytes] = set()
        for job, _ in self.jobs:
            mine = self.values(job)
            keys = {self.key(n) for n in mine} - {b""}
            assert not keys & seen  # never in two batches at a time
            seen |= keys
            for key in keys:
                turns = [self.turns[n] for n in mine if self.key(n) == key]
                others = [self.turns[n] for n in self.pending - set(mine) if self.key(n) == key]
                assert turns == sorted(turns)
                assert not others or max(turns) < min(others)

    @invariant()
    def no_key_is_held_for_nothing(self) -> None:
        if not self.pending:
            queue = self.pipeline.dispatcher.queue
            assert (queue._table.size, queue._blocked, queue._cold) == (0, {}, set())


class LogAgainstModel(PipelineAgainstModel):
    """The same over a replicated log: a crash loses the machine, and publishes meet faults."""

    kind, file = "memory_log", "cache.db"
    engine: Engine

    def start(self) -> None:
        if not self.lives and not self.next:
            type(self).engine = Engine(4096)
        JOURNALS.own[self.kind] = "tests.pipeline.test_model:build_log"
        super().start()

    @rule(
        faults=st.lists(st.sampled_from(["", "", LOST, LATE, DOWN, FULL]), min_size=1, max_size=4)
    )
    def meet(self, faults: list[str]) -> None:
        self.engine.faults = faults

    def accept(self, append: Append) -> None:
        for _ in range(20):
            try:
                super().accept(append)
            except Overloaded:
                continue
            return

    def poll_letters(self) -> None:
        for _ in range(20):
            with contextlib.suppress(Overloaded):
                super().poll_letters()
                return

    def crash(self) -> None:
        """The machine is lost; the log is as it is."""
        self.lives += 1
        left, type(self).engine = self.engine, self.engine.as_it_is()
        left.faults = []
        self.stop()
        self.folder = Path(tempfile.mkdtemp(prefix="ingestd-model-"))
        self.start()

    def restart(self) -> None:
        self.engine.faults = []
        super().restart()

    crash, restart = rule()(crash), rule()(restart)


def build_log(settings: Any, context: Any) -> LogJournal:
    return LogJournal(
        MemoryLog(LogAgainstModel.engine), context.folder / "cache.db",
        bytes_max=settings.bytes_max, clock=context.clock, on_commit=context.on_commit,
        dead_bytes_max=context.dead_bytes_max, invalid=context.invalid, snapshot_bytes=5_000,
    )  # fmt: skip


def run(examples: int, steps: int, machine: type[PipelineAgainstModel]) -> Any:
    case = machine.TestCase
    case.settings = settings(
        max_examples=examples,
        stateful_step_count=steps,
        suppress_health_check=list(HealthCheck),
    )
    return case


@pytest.mark.parametrize("machine", [PipelineAgainstModel, OrderedAgainstModel])
def test_the_pipeline_does_what_the_model_says(machine) -> None:
    run(5 if machine is PipelineAgainstModel else 2, 30, machine)("runTest").runTest()


@pytest.mark.slow
@pytest.mark.parametrize("machine", [*[PipelineAgainstModel] * 4, OrderedAgainstModel])
def test_the_pipeline_does_what_the_model_says_for_10_000_steps(machine) -> None:
    """In parts: on a slow machine all of them take longer than a test may."""
    run(50 if machine is PipelineAgainstModel else 20, 50, machine)("runTest").runTest()


@pytest.fixture
def memory_log(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(log_journal, "RETRY_SECONDS", 0.001)
    monkeypatch.setattr(writer, "FULL_PAUSE", 0.01)
    yield
    JOURNALS.own.pop(LogAgainstModel.kind, None)


def test_a_log_does_what_the_model_says(memory_log: None) -> None:
    run(1, 8, LogAgainstModel)("runTest").runTest()


@pytest.mark.slow
def test_a_log_does_what_the_model_says_for_many_steps(memory_log: None) -> None:
    examples = int(os.environ.get("TEST_MODEL_EXAMPLES", "8"))
    run(examples, 50, LogAgainstModel)("runTest").runTest()
