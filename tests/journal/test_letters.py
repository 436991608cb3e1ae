"""Dead letters in the journal: taken back, let go, bounded, counted."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from ingestd.base.append import Append
from ingestd.base.clock import SystemClock
from ingestd.base.errors import JournalFailed
from ingestd.base.record import InvalidRecord, Records, Span
from ingestd.journal.dead_letters import DeadLetter, InvalidQuota, LetterFilter, Moved
from ingestd.journal.interface import Cursor, Ledger, Seal, Sealed, Settle
from ingestd.journal.letter_rows import letter_bytes
from ingestd.journal.memory import MemoryJournal
from ingestd.journal.sqlite import check, dead_letters
from ingestd.journal.sqlite.journal import SqliteJournal
from ingestd.journal.sqlite.letters import REVIVE_RECORDS
from ingestd.journal.sqlite.offline import opened as opened_beside

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
    await j.journal.append(
        Append(Records.lines([b"1", b"2"]), [InvalidRecord(2, "malformed", "no", b"a\nb")])
    )
    await j.journal.write(Seal(Sealed(1, (Span(1, 0, 2),), 2), Cursor(2, 0)))
    letter = DeadLetter("j.1.0", "failed", "no", "trace", b"1", 8, 1.0, 2.0)
    done = Settle(1, 1, [letter], [], [1], 4)
    await j.journal.write(done)
    assert j.journal.ledger == Ledger(accepted=2, processed=1, dead=1, invalid=1)
    assert not await j.journal.dead_letters.poll_marked()
    mark(tmp_path)
    assert await j.journal.dead_letters.poll_marked()
    futures = [j.journal.append(Append(Records.lines([b"3"]))), j.journal.dead_letters.requeue()]
    _, moved = await asyncio.gather(*futures)
    assert (moved.requeued, moved.readmitted) == (1, 1)
    assert j.journal.ledger == Ledger(accepted=4, processed=1)
    assert [chunk.records.items() for chunk in j.chunks[1:]] == [[b"3"], [b"a\nb", b"1"]]
    assert [chunk.id for chunk in j.chunks] == [1, 2, 3]
    assert await j.journal.dead_letters.requeue() == Moved()
    size = j.journal.bytes
    assert j.journal.dead_totals.bytes == 0
    _, counted, *_ = await j.journal.close()
    assert counted == 3
    again = await opened()
    assert again.journal.bytes == size
    assert again.journal.dead_totals.requeued == again.journal.dead_totals.readmitted == 1


async def test_one_transaction_takes_back_a_bounded_number(opened, tmp_path) -> None:
    j = await opened()
    refused = [InvalidRecord(n, "malformed", "no", b"%d" % n) for n in range(REVIVE_RECORDS + 1)]
    await j.journal.append(Append(Records.lines([]), refused))
    mark(tmp_path)
    counts = [(await j.journal.dead_letters.requeue()).readmitted for _ in range(3)]
    assert counts == [REVIVE_RECORDS, 1, 0]
    assert j.journal.ledger == Ledger(accepted=REVIVE_RECORDS + 1)


async def test_letters_expire_oldest_first_and_never_marked_ones(opened, tmp_path) -> None:
    j = await opened()
    await j.journal.append(Append(Records.lines([]), [InvalidRecord(0, "malformed", "no", b"a")]))
    mark(tmp_path)
    await j.journal.append(Append(Records.lines([]), [InvalidRecord(0, "malformed", "no", b"b")]))
    now = SystemClock.now()
    assert (await j.journal.dead_letters.expire(now - 60)).expired == 0
    assert (await j.journal.dead_letters.expire(now + 60)).expired == 1
    assert j.journal.dead_totals.letters == j.journal.dead_totals.expired == 1
    assert (await j.journal.dead_letters.requeue()).readmitted == 1


def refused(*payloads: bytes) -> list[InvalidRecord]:
    return [InvalidRecord(i, "malformed", "no", payload) for i, payload in enumerate(payloads)]


async def test_letters_of_invalid_records_never_close_a_journal(opened) -> None:
    """They have a bound of their own, whatever `dead.bytes_max` and `journal.bytes_max` say."""
    j = await opened(bytes_max=1000)
    j.journal.dead_letters.bytes_max = 10
    for _ in range(20):
        await j.journal.append(Append(Records.lines([b"1"]), refused(b"x" * 500)))
    assert not j.journal.dead_letters.full
    assert j.journal.bytes == 40
    totals = j.journal.dead_totals
    assert (totals.letters, totals.invalid, totals.accepted_bytes) == (20, 20, 0)


async def test_a_principal_has_a_share_and_its_oldest_letters_go(tmp_path: Path) -> None:
    journal = SqliteJournal(
        tmp_path / "journal.db", bytes_max=1 << 30, clock=SystemClock(),
        on_commit=lambda *_: None, invalid=InvalidQuota(64 << 10),
    )  # fmt: skip
    await journal.open(lambda _: None)
    for number in range(40):
        await journal.append(
            Append(Records.lines([]), refused(b"%04d" % number * 256), principal="loud")
        )
        if number < 4:
            await journal.append(
                Append(Records.lines([]), refused(b"polite"), principal=f"p{number}")
            )
    totals = journal.dead_totals
    assert totals.invalid_bytes <= (64 << 10) // 4 + 4 * 300
    assert totals.dropped == 44 - totals.letters
    assert journal.ledger.invalid == 44
    for number in range(200):  # many who each keep to their share: the oldest of the largest go
        many = refused(b"x" * 2000)
        await journal.append(Append(Records.lines([]), many, principal=f"many{number}"))
    assert journal.dead_totals.invalid_bytes <= 64 << 10
    await journal.close()
    with closing(sqlite3.connect(tmp_path / "journal.db")) as db:
        kept = {row[0] for row in db.execute("SELECT principal FROM dead")}
        assert list(check.findings(db)) == []
    assert {"p0", "p1", "p2", "p3", "many199"} <= kept


async def test_another_process_makes_room(opened, tmp_path) -> None:
    j = await opened()
    j.journal.dead_letters.bytes_max = 10
    await j.journal.append(Append(Records.lines([b"1"])))
    await j.journal.write(Seal(Sealed(1, (Span(1, 0, 1),), 1), Cursor(2, 0)))
    letter = DeadLetter("j.1.0", "failed", "no", "trace", b"1", 8, 1.0, 2.0)
    await j.journal.write(Settle(1, 0, [letter], [], [1], 2))
    assert j.journal.dead_letters.full
    await j.journal.append(Append(Records.lines([b"1"])))  # what is accepted is not bound by them
    db = sqlite3.connect(tmp_path / "journal.db")
    db.execute("DELETE FROM dead")
    db.commit()
    db.close()
    assert not await j.journal.dead_letters.poll_marked()
    assert not j.journal.dead_letters.full
    assert j.journal.dead_totals.letters == 0
    assert j.journal.bytes == 2


async def test_the_memory_journal_keeps_the_newest_within_the_bound() -> None:
    one = letter_bytes(b"x", "no")
    journal = MemoryJournal(bytes_max=1 << 20, dead_bytes_max=2 * one, clock=SystemClock())
    await journal.open(lambda _: None)
    for payload in (b"1", b"2", b"3"):
        await journal.append(
            Append(Records.lines([]), [InvalidRecord(0, "malformed", "no", payload)])
        )
    assert [letter.payload for letter in journal.dead] == [b"2", b"3"]
    assert journal.dead_totals.expired == 1
    assert journal.dead_totals.bytes == 2 * one


async def group(j, count: int = 10) -> None:
    """The letters 1 to `count`, in one row."""
    await j.append(Append(Records.lines([b"%d" % n for n in range(1, count + 1)])))
    await j.write(Seal(Sealed(1, (Span(1, 0, count),), count), Cursor(2, 0)))
    letters = [
        DeadLetter(f"{j.id}.1.{n}", "rejected", f"no {n}", "", b"%d" % (n + 1), 1, 1.0, 2.0)
        for n in range(count)
    ]
    await j.write(Settle(1, 0, letters, [], [1], 0))


def kept(db: sqlite3.Connection) -> dict[int, tuple[bytes, bool]]:
    letters = dead_letters.letters(db, LetterFilter(), whole=True)
    return {one.id: (one.letter.payload, one.marked) for one in letters}


async def test_commands_that_take_the_same_row_apart_at_once_each_do_their_part(
    opened, tmp_path: Path, monkeypatch
) -> None:
    """Each has read the row whole when the other one takes it apart."""
    j = (await opened()).journal
    await group(j)
    await j.close()
    path = tmp_path / "journal.db"
    came: list[object] = []
    change = dead_letters._change_part

    def overtaken(db: sqlite3.Connection, part, *, mark: bool) -> int:
        if not came:
            came.append(part)
            db.execute("COMMIT")
            with opened_beside(path, write=True) as other:
                assert dead_letters.purge(other, LetterFilter(ids=(2, 7)), 10) == 2
                assert (
                    dead_letters.mark(other, LetterFilter(ids=(1, 3)), 10, lambda _: "").letters
                    == 2
                )
            db.execute("BEGIN IMMEDIATE")
        return change(db, part, mark=mark)

    monkeypatch.setattr(dead_letters, "_change_part", overtaken)
    with opened_beside(path, write=True) as db:
        assert dead_letters.mark(db, LetterFilter(ids=(3, 4, 5, 7)), 10, lambda _: "").letters == 2
        marked = {number for number, (_, is_marked) in kept(db).items() if is_marked}
        assert marked == {1, 3, 4, 5}
        assert dead_letters.purge(db, LetterFilter(), 10) == 4
        assert kept(db) == {n: (b"%d" % n, True) for n in (1, 3, 4, 5)}
        assert list(check.findings(db)) == []
    j = await opened()
    assert (await j.journal.dead_letters.requeue()).requeued == 4
    assert j.chunks[-1].records.items() == [b"1", b"3", b"4", b"5"]


async def test_numbers_of_a_row_are_found_with_one_look(opened, tmp_path: Path) -> None:
    j = (await opened()).journal
    await group(j)
    await j.append(Append(Records.lines([]), refused(b"a", b"b")))
    with opened_beside(tmp_path / "journal.db", write=True) as db:
        looks: list[str] = []
        db.set_trace_callback(looks.append)
        assert dead_letters.missing(db, [12, 3, 1, 10, 13, 2**64, 5]) == [13, 2**64]
        assert len(looks) == 3
        db.set_trace_callback(None)
        assert dead_letters.count(db, LetterFilter(ids=(3, 12, 13))).letters == 2
        assert dead_letters.purge(db, LetterFilter(ids=range(2, 12)), 12) == 10
        assert dead_letters.missing(db, range(14)) == [0, *range(2, 12), 13]


async def test_a_row_that_does_not_tell_what_is_in_it_is_one_damaged_letter(
    opened, tmp_path: Path
) -> None:
    """Seen by the commands, found by verify; it is not fed again, and nothing ends by it."""
    j = (await opened()).journal
    await group(j)
    await j.append(Append(Records.lines([b"11"])))
    with closing(sqlite3.connect(tmp_path / "journal.db")) as db, db:
        db.execute("UPDATE dead SET facts = zeroblob(length(facts)), retry = 1")
    with opened_beside(tmp_path / "journal.db", write=True) as db:
        (one,) = dead_letters.letters(db, LetterFilter(), whole=True)
        assert (one.id, one.letter.reason, one.letter.records) == (10, "damaged", 10)
        assert one.letter.payload == b"12345678910"
        (finding,) = check.findings(db)
        assert finding.text == "the dead letters 1 to 10 can't be told apart any more"
    assert await j.dead_letters.poll_marked()
    moved = await j.dead_letters.requeue()
    assert (moved.requeued, moved.unfit) == (0, 1)
    assert not await j.dead_letters.poll_marked()
    assert j.ledger == Ledger(accepted=11, dead=10)
    with opened_beside(tmp_path / "journal.db", write=True) as db:
        assert list(check.findings(db)) == []
        assert dead_letters.purge(db, LetterFilter(ids=(10,)), 10) == 1
        assert kept(db) == {}


async def test_a_letter_that_breaks_a_commit_is_repaired_by_the_next_start(
    opened, tmp_path: Path
) -> None:
    j = (await opened()).journal
    await j.append(Append(Records.lines([b"1"]), refused(b"2", b"3")))
    with closing(sqlite3.connect(tmp_path / "journal.db")) as db, db:
        db.execute("PRAGMA writable_schema=ON")
        db.execute("UPDATE sqlite_schema SET sql = replace(sql, 'STRICT', '') WHERE name = 'dead'")
    with closing(sqlite3.connect(tmp_path / "journal.db")) as db, db:
        db.execute("UPDATE dead SET payload = 'text', retry = 1")
    with pytest.raises(JournalFailed):
        await j.dead_letters.requeue()
    assert isinstance(j.failed.exception(), JournalFailed)
    await j.close()
    again = await opened()
    assert again.recovered.set_aside
    assert [chunk.records.items() for chunk in await again.journal.read(1, 1 << 20)] == [[b"1"]]
    await again.journal.dead_letters.requeue()
    assert not again.journal.failed.done()
