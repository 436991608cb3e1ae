"""Progress: a live line on a terminal, log lines elsewhere, a summary in any case."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import pty
import re

import pytest
import structlog

from ingestd.sources.progress import Progress, ProgressSnapshot, describe, seconds_left
from tests.sources.source_tools import until


class Counter:
    """Grows a little each time it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self) -> ProgressSnapshot:
        self.asked += 1
        n = self.asked
        return ProgressSnapshot(n * 1000, n * 100_000, n * 900, n * 800, n * 100, n * 100)


@pytest.fixture
def terminal():
    leader, follower = pty.openpty()
    os.set_blocking(leader, False)
    with os.fdopen(follower, "w") as stream:
        yield leader, stream
    os.close(leader)


async def test_on_a_terminal(terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    leader, stream = terminal
    count = Counter()
    progress = Progress(count, stream, live_seconds=0.001)
    with structlog.testing.capture_logs() as logs:
        progress.start()
        await until(lambda: count.asked > 5)
        await progress.stop()
        await progress.stop()
    drawn = bytearray()

    def complete() -> bool:
        with contextlib.suppress(BlockingIOError):
            drawn.extend(os.read(leader, 100_000))
        return drawn.endswith(b" s\r\n")

    await until(complete)
    lines = drawn.decode().replace("\r\n", "\n").split("\r\x1b[K")
    assert lines[0] == ""
    assert len(lines) >= 5
    assert all(len(line) <= 39 and "\n" not in line for line in lines[1:-1])
    assert re.fullmatch(
        r"[\d,]+ lines, [\d,]+/s, \d+\.\d KiB: [\d,]+ processed, [\d,]+ pending, [\d,]+ dead, "
        r"[\d,]+ accepted, \d+\.\d s\n",
        lines[-1],
    )
    assert not logs


async def test_elsewhere():
    stream = io.StringIO()
    count = Counter()
    progress = Progress(count, stream, log_seconds=0.001)
    with structlog.testing.capture_logs() as logs:
        progress.start()
        await until(lambda: len(logs) >= 2)
        await progress.stop()
    assert stream.getvalue() == ""
    assert {line["event"] for line in logs[:-1]} == {"input_progressed"}
    last = logs[-1]
    assert last["event"] == "input_summed_up"
    assert last["lines"] == count.asked * 1000
    assert last["rate"] > 0


async def test_a_short_run_has_its_summary():
    with structlog.testing.capture_logs() as logs:
        progress = Progress(Counter(), io.StringIO())
        progress.start()
        await progress.stop()
    assert [line["event"] for line in logs] == ["input_summed_up"]


async def test_a_terminal_that_goes_away_stops_nothing():
    leader, follower = pty.openpty()
    stream = os.fdopen(follower, "w")
    count = Counter()
    progress = Progress(count, stream, live_seconds=0.001)
    progress.start()
    os.close(leader)
    with structlog.testing.capture_logs() as logs:
        await until(lambda: logs)
        await progress.stop()
    assert logs[-1]["event"] == "input_summed_up"
    with pytest.raises(OSError, match="error"):
        stream.close()


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (5 * 1024**3, "5.0 GiB"),
        (2**51, "2048.0 TiB"),
    ],
)
def test_sizes(size, text):
    assert f", {text}:" in describe(ProgressSnapshot(1, size, 0, 0, 0, 0), 0.0)


async def test_it_sleeps_between():
    count = Counter()
    progress = Progress(count, io.StringIO(), log_seconds=60)
    progress.start()
    for _ in range(10):
        await asyncio.sleep(0)
    assert count.asked == 1
    await progress.stop()


def test_downloads_show_their_urls_and_the_time_that_is_left():
    before = ProgressSnapshot(0, 1000, 0, 0, 0, 0, 1, 20, 9000)
    now = ProgressSnapshot(5, 2000, 0, 0, 0, 0, 2, 20, 8000)
    assert seconds_left(now, before, 0.5) == 4.0
    assert seconds_left(now, now, 0.5) is None
    assert seconds_left(now._replace(bytes_left=None), before, 0.5) is None
    assert describe(now, 10.0, 4.2).startswith("2/20 URLs, about 4 s left, 5 lines, 10/s, 2.0 KiB:")
    assert describe(now, 10.0).startswith("2/20 URLs, 5 lines")


async def test_nothing_new_is_nothing_to_log():
    same = ProgressSnapshot(1, 2, 3, 4, 5, 6)
    asked = []
    progress = Progress(lambda: asked.append(1) or same, io.StringIO(), log_seconds=0.001)
    with structlog.testing.capture_logs() as logs:
        progress.start()
        await until(lambda: len(asked) > 5)
        await progress.stop()
    (last,) = logs
    assert last["event"] == "input_summed_up"
    assert "urls_total" not in last
