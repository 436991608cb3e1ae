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

from ingestd.sources.progress import (
    Progress,
    ProgressSnapshot,
    _short,
    _summary,
    describe,
    seconds_left,
)
from tests.sources.source_tools import until


class Counter:
    """Grows a little each time it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self) -> ProgressSnapshot:
        self.asked += 1
        n = self.asked
        return ProgressSnapshot(n * 1000, n * 100_000, n * 900, n * 100, n * 800, n * 50, n * 50)


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
        r"[\d,]+ lines, [\d,]+ processed \([\d,]+/s\), [\d,]+ pending, [\d,]+ dead, "
        r"[\d,]+ invalid, \d+\.\d s\n",  # the size does not fit into 40 columns
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
    assert describe(ProgressSnapshot(1, size, 0, 0, 0, 0, 0), 0.0).endswith(f", {text}")


async def test_it_sleeps_between():
    count = Counter()
    progress = Progress(count, io.StringIO(), log_seconds=60)
    progress.start()
    for _ in range(10):
        await asyncio.sleep(0)
    assert count.asked == 1
    await progress.stop()


def test_downloads_show_their_urls_and_the_time_that_is_left():
    before = ProgressSnapshot(0, 1000, 0, 0, 0, 0, 0, 1, 20, 9000)
    now = ProgressSnapshot(5, 2000, 0, 0, 0, 0, 0, 2, 20, 8000)
    assert seconds_left(now, before, 0.5) == 4.0
    assert seconds_left(now, now, 0.5) is None
    assert seconds_left(now._replace(bytes_left=None), before, 0.5) is None
    assert describe(now, 10.0, 4.2).startswith("2/20 URLs, 4 s left, 5 lines, 0 processed (10/s)")
    assert describe(now, 10.0).startswith("2/20 URLs, 5 lines")


async def test_nothing_new_is_nothing_to_log():
    same = ProgressSnapshot(1, 2, 3, 4, 5, 6, 7)
    asked = []
    progress = Progress(lambda: asked.append(1) or same, io.StringIO(), log_seconds=0.001)
    with structlog.testing.capture_logs() as logs:
        progress.start()
        await until(lambda: len(asked) > 5)
        await progress.stop()
    (last,) = logs
    assert last["event"] == "input_summed_up"
    assert "urls_total" not in last


LARGE = ProgressSnapshot(
    lines=12_345_678, bytes=5 * 1024**3, accepted=12_345_000, invalid=678, processed=11_999_000,
    dead=1_000, pending=345_000,
)  # fmt: skip


@pytest.mark.parametrize("urls", [None, 12])
def test_the_line_fits_into_80_columns_with_every_number_that_matters(urls):
    now = LARGE._replace(urls_done=urls, urls_total=urls)
    line = describe(now, 574_529.4, 1234.5, width=79)
    assert len(line) <= 79
    ends = "345k pending" if urls else "345k pending, 1,000 dead, 678 invalid"
    assert line.endswith("12.3M lines, 12.0M processed (575k/s), " + ends)


def test_the_line_fits_into_any_width_and_keeps_what_matters():
    for width in range(1, 200):
        line = describe(LARGE, 574_529.4, width=width)
        assert len(line) <= width
        assert not line.endswith(",") or width < 12
    assert (
        describe(LARGE, 574_529.4, width=200)
        == describe(LARGE, 574_529.4)
        == (
            "12,345,678 lines, 11,999,000 processed (574,529/s), 345,000 pending, 1,000 dead, "
            "678 invalid, 5.0 GiB"
        )
    )
    assert describe(LARGE, 1.0, width=20) == "12.3M lines"
    few = LARGE._replace(lines=3, processed=3, pending=0, dead=0, invalid=0, bytes=30)
    assert describe(few, 1.0, width=79) == "3 lines, 3 processed (1/s), 0 pending, 30 B"


def test_the_summary_fits_into_80_columns_if_its_exact_numbers_do():
    now = ProgressSnapshot(284_055, 8_200_000, 284_054, 1, 284_054, 0, 0)
    fits = "284,055 lines, 284,054 processed (130,716/s), 0 pending, 1 invalid"
    assert _summary(now, 130_716, 2.2, 79) == f"{fits}, 2.2 s"
    assert _summary(now, 130_716, 2.2, 99) == f"{fits}, 7.8 MiB, 2.2 s"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"), (999, "999"), (9_999, "9,999"), (9_999.6, "10.0k"), (99_940, "99.9k"),
        (99_960, "100k"), (999_499, "999k"), (999_600, "1.0M"), (12_345_678, "12.3M"),
        (10**12, "1T"), (10**16, "10,000T"),
    ],
)  # fmt: skip
def test_short_numbers(count, text):
    assert _short(count) == text


async def test_the_rate_is_that_of_what_is_processed_also_when_all_is_read():
    """A run whose input has ended works off the rest: nothing is read, and the rate is not 0."""

    class Ticks:
        seconds = 0.0

        def monotonic(self):
            self.seconds += 1.0
            return self.seconds

    done = 0

    def backlog():
        nonlocal done
        done += 500
        return ProgressSnapshot(9000, 9000, 9000, 0, done, 0, 9000 - done)

    progress = Progress(backlog, io.StringIO(), clock=Ticks(), log_seconds=0.001)
    with structlog.testing.capture_logs() as logs:
        progress.start()
        await until(lambda: len(logs) >= 5)
        last = await progress.stop()
    assert {line["rate"] for line in logs} == {500}
    assert last.processed == done


def test_when_nothing_came_of_an_input():
    none = ProgressSnapshot(4, 9, 0, 4, 0, 0, 0)
    assert none.is_fruitless
    assert none._replace(processed=70).is_fruitless  # records of an earlier life
    all_dead = ProgressSnapshot(4, 9, 3, 1, 0, 3, 0)
    assert all_dead.is_fruitless
    assert not all_dead._replace(pending=1).is_fruitless
    assert not all_dead._replace(processed=1).is_fruitless
    assert not ProgressSnapshot(0, 9, 0, 0, 0, 0, 0).is_fruitless
