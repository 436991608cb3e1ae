"""The executor `auto`: what it picks, and that the daemon stays out of the user's module."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import TYPE_CHECKING

import pytest

from ingestd.base.record import Records, Span
from ingestd.execution.build import start_pool
from ingestd.handlers.outcome import Job
from ingestd.settings import Settings
from tests.daemon.harness import daemon

if TYPE_CHECKING:
    from pathlib import Path

    from ingestd.base.record import Format
    from ingestd.execution.settings import ExecutorSettings, HandlerSettings

THEIRS = """\
import os
from pathlib import Path

HERE = Path(__file__).parent
with open(HERE / "imported", "a") as said:
    said.write(f"{os.getpid()}\\n")

def said(batch):
    with open(HERE / "called", "a") as called:
        called.write(f"{os.getpid()}\\n")

def function(batch: list[int]) -> None:
    said(batch)

async def coroutine(batch: list[int]) -> None:
    said(batch)

class Plain:
    def __call__(self, batch: list[int]) -> None:
        said(batch)

class Awaited:
    def __init__(self) -> None:
        with open(HERE / "made", "a") as made:
            made.write(f"{os.getpid()}\\n")

    async def __call__(self, batch: list[int]) -> None:
        said(batch)
"""


def pids(folder: Path, name: str) -> set[int]:
    return {int(line) for line in (folder / name).read_text().split()}


def settings_for(target: str) -> tuple[ExecutorSettings, HandlerSettings, Format]:
    settings = Settings(handler={"target": target}, executor={"workers": 2})
    return settings.executor, settings.handler, settings.format


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("function", "process"),
        ("Plain", "process"),
        ("coroutine", "async"),
        ("Awaited", "async"),
    ],
)
async def test_what_a_handler_of_the_users_runs_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, expected: str
) -> None:
    module = f"auto_{name}"
    (tmp_path / f"{module}.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(str(tmp_path))
    pool, kind = await start_pool(
        "default", *settings_for(f"{module}:{name}"), data_dir=tmp_path, on_restart=lambda _: None
    )
    try:
        assert kind == expected
        await pool.acquire()
        result = await pool.run(Job("j-1", 1, Records.sized([b"1"]), [Span(1, 0, 1)], "j"))
        assert result.failure is None
    finally:
        assert await pool.close(asyncio.get_running_loop().time() + 60)
    here = os.getpid()
    assert (pids(tmp_path, "called") == {here}) == (expected == "async")
    assert (here in pids(tmp_path, "imported")) == (expected == "async")
    assert (module in sys.modules) == (expected == "async")
    if name == "Awaited":
        assert pids(tmp_path, "made") == {here}  # not in the processes that looked at it


@pytest.mark.parametrize("target", ["jsonl", "ingestd.sinks.jsonl:JsonlSink"])
async def test_a_sink_that_comes_with_us_runs_in_threads(tmp_path: Path, target: str) -> None:
    pool, kind = await start_pool(
        "default", *settings_for(target), data_dir=tmp_path, on_restart=lambda _: None
    )
    assert await pool.close(asyncio.get_running_loop().time() + 60)
    assert kind == "thread"


def test_log_and_status_say_what_was_chosen(tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text(THEIRS)
    with daemon("theirs:coroutine", cwd=tmp_path) as one:
        assert one.event("daemon_started")["executors"] == {"default": "async"}
        assert one.status()["pipelines"]["default"]["executor"] == "async"
    with daemon("theirs:function", cwd=tmp_path) as one:
        assert one.event("daemon_started")["executors"] == {"default": "process"}
        assert one.post(b"1")[0] == 202
        assert one.until_settled()["processed"] == 1, one.events
        assert one.process.pid not in pids(tmp_path, "called")
