"""Envelopes are kept with their records: on disk, in dead letters, and back."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.base import envelope
from ingestd.base.append import Append
from ingestd.base.clock import SystemClock
from ingestd.base.envelope import Envelope, EnvelopeRuns
from ingestd.base.record import InvalidRecord, Records, Span
from ingestd.journal.dead_letters import DeadLetter, LetterFilter
from ingestd.journal.interface import Cursor, Seal, Sealed, Settle
from ingestd.journal.memory import MemoryJournal
from ingestd.journal.sqlite import check, dead_letters
from ingestd.journal.sqlite.offline import opened as opened_beside
from ingestd.journal.sqlite.repair import repair

if TYPE_CHECKING:
    from pathlib import Path

SHOP = envelope.pack(Envelope("http", "records", "shop", "application/json"))
TILL = envelope.pack(Envelope("http", "records", "till"))
FILE = envelope.pack(Envelope("fetch", attributes={"url": "u"}, numbered="line"))


def lines(count: int) -> Records:
    return Records.lines([b"%d" % n for n in range(count)])


def clients(packed: bytes, count: int) -> list[str]:
    return [EnvelopeRuns(packed, count).of(i).client for i in range(count)]


def kept(path: Path) -> dict[int, tuple[bytes, Envelope]]:
    with opened_beside(path) as db:
        return {
            one.id: (one.letter.payload, EnvelopeRuns(one.letter.envelope, 1).of(0))
            for one in dead_letters.letters(db, LetterFilter(), whole=True)
        }


async def test_small_appends_of_one_client_share_one_envelope_on_disk(opened, tmp_path) -> None:
    j = await opened()
    appended = [j.journal.append(Append(lines(1), envelope=SHOP)) for _ in range(200)]
    for future in appended:
        await future
    assert j.journal.bytes == sum(chunk.records.stored_bytes for chunk in j.chunks)
    await j.journal.close()
    with closing(sqlite3.connect(tmp_path / "journal.db")) as db:
        for count, size in db.execute("SELECT count, length(envelopes) FROM chunks"):
            assert count > 1
            assert size == len(SHOP)


async def test_envelopes_outlive_restarts_and_are_cut_with_their_records(opened) -> None:
    j = await opened()
    futures = [j.journal.append(Append(lines(2), envelope=one)) for one in (SHOP, TILL, b"")]
    futures.append(j.journal.append(Append(Records.sized([b"\n"]), envelope=TILL)))
    for future in futures:
        await future
    await j.journal.close()
    again = await opened()
    chunks = await again.journal.read(1, 1 << 20)
    found = [one for c in chunks for one in clients(c.records.envelopes, c.records.count)]
    assert found == ["shop", "shop", "till", "till", "", "", "till"]
    assert again.journal.bytes == sum(chunk.records.stored_bytes for chunk in chunks)
    records = await again.journal.load([Span(1, 1, 2), Span(len(chunks), 0, 1)])
    assert clients(records.envelopes, 3) == ["shop", "till", "till"]


async def test_a_changed_envelope_is_damage_like_a_changed_record(opened, tmp_path) -> None:
    j = await opened()
    await j.journal.append(Append(lines(1), envelope=SHOP))
    await j.journal.close()
    with closing(sqlite3.connect(tmp_path / "journal.db")) as db, db:
        db.execute("UPDATE chunks SET envelopes = ?", (TILL,))
    (chunk,) = await (await opened()).journal.read(1, 1 << 20)
    assert chunk.damaged


async def give_up(j: Any, packed: bytes, count: int) -> None:
    """One append of which every record becomes a dead letter."""
    await j.append(Append(lines(count)._replace(envelopes=packed)))
    await j.write(Seal(Sealed(1, (Span(1, 0, count),), count), Cursor(2, 0)))
    letters = [
        DeadLetter(f"{j.id}.1.{n}", "rejected", "no", "", b"%d" % n, 1, 1.0, 2.0, envelope=one)
        for n, one in enumerate(envelope.singles(packed, count))
    ]
    await j.write(Settle(1, 0, letters, [], [1], lines(count).stored_bytes + len(packed)))


async def test_dead_letters_keep_their_envelopes_and_give_them_back(opened, tmp_path) -> None:
    j = (await opened()).journal
    await give_up(j, envelope.numbered(FILE, 10, 100), 10)
    assert j.bytes == j.dead_totals.accepted_bytes
    await j.close()
    path = tmp_path / "journal.db"
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT letters FROM dead").fetchall() == [(10,)]
    with opened_beside(path, write=True) as db:
        assert dead_letters.purge(db, LetterFilter(ids=(3, 4)), 10) == 2
        assert dead_letters.mark(db, LetterFilter(ids=(1, 6, 7, 9)), 10, lambda _: "").letters == 4
    for number, (payload, known) in kept(path).items():
        assert payload == b"%d" % (number - 1)
        assert known.attributes == {"url": "u", "line": 99 + number}
    again = await opened()
    await again.journal.dead_letters.requeue()
    (chunk,) = again.chunks
    known = EnvelopeRuns(chunk.records.envelopes, 4)
    assert [known.of(i).attributes["line"] for i in range(4)] == [100, 105, 106, 108]
    with opened_beside(path) as db:
        assert list(check.findings(db)) == []


async def test_an_invalid_record_becomes_a_letter_with_its_envelope(opened, tmp_path) -> None:
    j = (await opened()).journal
    bad = [InvalidRecord(n, "malformed", "no", b"{%d" % n) for n in range(3)]
    await j.append(Append(lines(1), bad, envelope=SHOP))
    await j.append(Append(lines(0), bad[:1], envelope=TILL))
    await j.close()
    assert [one.client for _, one in kept(tmp_path / "journal.db").values()] == [
        "shop", "shop", "shop", "till",
    ]  # fmt: skip


@pytest.mark.parametrize("damage", [b"R", b"\xff", b"R\x92\x90\x90"])
async def test_a_letter_whose_envelope_is_damaged_loses_that_alone(
    opened, tmp_path, damage: bytes
) -> None:
    j = (await opened()).journal
    await give_up(j, SHOP, 3)
    await j.close()
    path = tmp_path / "journal.db"
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE dead SET envelopes = ?, retry = 1", (damage,))
    assert kept(path) == {n + 1: (b"%d" % n, Envelope()) for n in range(3)}
    again = await opened()
    assert (await again.journal.dead_letters.requeue()).requeued == 3
    assert again.chunks[-1].records.envelopes == b""


async def test_a_repair_keeps_envelopes_and_lineage(opened, tmp_path) -> None:
    j = (await opened()).journal
    await j.append(Append(lines(4), [InvalidRecord(0, "malformed", "no", b"{")], envelope=SHOP))
    await j.write(Seal(Sealed(7, (Span(1, 0, 2),), 2, lineage=(3, 5)), Cursor(1, 2)))
    await j.close()
    path = tmp_path / "journal.db"
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE meta SET crc = 1")
    repair(path, 2e9)
    again = await opened()
    assert [batch.lineage for batch in again.recovered.batches] == [(3, 5)]
    records = await again.journal.load([Span(1, 0, 4)])
    assert records.envelopes == SHOP
    assert [one.client for _, one in kept(path).values()] == ["shop"]


async def test_a_repair_of_a_damaged_lineage_keeps_the_batch(opened, tmp_path) -> None:
    j = (await opened()).journal
    await j.append(Append(lines(4), envelope=SHOP))
    await j.write(Seal(Sealed(7, (Span(1, 0, 4),), 4, lineage=(3, 5)), Cursor(2, 0)))
    await j.close()
    with closing(sqlite3.connect(tmp_path / "journal.db")) as db, db:
        db.execute("UPDATE batches SET lineage = x'ff'")
    with opened_beside(tmp_path / "journal.db") as db:
        assert [one.text for one in check.findings(db)] == [
            "the batches that batch 7 was split from can't be read"
        ]
    again = await opened()
    assert again.recovered.set_aside
    assert [(b.number, b.count, b.lineage) for b in again.recovered.batches] == [(7, 4, ())]


async def test_the_memory_journal_keeps_them_too() -> None:
    journal = MemoryJournal(bytes_max=1 << 20, clock=SystemClock())
    chunks: list[Any] = []
    await journal.open(chunks.append)
    await journal.append(
        Append(lines(2), [InvalidRecord(0, "malformed", "no", b"{")], envelope=SHOP)
    )
    assert clients((await journal.load([Span(1, 0, 2)])).envelopes, 2) == ["shop", "shop"]
    assert clients(journal.dead[0].envelope, 1) == ["shop"]
    assert journal.bytes == chunks[0].records.stored_bytes
