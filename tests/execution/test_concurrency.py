"""The number of workers follows what their calls show: rules, a simulated sink, a real pool."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingestd.admin.status import status_of
from ingestd.base.append import Append
from ingestd.base.errors import HandlerLoadError
from ingestd.base.record import Records
from ingestd.execution.concurrency import (
    IDLE_SECONDS,
    REST_SECONDS,
    WINDOW_CALLS,
    ConcurrencyLimit,
    Demand,
    step,
)
from ingestd.execution.pool import TaskPool, ThreadedPool
from ingestd.handlers.outcome import Failure, Job, Rejection, Result, RetryRequest
from ingestd.settings import Settings
from tests.pipeline import recording
from tests.pipeline.conftest import start  # noqa: F401  a fixture
from tests.pipeline.test_pipeline import numbers, until

if TYPE_CHECKING:
    from ingestd.execution.job_queue import JobQueue

DONE = Result(seconds=0.1)
RAISED = Result(failure=Failure("unavailable", "down"), seconds=0.1)


def limit(least: int = 4, most: int = 64) -> ConcurrencyLimit:
    return ConcurrencyLimit(least, most, 0.0)


class Watch:
    """Gives a limit windows of calls, one a second, as fast as they could be."""

    def __init__(self, made: ConcurrencyLimit) -> None:
        self.limit = made
        self.now = 0.0
        self.taken = self.waited = 0

    def window(
        self, *results: Result, records: int = 100, waited: bool = True, missing: int = 0
    ) -> int:
        """One window, with enough of these results; returns the workers wanted then."""
        workers = self.limit.workers
        self.now += 0.5 + max((one.seconds for one in results), default=0.0)
        calls = max(WINDOW_CALLS, workers)
        for n in range(calls if results else 0):
            self.limit.ran(results[n % len(results)], records, self.now, running=workers)
        self.taken += calls
        self.waited += calls * waited
        self.now += 0.5
        demand = Demand(workers - missing, self.waited, self.taken)
        return self.limit.look(demand, self.now)


# -- the rule --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workers", "crowd", "wanted"),
    [
        (4, 1.0, 5),
        (16, 1.0, 20),  # by a quarter while latency is flat
        (16, 1.1, 17),
        (4, 2.0, 4),  # as many wait as are worked on: enough
        (16, 1.4, 16),
        (16, 2.0, 15),
        (100, 1.02, 125),
        (100, 1.09, 101),
        (100, 3.0, 90),
    ],
)
def test_a_step(workers: int, crowd: float, wanted: int) -> None:
    assert step(workers, crowd) == wanted


def test_it_grows_while_latency_stays_flat_and_jobs_wait() -> None:
    watch = Watch(limit(4, 20))
    assert [watch.window(DONE) for _ in range(8)] == [5, 6, 7, 8, 10, 12, 15, 18]
    assert watch.window(DONE) == watch.window(DONE) == 20


def test_it_does_not_grow_while_no_job_waits_or_workers_are_missing() -> None:
    watch = Watch(limit())
    assert watch.window(DONE, waited=False) == 4
    assert watch.window(DONE) == 5
    assert watch.window(DONE, missing=1) == 5


def test_calls_that_take_longer_lower_it_and_are_the_floor_at_the_least() -> None:
    watch = Watch(limit(4, 64))
    while watch.window(DONE) < 30:
        pass
    before, slow = watch.limit.workers, Result(seconds=1.0)
    seen = [watch.window(slow) for _ in range(40)]
    assert seen[0] == before - before // 10
    assert min(seen) == 4
    # There is no crowd of ours: so the sink is slower, and what it takes is climbed from there.
    assert max(seen[seen.index(4) :]) > 8


def test_calls_are_compared_with_those_of_as_many_records() -> None:
    watch = Watch(limit(4, 64))
    watch.window(Result(seconds=0.001), records=1)
    for _ in range(3):
        watch.window(Result(seconds=2.0), records=1000)
    assert watch.limit.workers > 7


def test_failures_lower_it_by_a_quarter_and_those_that_were_asked_for_do_not() -> None:
    watch = Watch(limit(4, 64))
    while watch.window(DONE) < 40:
        pass
    began = watch.limit.workers
    few = [DONE] * 10 + [RAISED]
    assert watch.window(*few) > began  # one in eleven may be a bad record
    began = watch.limit.workers
    assert watch.window(DONE, RAISED) == began - began // 4
    asked = Result(failure=Failure("postponed", "later"), seconds=0.1)
    assert watch.window(DONE, DONE, DONE, asked) >= began - began // 4
    refused = Result(retries=[RetryRequest(i, None, "busy") for i in range(100)], seconds=0.1)
    began = watch.limit.workers
    assert watch.window(refused) == began - began // 4
    while watch.window(RAISED) > 4:
        pass
    assert watch.window(RAISED) == 4


def test_rejections_at_once_are_no_quick_calls() -> None:
    watch = Watch(limit(4, 64))
    rejected = Result(
        rejections=[Rejection(i, "rejected", "no") for i in range(100)], seconds=0.0001
    )
    watch.window(rejected)
    while watch.window(DONE) < 10:
        pass


def test_an_idle_surplus_goes_and_a_peak_is_kept() -> None:
    watch = Watch(limit(4, 64))
    while watch.window(DONE) < 20:
        pass
    watch.now += IDLE_SECONDS
    watch.limit.look(Demand(watch.limit.workers, watch.waited, watch.taken), watch.now)
    for _ in range(3):
        watch.limit.ran(DONE, 1, watch.now, running=9)
    watch.now += IDLE_SECONDS
    assert watch.limit.look(Demand(watch.limit.workers, 0, 0), watch.now) == 9
    watch.now += IDLE_SECONDS
    assert watch.limit.look(Demand(9, 0, 0), watch.now) == 4


def test_workers_that_cannot_be_started_end_the_growth_for_a_while() -> None:
    watch = Watch(limit(4, 64))
    assert watch.window(DONE) == 5
    watch.now += 1
    assert watch.limit.look(Demand(4, watch.waited, watch.taken, failed=1), watch.now) == 4
    watch.limit._seen = watch.limit._seen._replace(failed=0)
    until_then = watch.now + REST_SECONDS
    while watch.window(DONE) == 4:
        assert watch.now <= until_then + 2
    assert watch.now >= until_then


@settings(max_examples=25)
@given(
    st.integers(1, 20),
    st.integers(1, 200),
    st.lists(
        st.tuples(
            st.sampled_from([DONE, RAISED, Result(seconds=9.0)]), st.booleans(), st.booleans()
        )
    ),
)
def test_it_stays_within_its_bounds(least: int, more: int, windows: Any) -> None:
    watch = Watch(limit(least, least + more))
    for result, waited, rests in windows:
        watch.now += IDLE_SECONDS * rests
        assert least <= watch.window(result, waited=waited) <= least + more


# -- a simulated sink, on a clock of its own ------------------------------------------------------


class Sink:
    """Works on `lanes` calls at once, each for 50 ms or so; more wait. Steps of a second."""

    def __init__(self, made: ConcurrencyLimit, lanes: float) -> None:
        self.limit, self.lanes = made, lanes
        self.random = random.Random(1)
        self.now, self.taken, self.fails = 0.0, 0, False

    def run(self, seconds: int) -> list[int]:
        """The workers after each second; a job is always waiting."""
        seen = []
        for _ in range(seconds):
            workers = self.limit.workers
            latency = 0.05 * max(1.0, workers / self.lanes)
            calls = int(workers / latency)
            for n in range(min(calls, 100)):
                took = latency * self.random.lognormvariate(0, 0.4)
                failure = Failure("unavailable", "busy") if self.fails else None
                at = self.now + 0.5 + (n + 1) / calls / 2 + took
                self.limit.ran(Result(failure=failure, seconds=took), 500, at, running=workers)
            self.now += 1.0 + latency
            self.taken += calls
            self.limit.look(Demand(workers, self.taken, self.taken), self.now)
            seen.append(self.limit.workers)
        return seen


@pytest.mark.parametrize("lanes", [6, 40])
def test_a_sink_is_found_full_and_followed(lanes: int) -> None:
    """All of the sink is used, and no crowd waits in it; both when its capacity changes."""
    sink = Sink(limit(2, 200), lanes)
    assert all(0.9 * lanes <= workers <= 2.2 * lanes for workers in sink.run(120)[60:])
    sink.lanes = lanes / 2
    assert all(workers <= 1.4 * lanes for workers in sink.run(120)[60:])
    sink.lanes = 2 * lanes
    assert max(sink.run(120)) >= 1.5 * lanes
    sink.fails = True
    assert sink.run(30)[-1] == 2
    sink.fails = False
    assert max(sink.run(60)) >= 1.2 * lanes


# -- pools -----------------------------------------------------------------------------------------


class Thread:
    """A worker with a thread that does nothing but take jobs."""

    alive: ClassVar[set[str]] = set()

    def __init__(self, number: int, *, fails: bool = False) -> None:
        self.name, self.fails = f"w{number}", fails

    async def start(self) -> None:
        if self.fails:
            raise HandlerLoadError(target="x", problem="no memory")
        Thread.alive.add(self.name)

    def serve(self, jobs: JobQueue) -> None:
        self.thread = threading.Thread(target=jobs.serve, args=(self._run, self.name))
        self.thread.start()

    def _run(self, job: Job) -> Result:
        if job.batch.startswith("slow"):
            time.sleep(0.1)
        return Result(seconds=0.001)

    async def close(self, deadline: float) -> bool:
        if hasattr(self, "thread"):
            await asyncio.get_running_loop().run_in_executor(None, self.thread.join)
        Thread.alive.discard(self.name)
        return True

    async def run(self, job: Job) -> Result:
        await asyncio.sleep(0.1 if job.batch.startswith("slow") else 0)
        return Result(seconds=0.001)


@pytest.fixture(params=["threads", "tasks"])
async def pool(request: pytest.FixtureRequest) -> Any:
    Thread.alive = set()
    kind = ThreadedPool if request.param == "threads" else TaskPool
    made = kind([Thread(n) for n in range(2)], Thread)
    await made.start()
    yield made
    assert await made.close(asyncio.get_running_loop().time() + 60)
    assert Thread.alive == set()


async def ran(pool: Any, batch: str) -> Result:
    await pool.acquire()
    try:
        return await pool.run(Job(batch, 1, Records.lines([b"1"]), [], "j"))
    finally:
        pool.release()


async def test_a_pool_grows_and_shrinks_while_it_works(pool: Any) -> None:
    for wanted in (5, 3, 6, 2, 2, 4, 1):
        jobs = [asyncio.ensure_future(ran(pool, f"{n}")) for n in range(20)]
        pool.resize(wanted)
        while not pool.size == wanted == len(Thread.alive):
            await asyncio.sleep(0.001)
        assert {worker.name for worker in pool.workers} == Thread.alive
        await asyncio.gather(*jobs)
        await ran(pool, "one more")
    assert pool.taken == 7 * 21


async def test_a_worker_that_has_a_job_ends_behind_it_or_is_kept(pool: Any) -> None:
    pool.resize(4)
    await until(lambda: pool.size == 4)
    jobs = [asyncio.ensure_future(ran(pool, f"slow-{n}")) for n in range(4)]
    await asyncio.sleep(0)
    pool.resize(1)
    await until(lambda: pool.size == 1)
    assert len(Thread.alive) >= 1
    pool.resize(4)  # never more than four are alive
    while pool.size < 4:
        assert len(Thread.alive) <= 4
        await asyncio.sleep(0.001)
    await asyncio.gather(*jobs)


async def test_workers_that_cannot_be_started_are_given_up(pool: Any) -> None:
    pool._make = lambda number: Thread(number, fails=True)
    pool.resize(4)
    await until(lambda: pool.failed)
    await until(lambda: len(pool._numbers) == 2)
    assert (pool.size, len(pool.workers), pool.demand.failed) == (2, 2, 2)
    await ran(pool, "it goes on")
    pool._make = Thread
    pool.resize(3)
    await until(lambda: pool.size == 3)


# -- a real pipeline whose handler gets slower with a crowd ---------------------------------------

LANES = threading.Semaphore(6)


def crowded(batch: list[Any]) -> None:
    """A sink that works on six calls at once."""
    with LANES:
        time.sleep(0.05)


@pytest.mark.slow
async def test_a_handler_that_gets_slower_with_a_crowd_is_given_no_crowd(start) -> None:  # noqa: F811
    executor = {"kind": "thread", "workers": 2, "workers_max": 40}
    pipeline = await start(f"{__name__}:crowded", executor=executor, batch={"records_max": 1})
    work = pipeline.dispatcher
    assert status_of(pipeline).workers == 2
    seen = []
    began = time.monotonic()
    while time.monotonic() - began < 12:
        while pipeline.ledger.pending < 100:
            await pipeline.accept(Append(numbers(0, 100)))
        seen.append(work.workers)
        assert len(work.pool.workers) <= 40
        await asyncio.sleep(0.05)
    assert 5 <= max(seen[len(seen) // 2 :]) <= 20, seen
    assert status_of(pipeline).workers == work.workers
    await pipeline.drain(None)
    assert (await pipeline.close()).balanced


@pytest.mark.slow
async def test_processes_are_started_on_demand_and_ended(start, tmp_path) -> None:  # noqa: F811
    executor = {"kind": "process", "workers": 1, "workers_max": 3}
    pipeline = await start(
        "tests.pipeline.recording:Gate",
        executor=executor,
        batch={"records_max": 1},
        options={"folder": str(tmp_path)},
    )
    pool = pipeline.dispatcher.pool
    pool.resize(3)
    await until(lambda: pool.size == 3)
    children = [worker._child.process for worker in pool.workers]
    await pipeline.accept(Append(numbers(0, 6)))
    await until(lambda: len(recording.calls(tmp_path)) == 3)
    pool.resize(1)
    await until(lambda: pool.size == 1)
    assert all(child.returncode is None for child in children)  # each has a batch
    (tmp_path / "open").touch()
    await until(lambda: sum(child.returncode is None for child in children) == 1)
    assert sorted(child.returncode for child in children if child.returncode is not None) == [0, 0]
    await pipeline.drain(None)
    assert (await pipeline.close()).ledger.processed == 6
    assert len(list(tmp_path.glob("closed-*"))) == 3


def test_fewer_than_workers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"executor\.workers_max: 3 is less than executor.workers"):
        Settings(executor={"workers": 4, "workers_max": 3})
