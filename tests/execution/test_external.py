"""The handler runs in an executor of the user's: `executor.factory`."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.base.errors import ExecutorLoadError, HandlerLoadError
from ingestd.base.record import Records, Span
from ingestd.execution import external
from ingestd.execution.build import start_pool
from ingestd.execution.settings import ExecutorSettings, HandlerSettings
from ingestd.handlers.outcome import POSTPONED, Job, Result
from tests.daemon.harness import ROOT, daemon
from tests.execution.pools import calls

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from ingestd.execution.pool import Pool

pytestmark = pytest.mark.slow

HERE = "tests.execution.pools"
KINDS = ["processes", "threads"]


def job(*records: Any, batch: str = "j-1", attempt: int = 1) -> Job:
    payloads = [json.dumps(record).encode() for record in records]
    return Job(batch, attempt, Records.sized(payloads), [Span(1, 0, len(payloads))], "j")


class Started:
    """A pool with the retirements that it reported."""

    def __init__(self, pool: Pool[Any], restarts: list[str]) -> None:
        self.pool = pool
        self.restarts = restarts
        self.is_closed = False

    async def run(self, *records: Any, **more: Any) -> Result:
        await self.pool.acquire()
        try:
            return await self.pool.run(job(*records, **more))
        finally:
            self.pool.release()

    async def close(self, seconds: float = 60) -> bool:
        self.is_closed = True
        return await self.pool.close(asyncio.get_running_loop().time() + seconds)


@pytest.fixture
async def start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[..., Awaitable[Started]]]:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    live: list[Started] = []

    async def start_(factory: str, handler: str = "Writes", **executor: Any) -> Started:
        restarts: list[str] = []
        options = {"folder": str(tmp_path)} if handler == "Writes" else {}
        pool, kind = await start_pool(
            "default",
            ExecutorSettings(factory=f"{HERE}:{factory}", **{"workers": 2, **executor}),
            HandlerSettings(target=f"{HERE}:{handler}", options=options),
            "json",
            data_dir=tmp_path,
            on_restart=restarts.append,
        )
        assert kind == "external"
        live.append(Started(pool, restarts))
        return live[-1]

    yield start_
    for one in live:
        if not one.is_closed:
            await one.close()


@pytest.mark.parametrize("factory", KINDS)
async def test_batches_run_and_handlers_stay_with_their_thread(start, tmp_path, factory) -> None:
    one = await start(factory)
    results = await asyncio.gather(*(one.run(n, batch=f"j-{n}") for n in range(20)))
    assert all(result.failure is None for result in results)
    seen = calls(tmp_path)
    assert sorted(call["records"] for call in seen) == [[n] for n in range(20)]
    assert all(call["made_here"] for call in seen)
    pids = {call["pid"] for call in seen}
    assert (pids == {os.getpid()}) == (factory == "threads")
    assert await one.close()
    closed = [line.split() for line in (tmp_path / "closed").read_text().splitlines()]
    assert {int(pid) for pid, _ in closed} >= pids
    assert all(own == "True" for _, own in closed)


@pytest.mark.parametrize("factory", KINDS)
async def test_outcomes_come_back_as_plain_data(start, factory) -> None:
    one = await start(factory)
    result = await one.run("raise", 2)
    assert result.failure is not None
    assert result.failure.error == "ValueError: so it was asked"
    assert "pools.py" in result.failure.traceback
    result = await one.run("reject", 2)
    assert [(one.index, one.reason) for one in result.rejections] == [(0, "rejected")]
    assert one.restarts == []


async def test_a_process_that_dies_costs_a_try_and_the_executor(start, tmp_path) -> None:
    one = await start("processes")
    result = await one.run("die")
    assert result.failure is not None
    assert result.failure.reason == "crashed"
    assert "BrokenProcessPool" in result.failure.error
    assert (await one.run("die", attempt=2)).failure is None
    assert one.restarts == ["crashed"]
    assert [call["attempt"] for call in calls(tmp_path)] == [1, 2]


async def test_an_executor_that_cancels_its_calls_is_built_anew(start) -> None:
    one = await start("forgets")  # its first one is lost before the first batch
    assert (await one.run(1)).failure is None
    assert one.restarts == ["crashed"]


@pytest.mark.parametrize("factory", KINDS)
async def test_a_call_that_hangs_costs_its_batch_alone(
    start, tmp_path, monkeypatch, factory
) -> None:
    monkeypatch.setattr(external, "HANG_SECONDS", 0.1)
    one = await start(factory, timeout=60.0)
    await asyncio.gather(one.run(1), one.run(2))  # both workers are there
    waits = "wait" if factory == "threads" else "hang"  # a thread of this test must end
    one.pool._timeout = 2.0
    hung = asyncio.ensure_future(one.run(waits, batch="j-2"))
    await until(lambda: any(call["id"] == "j-2" for call in calls(tmp_path)))
    one.pool._timeout = 60.0  # of the others
    assert (await one.run(3)).failure is None
    result = await hung
    assert result.failure is not None
    assert result.failure.reason == "timeout"
    # One worker is still busy, but none of the next executor.
    assert [r.failure for r in await asyncio.gather(one.run(4), one.run(5))] == [None, None]
    assert one.restarts == ["timeout"]
    (tmp_path / "open").touch()
    if factory == "processes":
        (pid,) = {call["pid"] for call in calls(tmp_path) if call["id"] == "j-2"}
        await until(lambda: not is_alive(pid))


async def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def test_closing_waits_for_calls_until_its_deadline(start, tmp_path) -> None:
    one = await start("processes")
    call = asyncio.ensure_future(one.run("wait"))
    await until(lambda: bool(calls(tmp_path)))
    closing = asyncio.ensure_future(one.close())
    await asyncio.sleep(0)
    (tmp_path / "open").touch()
    assert await closing
    assert (await call).failure is None
    assert (tmp_path / "closed").exists()


async def test_closing_leaves_a_call_that_hangs(start, tmp_path) -> None:
    one = await start("processes")
    call = asyncio.ensure_future(one.run("wait"))
    await until(lambda: bool(calls(tmp_path)))
    assert not await one.close(0.1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    (tmp_path / "open").touch()


async def test_a_cluster_that_is_down_postpones_batches_and_spends_no_try(start) -> None:
    one = await start("raises")
    result = await one.run(1)
    assert result.failure is not None
    assert result.failure.reason == POSTPONED
    assert "the cluster is down" in result.failure.error


async def test_a_factory_that_later_gives_no_executor_postpones_batches(start) -> None:
    one = await start("gone_for_a_while")
    result = await one.run(1)
    assert result.failure is not None
    assert result.failure.reason == POSTPONED
    assert "gave NoneType, which is no concurrent.futures.Executor" in result.failure.error
    assert (await one.run(1)).failure is None


@pytest.mark.parametrize(
    ("factory", "handler", "error", "text"),
    [
        ("nothing", "Writes", ExecutorLoadError, "has no 'nothing'"),
        ("not_callable", "Writes", ExecutorLoadError, "is not callable"),
        ("none_at_all", "Writes", ExecutorLoadError, "gave str, which is no concurrent.futures"),
        ("threads", "nothing", HandlerLoadError, "has no 'nothing'"),
        ("processes", "nothing", HandlerLoadError, "has no 'nothing'"),
        ("threads", "awaited", HandlerLoadError, "is async, which an executor"),
    ],
)
async def test_a_start_is_refused(start, factory, handler, error, text) -> None:
    with pytest.raises(error, match=text):
        await start(factory, handler)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_the_daemon_drains_a_pool_and_takes_it_along(tmp_path: Path, how: signal.Signals) -> None:
    flags = ["--executor.factory", f"{HERE}:processes", "--handler.options.folder", str(tmp_path)]
    with daemon(f"{HERE}:Writes", *flags, "--batch.age_max", "10ms", cwd=tmp_path) as one:
        assert one.event("daemon_started")["executors"] == {"default": "external"}
        assert one.post(b'"wait"')[0] == 202
        end = time.monotonic() + 60
        while not calls(tmp_path) and time.monotonic() < end:
            time.sleep(0.02)
        (call,) = calls(tmp_path)
        one.terminate(how)
        if how == signal.SIGTERM:
            one.event("drain_started")
            (tmp_path / "open").touch()
            assert one.wait() == 0
            assert [c["attempt"] for c in calls(tmp_path)] == [1]
        else:
            assert one.wait() == -how
        end = time.monotonic() + 60
        while is_alive(call["pid"]):
            assert time.monotonic() < end
            time.sleep(0.02)
    if how == signal.SIGKILL:
        (tmp_path / "open").touch()
        with daemon(f"{HERE}:Writes", *flags, cwd=tmp_path) as one:
            assert one.until_settled()["processed"] == 1
        assert {c["id"] for c in calls(tmp_path)} == {call["id"]}


@pytest.mark.slow
def test_a_cluster_of_dask(tmp_path: Path) -> None:
    """A worker that is lost costs a try; none of the records is lost with it."""
    pytest.importorskip("distributed")
    flags = ["--executor.factory", f"{HERE}:dask", "--handler.options.folder", str(tmp_path)]
    flags += ["--batch.age_max", "10ms", "--retry.backoff", "10ms", "--executor.timeout", "150s"]
    with daemon(f"{HERE}:Writes", *flags, cwd=tmp_path) as one:
        assert one.event("daemon_started", 180)["executors"] == {"default": "external"}
        for n in range(20):
            assert one.post(f"{n}\n{n}".encode())[0] == 202
        assert one.until_settled(timeout=120)["processed"] == 40
        assert one.process.pid not in {call["pid"] for call in calls(tmp_path)}
        assert one.post(b'"raise"')[0] == 202
        one.until_settled()  # or both would be in one batch
        assert one.post(b'"die"')[0] == 202
        status = one.until_settled(timeout=240)
        assert (status["processed"], status["dead"]) == (42, 0)
        died = [call["attempt"] for call in calls(tmp_path) if call["records"] == ["die"]]
        assert set(died) == {1, 2}
        assert one.event("executor_retired")["reason"] == "crashed"
        assert one.post(b'"wait"')[0] == 202
        end = time.monotonic() + 60
        while not any(call["records"] == ["wait"] for call in calls(tmp_path)):
            assert time.monotonic() < end
            time.sleep(0.02)
        one.terminate()
        one.event("drain_started")
        (tmp_path / "open").touch()
        assert one.wait(120) == 0
    pids = {call["pid"] for call in calls(tmp_path)}
    end = time.monotonic() + 60
    while any(map(is_alive, pids)):
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["threads", "not_callable", "nothing"])
def test_check_says_which_factory_it_is(tmp_path: Path, name: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "ingestd", "check", f"{HERE}:Writes", "--executor.factory",
         f"{HERE}:{name}", "--handler.options.folder", str(tmp_path)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    if name == "threads":
        assert f"(executor: {HERE}:threads)" in run.stdout, run.stderr
    else:
        assert f"executor.factory '{HERE}:{name}': " in run.stderr
    assert run.returncode == (0 if name == "threads" else 78)
