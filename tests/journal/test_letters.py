"""Dead letters in the journal: taken back, let go, bounded, counted."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

from ingestd.base.clock import SystemClock
from ingestd.base.record import Records, Refused, Span
from ingestd.journal import verify
from ingestd.journal.interface import Cursor, DeadLetter, Ledger, Moved, Sealed, Settlement
from ingestd.journal.letters import REVIVE_RECORDS, Courtesy, letter_bytes
from ingestd.journal.memory import MemoryJournal
from ingestd.journal.sqlite import SqliteJournal

if TYPE_CHECKING:
    from pathlib import Path


def mark(folder: Path) -> None:
    db = sqlite3.connect(folder / "journal.db")
    db.execute("UPDATE dead SET retry = 1")
    db.commit()
    db.close()


async def test_revived_letters_are_one_chunk_behind_the_appends_of_the_commit(
    opened, tmp_path
) -> None:
    j = await opened()
    await j.journal.append(Records.lines([b"1", b"2"]), [Refused(2, "malformed", "no", b"a\nb")])
    await j.journal.seal(Sealed(1, (Span(1, 0, 2),), 2), Cursor(2, 0))
    letter = DeadLetter("j.1.0", "failed", "no", "trace", b"1", 8, 1.0, 2.0)
    done = Settlement(1, 1, [letter], [], [1], 4)
    await j.journal.settle(done)
    assert j.journal.ledger == Ledger(accepted=2, processed=1, dead=1, refused=1)
    assert not await j.journal.look()
    mark(tmp_path)
    assert await j.journal.look()
    futures = [j.journal.append(Records.lines([b"3"]), ()), j.journal.revive()]
    _, moved = await asyncio.gather(*futures)
    assert (moved.revived, moved.readmitted) == (1, 1)
    assert j.journal.ledger == Ledger(accepted=4, processed=1)
    assert [chunk.records.items() for chunk in j.chunks[1:]] == [[b"3"], [b"a\nb", b"1"]]
    assert [chunk.id for chunk in j.chunks] == [1, 2, 3]
    assert await j.journal.revive() == Moved()
    size = j.journal.bytes
    assert j.journal.dead_totals.bytes == 0
    _, counted, *_ = await j.journal.close()
    assert counted == 3
    again = await opened()
    assert again.journal.bytes == size
    assert again.journal.dead_totals.revived == again.journal.dead_totals.readmitted == 1


async def test_one_transaction_takes_back_a_bounded_number(opened, tmp_path) -> None:
    j = await opened()
    refused = [Refused(n, "malformed", "no", b"%d" % n) for n in range(REVIVE_RECORDS + 1)]
    await j.journal.append(Records.lines([]), refused)
    mark(tmp_path)
    counts = [(await j.journal.revive()).readmitted for _ in range(3)]
    assert counts == [REVIVE_RECORDS, 1, 0]
    assert j.journal.ledger == Ledger(accepted=REVIVE_RECORDS + 1)


async def test_letters_expire_oldest_first_and_never_marked_ones(opened, tmp_path) -> None:
    j = await opened()
    await j.journal.append(Records.lines([]), [Refused(0, "malformed", "no", b"a")])
    mark(tmp_path)
    await j.journal.append(Records.lines([]), [Refused(0, "malformed", "no", b"b")])
    now = SystemClock.now()
    assert (await j.journal.expire(now - 60)).expired == 0
    assert (await j.journal.expire(now + 60)).expired == 1
    assert j.journal.dead_totals.letters == j.journal.dead_totals.expired == 1
    assert (await j.journal.revive()).readmitted == 1


def refused(*payloads: bytes) -> list[Refused]:
    return [Refused(i, "malformed", "no", payload) for i, payload in enumerate(payloads)]


async def test_letters_of_invalid_records_never_close_a_journal(opened) -> None:
    """They have a bound of their own, whatever `dead.bytes_max` and `journal.bytes_max` say."""
    j = await opened(bytes_max=1000)
    j.journal.dead_bytes_max = 10
    for _ in range(20):
        await j.journal.append(Records.lines([b"1"]), refused(b"x" * 500))
    assert not j.journal.letters_full
    assert j.journal.bytes == 40
    totals = j.journal.dead_totals
    assert (totals.letters, totals.invalid, totals.accepted_bytes) == (20, 20, 0)


async def test_a_principal_has_a_share_and_its_oldest_letters_go(tmp_path: Path) -> None:
    journal = SqliteJournal(
        tmp_path / "journal.db", bytes_max=1 << 30, clock=SystemClock(),
        on_commit=lambda *_: None, courtesy=Courtesy(64 << 10),
    )  # fmt: skip
    await journal.open(lambda _: None)
    for number in range(40):
        await journal.append(Records.lines([]), refused(b"%04d" % number * 256), principal="loud")
        if number < 4:
            await journal.append(Records.lines([]), refused(b"polite"), principal=f"p{number}")
    totals = journal.dead_totals
    assert totals.invalid_bytes <= (64 << 10) // 4 + 4 * 300
    assert totals.dropped == 44 - totals.letters
    assert journal.ledger.refused == 44
    for number in range(200):  # many who each keep to their share: the oldest of the largest go
        many = refused(b"x" * 2000)
        await journal.append(Records.lines([]), many, principal=f"many{number}")
    assert journal.dead_totals.invalid_bytes <= 64 << 10
    await journal.close()
    with closing(sqlite3.connect(tmp_path / "journal.db")) as db:
        kept = {row[0] for row in db.execute("SELECT principal FROM dead")}
        assert list(verify.findings(db)) == []
    assert {"p0", "p1", "p2", "p3", "many199"} <= kept


async def test_another_process_makes_room(opened, tmp_path) -> None:
    j = await opened()
    j.journal.dead_bytes_max = 10
    await j.journal.append(Records.lines([b"1"]), ())
    await j.journal.seal(Sealed(1, (Span(1, 0, 1),), 1), Cursor(2, 0))
    letter = DeadLetter("j.1.0", "failed", "no", "trace", b"1", 8, 1.0, 2.0)
    await j.journal.settle(Settlement(1, 0, [letter], [], [1], 2))
    assert j.journal.letters_full
    await j.journal.append(Records.lines([b"1"]), ())  # what is accepted is not bound by them
    db = sqlite3.connect(tmp_path / "journal.db")
    db.execute("DELETE FROM dead")
    db.commit()
    db.close()
    assert not await j.journal.look()
    assert not j.journal.letters_full
    assert j.journal.dead_totals.letters == 0
    assert j.journal.bytes == 2


async def test_the_memory_journal_keeps_the_newest_within_the_bound() -> None:
    one = letter_bytes(b"x", "no")
    journal = MemoryJournal(bytes_max=1 << 20, dead_bytes_max=2 * one, clock=SystemClock())
    await journal.open(lambda _: None)
    for payload in (b"1", b"2", b"3"):
        await journal.append(Records.lines([]), [Refused(0, "malformed", "no", payload)])
    assert [letter.payload for letter in journal.dead] == [b"2", b"3"]
    assert journal.dead_totals.expired == 1
    assert journal.dead_totals.bytes == 2 * one
