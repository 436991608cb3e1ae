"""Order by key: the table of holders, and the ready queue that gives free batches alone."""

from __future__ import annotations

import asyncio
from itertools import count

import pytest

from ingestd.base.batch import SealedBatch
from ingestd.base.record import Records, Span
from ingestd.execution import key_order
from ingestd.execution.key_order import BatchKeys, KeyTable, OrderedQueue, grouped
from ingestd.execution.outage import Outage
from ingestd.execution.ready_queue import AHEAD_MAX, Load
from ingestd.execution.retry import RetryRecords

ONE = Load(1, 10)
numbers = count(1)


def batch(*keys: int, payload: bool = False) -> SealedBatch:
    number = next(numbers)
    made = SealedBatch(number, (Span(number, 0, 1),), 1, accepted_at=0.0)
    made.keys = frozenset(keys)
    made.records = Records.lines([b"1"]) if payload else None
    return made


def queue() -> tuple[OrderedQueue, list[str]]:
    emptied: list[str] = []
    outage = Outage(60.0, lambda: 0.5)
    made = OrderedQueue(
        waiting_max=Load(3, 10**6), outage=outage, on_empty=lambda: emptied.append("empty")
    )
    return made, emptied


async def soon(made: OrderedQueue) -> SealedBatch | None:
    """What `next` gives without waiting."""
    task = asyncio.ensure_future(made.next())
    for _ in range(3):
        await asyncio.sleep(0)
    if task.done():
        return task.result()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return None


# -- the table -------------------------------------------------------------------------------------


def test_a_batch_is_free_when_all_before_it_with_one_of_its_keys_have_left() -> None:
    table = KeyTable()
    one, two, both, other = batch(1), batch(2), batch(1, 2), batch(3)
    assert [table.enter(b) for b in (one, two, both, other)] == [
        set(), set(), {one.number, two.number}, set(),
    ]  # fmt: skip
    assert [table.is_free(b) for b in (one, two, both, other)] == [True, True, False, True]
    assert table.leave(one, []) == []
    assert table.leave(two, []) == [both]
    assert table.leave(both, []) == table.leave(other, []) == []
    assert table.size == 0


def test_successors_stand_in_the_place_of_their_batch_and_in_their_own_order() -> None:
    table = KeyTable()
    whole, behind, free = batch(1, 2, 3), batch(1), batch(3)
    for one in (whole, behind, free):
        table.enter(one)
    first, second = batch(1), batch(1, 2)
    assert table.leave(whole, [first, second]) == [free]  # none of them has its key
    assert [table.is_free(b) for b in (first, second, behind)] == [True, False, False]
    assert table.leave(first, []) == [second]
    assert table.leave(second, []) == [behind]


def test_a_batch_without_keys_waits_for_none() -> None:
    table = KeyTable()
    assert table.enter(batch()) == table.enter(last := batch()) == set()
    assert table.leave(last, []) == []


# -- the queue -------------------------------------------------------------------------------------


async def test_the_queue_looks_past_what_is_blocked() -> None:
    made, _ = queue()
    first, second, other = batch(1), batch(1), batch(2)
    for one in (first, second, other):
        await made.put(one)
    assert made.ahead == 3
    assert [await soon(made) for _ in range(3)] == [first, other, None]
    assert not made.empty  # there is one that a worker will get soon
    made.replaced(first)
    assert await soon(made) is second
    assert made.empty


async def test_what_stands_behind_a_wait_gives_its_payload_back_and_others_go_on() -> None:
    made, emptied = queue()
    given_back: list[SealedBatch] = []
    made.on_cold = given_back.append
    hours = asyncio.get_running_loop().time() + 7200
    failing, behind, further = batch(1, 2), batch(2, 3), batch(3)
    for one in (failing, behind, further):
        await made.put(one)
    assert await soon(made) is failing
    emptied.clear()
    made.park(failing, hours, ONE, asked=True)
    assert given_back == [behind, further]
    assert (made.empty, emptied) == (True, ["empty"])  # what waits in an open batch may be sealed
    await made.put(late := batch(3))
    assert given_back[-1] is late
    for _ in range(2 * AHEAD_MAX):  # many more than are sealed ahead of the workers
        await asyncio.wait_for(made.put(batch(1)), 60)
    await asyncio.wait_for(made.put(other := batch(4)), 60)
    assert [await soon(made), await soon(made)] == [other, None]
    assert made.ready_at == hours


async def test_parts_of_a_batch_are_tried_in_their_order() -> None:
    made, _ = queue()
    whole, behind = batch(1, 2), batch(2)
    for one in (whole, behind):
        await made.put(one)
    assert await soon(made) is whole
    now = asyncio.get_running_loop().time()
    first, second = batch(1, 2), batch(2)
    made.replaced(whole, [first, second])
    made.park(first, now, ONE)
    made.park(second, now + 3600, ONE)
    assert made.waiting == 2
    assert made.waiting_load == ONE  # the other one waits for the first, whatever its own wait is
    assert [await soon(made), await soon(made)] == [first, None]
    made.wake(now)
    made.replaced(first)
    assert await soon(made) is second
    made.replaced(second)
    assert await soon(made) is behind


async def test_a_batch_that_nothing_was_tried_of_may_stand_before_too_many_that_wait() -> None:
    """As when the key was set just now, and an earlier life had no order."""
    made, _ = queue()
    now = asyncio.get_running_loop().time()
    made.resume(first := batch(1))
    for _ in range(5):  # more than may wait
        made.park(batch(1), now - 1, ONE)
    assert await soon(made) is first


@pytest.mark.parametrize("bound", ["LOOK_AHEAD", "KEYS_MAX"])
async def test_the_batches_that_are_looked_past_are_bounded(monkeypatch, bound) -> None:
    monkeypatch.setattr(key_order, bound, 4)
    made, _ = queue()
    first = batch(1)
    await made.put(first)
    assert await soon(made) is first
    made.park(first, asyncio.get_running_loop().time() + 3600, ONE)
    while not made.is_long:
        await made.put(batch(1))
    assert made.ahead == (4 if bound == "LOOK_AHEAD" else 3)
    waits = asyncio.ensure_future(made.put(batch(2)))
    await asyncio.sleep(0)
    assert not waits.done()
    made.replaced(first)
    assert await soon(made) is not None
    await asyncio.wait_for(waits, 60)


# -- keys ------------------------------------------------------------------------------------------


async def test_keys_are_those_of_the_records_that_have_one() -> None:
    keys = BatchKeys("/k")
    lines = [b'{"k":"a"}', b'{"k":"b"}', b'{"k":null}', b"3", b'{"k":"a"}']
    assert len(await keys.of(Records.lines(lines))) == 2
    assert await keys.of(None) == frozenset()
    large = Records.lines(lines * 20_000)  # read in a thread
    assert await keys.of(large) == await keys.of(Records.lines(lines))
    keys.close()


def test_records_of_one_key_that_come_again_do_so_together() -> None:
    again = (RetryRecords((0, 2), 5.0), RetryRecords((1, 3, 4), 60.0))
    together = {RetryRecords((2,), 5.0), RetryRecords((0, 1, 3, 4), 60.0)}
    assert set(grouped([7, 7, 8, 9, None], again)) == together
    assert grouped([7, 8, 9, 1, 2], again) == again
    assert grouped([7, 7], again[:1]) == again[:1]
