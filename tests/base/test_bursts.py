"""A thread that computes in bursts beside an event loop."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from ingestd.base.bursts import BURST_SECONDS, compute_beside, let_loop_go_first


def test_the_loop_takes_a_turn_between_bursts() -> None:
    """However busy the loop is: what it had to do is done before the thread goes on."""

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
        thread.join(10)
        loop.close()
    assert ended == [True, True]


def test_nothing_is_waited_for_where_there_is_no_loop() -> None:
    let_loop_go_first()
