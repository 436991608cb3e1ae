"""A thread that computes in bursts beside an event loop."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ingestd.base import bursts
from ingestd.base.bursts import (
    BURST_SECONDS,
    TRIP_SECONDS,
    ComputeThread,
    compute_beside,
    let_loop_go_first,
)


def test_the_loop_takes_a_turn_between_bursts(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the loop is: what it had to do is done before the thread goes on."""
    # On a busy machine a loop that has its turn may not come to it for as long as it is waited for.
    monkeypatch.setattr(bursts, "TURN_SECONDS_MAX", 60.0)

    async def run() -> list[int]:
        loop = asyncio.get_running_loop()
        turns = 0
        seen: list[int] = []

        def turn() -> None:
            nonlocal turns
            turns += 1
            loop.call_soon(turn)

        def compute() -> None:
            for _ in range(20):
                let_loop_go_first()
                seen.append(turns)
                end = time.thread_time() + BURST_SECONDS * 1.5
                while time.thread_time() < end:
                    pass

        with ThreadPoolExecutor(1, initializer=compute_beside, initargs=(loop,)) as pool:
            loop.call_soon(turn)
            await loop.run_in_executor(pool, compute)
        return seen

    seen = asyncio.run(run())
    assert all(after > before for before, after in itertools.pairwise(seen[1:]))


def test_a_loop_that_is_closed_or_stands_still_keeps_no_thread() -> None:
    loop = asyncio.new_event_loop()
    ended = []

    def compute() -> None:
        compute_beside(loop)
        let_loop_go_first()
        while time.thread_time() < 2 * BURST_SECONDS:
            pass
        let_loop_go_first()
        ended.append(True)

    for _ in range(2):
        thread = threading.Thread(target=compute, daemon=True)
        thread.start()
        thread.join(60)
        loop.close()
    assert ended == [True, True]


def test_nothing_is_waited_for_where_there_is_no_loop() -> None:
    let_loop_go_first()


# -- calls that go together ------------------------------------------------------------------------


async def test_calls_that_wait_go_and_come_back_together() -> None:
    """In their order; an error is that of its call alone."""
    thread = ComputeThread("compute", asyncio.get_running_loop())
    begin, made = threading.Event(), list[int]()

    def make(number: int) -> str:
        made.append(number)
        if number == 2:
            raise ValueError("two")
        return f"{number} in {threading.current_thread().name}"

    first = thread.run(begin.wait)
    futures = [thread.run(make, number) for number in range(4)]
    done: list[int] = []
    for number, future in enumerate(futures):
        future.add_done_callback(lambda _, number=number: done.append(number))
    begin.set()
    assert await first
    results = await asyncio.gather(*futures, return_exceptions=True)
    thread.close()
    assert made == done == [0, 1, 2, 3]
    assert [str(one) for one in results] == [
        "0 in compute_0", "1 in compute_0", "two", "3 in compute_0",
    ]  # fmt: skip


async def test_a_trip_ends_in_time_and_the_rest_is_the_next_one() -> None:
    thread = ComputeThread("compute", asyncio.get_running_loop())
    begin = threading.Event()
    futures = list[asyncio.Future[int]]()

    def compute() -> int:
        came_back = sum(one.done() for one in futures)
        end = time.monotonic() + 1.5 * TRIP_SECONDS
        while time.monotonic() < end:
            pass
        return came_back

    first = thread.run(begin.wait)
    futures += [thread.run(compute) for _ in range(4)]
    begin.set()
    await first
    assert await asyncio.gather(*futures) == [0, 1, 2, 3]
    thread.close()


async def test_what_is_cancelled_does_not_begin_and_a_closed_thread_takes_nothing() -> None:
    thread = ComputeThread("compute", asyncio.get_running_loop())
    begin, made = threading.Event(), list[str]()
    first = thread.run(begin.wait)
    cancelled, kept = thread.run(made.append, "cancelled"), thread.run(made.append, "kept")
    cancelled.cancel()
    begin.set()
    await asyncio.gather(first, kept)
    assert made == ["kept"]
    begin.clear()
    is_there = threading.Event()
    begun = thread.run(lambda: is_there.set() or begin.wait())
    waits = thread.run(made.append, "waits")
    is_there.wait()
    thread.close()
    with pytest.raises(asyncio.CancelledError):
        await waits
    with pytest.raises(RuntimeError, match="closed"):
        thread.run(made.append, "late")
    begin.set()
    assert await begun
    assert made == ["kept"]
