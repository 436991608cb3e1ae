"""Jobs that lie ready: who takes them, who hears of their end, and how many there are."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import structlog

from ingestd.base.record import Records
from ingestd.execution.job_queue import AHEAD_MAX, SECONDS, JobQueue, PrefetchLimit
from ingestd.handlers.outcome import Job, Result


def job(number: int) -> Job:
    return Job(f"j-{number}", 1, Records.lines([b"1"]), [], "j")


async def test_a_busy_lane_keeps_no_job_from_the_others() -> None:
    """One worker hangs in its first job; all others are run by the second one."""
    hold = threading.Event()
    jobs = JobQueue()

    def run(one: Job) -> Result:
        if one.batch == "j-0":
            hold.wait(240)
        return Result(seconds=1.0)

    with ThreadPoolExecutor(2) as threads:
        queued = [jobs.put(job(number)) for number in range(50)]
        for worker in ("a", "b"):
            threads.submit(jobs.serve, run, worker)
        await asyncio.wait_for(asyncio.gather(*(t.done for t in queued[1:])), 60)
        assert not queued[0].done.done()
        assert {ticket.worker for ticket in queued[1:]} == {"b" if queued[0].worker == "a" else "a"}
        hold.set()
        assert (await queued[0].done).seconds == 1.0
        jobs.close(2)


async def test_what_goes_wrong_in_a_lane_is_told_and_the_lane_goes_on() -> None:
    jobs = JobQueue()

    def run(one: Job) -> Result:
        if one.batch == "j-0":
            raise SystemExit(3)
        return Result()

    with ThreadPoolExecutor(1) as threads:
        first, second = jobs.put(job(0)), jobs.put(job(1))
        threads.submit(jobs.serve, run, "a")
        with pytest.raises(SystemExit):
            await first.done
        assert await second.done == Result()
        jobs.close(1)


async def test_after_the_end_no_job_is_begun() -> None:
    jobs, begun = JobQueue(), []
    left = [jobs.put(job(number)) for number in range(5)]
    jobs.close(2)
    with ThreadPoolExecutor(2) as threads:
        for worker in ("a", "b"):
            threads.submit(jobs.serve, lambda one: begun.append(one) or Result(), worker)
    await asyncio.sleep(0)
    assert not begun
    assert not any(ticket.done.done() for ticket in left)


async def test_log_lines_of_a_lane_know_whose_job_it_is() -> None:
    jobs, seen = JobQueue(), []

    def run(one: Job) -> Result:
        seen.append((one.batch, structlog.contextvars.get_contextvars()["batch_id"]))
        return Result()

    async def ask(number: int) -> None:
        structlog.contextvars.bind_contextvars(batch_id=f"j-{number}")
        await jobs.put(job(number)).done

    with ThreadPoolExecutor(1) as threads:
        threads.submit(jobs.serve, run, "a")
        await asyncio.gather(*(asyncio.create_task(ask(number)) for number in range(9)))
        jobs.close(1)
    assert len(seen) == 9
    assert all(batch == bound for batch, bound in seen)


@pytest.mark.parametrize("workers", [1, 2, 100])
def test_what_lies_ready_is_a_moments_work(workers: int) -> None:
    ahead = PrefetchLimit(workers)
    assert ahead.jobs == workers
    for _ in range(200):
        ahead.ran(SECONDS / 10, failed=False)
    least, most = (max(workers, min(n * workers, AHEAD_MAX)) for n in (9, 10))
    assert least <= ahead.jobs <= most
    for _ in range(200):
        ahead.ran(0.0, failed=False)
    assert ahead.jobs == max(workers, AHEAD_MAX)
    ahead.ran(0.0, failed=True)
    assert ahead.jobs == workers
    for _ in range(200):
        ahead.ran(30.0, failed=False)
    assert ahead.jobs == workers


async def test_a_job_that_comes_back_is_the_next_one() -> None:
    jobs = JobQueue()
    queued = [jobs.put(job(number)) for number in range(4)]
    assert jobs.take("a") is queued[0]
    ahead = [jobs.take_ahead("a"), jobs.take_ahead("a")]
    assert ahead == queued[1:3]
    jobs.put_back(queued[1:3])
    assert [jobs.take("b") for _ in range(3)] == queued[1:]
    assert jobs.take_ahead("a") is None


async def test_no_job_is_taken_ahead_of_an_idle_worker() -> None:
    jobs, taken = JobQueue(), []
    with ThreadPoolExecutor(1) as threads:
        waits = threads.submit(jobs.take, "idle")
        while not jobs._idle:
            await asyncio.sleep(0.001)
        # Put while the idle worker can't run, were it not for the interpreter's switch.
        queued = [jobs.put(job(number)) for number in range(2)]
        taken += [jobs.take_ahead("busy"), jobs.take_ahead("busy")]
        taken.append(waits.result(60))
    assert taken.count(None) >= 1
    assert [one for one in taken if one is not None and one not in queued] == []
    assert taken[2] is not None


async def test_a_job_that_comes_back_wakes_an_idle_worker_and_the_end_wakes_all() -> None:
    jobs = JobQueue()
    queued = jobs.put(job(0))
    assert jobs.take("a") is queued
    with ThreadPoolExecutor(2) as threads:
        waits = [threads.submit(jobs.take, worker) for worker in ("b", "c")]
        jobs.put_back([queued])
        jobs.close(2)
        assert {one.result(60) for one in waits} <= {queued, None}
