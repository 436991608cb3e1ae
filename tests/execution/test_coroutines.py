"""Async handlers that do not come back: deadlines hold, and the daemon's own loop turns."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

from ingestd.base.errors import HandlerLoadError
from ingestd.base.record import Records, Span
from ingestd.execution import build, event_loops
from ingestd.execution.build import start_pool
from ingestd.execution.pool import START_AGAIN_SECONDS
from ingestd.handlers.outcome import POSTPONED, Job
from ingestd.settings import Settings
from tests.daemon.harness import daemon

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

THEIRS = """\
import asyncio, threading, time

GO = threading.Event()   # what hangs goes on

async def swallows(batch: list[int]) -> None:
    while batch[0] and not GO.is_set():
        try:
            await asyncio.sleep(0.02 if GO.is_set() else 3600)
        except asyncio.CancelledError:
            pass
        await asyncio.sleep(0.02)

async def ignores(batch: list[int]) -> None:
    while batch[0] and not GO.is_set():
        try:
            await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            pass

async def waits(batch: list[int]) -> None:
    try:
        if batch[0]:
            await asyncio.sleep(3600)
    finally:
        while batch[0] and not GO.is_set():
            await asyncio.sleep(0.02)

async def blocks(batch: list[int]) -> None:
    if batch[0]:
        GO.wait()

async def delegates(batch: list[int]) -> None:
    if batch[0]:
        await asyncio.to_thread(GO.wait)

async def leaves(batch: list[int]) -> None:
    async def leave():
        raise SystemExit(3)
    task = asyncio.get_running_loop().create_task(leave())
    await asyncio.wait([task])

class Ugly(SystemExit):
    def __str__(self):
        raise SystemExit("not even this")

class Closes(SystemExit):
    def __str__(self):
        self.args[0].close()   # it does not turn at the moment
        return "closed"

def throw(error):
    raise error

async def ugly(batch: list[int]) -> None:
    loop = asyncio.get_running_loop()
    for error in (Ugly(), BaseException(), Ugly()):
        loop.call_soon(throw, error)
        await asyncio.sleep(0.01)

async def closes(batch: list[int]) -> None:
    if batch[0]:
        loop = asyncio.get_running_loop()
        loop.call_soon(throw, Closes(loop))
        await asyncio.sleep(3600)

class Hangs:
    def __init__(self):
        GO.wait()
    def __call__(self, batch: list[int]) -> None:
        pass

class HangsAsync(Hangs):
    async def __call__(self, batch: list[int]) -> None:
        pass

class CancelsAll:
    def __init__(self):
        for task in asyncio.all_tasks():
            task.cancel()
    async def __call__(self, batch: list[int]) -> None:
        pass

async def finishes(batch: list[int]) -> None:
    try:
        await asyncio.sleep(3600)
    except asyncio.CancelledError:
        pass

async def where(batch: list[int]) -> None:
    raise OSError(threading.current_thread() is threading.main_thread())
"""
HANGS = ["ignores", "waits", "blocks", "delegates"]


def be_patient(pool: Any) -> None:
    """Calls from now on have a minute, whatever it was for those before."""
    for worker in pool.workers:
        worker._timeout = 60.0


def job(value: int) -> Job:
    return Job("j-1", 1, Records.sized([b"%d" % value]), [Span(1, 0, 1)], "j")


@pytest.fixture
async def opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[..., Any]]:
    pools: list[Any] = []
    modules: list[Any] = []

    async def open_(
        name: str, *, workers: int = 2, within: str = "100ms", kind: str = "async"
    ) -> Any:
        module = f"coroutines_{tmp_path.name}"
        (tmp_path / f"{module}.py").write_text(THEIRS)
        monkeypatch.syspath_prepend(str(tmp_path))
        settings = Settings(
            handler={"target": f"{module}:{name}"},
            executor={"kind": kind, "workers": workers, "timeout": within},
        )
        modules.append(__import__(module))
        pool, _ = await start_pool(
            "default",
            settings.executor,
            settings.handler,
            settings.format,
            data_dir=tmp_path,
            on_restart=lambda _: None,
        )
        pools.append(pool)
        return pool, modules[-1].GO

    yield open_
    for module in modules:
        module.GO.set()
    for pool in pools:
        await pool.close(asyncio.get_running_loop().time() + 60)
    deadline = time.monotonic() + 60
    while [one for one in threading.enumerate() if one.name.startswith("default-loop")]:
        assert time.monotonic() < deadline, "what was left behind does not end"
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("name", HANGS)
async def test_a_call_that_does_not_come_back_frees_its_batch(opened, name: str) -> None:
    pool, _ = await opened(name)
    result = await asyncio.wait_for(pool.run(job(1)), 60)
    assert result.failure is not None
    assert result.failure.reason == "timeout"
    be_patient(pool)
    again = await asyncio.wait_for(pool.run(job(0)), 60)
    assert again.failure is None


async def test_a_module_that_cannot_be_loaded_any_more_costs_a_batch_no_try(
    opened, tmp_path: Path
) -> None:
    pool, _ = await opened("ignores", workers=1)
    (module,) = tmp_path.glob("coroutines_*.py")
    assert (await asyncio.wait_for(pool.run(job(1)), 60)).failure.reason == "timeout"
    be_patient(pool)
    sys.modules.pop(module.stem)
    module.write_text("broken(")
    failure = (await asyncio.wait_for(pool.run(job(0)), 60)).failure
    assert (failure.reason, failure.after) == (POSTPONED, START_AGAIN_SECONDS)
    module.write_text(THEIRS)
    assert (await asyncio.wait_for(pool.run(job(0)), 60)).failure is None


async def test_work_that_was_finished_after_all_counts(opened) -> None:
    pool, _ = await opened("finishes")
    for worker in pool.workers:
        worker._grace = 60.0
    assert (await asyncio.wait_for(pool.run(job(1)), 60)).failure is None


async def test_a_task_that_leaves_with_system_exit_does_not_end_the_loop(opened) -> None:
    pool, _ = await opened("leaves", within="20s")
    assert (await asyncio.wait_for(pool.run(job(1)), 60)).failure is None
    assert (await asyncio.wait_for(pool.run(job(1)), 60)).failure is None


async def test_what_nobody_awaits_may_be_anything(opened) -> None:
    pool, _ = await opened("ugly", within="20s")
    with capture_logs() as lines:
        assert (await asyncio.wait_for(pool.run(job(1)), 60)).failure is None
    told = [line["error"] for line in lines if line["log_level"] == "error"]
    assert [error.partition(":")[0].rpartition(".")[2] for error in told] == [
        "Ugly",
        "BaseException",
    ]  # each once


async def test_a_loop_that_was_closed_ends_its_calls_and_is_replaced(opened) -> None:
    pool, _ = await opened("closes", within="1h")
    failure = (await asyncio.wait_for(pool.run(job(1)), 60)).failure
    assert failure.error == "the handler cancelled its own task, or closed its loop"
    assert (await asyncio.wait_for(pool.run(job(0)), 60)).failure is None


async def test_a_constructor_that_cancels_its_own_task_is_like_one_that_fails(opened) -> None:
    pool, _ = await opened("CancelsAll", within="20s")
    assert (await asyncio.wait_for(pool.run(job(1)), 60)).failure is None


@pytest.mark.parametrize(("kind", "name"), [("thread", "Hangs"), ("async", "HangsAsync")])
async def test_a_constructor_that_hangs_ends_the_start(
    opened, monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    monkeypatch.setattr(build, "START_TIMEOUT", 0.05)
    with pytest.raises(HandlerLoadError, match="not loaded within"):
        await asyncio.wait_for(opened(name, kind=kind), 60)


@pytest.mark.parametrize(
    ("name", "bound"), [("ignores", "ABANDONED_MAX"), ("blocks", "RETIRED_MAX")]
)
async def test_what_is_left_behind_is_bounded(
    opened, monkeypatch: pytest.MonkeyPatch, name: str, bound: str
) -> None:
    monkeypatch.setattr(event_loops, bound, 2)
    if name == "ignores":  # its loop turns, however late
        answers = event_loops.HandlerLoop.answers
        monkeypatch.setattr(event_loops.HandlerLoop, "answers", lambda loop, _: answers(loop, 60))
    pool, go = await opened(name, workers=1, within="20ms")
    for _ in range(2):
        assert (await asyncio.wait_for(pool.run(job(1)), 60)).failure.reason == "timeout"
    with capture_logs() as lines:
        third = asyncio.ensure_future(pool.run(job(1)))
        async with asyncio.timeout(60):
            while "handler_not_abandoned" not in {line["event"] for line in lines}:
                await asyncio.sleep(0.01)
    done, _ = await asyncio.wait({third}, timeout=0.5)
    assert not done
    go.set()
    assert (await asyncio.wait_for(third, 60)).failure.reason == "timeout"
    be_patient(pool)
    assert (await asyncio.wait_for(pool.run(job(0)), 60)).failure is None


@pytest.mark.parametrize("name", HANGS)
@pytest.mark.slow
def test_signals_and_deadlines_hold(tmp_path: Path, name: str) -> None:
    """The first one drains until `drain.timeout`; the admin server answers meanwhile."""
    (tmp_path / "theirs.py").write_text(THEIRS)
    arguments = ("--executor.timeout", "1h", "--drain.timeout", "500ms")
    with daemon(f"theirs:{name}", *arguments, cwd=tmp_path) as one:
        assert one.post(b"1")[0] == 202
        while not one.status()["pipelines"]["default"]["batches"]["running"]:
            time.sleep(0.01)
        assert one.request("GET", "/livez", admin=True)[0] == 200
        one.terminate()
        assert one.wait(60) == 0
        assert one.event("drained_partly")["pending"] == 1


def test_a_second_signal_leaves_at_once(tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text(THEIRS)
    arguments = ("--executor.timeout", "1h", "--drain.timeout", "1h")
    with daemon("theirs:blocks", *arguments, cwd=tmp_path) as one:
        assert one.post(b"1")[0] == 202
        while not one.status()["pipelines"]["default"]["batches"]["running"]:
            time.sleep(0.01)
        one.terminate()
        one.event("drain_started")
        one.terminate(signal.SIGINT)
        assert one.wait(60) == 0
