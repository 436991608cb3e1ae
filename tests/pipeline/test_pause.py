"""A paused pipeline accepts records and gives none to its handler, until it is resumed."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.admin.status import status_of
from ingestd.base.append import Append
from ingestd.base.errors import DataDirError
from ingestd.execution.dispatch_control import PAUSED, PauseMark
from tests.daemon.harness import daemon
from tests.pipeline import recording
from tests.pipeline.test_pipeline import HANDLER, drained, numbers, records_of, until

if TYPE_CHECKING:
    from pathlib import Path


async def one(start: Any, folder: Path, handler: str = "Note", **more: Any) -> Any:
    return await start(
        HANDLER + handler,
        executor={"kind": "thread", "workers": 1},
        batch={"records_max": 10, "age_max": "1ms"},
        options={"folder": str(folder)},
        **more,
    )


async def test_it_holds_through_a_restart_and_a_drain_leaves_the_records(start, tmp_path) -> None:
    pipeline = await one(start, tmp_path)
    await pipeline.pause()
    await pipeline.pause()
    for n in range(5):
        await pipeline.accept(Append(numbers(10 * n, 10)))
    await until(lambda: pipeline.dispatcher.queue.ahead == 5)
    status = status_of(pipeline)
    assert (status.paused, status.is_stopped, status.dispatch_stopped) == (True, False, PAUSED)
    assert status.paused_since is not None
    report = await drained(pipeline)  # without a deadline: it would never end
    assert (report.counted, report.durable, report.balanced) == (50, True, True)
    pipeline = await one(start, tmp_path)
    await until(lambda: pipeline.dispatcher.queue.ahead == 5)
    assert status_of(pipeline).paused_since == status.paused_since
    assert recording.calls(tmp_path) == []
    await pipeline.resume()
    report = await drained(pipeline)
    assert (sorted(records_of(tmp_path)), report.ledger.pending) == (list(range(50)), 0)


async def test_batches_with_a_worker_are_finished_and_waited_for(start, tmp_path) -> None:
    pipeline = await one(start, tmp_path, "Gate")
    for n in range(5):
        await pipeline.accept(Append(numbers(10 * n, 10)))
    # One is with the worker and one lies ready before it.
    await until(lambda: recording.calls(tmp_path) and pipeline.dispatcher.running == 2)
    await pipeline.pause()
    draining = asyncio.ensure_future(pipeline.drain(None))
    await asyncio.sleep(0)
    assert not draining.done()
    (tmp_path / "open").touch()
    await draining
    report = await pipeline.close()
    assert (report.ledger.processed, report.counted) == (20, 30)


async def test_a_drain_that_waits_is_told_of_a_pause(start, tmp_path) -> None:
    pipeline = await one(start, tmp_path, "Fails", retry={"backoff": "1h", "backoff_max": "1h"})
    await pipeline.accept(Append(numbers(0, 10)))
    await until(lambda: pipeline.dispatcher.queue.waiting == 1)
    draining = asyncio.ensure_future(pipeline.drain(None))
    await asyncio.sleep(0)
    assert not draining.done()
    await pipeline.pause()
    async with asyncio.timeout(60):
        await draining
    assert (await pipeline.close()).counted == 10


async def test_another_process_marks_it_beside_the_running_pipeline(start, tmp_path) -> None:
    pipeline = await one(start, tmp_path)
    PauseMark(tmp_path).put()
    await pipeline.dispatcher.control.poll()
    await pipeline.accept(Append(numbers(0, 10)))
    await until(lambda: pipeline.dispatcher.queue.ahead == 1)
    PauseMark(tmp_path).remove()
    await pipeline.dispatcher.control.poll()
    await drained(pipeline)
    assert records_of(tmp_path) == list(range(10))


async def test_a_pause_that_cannot_be_kept_is_none(start, tmp_path) -> None:
    pipeline = await one(start, tmp_path)
    (tmp_path / "paused").mkdir()  # also a pause, and nothing that `resume` could remove
    await pipeline.pause()
    with pytest.raises(DataDirError, match="paused can't be changed"):
        await pipeline.resume()
    assert status_of(pipeline).paused
    (tmp_path / "paused").rmdir()
    await pipeline.resume()
    assert not status_of(pipeline).paused


# -- the commands, beside a real daemon ------------------------------------------------------------


def ingestd(*args: str, cwd: Path, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "ingestd", *args], cwd=cwd, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == code, (done.stdout, done.stderr)
    return done.stdout + done.stderr


@pytest.mark.slow
def test_the_commands_work_beside_a_daemon_and_without_one(tmp_path: Path) -> None:
    flags = ("--batch.age_max", "1ms", "--pipelines.other.handler.target", "jsonl")
    there = ("--data-dir", "ingestd-data")
    assert "there is no such folder" in ingestd("pause", cwd=tmp_path, code=78)
    with daemon(*flags, cwd=tmp_path) as running:
        assert ingestd("pause", "default", *there, cwd=tmp_path) == "default: paused\n"
        running.event("dispatch_stopped")
        assert running.post(b"1\n2\n")[0] == 202
        assert running.post(b"3\n", "/v1/records/other")[0] == 202
        running.until_settled("other")
        assert running.status()["pipelines"]["default"]["paused"]
        assert running.request("GET", "/readyz", admin=True)[0] == 200
        page = running.request("GET", "/metrics", admin=True)[2]
        assert b'ingestd_pipeline_paused{pipeline="default"} 1.0' in page
        assert b'ingestd_dispatch_stopped{pipeline="default"} 0.0' in page
        running.terminate()
        assert running.wait() == 0
        assert running.event("drained_partly")["pending"] == 2
    assert "was paused already, since 20" in ingestd("pause", "default", *there, cwd=tmp_path)
    with daemon(*flags, cwd=tmp_path) as running:
        assert running.status()["pipelines"]["default"]["pending"] == 2
        assert running.event("dispatch_stopped")["reason"] == "paused"
        # Without a name it is all of them.
        text = "default: resumed\nother: was not paused\n"
        assert ingestd("resume", *there, cwd=tmp_path) == text
        running.event("dispatch_resumed")
        running.until_settled()
        running.terminate()
        assert running.wait() == 0
    assert "no pipeline 'none'" in ingestd("pause", "none", *there, cwd=tmp_path, code=2)
