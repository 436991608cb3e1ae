"""A worker process has its next jobs before it has answered; each is charged with its own fate."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import textwrap
import threading
import time
from collections import Counter
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ingestd.base.record import Records, Span
from ingestd.execution import process
from ingestd.execution.job_queue import JobQueue, QueuedJob
from ingestd.execution.pool import ThreadedPool
from ingestd.execution.process import ProcessWorker
from ingestd.handlers import wire
from ingestd.handlers.outcome import Job, Result
from ingestd.handlers.runner import HandlerConfig
from ingestd.handlers.wire import InitMessage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

HANDLERS = """
import os, signal, time
from pathlib import Path

class Does:
    def __init__(self, folder): self.folder = Path(folder)
    def __call__(self, batch: list):
        what, number = batch[0]
        with open(self.folder / "begun", "a") as file: file.write(f"{number}\\n")
        match what:
            case "crash": os.kill(os.getpid(), signal.SIGKILL)
            case "hang": time.sleep(600)
            case "sleep": time.sleep(1)
            case "raise": raise ValueError("asked to")
            case "wait": self.wait("open")
    def wait(self, name):
        while not (self.folder / name).exists(): time.sleep(0.01)
    def close(self):
        (self.folder / f"closing-{os.getpid()}").touch()
        if (self.folder / "close_waits").exists(): self.wait("never")
"""

QUICK = 40
"""So many quick jobs make it likely that a child has the next ones at once."""


class Pool:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.restarts: list[str] = []
        self.handed: list[int] = []
        self.is_open = False

    async def start(self, seconds: float = 60.0, workers: int = 1) -> None:
        wanted = HandlerConfig(
            "next_handlers:Does",
            {"folder": str(self.folder)},
            "json",
            "process",
            "default",
            b"data",
        )
        hello = InitMessage(wanted, os.getpid())
        self.workers = [
            ProcessWorker(f"w-{n}", hello, timeout=seconds, on_restart=self.restarts.append)
            for n in range(workers)
        ]
        self.pool = ThreadedPool(self.workers)
        await self.pool.start()
        self.is_open = True

    def submit(self, *whats: str) -> list[asyncio.Task[Result]]:
        jobs = []
        for what in whats:
            number = len(self.handed)
            self.handed.append(number)
            records = Records.lines([f'["{what}", {number}]'.encode()])
            job = Job(f"j-{number}", 1, records, [Span(1, 0, 1)], "j")
            jobs.append(asyncio.create_task(self.pool.run(job)))
        return jobs

    async def warm(self) -> None:
        results = await self.all(self.submit(*["quick"] * QUICK))
        assert not [one for one in results if one.failure is not None]

    async def all(self, jobs: list[asyncio.Task[Result]]) -> list[Result]:
        return await asyncio.wait_for(asyncio.gather(*jobs), 120)

    def begun(self) -> Counter[int]:
        path = self.folder / "begun"
        return Counter(map(int, path.read_text().split())) if path.exists() else Counter()

    async def until(self, name: str) -> Path:
        while not (found := list(self.folder.glob(name))):
            await asyncio.sleep(0.005)
        return found[0]

    async def close(self, seconds: float) -> bool:
        loop, self.is_open = asyncio.get_running_loop(), False
        return await asyncio.wait_for(self.pool.close(loop.time() + seconds), 120)


@pytest.fixture
async def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pool]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("next_handlers.py").write_text(textwrap.dedent(HANDLERS))
    made = Pool(tmp_path)
    yield made
    if made.is_open:
        assert await made.close(60)


@contextmanager
def counting_ahead(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """What each try to hand a job ahead came to."""
    tries: list[bool] = []
    begin_ahead = process.WorkerProcess.begin_ahead

    def counted(child: process.WorkerProcess, job: Job) -> bool:
        tries.append(begin_ahead(child, job))
        return tries[-1]

    with monkeypatch.context() as patched:
        patched.setattr(process.WorkerProcess, "begin_ahead", counted)
        yield tries


def reasons(results: list[Result]) -> dict[int, str]:
    return {n: one.failure.reason for n, one in enumerate(results) if one.failure is not None}


async def test_jobs_are_handed_over_before_the_last_one_is_answered(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    await pool.start()
    with counting_ahead(monkeypatch) as tries:
        await pool.warm()
        jobs = pool.submit("wait", *["quick"] * 20)
        await asyncio.sleep(0)
        while not tries.count(True):
            await asyncio.sleep(0.005)
        (pool.folder / "open").touch()
        assert reasons(await pool.all(jobs)) == {}
    assert pool.begun() == dict.fromkeys(pool.handed, 1)
    assert pool.restarts == []


@pytest.mark.parametrize(("what", "reason"), [("crash", "crashed"), ("hang", "timeout")])
async def test_only_the_guilty_job_is_charged(pool: Pool, what: str, reason: str) -> None:
    await pool.start(seconds=5.0 if what == "hang" else 60.0)
    await pool.warm()
    results = await pool.all(pool.submit(*["quick"] * 10, what, *["quick"] * 20))
    assert reasons(results) == {10: reason}
    assert pool.begun() == dict.fromkeys(pool.handed, 1)
    assert pool.restarts == [reason]


async def test_every_job_that_crashes_is_charged_once(pool: Pool) -> None:
    """Also one that is the first of its child, and one right behind another one."""
    await pool.start()
    await pool.warm()
    whats = ["crash" if number in {3, 4, 11} else "quick" for number in range(20)]
    assert reasons(await pool.all(pool.submit(*whats))) == dict.fromkeys((3, 4, 11), "crashed")
    assert pool.begun() == dict.fromkeys(pool.handed, 1)


async def test_a_kill_between_two_jobs_costs_no_try(pool: Pool) -> None:
    """The child closes its handler, has the next jobs, and has not begun one of them."""
    await pool.start()
    await pool.warm()
    (pool.folder / "close_waits").touch()
    jobs = pool.submit(*["quick"] * 5, "raise", *["quick"] * 20)
    closing = await asyncio.wait_for(pool.until("closing-*"), 60)
    (pool.folder / "close_waits").unlink()
    os.kill(int(closing.name.partition("-")[2]), signal.SIGKILL)
    assert reasons(await pool.all(jobs)) == {5: "raised"}
    assert pool.begun() == dict.fromkeys(pool.handed, 1)
    assert pool.restarts == ["crashed"]


async def test_a_kill_at_any_moment_charges_one_job_at_most(pool: Pool) -> None:
    await pool.start()
    jobs = pool.submit(*["quick"] * 200)
    for enough in (40, 90, 140):
        while len(pool.begun()) < enough:
            await asyncio.sleep(0.001)
        child = pool.workers[0]._child
        if child is not None:
            child.kill_at_once()
    results = await pool.all(jobs)
    crashed = reasons(results)
    assert set(crashed.values()) <= {"crashed"}
    assert len(crashed) <= 3
    begun = pool.begun()
    # A job that was not charged was called once and answered; one that was may have been begun.
    assert {n: begun[n] for n in pool.handed if n not in crashed} == {
        n: 1 for n in pool.handed if n not in crashed
    }
    assert all(begun[n] <= 1 for n in crashed)


async def test_the_time_of_a_job_begins_when_the_child_begins_it(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six jobs of a second each are with the child at once, and each may take five."""
    monkeypatch.setattr(process, "AHEAD_SECONDS", 60.0)
    await pool.start(seconds=5.0)
    with counting_ahead(monkeypatch) as tries:
        results = await pool.all(pool.submit(*["sleep"] * 6))
    assert tries.count(True) >= 4
    assert reasons(results) == {}
    assert pool.restarts == []


async def test_an_answer_that_came_while_the_daemon_stood_still_counts(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is there when the daemon goes on, beyond the job's deadline."""
    await pool.start()
    await pool.warm()
    pool.workers[0]._timeout = 2.0
    take_back, stood_still = process.WorkerProcess.take_back, False

    def taken_back_late(child: process.WorkerProcess) -> set[int]:
        nonlocal stood_still
        places = take_back(child)
        if not stood_still:
            stood_still = True
            (pool.folder / "open").touch()
            time.sleep(3)
        return places

    with monkeypatch.context() as patched:
        patched.setattr(process.WorkerProcess, "take_back", taken_back_late)
        assert reasons(await pool.all(pool.submit("wait", *["quick"] * 20))) == {}
    assert stood_still
    assert pool.begun() == dict.fromkeys(pool.handed, 1)
    assert pool.restarts == []


async def test_what_lies_behind_a_slow_job_goes_to_another_worker(pool: Pool) -> None:
    await pool.start(workers=2)
    await pool.warm()
    slow, *others = pool.submit("wait", *["quick"] * 30)
    assert reasons(await pool.all(others)) == {}
    assert not slow.done()
    (pool.folder / "open").touch()
    assert reasons(await pool.all([slow])) == {}
    assert pool.begun() == dict.fromkeys(pool.handed, 1)


async def test_a_drain_takes_back_what_is_not_begun(pool: Pool) -> None:
    """The running job gets its time, those behind it stay for the next start."""
    await pool.start()
    await pool.warm()
    slow, *others = pool.submit("wait", *["quick"] * 10)
    while QUICK not in pool.begun():
        await asyncio.sleep(0.005)
    closing = asyncio.create_task(pool.close(60))
    (worker,) = pool.workers
    while not pool.pool._jobs.closed or len(worker._handed) > 1:
        await asyncio.sleep(0.005)  # what lies ready goes back
    (pool.folder / "open").touch()
    assert await closing
    assert reasons(await pool.all([slow])) == {}
    assert set(pool.begun()) == set(range(QUICK + 1))
    await _end(others)


async def test_a_drain_at_its_deadline_begins_nothing_more(pool: Pool) -> None:
    await pool.start()
    await pool.warm()
    slow, *others = pool.submit("hang", *["quick"] * 10)
    while QUICK not in pool.begun():
        await asyncio.sleep(0.005)
    began = time.monotonic()
    assert await pool.close(0.0)
    assert time.monotonic() - began < 60
    assert reasons(await pool.all([slow])) == {0: "crashed"}
    assert set(pool.begun()) == set(range(QUICK + 1))
    await _end(others)


async def _end(left: list[asyncio.Task[Result]]) -> None:
    assert not any(one.done() for one in left)
    for one in left:
        one.cancel()
    await asyncio.wait(left)


async def test_a_job_that_the_child_begins_while_others_are_taken_back_is_its_own(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packets are taken back one after the other, and the child may receive one in between."""
    raced = 0

    def take_back(unread: socket.socket) -> set[int]:
        nonlocal raced
        try:
            head = unread.recv(wire._HEAD.size, socket.MSG_DONTWAIT)
        except OSError:
            return set()
        deadline = time.monotonic() + 60
        with contextlib.suppress(OSError):  # until the child has received all that is behind it
            while unread.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                raced += 1
                assert time.monotonic() < deadline
                time.sleep(0.001)
        return {wire._HEAD.unpack(head)[2]}

    await pool.start()
    await pool.warm()
    with monkeypatch.context() as patched:
        patched.setattr(wire, "take_packets_back", take_back)
        for _ in range(300):
            results = await pool.all(pool.submit(*["quick"] * 5, "raise", *["quick"] * 20))
            assert [one.failure.reason for one in results if one.failure is not None] == ["raised"]
            if raced:
                break
    assert raced
    assert pool.restarts == []
    assert set(pool.begun().values()) == {1}


async def test_a_job_that_came_back_runs_before_the_worker_that_gave_it_is_out(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other worker's thread is still in the context of the job."""
    context, entered, leaves = copy_context(), threading.Event(), threading.Event()

    def stay() -> None:
        entered.set()
        leaves.wait(60)

    other = threading.Thread(target=context.run, args=(stay,))
    other.start()
    entered.wait(60)
    try:
        await pool.start()
        monkeypatch.setattr("ingestd.execution.job_queue.copy_context", lambda: context)
        results = await pool.all(pool.submit("quick"))
        assert results[0].failure is None
    finally:
        leaves.set()
        other.join()


class GivesBack(ProcessWorker):
    """Gives its first job back, which another worker has run before this one is out of the call."""

    def _spawn(self) -> None:
        return None

    def _run(self, jobs: JobQueue, queued: QueuedJob) -> None:
        jobs.put_back([queued])
        other = jobs.take("other")
        assert other is queued
        other.result = Result(seconds=7.0)
        jobs.resolve(other)
        jobs.close(1)


async def test_a_job_that_goes_back_keeps_the_result_of_the_worker_that_runs_it() -> None:
    wanted = HandlerConfig("next_handlers:Does", {}, "json", "process", "default", b"data")
    hello = InitMessage(wanted, os.getpid())
    jobs = JobQueue()
    queued = jobs.put(Job("j-0", 1, Records.lines([b"1"]), [Span(1, 0, 1)], "j"))
    # On the loop's own thread: the loop sees the result when this worker is done with the job.
    GivesBack("w-0", hello, timeout=60.0, on_restart=lambda _: None)._serve(jobs)
    assert (await asyncio.wait_for(queued.done, 60)).seconds == 7.0
