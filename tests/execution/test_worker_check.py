"""A handler's `check()` in a process worker: asked once a start, and no reason not to start."""

from __future__ import annotations

import asyncio
import os
import socket
import textwrap
import time
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from ingestd.base.record import Records, Span
from ingestd.execution.pool import ThreadedPool
from ingestd.execution.process import ProcessWorker
from ingestd.handlers.outcome import FINDINGS_MAX, Job
from ingestd.handlers.runner import HandlerConfig, Runner
from ingestd.handlers.wire import InitMessage
from tests.cli.test_cli import ingestd
from tests.daemon.harness import daemon

if TYPE_CHECKING:
    from pathlib import Path

HANDLERS = """
    import os, time
    from ingestd.handlers.options import Options, Secret
    from ingestd.handlers.outcome import SinkFinding

    class Base:
        def __call__(self, batch: list): pass

    class WrongOptions(Options, frozen=True, kw_only=True):
        password: Secret = Secret("")

    class Wrong(Base):
        def __init__(self, options: WrongOptions): self.password = options.password
        def check(self):
            yield SinkFinding("info", f"connected with {self.password}")
            yield SinkFinding("error", "there is no table records")

    class Hangs(Base):
        def check(self): time.sleep(600)

    class Dies(Base):
        def check(self): os._exit(3)

    class Down(Base):
        def check(self): raise ConnectionRefusedError("nobody listens")

    class Endless(Base):
        def check(self):
            while True: yield SinkFinding("info", "\\N{GRINNING FACE}" * 10_000)

    class Odd(Base):
        def check(self): return ["a text", SinkFinding("fatal", "x")]

    class Nothing(Base):
        def check(self): return None

    class Own(Base):
        def check(self, record): raise AssertionError("it is the user's own")
"""
JOB = Job("j-1", 1, Records.lines([b"1"]), [Span(1, 0, 1)], "j")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the handlers, importable."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "checked_handlers.py").write_text(textwrap.dedent(HANDLERS))
    return tmp_path


def config(name: str) -> HandlerConfig:
    return HandlerConfig(f"checked_handlers:{name}", {}, "json", "process", "default", b"data")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("Down", [("error", "ConnectionRefusedError: nobody listens")]),
        ("Odd", [("warning", "the handler's check() gives something that is no SinkFinding")] * 2),
        ("Nothing", []),
        ("Own", []),
        ("Base", []),
    ],
)
@pytest.mark.usefixtures("here")
def test_what_a_check_may_give(name: str, found: list[tuple[str, str]]) -> None:
    runner = Runner(config(name))
    runner.prepare()
    assert [tuple(one) for one in runner.check()] == found


async def checked(name: str, seconds: float = 30.0) -> tuple[list[tuple[str, str]], list[str]]:
    """Serves a job behind the check; the findings that were logged, and why children went."""
    restarts: list[str] = []
    hello = InitMessage(config(name), os.getpid(), checks=True)
    worker = ProcessWorker("w-0", hello, timeout=seconds, on_restart=restarts.append)
    pool = ThreadedPool([worker])
    with structlog.testing.capture_logs() as logs:
        await pool.start()
        try:
            for _ in range(2):
                await pool.acquire()
                result = await asyncio.wait_for(pool.run(JOB), 120)
                assert result.failure is None
                pool.release()
        finally:
            assert await pool.close(asyncio.get_running_loop().time() + 60)
    told = [(one["log_level"], one["finding"]) for one in logs if one["event"] == "sink_checked"]
    return told, restarts


@pytest.mark.slow
@pytest.mark.usefixtures("here")
async def test_findings_come_from_the_child_and_cost_no_job() -> None:
    assert await checked("Wrong") == (
        [("info", "connected with"), ("error", "there is no table records")],
        [],
    )
    told, restarts = await checked("Endless")
    assert (len(told), restarts) == (FINDINGS_MAX, [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "seconds", "why", "restart"),
    [
        ("Hangs", 4.0, "the worker was killed after 4 s", "timeout"),
        ("Dies", 30.0, "the worker exited with code 3", "crashed"),
    ],
)
@pytest.mark.usefixtures("here")
async def test_a_check_that_costs_the_child_is_a_finding(
    name: str, seconds: float, why: str, restart: str
) -> None:
    assert await checked(name, seconds) == ([("error", f"in its check() {why}")], [restart])


@pytest.mark.slow
@pytest.mark.usefixtures("here")
async def test_a_check_that_hangs_delays_neither_start_nor_end() -> None:
    hello = InitMessage(config("Hangs"), os.getpid(), checks=True)
    worker = ProcessWorker("w-0", hello, timeout=600.0, on_restart=lambda _: None)
    pool = ThreadedPool([worker])
    await asyncio.wait_for(pool.start(), 60)
    began = time.monotonic()
    with structlog.testing.capture_logs() as logs:
        assert await pool.close(asyncio.get_running_loop().time() + 600)
    assert time.monotonic() - began < 60
    assert [one["event"] for one in logs] == []


@pytest.mark.slow
def test_a_start_tells_what_check_tells(here: Path) -> None:
    options = ("--handler.options.password", "hidden-from-all")
    run = ingestd("check", "checked_handlers:Wrong", *options, "--connect", cwd=here)
    assert run.returncode == 78
    assert "# default: error: there is no table records\n" in run.stdout
    with daemon("checked_handlers:Wrong", *options, cwd=here) as one:
        assert one.post(b"1")[0] == 202
        assert one.until_settled()["processed"] == 1

        def told() -> list[dict[str, Any]]:
            return [event for event in one.events if event["event"] == "sink_checked"]

        # The other worker may have had the record while this one was checked.
        deadline = time.monotonic() + 60
        while len(told()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert [(event["level"], event["finding"]) for event in told()] == [
        ("info", "connected with ***"),
        ("error", "there is no table records"),
    ]
    assert {event["worker"] for event in told()} == {"default-worker-0"}


@pytest.mark.slow
def test_a_sink_that_is_down_is_told_and_the_daemon_accepts(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        options = ("--handler.options.url", url, "--executor.kind", "process")
        with daemon("http", *options, cwd=tmp_path) as one:
            assert one.post(b"1")[0] == 202
            told = one.event("sink_checked")
            assert told["level"] == "error"
            assert told["worker"] == "default-worker-0"
            assert url in told["finding"]
            one.event("batch_failed")
            assert one.status()["pipelines"]["default"]["pending"] == 1
            assert len([event for event in one.events if event["event"] == "sink_checked"]) == 1
