"""Ids of senders: known once their records are durable, of the last records, to their principal."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing

import pytest

from ingestd.base.append import Append, HeldIds, RecentIds, SenderIds, sender_id
from ingestd.base.errors import IdsInFlight, Overloaded
from ingestd.base.record import Records
from ingestd.journal.sqlite import check, repair

A, B, C, D = (frozenset([sender_id(name.encode())]) for name in "abcd")


def names(*texts: str) -> frozenset[bytes]:
    return frozenset(sender_id(text.encode()) for text in texts)


async def accept(recent: RecentIds, principal: str, ids: frozenset[bytes]) -> HeldIds:
    held = recent.hold(principal, ids)
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    done.set_result(None)
    await recent.follow(held, done)
    await asyncio.sleep(0)
    recent.release(held)
    return held


async def test_a_record_that_comes_again_in_another_request_is_known() -> None:
    recent = RecentIds(100)
    await accept(recent, "p", names("1", "2", "3"))
    held = recent.hold("p", names("3", "4", "1"))
    assert (held.accepted, held.new) == (names("1", "3"), names("4"))
    recent.release(held)
    assert recent.hold("q", names("1")).new == names("1")  # no principal knows another's


async def test_ids_are_known_after_the_commit_and_not_before() -> None:
    recent = RecentIds(100)
    held = recent.hold("p", A | B)
    with pytest.raises(IdsInFlight) as busy:
        recent.hold("p", B | C)
    assert isinstance(busy.value, Overloaded)
    assert busy.value.retry_after == 1.0
    assert recent.hold("p", C).new == C  # what was refused holds nothing
    placed: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    task = asyncio.ensure_future(recent.follow(held, placed))
    await asyncio.sleep(0)
    task.cancel()  # the client has left: the append goes on
    with pytest.raises(asyncio.CancelledError):
        await task
    recent.release(held)
    with pytest.raises(IdsInFlight):
        recent.hold("p", A)
    placed.set_result(7)
    await asyncio.sleep(0)
    assert recent.hold("p", A | D).accepted == A


async def test_what_was_refused_can_come_again() -> None:
    recent = RecentIds(100)
    for _ in range(2):
        held = recent.hold("p", A | B)
        placed: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        placed.set_exception(Overloaded(what="the journal"))
        with pytest.raises(Overloaded):
            await recent.follow(held, placed)
        await asyncio.sleep(0)
        recent.release(held)
    held = recent.hold("p", A)
    recent.release(held)  # nothing was appended
    assert recent.hold("p", A).new == A
    assert recent.count == 0


async def test_the_oldest_go_at_the_bound() -> None:
    recent = RecentIds(3)
    await accept(recent, "p", names("1", "2"))
    await accept(recent, "q", names("1"))
    await accept(recent, "p", names("2", "3"))
    # Of these `1` and `2` came in one append, and behind it no three others.
    assert recent.hold("p", names("1", "2")).accepted == names("1", "2")
    await accept(recent, "p", names("2", "3", "4"))
    assert recent.count == 3
    assert recent.hold("p", names("1", "2", "3", "4")).accepted == names("3", "4")
    assert recent.hold("q", names("1")).accepted == names("1")
    recent.kept_max = 0
    await accept(recent, "r", names("1"))
    assert recent.count == 0
    assert not recent._kept


async def test_an_append_with_more_than_are_kept_is_known_until_as_many_came_behind_it() -> None:
    recent, many = RecentIds(3), names("1", "2", "3", "4", "5")
    await accept(recent, "p", many)
    assert recent.hold("p", many).accepted == many
    await accept(recent, "p", names("6", "7"))
    assert recent.hold("p", many).accepted == many
    await accept(recent, "p", names("8"))
    assert recent.count == 3


def append(recent: RecentIds, *texts: str, principal: str = "p") -> Append:
    records = Records.lines([b"1"] * len(texts))
    return Append(records, ids=recent.hold(principal, names(*texts)))


async def test_a_journal_keeps_them_in_the_commit_of_their_records(opened) -> None:
    recent = RecentIds(100)
    j = (await opened()).journal
    for texts in (("1", "2"), ("3",)):
        one = append(recent, *texts)
        await recent.follow(one.ids, j.append(one))
        await asyncio.sleep(0)
    one = append(recent, "3", "4", principal="token shop")
    await recent.follow(one.ids, j.append(one))
    await j.append(append(recent, "1", "2")._replace(records=Records.lines([])))  # nothing new
    await j.close()
    again = await opened()
    fresh = RecentIds(100)
    fresh.restore(again.recovered.ids)
    assert fresh.count == 5
    assert fresh.hold("p", names("1", "2", "3", "4")).accepted == names("1", "2", "3")
    assert fresh.hold("token shop", names("1", "4")).accepted == names("4")


async def test_a_journal_drops_the_oldest(opened) -> None:
    j = (await opened()).journal
    recent = RecentIds(5)
    for n in range(20):
        one = append(recent, f"{n}a", f"{n}b")
        await recent.follow(one.ids, j.append(one))
        await asyncio.sleep(0)
    await j.close()
    stored = (await opened()).recovered.ids
    assert [len(ids) // 16 for _, ids in stored] == [2, 2, 2]  # the third one is not wholly too old
    fresh = RecentIds(5)
    fresh.restore(stored)
    last = names("19a", "18b", "17b")
    assert fresh.hold("p", last | names("16b")).accepted == last
    assert recent.hold("p", last | names("16b")).accepted == last


async def test_a_rebuilt_journal_has_them_and_a_damaged_one_is_told(opened, tmp_path) -> None:
    j = (await opened()).journal
    recent = RecentIds(5)
    one = append(recent, "1", "2")
    await recent.follow(one.ids, j.append(one))
    await j.close()
    repair.repair(j.path, 0.0)
    with closing(sqlite3.connect(j.path)) as db:
        assert not list(check.findings(db))
        db.execute("PRAGMA ignore_check_constraints=ON")
        db.execute("UPDATE sender_ids SET ids = x'00'")
        assert [one.text for one in check.findings(db)]
        db.rollback()
    assert len((await opened()).recovered.ids) == 1


def test_long_ids_are_as_short_as_others() -> None:
    assert len(sender_id(b"x" * 100_000)) == len(sender_id(b"")) == 16
    assert sender_id(b"a", b"b") != sender_id(b"ab")
    assert SenderIds((b"",), frozenset()).known == frozenset()
