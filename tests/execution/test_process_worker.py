"""A worker's connection is not believed, and a worker is ended with everything it started."""

from __future__ import annotations

import asyncio
import os
import textwrap
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from ingestd.base.record import Records, Span
from ingestd.execution.pool import START_AGAIN_SECONDS, ThreadedPool
from ingestd.execution.process import FAILING_TRIES, ProcessWorker
from ingestd.handlers.outcome import POSTPONED, Failure, Job, Result
from ingestd.handlers.runner import HandlerConfig
from ingestd.handlers.wire import InitMessage

pytestmark = pytest.mark.slow

HANDLERS = """
import multiprocessing, os, signal, socket, subprocess, sys, threading, time
from pathlib import Path
from ingestd.handlers import wire
from ingestd.handlers.outcome import Failure, Rejection

def fds():
    return [int(name) for name in os.listdir("/proc/self/fd")]
def first(batch): return batch.attempt == 1
def link(fd):
    try: return os.readlink(f"/proc/self/fd/{fd}")
    except OSError: return ""
def links(begin): return [fd for fd in fds() if link(fd).startswith(begin)]
def sockets(): return links("socket:")

class Does:
    def __init__(self, how, folder=""): self.how, self.folder = getattr(self, how), Path(folder)
    def __call__(self, batch: "Batch"):
        if batch.attempt == 1: return self.how(batch)
    def child_returns(self, batch):
        if os.fork() == 0: return None  # and now there are two
        os.wait()
        raise ValueError("the parent raises")
    def child_exits(self, batch):
        if os.fork() == 0: sys.exit(0)
        os.wait()
        raise ValueError("the parent raises")
    def child_raises(self, batch):
        if os.fork() == 0: raise ValueError("the child raises")
        os.wait()
    def pools(self, batch):
        for _ in range(40):
            with multiprocessing.Pool(2) as pool: assert pool.map(abs, [-1, 2]) == [1, 2]
    def ends_child(self, batch):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) * 50:
            child = os.fork()
            if child == 0:
                time.sleep(60)
                os._exit(0)
            os.kill(child, number)
            assert os.WTERMSIG(os.waitpid(child, 0)[1]) == number
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
    def child_of_its_own(self, batch):
        signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    def garbage(self, batch):
        for fd in fds():
            if fd > 2:
                try: os.write(fd, b"garbage" * 100)
                except OSError: pass
    def huge_length(self, batch):
        for fd in sockets(): os.write(fd, wire._HEAD.pack(wire._MAGIC, os.getpid(), 1, 1 << 60))
    def says(self, number, body):
        head = wire._HEAD.pack(wire._MAGIC, os.getpid(), number, len(body))
        for fd in sockets(): os.write(fd, head + body)
    def other_job(self, batch): self.says(7, wire.encode(wire.ResultMessage(wire.Result())))
    def no_answer(self, batch): self.says(1, b"abc")
    def impossible_answer(self, batch):
        self.says(1, wire.encode(wire.ResultMessage(wire.Result([Rejection(99, "rejected", "x")]))))
    def impossible_reason(self, batch):
        self.says(1, wire.encode(wire.ResultMessage(wire.Result(failure=Failure("because", "x")))))
    def slow_drip(self, batch):
        head = wire._HEAD.pack(wire._MAGIC, os.getpid(), 1, 1000)
        for fd in sockets(): os.write(fd, head)
        while True:
            for fd in sockets(): os.write(fd, b"x")
            time.sleep(0.05)
    def closes(self, batch): os.closerange(3, 4096)
    def takes_number(self, batch):
        for fd in sockets():
            file = os.open(self.folder / "own", os.O_RDWR | os.O_CREAT)
            os.dup2(file, fd)
    def spoils_memory(self, batch):
        for fd in links("/memfd:"):
            for spoil in (lambda: os.ftruncate(fd, 0), lambda: os.pwrite(fd, b"xxxx", 0)):
                try: spoil()
                except OSError: pass
    def killed_beside_a_child(self, batch):
        if os.fork() == 0: time.sleep(600)
        os.kill(os.getpid(), signal.SIGKILL)
    def killed_beside_an_old_fork(self, batch):
        import ctypes
        if ctypes.PyDLL(None).fork() == 0:  # no hook of Python's runs: it keeps every descriptor
            ctypes.PyDLL(None).sleep(600)
        os.kill(os.getpid(), signal.SIGKILL)
    def stops_itself(self, batch): os.kill(os.getpid(), signal.SIGSTOP)
    def leaves_its_group(self, batch):
        other = subprocess.Popen(["sleep", "600"], process_group=0)
        os.setpgid(0, other.pid)
        self.note(os.getpid())
        time.sleep(600)
    def hangs_with_company(self, batch):
        self.note(subprocess.Popen(["sleep", "600"]).pid)
        self.note(subprocess.Popen(["sleep", "600"], process_group=0).pid)
        self.note(subprocess.Popen(["sleep", "600"], start_new_session=True).pid)
        self.note(subprocess.Popen(["sleep", "600"], start_new_session=True, env={}).pid)
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                self.note(os.getpid())
                time.sleep(600)
            os._exit(0)
        os.wait()
        time.sleep(600)
    def note(self, pid):
        with open(self.folder / "pids", "a") as file: file.write(f"{pid}\\n")
    def lists(self, batch):
        def mine(): return sorted(map(link, fds()))
        (self.folder / "parent").write_text("\\n".join(mine()))
        if os.fork() == 0:
            (self.folder / "forked").write_text("\\n".join(mine()))
            os._exit(0)
        os.wait()
        out = subprocess.run(
            ["ls", "-l", "/proc/self/fd"], capture_output=True, text=True, close_fds=False)
        (self.folder / "executed").write_text(out.stdout)
    def dies_later(self, batch):
        threading.Timer(0.1, os._exit, (5,)).start()
    def writes_later(self, batch):
        threading.Timer(0.1, self.write_late).start()
    def write_late(self):
        for fd in sockets(): os.write(fd, b"late")
        (self.folder / "late").touch()
    def maps_memory(self, batch):
        (self.folder / "map").write_text(Path("/proc/self/maps").read_text())
    def no_memory(self, batch):
        import resource
        used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 20),) * 2)

from ingestd import Batch

class NoDescriptors:
    def __call__(self, batch: Batch):
        import resource
        if batch.attempt == 1: resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
        os.close(os.open("/dev/null", os.O_RDONLY))

class CloseHangs:
    def __call__(self, batch: Batch):
        if batch.attempt == 1: raise ValueError("raised")
    def close(self): time.sleep(600)
"""

Run = Callable[..., Awaitable[Result]]


def job(attempt: int = 1, payload: bytes = b"1") -> Job:
    return Job("j-1", attempt, Records.lines([payload]), [Span(1, 0, 1)], "j")


class Lanes:
    """A pool of one process worker, started for a handler."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.restarts: list[str] = []
        self.pool: ThreadedPool | None = None
        self.close_seconds = 60.0

    async def start(self, name: str, seconds: float = 30.0, **options: str) -> None:
        wanted = HandlerConfig(
            f"{self.module}:{name}", options, "json", "process", "default", b"data"
        )
        hello = InitMessage(wanted, os.getpid())
        worker = ProcessWorker(
            "default-worker-0", hello, timeout=seconds, on_restart=self.restarts.append
        )
        self.pool = ThreadedPool([worker])
        await self.pool.start()

    def be_patient(self) -> None:
        """Jobs from now on have a minute, whatever it was for those before."""
        assert self.pool is not None
        for worker in self.pool.workers:
            worker._timeout = 60.0

    async def run(self, one: Job) -> Result:
        assert self.pool is not None
        await self.pool.acquire()
        try:
            return await asyncio.wait_for(self.pool.run(one), 120)
        finally:
            self.pool.release()


@pytest.fixture
async def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Lanes]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("worker_handlers.py").write_text(textwrap.dedent(HANDLERS))
    made = Lanes("worker_handlers")
    yield made
    if made.pool is not None:
        loop = asyncio.get_running_loop()
        assert await asyncio.wait_for(made.pool.close(loop.time() + made.close_seconds), 120)


def failure_of(result: Result) -> Failure:
    assert result.failure is not None
    return result.failure


@pytest.mark.parametrize("how", ["child_returns", "child_exits"])
async def test_a_forked_child_does_not_answer(workers: Lanes, how: str) -> None:
    """The parent raised, so the batch failed; and each later answer is that of its job."""
    await workers.start("Does", how=how)
    for _ in range(3):
        assert failure_of(await workers.run(job())).error == "ValueError: the parent raises"
        assert (await workers.run(job(2))).failure is None
    assert workers.restarts == []


@pytest.mark.parametrize("how", ["pools", "ends_child", "child_of_its_own"])
async def test_a_forked_child_ends_by_a_signal(workers: Lanes, how: str) -> None:
    """Also by one that it gets just after the fork; a handler's own ways of ending stay."""
    await workers.start("Does", how=how)
    assert (await workers.run(job())).failure is None
    assert workers.restarts == []


async def test_a_forked_child_that_raises_is_not_the_batchs_failure(workers: Lanes) -> None:
    await workers.start("Does", how="child_raises")
    assert (await workers.run(job())).failure is None
    assert workers.restarts == []


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("garbage", "killed for its answer: it does not begin like a message"),
        ("huge_length", "killed for its answer: it is said to be 1152921504606846976 bytes long"),
        ("other_job", "killed for its answer: "),
        ("no_answer", "killed for its answer: "),
        ("impossible_answer", "killed for its answer: "),
        ("impossible_reason", "killed for its answer: its reason for the failure is none of ours"),
        ("closes", "the worker exited with code 1"),
        ("takes_number", "the worker exited with code 1"),
        ("killed_beside_a_child", "the worker was killed by SIGKILL"),
        ("killed_beside_an_old_fork", "the worker was killed by SIGKILL"),
    ],
)
async def test_what_does_not_fit_is_the_batchs_crash(
    workers: Lanes, tmp_path: Path, how: str, says: str
) -> None:
    await workers.start("Does", how=how, folder=str(tmp_path))
    failure = failure_of(await workers.run(job()))
    assert failure.reason == "crashed"
    assert says in failure.error
    assert (await workers.run(job(2))).failure is None
    assert workers.restarts == ["crashed"]
    own = tmp_path / "own"
    assert not own.exists() or own.read_bytes() == b""  # no answer went into the handler's file


@pytest.mark.parametrize("how", ["slow_drip", "stops_itself", "leaves_its_group"])
async def test_a_worker_that_does_not_come_back_is_killed(
    workers: Lanes, tmp_path: Path, how: str
) -> None:
    await workers.start("Does", seconds=0.5, how=how, folder=str(tmp_path))
    began = time.monotonic()
    assert failure_of(await workers.run(job())).reason == "timeout"
    assert time.monotonic() - began < 60
    workers.be_patient()
    assert (await workers.run(job(2))).failure is None
    assert workers.restarts == ["timeout"]


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("how", ["hangs_with_company"])
async def test_what_a_worker_started_ends_with_it(workers: Lanes, tmp_path: Path, how: str) -> None:
    """In its group, in another one, in another session, with no environment, as an orphan."""
    await workers.start("Does", seconds=7, how=how, folder=str(tmp_path))
    assert failure_of(await workers.run(job())).reason == "timeout"
    pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 5
    assert [pid for pid in pids if lives(pid)] == []


async def test_a_worker_in_another_group_is_killed_when_the_daemon_leaves(
    workers: Lanes, tmp_path: Path
) -> None:
    await workers.start("Does", seconds=600, how="leaves_its_group", folder=str(tmp_path))
    running = asyncio.create_task(workers.run(job()))
    pids = tmp_path / "pids"
    while not (pids.exists() and pids.read_text()):
        await asyncio.sleep(0.01)
    assert workers.pool is not None
    loop = asyncio.get_running_loop()
    assert await asyncio.wait_for(workers.pool.close(loop.time() + 0.1), 60)
    assert failure_of(await asyncio.wait_for(running, 60)).reason == "crashed"
    workers.pool = None
    assert not lives(int(pids.read_text()))


async def test_the_connection_is_not_inherited(workers: Lanes, tmp_path: Path) -> None:
    await workers.start("Does", how="lists", folder=str(tmp_path))
    assert (await workers.run(job())).failure is None
    assert "memfd:ingestd-job" in (tmp_path / "parent").read_text()
    for name in ("forked", "executed"):
        listed = (tmp_path / name).read_text()
        assert listed
        assert "memfd:ingestd-job" not in listed
    parent = (tmp_path / "parent").read_text().split("\n")
    wires = {one for one in parent if one.startswith("socket:")}
    forked = set((tmp_path / "forked").read_text().split("\n"))
    assert wires - forked
    executed = (tmp_path / "executed").read_text()
    assert not [one for one in wires if one in executed]


async def test_the_memory_of_jobs_can_not_be_spoilt(workers: Lanes) -> None:
    """A handler that shortens or overwrites every descriptor: the daemon lives, jobs are whole."""
    await workers.start("Does", how="spoils_memory")
    assert workers.pool is not None
    (size,) = workers.pool.memory().values()
    assert 5 << 20 < size < 1 << 30
    for _ in range(2):
        assert (await workers.run(job())).failure is None
        assert (await workers.run(job(2, b"2" * 5000))).failure is None
    assert workers.restarts == []


@pytest.mark.parametrize("how", ["dies_later", "writes_later"])
async def test_what_happens_between_two_jobs_is_no_jobs_fault(
    workers: Lanes, tmp_path: Path, how: str
) -> None:
    await workers.start("Does", how=how, folder=str(tmp_path))
    assert workers.pool is not None
    pid = workers.pool.workers[0]._child.process.pid
    assert (await workers.run(job())).failure is None
    while lives(pid) if how == "dies_later" else not (tmp_path / "late").exists():
        await asyncio.sleep(0.01)  # the worker is idle
    assert (await workers.run(job(2))).failure is None
    assert workers.restarts == ["crashed"]


async def test_no_memory_for_a_job_is_a_crash(workers: Lanes) -> None:
    await workers.start("Does", how="no_memory")
    assert (await workers.run(job())).failure is None
    large = job(2, b'"' + b"x" * 50_000_000 + b'"')
    failure = failure_of(await workers.run(large))
    assert (failure.reason, failure.error) == ("crashed", "the worker exited with code 1")
    assert (await workers.run(large)).failure is None


async def test_a_worker_that_can_not_be_started_costs_no_try(workers: Lanes) -> None:
    """The module is broken while a new worker is needed, as in the middle of a deployment."""
    await workers.start("Does", how="closes")
    good = Path("worker_handlers.py").read_text()
    assert failure_of(await workers.run(job())).reason == "crashed"
    Path("worker_handlers.py").write_text("def (")
    failure = failure_of(await workers.run(job(2)))
    assert (failure.reason, failure.after) == (POSTPONED, START_AGAIN_SECONDS)
    assert (
        "no worker could be started: handler 'worker_handlers:Does': SyntaxError" in failure.error
    )
    Path("worker_handlers.py").write_text(good)
    assert (await workers.run(job(2))).failure is None


@pytest.mark.slow
async def test_a_close_that_hangs_costs_no_job(workers: Lanes) -> None:
    await workers.start("CloseHangs", seconds=2.0)
    workers.close_seconds = 5.0  # in vain, too
    assert failure_of(await workers.run(job())).reason == "raised"
    workers.be_patient()
    assert (await workers.run(job(2))).failure is None
    assert workers.restarts == ["timeout"]


async def test_a_worker_of_which_only_failures_come_is_replaced(
    workers: Lanes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that has no descriptor left fails for every batch, and would do so for ever."""
    monkeypatch.setattr("ingestd.execution.process.FAILING_SECONDS", 0.0)
    await workers.start("NoDescriptors")
    for attempt in range(1, FAILING_TRIES + 1):
        assert failure_of(await workers.run(job(attempt))).reason == "raised"
    assert (await workers.run(job(FAILING_TRIES + 1))).failure is None
    assert workers.restarts == []
