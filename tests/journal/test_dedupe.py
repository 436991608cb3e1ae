"""Deduplication by a value in each record: once within its window, durable with its record."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingestd.base import envelope
from ingestd.base.append import Append, DeliveryWaiter
from ingestd.base.envelope import Envelope
from ingestd.base.errors import Overloaded
from ingestd.base.record import Records, Span
from ingestd.journal.build import build_deduplicator
from ingestd.journal.dedupe import Deduplicator
from ingestd.journal.interface import Place
from ingestd.journal.settings import DedupeSettings
from ingestd.journal.sqlite import check, repair
from ingestd.waiters import DeliveryWaiters

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Clock:
    def __init__(self) -> None:
        self.time = 1e9

    def now(self) -> float:
        return self.time

    def monotonic(self) -> float:
        return self.time - 1e6


class Journal:
    """Remembers what it was given; a commit is what the test says."""

    def __init__(self) -> None:
        self.appends: list[tuple[Append, asyncio.Future[Place]]] = []
        self.stored: list[tuple[float, bytes]] = []
        self.records: list[bytes] = []

    def submit(self, append: Append) -> asyncio.Future[Place]:
        placed: asyncio.Future[Place] = asyncio.get_running_loop().create_future()
        self.appends.append((append, placed))
        return placed

    async def commit(self, error: Exception | None = None) -> None:
        append, placed = self.appends.pop(0)
        if error is not None:
            placed.set_exception(error)
        else:
            self.records += append.records.items()
            if (found := append.deduplicated) is not None:
                self.stored.append((found.at, b"".join(found.keys.new)))
            placed.set_result(Place(1, 0))
        await asyncio.sleep(0)


def records(*keys: object) -> Append:
    return Append(Records.lines([b'{"id":%b}' % str(key).encode() for key in keys]))


def made(clock: Clock, **table: Any) -> Deduplicator:
    return Deduplicator(DedupeSettings(key="/id", **table), clock)


async def admit(one: Deduplicator, journal: Journal, append: Append) -> Append:
    """An append that is committed at once."""
    found, placed = await one.admit(append, journal.submit)
    await journal.commit()
    await placed
    return found


async def test_a_record_with_a_value_that_came_before_is_left_out() -> None:
    one, journal = made(Clock()), Journal()
    await admit(one, journal, records(1, '"1"', 2, 1, "null", "null"))
    await admit(one, journal, Append(Records.sized([b'{ "id":2}', b'{\n"id":3}', b"[]", b"[]"])))
    found = await admit(one, journal, records(2, 3))
    assert journal.records == [
        b'{"id":1}', b'{"id":"1"}', b'{"id":2}', b'{"id":null}', b'{"id":null}',
        b'{\n"id":3}', b"[]", b"[]",
    ]  # fmt: skip
    assert (found.records.count, found.deduplicated.left_out, one.left_out) == (0, 2, 4)


async def test_an_append_waits_for_another_one_with_the_same_value() -> None:
    one, journal = made(Clock()), Journal()
    _, placed = await one.admit(records(1, 2), journal.submit)
    second = asyncio.ensure_future(one.admit(records(2, 3), journal.submit))
    third = asyncio.ensure_future(one.admit(records(4), journal.submit))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not second.done()
    assert not third.done()  # appends keep their order
    await journal.commit(Overloaded(what="the disk"))
    with pytest.raises(Overloaded):
        await placed
    for _ in range(5):
        await asyncio.sleep(0)
    for _ in range(2):
        await journal.commit()
    assert journal.records == [b'{"id":2}', b'{"id":3}', b'{"id":4}']
    assert one.left_out == 0


async def test_what_was_refused_or_left_may_come_again() -> None:
    one, journal = made(Clock()), Journal()

    def refuse(_: Append) -> asyncio.Future[Place]:
        raise Overloaded(what="the journal")

    with pytest.raises(Overloaded):
        await one.admit(records(1), refuse)
    _, placed = await one.admit(records(1), journal.submit)
    placed.cancel()  # the client has left; the append goes on
    await journal.commit()
    await admit(one, journal, records(1))
    assert journal.records == [b'{"id":1}']


async def test_values_are_forgotten_after_the_window_and_beyond_the_bound() -> None:
    clock, journal = Clock(), Journal()
    one = made(clock, window="10s", keys_max=3)
    for _ in range(3):
        await admit(one, journal, records(1))
        clock.time += 5
    assert journal.records == [b'{"id":1}'] * 2  # at 0 s and at 10 s
    for key in (2, 3, 4, 1):
        await admit(one, journal, records(key))
    assert journal.records[2:] == [b'{"id":2}', b'{"id":3}', b'{"id":4}', b'{"id":1}']


async def test_records_that_are_left_keep_what_belongs_to_them() -> None:
    one, journal = made(Clock()), Journal()
    file = envelope.pack(Envelope("fetch", attributes={"url": "u"}, numbered="line"))
    append = records(1, 1, 2, 1, 3)
    lines = append.records._replace(envelopes=envelope.numbered(file, 5, 10))
    found = await admit(one, journal, append._replace(records=lines))
    left = envelope.EnvelopeRuns(found.records.envelopes, 3)
    assert [left.of(i).attributes["line"] for i in range(3)] == [10, 12, 14]


def test_a_waiter_is_told_of_all_its_records_under_their_own_places() -> None:
    async def go() -> None:
        one, journal, waiters = made(Clock()), Journal(), DeliveryWaiters()
        told: list[tuple[int, int]] = []

        class Names(DeliveryWaiter):
            __slots__ = ()

            def settled(self, index: int, records: int) -> None:
                told.append((index, records))
                super().settled(index, records)

        waiter = Names(5)
        found = await admit(one, journal, records(1, 1, 2, 1, 3)._replace(waiter=waiter))
        waiters.add(Place(7, 2), waiter, found.deduplicated)
        assert told == [(1, 1), (3, 1)]
        waiters.settled([Span(7, 2, 3)], [])
        assert told[2:] == [(0, 1), (2, 1), (4, 1)]
        assert waiter.done.is_set()
        again = Names(2)
        found = await admit(one, journal, records(1, 2))
        waiters.add(Place(0, 0), again, found.deduplicated)
        assert again.done.is_set()

    asyncio.run(go())


def test_without_a_key_there_is_no_deduplicator() -> None:
    assert build_deduplicator(DedupeSettings(), Clock()) is None


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.lists(st.integers(0, 5), max_size=4)),
        st.tuples(st.just("fail"), st.lists(st.integers(0, 5), max_size=4)),
        st.tuples(st.just("wait"), st.integers(1, 12)),
        st.tuples(st.just("restart"), st.none()),
    ),
    max_size=30,
)


@settings(max_examples=40)
@given(steps=STEPS)
def test_each_value_is_stored_once_a_window(steps) -> None:
    async def go() -> None:
        clock, journal = Clock(), Journal()
        one, last, expected = made(clock, window=10), dict[int, float](), []
        for what, said in steps:
            if what == "wait":
                clock.time += said
            elif what == "restart":
                one = made(clock, window=10)
                one.restore(journal.stored)
            else:
                _, placed = await one.admit(records(*said), journal.submit)
                await journal.commit(Overloaded(what="x") if what == "fail" else None)
                with suppress(Overloaded):
                    await placed
                for key in said if what == "send" else ():
                    if clock.time - last.get(key, -1e9) >= 10:
                        last[key] = clock.time
                        expected.append(b'{"id":%d}' % key)
        assert journal.records == expected

    asyncio.run(go())


# -- in a journal ----------------------------------------------------------------------------------


async def put(opened: Callable[..., Any], one: Deduplicator, sent: Sequence[Append]) -> Any:
    journal = (await opened()).journal
    for append in sent:
        _, placed = await one.admit(append, journal.append)
        await placed
    await journal.close()
    return await opened()


async def test_a_journal_keeps_values_in_the_commit_of_their_records(opened) -> None:
    clock = Clock()
    again = await put(opened, made(clock), [records(1, 2), records(2, 3), records(3)])
    assert again.journal.ledger.accepted == 3
    assert [len(keys) // 16 for _, keys in again.recovered.keys] == [2, 1]
    fresh = made(clock)
    fresh.restore(again.recovered.keys)
    found, placed = await fresh.admit(records(1, 2, 3, 4), again.journal.append)
    await placed
    assert found.records.items() == [b'{"id":4}']
    clock.time += 7200
    fresh = made(clock)
    fresh.restore(again.recovered.keys)
    found, placed = await fresh.admit(records(1), again.journal.append)
    await placed
    assert found.records.count == 1


async def test_a_journal_drops_values_that_are_too_old_or_too_many(opened) -> None:
    clock = Clock()
    one = made(clock, window="10s", keys_max=5)
    again = await put(opened, one, [records(n, -n) for n in range(1, 21)])
    assert [len(keys) // 16 for _, keys in again.recovered.keys] == [2, 2, 2]
    await again.journal.close()
    clock.time += 20
    again = await put(opened, one, [records(100)])
    assert [len(keys) // 16 for _, keys in again.recovered.keys] == [1]


async def test_a_rebuilt_journal_has_them_and_a_damaged_one_is_told(opened) -> None:
    again = await put(opened, made(Clock()), [records(1, 2)])
    await again.journal.close()
    repair.repair(again.journal.path, 0.0)
    with closing(sqlite3.connect(again.journal.path)) as db:
        assert not list(check.findings(db))
        db.execute("PRAGMA ignore_check_constraints=ON")
        db.execute("UPDATE dedupe_keys SET keys = x'00'")
        assert [one.text for one in check.findings(db)]
        db.rollback()
    assert len((await opened()).recovered.keys) == 1
