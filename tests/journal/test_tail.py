"""The tail gives every chunk once and in order, from memory or from disk."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingestd.base.append import Append
from ingestd.base.clock import SystemClock
from ingestd.base.record import Records
from ingestd.journal.memory import MemoryJournal
from ingestd.journal.reader import FRESH_MAX, ChunkReader, MemoryBudget


async def _journal(tails: list[ChunkReader]) -> MemoryJournal:
    journal = MemoryJournal(bytes_max=1 << 30, clock=SystemClock())
    await journal.open(lambda chunk: tails[0].push(chunk))  # noqa: PLW0108  not there yet
    return journal


async def test_fresh_chunks_come_from_memory() -> None:
    tails: list[ChunkReader] = []
    journal = await _journal(tails)
    room = MemoryBudget(1000)
    tails.append(ChunkReader(journal, room, first=1, last=0))
    await journal.append(Append(Records.lines([b"1"])))
    assert room.bytes == 2
    chunk = await tails[0].next()
    assert chunk.id == 1
    assert tails[0].waiting == 0


async def test_a_reader_waits_for_the_next_chunk() -> None:
    tails: list[ChunkReader] = []
    journal = await _journal(tails)
    tails.append(ChunkReader(journal, MemoryBudget(1000), first=1, last=0))
    waiting = asyncio.ensure_future(tails[0].next())
    await asyncio.sleep(0)
    assert not waiting.done()
    await journal.append(Append(Records.lines([b"1"])))
    assert (await asyncio.wait_for(waiting, 60)).id == 1


@given(
    steps=st.lists(st.sampled_from(["push", "take", "free"]), max_size=80),
    bound=st.integers(1, 60),
)
@settings(max_examples=200)
def test_whatever_the_order_every_chunk_comes_once(steps: list[str], bound: int) -> None:
    async def scenario() -> None:
        tails: list[ChunkReader] = []
        journal = await _journal(tails)
        room = MemoryBudget(bound)
        tail = ChunkReader(journal, room, first=1, last=0)
        tails.append(tail)
        pushed, held, got = 0, [], []
        for step in steps:
            if step == "push":
                pushed += 1
                await journal.append(Append(Records.lines([b"%09d" % pushed])))
            elif step == "take":
                task = asyncio.ensure_future(tail.next())
                for _ in range(4):
                    await asyncio.sleep(0)
                if task.done():
                    held.append(task.result())
                    got.append(task.result().id)
                else:
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
            elif held:
                room.free(len(held.pop(0).records.payload))
        while len(got) < pushed:
            for chunk in held:
                room.free(len(chunk.records.payload))
            held.clear()
            held.append(await asyncio.wait_for(tail.next(), 60))
            got.append(held[-1].id)
        assert got == list(range(1, pushed + 1))
        await asyncio.wait_for(tail.emptied(), 60)

    asyncio.run(scenario())


async def test_small_chunks_in_memory_are_bounded_by_their_number() -> None:
    tails: list[ChunkReader] = []
    journal = await _journal(tails)
    tail = ChunkReader(journal, MemoryBudget(1 << 30), first=1, last=0)
    tails.append(tail)
    for _ in range(FRESH_MAX + 10):
        await journal.append(Append(Records.lines([b"1"])))
    assert len(tail._fresh) == FRESH_MAX
    ids = [(await tail.next()).id for _ in range(FRESH_MAX + 10)]
    assert ids == list(range(1, FRESH_MAX + 11))


async def test_room_lets_one_oversized_thing_in() -> None:
    room = MemoryBudget(10)
    assert room.has(50)
    room.take(50)
    assert not room.has(1)
    waiting = asyncio.ensure_future(room.wait(5))
    await asyncio.sleep(0)
    assert not waiting.done()
    room.free(50)
    await asyncio.wait_for(waiting, 60)


@pytest.fixture(autouse=True)
def _no_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONASYNCIODEBUG", raising=False)
