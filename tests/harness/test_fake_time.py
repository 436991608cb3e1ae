"""The invariants of `ingestd/testing/fake_time.py`."""

from __future__ import annotations

import asyncio
import threading
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from ingestd.testing.fake_time import BEGIN, TICK, FakeClock, FakeTimeLoop

if TYPE_CHECKING:
    from collections.abc import Iterator

DAY = 86400.0


@pytest.fixture
def loop() -> Iterator[FakeTimeLoop]:
    loop = FakeTimeLoop()
    yield loop
    loop.close()


def test_timers_fire_in_their_order_at_their_time_and_take_none(loop: FakeTimeLoop) -> None:
    fired: list[tuple[float, float]] = []

    async def wait(seconds: float) -> None:
        await asyncio.sleep(seconds)
        fired.append((seconds, loop.time() - BEGIN))

    async def main() -> None:
        await asyncio.gather(*map(wait, (3 * DAY, 0.25, 7.5, 100 * DAY)))

    began = time.monotonic()
    loop.run_until_complete(main())
    assert [seconds for seconds, _ in fired] == [0.25, 7.5, 3 * DAY, 100 * DAY]
    assert all(0 <= at - seconds <= TICK for seconds, at in fired)
    assert time.monotonic() - began < DAY


def test_a_timeout_passes_at_once(loop: FakeTimeLoop) -> None:
    async def main() -> None:
        async with asyncio.timeout(3600):
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        loop.run_until_complete(main())
    assert loop.time() == BEGIN + 3600


def test_time_stands_still_while_a_thread_works(loop: FakeTimeLoop) -> None:
    may_end = threading.Event()

    async def main() -> tuple[float, float]:
        timer = loop.call_later(1.0, may_end.set)
        working = loop.run_in_executor(None, may_end.wait, 0.05)
        await working
        during = loop.time()
        await asyncio.sleep(0.5)
        timer.cancel()
        return during, loop.time()

    assert loop.run_until_complete(main()) == (BEGIN, BEGIN + 0.5)
    assert not may_end.is_set()


def test_time_stands_still_outside_and_while_something_is_busy(loop: FakeTimeLoop) -> None:
    async def woken_by_a_thread() -> float:
        come = asyncio.Event()
        thread = threading.Timer(0.02, loop.call_soon_threadsafe, (come.set,))
        thread.start()
        late = loop.call_later(0.25, come.set)
        await come.wait()
        late.cancel()
        thread.join()
        return loop.time()

    async def main() -> None:
        with loop.outside():
            assert await woken_by_a_thread() == BEGIN
        loop.busy = lambda: True
        assert await woken_by_a_thread() == BEGIN
        loop.busy = lambda: False
        assert await woken_by_a_thread() == BEGIN + 0.25

    loop.run_until_complete(main())


def test_quiet_comes_after_all_that_needs_no_time(loop: FakeTimeLoop) -> None:
    done: list[str] = []

    async def work() -> None:
        for step in range(5):
            await loop.run_in_executor(None, lambda: None)
            done.append(f"step {step}")
        await asyncio.sleep(1)
        done.append("later")

    async def main() -> None:
        task = loop.create_task(work())
        await loop.quiet()
        assert done == [f"step {step}" for step in range(5)]
        assert loop.time() == BEGIN
        await task

    loop.run_until_complete(main())


def test_a_stall_is_reported_and_wakes_quiet(loop: FakeTimeLoop) -> None:
    stalls: list[float] = []
    loop.patience = 0.01
    may_end = threading.Event()

    async def main() -> None:
        waiting = loop.run_in_executor(None, may_end.wait)
        loop.on_stall = lambda: stalls.append(loop.time())
        await loop.quiet()
        may_end.set()
        await waiting

    loop.run_until_complete(main())
    assert BEGIN in stalls


def test_a_wait_without_an_end_is_an_error(loop: FakeTimeLoop) -> None:
    async def main() -> None:
        await loop.create_future()

    task = loop.create_task(main())
    with pytest.raises(RuntimeError, match="will not come"):
        loop.run_until_complete(task)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        loop.run_until_complete(task)


def test_both_clocks_follow_the_loop(loop: FakeTimeLoop) -> None:
    begin = datetime(2030, 5, 1, tzinfo=UTC)
    clock = FakeClock(loop, begin)
    before = clock.monotonic()
    loop.run_until_complete(asyncio.sleep(90))
    assert clock.now() - begin.timestamp() == clock.monotonic() - before == 90
    loop.run_until_complete(asyncio.sleep(0.1))
    assert clock.now() - begin.timestamp() == clock.monotonic() - before
