"""The line before the workers: due retries first, then new batches in order."""

from __future__ import annotations

import asyncio

import pytest

from ingestd.execution.outage import Outage
from ingestd.execution.ready_queue import AHEAD_MAX, Load, ReadyQueue

ONE = Load(1, 10)


def line(
    waiting_max: int = 3, *, bytes_max: int = 10**6, outage: Outage | None = None
) -> tuple[ReadyQueue[str], list[str]]:
    emptied: list[str] = []
    made: ReadyQueue[str] = ReadyQueue(
        waiting_max=Load(waiting_max, bytes_max),
        outage=outage or Outage(60.0, lambda: 0.5),
        on_empty=lambda: emptied.append("empty"),
    )
    return made, emptied


async def soon(line: ReadyQueue[str]) -> str | None:
    """What `next` gives without waiting."""
    task = asyncio.ensure_future(line.next())
    for _ in range(3):
        await asyncio.sleep(0)
    if task.done():
        return task.result()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return None


async def test_new_batches_come_in_order_and_the_last_one_is_announced() -> None:
    made, emptied = line()
    await made.put("a")
    await made.put("b")
    assert not made.empty
    assert await soon(made) == "a"
    assert emptied == []
    assert await soon(made) == "b"
    assert emptied == ["empty"]
    assert await soon(made) is None


async def test_a_due_retry_goes_first_and_an_early_one_waits() -> None:
    made, _ = line()
    now = asyncio.get_running_loop().time()
    await made.put("new")
    made.park("late", now + 3600, ONE)
    made.park("due", now - 1, ONE)
    assert made.could_give(now)
    assert await soon(made) == "due"
    assert await soon(made) == "new"
    assert await soon(made) is None
    assert made.waiting == 1


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("other", ["new", "failed"])
async def test_what_is_always_due_and_all_else_are_given_by_turns(other: str, paused: bool) -> None:
    """Batches that ask to be tried again at once, each time, for ever."""
    outage = Outage(60.0, lambda: 0.5)
    made, _ = line(waiting_max=100, outage=outage)
    now = asyncio.get_running_loop().time()
    for batch in (1, 2) if paused else ():
        outage.failed(batch, batch, now - 1, fresh=True)
    for n in range(3):
        if other == "new":
            await made.put(f"other-{n}")
        else:
            made.park(f"other-{n}", now - 1 + n / 10, ONE)
    given = []
    for n in range(8):
        made.park(f"asked-{n}", now - 2, ONE, asked=True)
        given.append((await soon(made) or "nothing").partition("-")[0])
    assert given == ["asked", "other"] * 3 + ["asked", "asked"]


async def test_a_retry_wakes_who_waits_when_it_is_due() -> None:
    made, _ = line()
    task = asyncio.ensure_future(made.next())
    await asyncio.sleep(0)
    made.park("later", asyncio.get_running_loop().time() + 0.02, ONE)
    assert await asyncio.wait_for(task, 60) == "later"


async def test_too_many_waiting_hold_new_ones_back() -> None:
    made, _ = line(waiting_max=2)
    now = asyncio.get_running_loop().time()
    await made.put("new")
    made.park("x", now + 3600, ONE)
    assert await soon(made) == "new"
    await made.put("newer")
    made.park("y", now + 3600, ONE)
    assert await soon(made) is None
    made.park("z", now - 1, ONE)
    assert await soon(made) == "z"
    assert await soon(made) is None


async def test_the_line_is_bounded() -> None:
    made, _ = line()
    for n in range(AHEAD_MAX):
        await made.put(str(n))
    task = asyncio.ensure_future(made.put("one more"))
    await asyncio.sleep(0)
    assert not task.done()
    assert await made.next() == "0"
    await asyncio.wait_for(task, 60)
    assert made.ahead == AHEAD_MAX


async def test_batches_of_an_earlier_life_count_as_new_ones() -> None:
    made, _ = line()
    for n in range(AHEAD_MAX):
        made.resume(f"old-{n}")
    assert made.is_long
    waiting = asyncio.ensure_future(made.put("new"))
    await asyncio.sleep(0)
    assert not waiting.done()
    assert await soon(made) == "old-0"
    await waiting
    assert made.ahead == AHEAD_MAX


@pytest.mark.parametrize("end", ["succeeded", "failed", "answered", "nothing_fails"])
async def test_a_wait_for_a_probe_ends_with_the_probe(end: str) -> None:
    """Nothing else happens to the line: a success parks no batch, and adds none."""
    outage = Outage(60.0, lambda: 0.5)
    made, _ = line(outage=outage)
    now = asyncio.get_running_loop().time()
    for batch in (1, 2):
        outage.failed(batch, batch, now, fresh=True)
    outage.started(1, now)
    await made.put("new")
    asked = asyncio.ensure_future(made.next())
    await asyncio.sleep(0)
    assert not asked.done()
    match end:
        case "succeeded":
            outage.succeeded()
        case "failed":
            outage.failed(1, 1, now, fresh=True)
        case "answered":
            outage.answered(1)
        case _:
            outage.nothing_fails()
    async with asyncio.timeout(30):  # the probe's own time is longer
        assert await asked == "new"


async def test_while_paused_the_lowest_rank_of_those_that_wait_is_tried_first() -> None:
    outage = Outage(60.0, lambda: 0.5)
    made, _ = line(10, outage=outage)
    now = asyncio.get_running_loop().time()
    for batch in (1, 2):
        outage.failed(batch, batch, now - 3600, fresh=True)
    made.park("due first", now, ONE, rank=4)
    made.park("due later", now + 60, ONE, rank=4)
    made.park("nearest to be split", now + 70, ONE, rank=1)
    made.park("a part", now + 80, ONE, rank=0)
    order = [await soon(made) for _ in range(4)]
    assert order == ["a part", "nearest to be split", "due first", "due later"]
    assert made.waiting_load == Load(0, 0)
