"""The SQLite journal against its invariants (docs/ARCHITECTURE.md)."""

from __future__ import annotations

import asyncio
import sqlite3
from typing import TYPE_CHECKING

import pytest

from ingestd.base.append import Append
from ingestd.base.errors import JournalFailed, JournalUnreadable, Overloaded
from ingestd.base.record import InvalidRecord, Layout, Records, Span
from ingestd.journal.dead_letters import DeadLetter
from ingestd.journal.interface import Cursor, Ledger, Postpone, Seal, Sealed, Settle
from ingestd.journal.letter_rows import letter_bytes

if TYPE_CHECKING:
    from pathlib import Path


def lines(*records: bytes) -> Records:
    return Records.lines(records)


def settlement(batch: int, processed: int, **more: object) -> Settle:
    facts = {"dead": [], "successors": [], "finished": [], "finished_bytes": 0, **more}
    return Settle(batch, processed, **facts)  # type: ignore[arg-type]


async def test_what_was_accepted_is_there_after_a_restart(opened) -> None:
    first = await opened()
    await first.journal.append(Append(lines(b"1", b"2")))
    await first.journal.append(Append(Records.sized([b"a\nb", b""])))
    identity = first.journal.id
    await first.journal.close()

    again = await opened()
    chunks = await again.journal.read(1, 1 << 20)
    assert again.journal.id == identity
    assert again.journal.ledger == Ledger(accepted=4)
    assert [c.records.items() for c in chunks] == [[b"1", b"2"], [b"a\nb", b""]]
    assert [c.records.layout for c in chunks] == [Layout.LINES, Layout.SIZED]
    assert again.recovered.last_chunk == 2
    assert again.recovered.cursor == Cursor(1, 0)


async def test_appends_that_wait_together_share_a_commit_and_a_chunk(opened) -> None:
    j = await opened()
    futures = [j.journal.append(Append(lines(b"%d" % n))) for n in range(500)]
    await asyncio.gather(*futures)
    got = [item for chunk in j.chunks for item in chunk.records.items()]
    assert got == [b"%d" % n for n in range(500)]
    assert [c.id for c in j.chunks] == list(range(1, len(j.chunks) + 1))
    # The first one may have gone alone; what came meanwhile went together.
    assert len(j.chunks) < 100


async def test_a_chunk_is_announced_before_its_append_resolves(opened) -> None:
    j = await opened()
    seen: list[int] = []
    future = j.journal.append(Append(lines(b"1")))
    future.add_done_callback(lambda _: seen.append(len(j.chunks)))
    await future
    await asyncio.sleep(0)
    assert seen == [1]


async def test_large_appends_are_stored_without_joining(opened) -> None:
    j = await opened()
    big = Records(Layout.LINES, 1, b"x" * 100_000 + b"\n")
    await asyncio.gather(*(j.journal.append(Append(big)) for _ in range(4)))
    assert [len(c.records.payload) for c in j.chunks] == [100_001] * 4


async def test_refused_records_are_dead_letters_outside_the_four_numbers(opened, tmp_path) -> None:
    j = await opened()
    await j.journal.append(Append(lines(b"1"), [InvalidRecord(1, "malformed", "line 2", b"{")]))
    assert j.journal.ledger == Ledger(accepted=1, invalid=1)
    assert j.journal.ledger.pending == 1
    await j.journal.close()
    with sqlite3.connect(tmp_path / "journal.db") as db:
        rows = db.execute("SELECT reason, error, payload, records FROM dead").fetchall()
    db.close()
    assert rows == [("malformed", "line 2", b"{", 1)]


async def test_sealed_batches_come_back_under_their_numbers(opened) -> None:
    j = await opened()
    await j.journal.append(Append(lines(b"1", b"2", b"3")))
    await j.journal.write(Seal(Sealed(1, (Span(1, 0, 2),), 2, accepted_at=5.0), Cursor(1, 2)))
    await j.journal.close()
    again = await opened()
    assert again.recovered.batches == [Sealed(1, (Span(1, 0, 2),), 2, accepted_at=5.0)]
    assert again.recovered.cursor == Cursor(1, 2)
    assert again.recovered.next_batch == 2
    assert list(again.recovered.sizes) == [1]
    loaded = await again.journal.load([Span(1, 0, 2)])
    assert loaded is not None
    assert loaded.items() == [b"1", b"2"]
    ledger, counted, *_ = await again.journal.close()
    assert counted == ledger.pending == 3


async def test_settling_moves_everything_in_one_commit(opened) -> None:
    j = await opened()
    await j.journal.append(Append(lines(b"1", b"2", b"3")))
    size = j.journal.bytes
    await j.journal.write(Seal(Sealed(1, (Span(1, 0, 3),), 3), Cursor(2, 0)))
    letter = DeadLetter("j.1.1", "rejected", "no", "", b"2", 1, 1.0, 2.0)
    again = Sealed(2, (Span(1, 2, 1),), 1, attempts=1, due_at=9.0)
    await j.journal.write(settlement(1, 1, dead=[letter], successors=[again]))
    assert j.journal.ledger == Ledger(accepted=3, processed=1, dead=1)
    assert j.journal.bytes == size + letter_bytes(b"2", "no")
    await j.journal.close()

    second = await opened()
    assert second.recovered.batches == [again]
    await second.journal.write(settlement(2, 1, finished=[1], finished_bytes=size))
    ledger, counted, *_ = await second.journal.close()
    assert ledger == Ledger(accepted=3, processed=2, dead=1)
    assert counted == 0

    third = await opened()
    assert third.recovered.batches == []
    assert third.recovered.next_batch == 3
    assert await third.journal.read(1, 1 << 20) == []
    assert third.journal.bytes == letter_bytes(b"2", "no")


async def test_a_postponed_batch_keeps_its_attempts(opened) -> None:
    j = await opened()
    await j.journal.append(Append(lines(b"1")))
    await j.journal.write(Seal(Sealed(1, (Span(1, 0, 1),), 1), Cursor(2, 0)))
    await j.journal.write(Postpone(Sealed(1, (Span(1, 0, 1),), 1, attempts=3, due_at=77.5)))
    await j.journal.close()
    (batch,) = (await opened()).recovered.batches
    assert (batch.attempts, batch.due_at) == (3, 77.5)


async def test_chunk_ids_are_never_used_again(opened) -> None:
    j = await opened()
    await j.journal.append(Append(lines(b"1")))
    await j.journal.write(Seal(Sealed(1, (Span(1, 0, 1),), 1), Cursor(2, 0)))
    await j.journal.write(settlement(1, 1, finished=[1], finished_bytes=j.journal.bytes))
    await j.journal.close()
    again = await opened()
    await again.journal.append(Append(lines(b"2")))
    assert [c.id for c in again.chunks] == [2]


async def test_the_bound_refuses_and_counts_back(opened) -> None:
    j = await opened(bytes_max=100)
    await j.journal.append(Append(lines(b"x" * 60)))
    with pytest.raises(Overloaded) as refused:
        j.journal.append(Append(lines(b"y" * 60)))
    assert refused.value.retry_after > 0
    await j.journal.append(Append(lines(b"z" * 30)))
    assert j.journal.ledger.accepted == 2


async def test_a_damaged_chunk_is_marked_and_never_loaded(opened, tmp_path: Path) -> None:
    j = await opened()
    big = b"x" * 70_000
    await j.journal.append(Append(Records(Layout.LINES, 1, big + b"\n")))
    await j.journal.append(Append(lines(b"2")))
    await j.journal.close()
    path = tmp_path / "journal.db"
    raw = path.read_bytes()
    at = raw.index(b"x" * 10_000) + 5000
    path.write_bytes(raw[:at] + b"X" + raw[at + 1 :])

    again = await opened()
    first, second = await again.journal.read(1, 1 << 20)
    assert (first.damaged, second.damaged) == (True, False)
    assert await again.journal.load([Span(1, 0, 1)]) is None
    assert await again.journal.load([Span(2, 0, 1)]) is not None
    await again.journal.write(Seal(Sealed(1, (Span(1, 0, 1),), 1), Cursor(2, 0)))
    letter = DeadLetter("j.1.0", "damaged", "checksum", "", b"", 0, 1.0, 2.0)
    await again.journal.write(settlement(1, 0, dead=[letter], finished=[1], damaged=[1]))
    ledger, counted, *_ = await again.journal.close()
    assert counted == ledger.pending == 1
    with sqlite3.connect(path) as db:
        kept = db.execute("SELECT id, length(payload) FROM damaged").fetchall()
    db.close()
    assert kept == [(1, 70_001)]


async def test_another_programs_file_is_refused_and_left_alone(opened, tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE theirs(x)")
    db.close()
    before = path.read_bytes()
    with pytest.raises(JournalUnreadable, match="not a journal"):
        await opened()
    assert path.read_bytes() == before


async def test_a_newer_version_is_refused(opened, tmp_path: Path) -> None:
    j = await opened()
    await j.journal.close()
    with sqlite3.connect(tmp_path / "journal.db") as db:
        db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(JournalUnreadable, match="version 99"):
        await opened()


@pytest.mark.parametrize("damage", ["garbage", "empty header", "truncated"])
async def test_an_unreadable_file_is_set_aside_and_it_starts(opened, tmp_path, damage) -> None:
    j = await opened()
    await j.journal.append(Append(Records(Layout.LINES, 1, b"x" * 200_000 + b"\n")))
    await j.journal.close()
    path = tmp_path / "journal.db"
    raw = path.read_bytes()
    broken = {
        "garbage": b"garbage" * 10_000,
        "empty header": bytes(100) + raw[100:],
        "truncated": raw[: len(raw) // 3],
    }[damage]
    path.write_bytes(broken)
    again = await opened()
    assert again.recovered.set_aside
    # Everything but the header is there: where the tables begin is written in the file once more.
    kept = [b"x" * 200_000 + b"\n"] if damage == "empty header" else []
    assert [chunk.records.payload for chunk in await again.journal.read(1, 1 << 20)] == kept
    await again.journal.append(Append(lines(b"1")))
    assert (tmp_path / again.recovered.set_aside).read_bytes() == broken


async def test_a_failed_commit_poisons(opened) -> None:
    j = await opened()
    await j.journal.append(Append(lines(b"1")))
    # A real failure of the store: its tables are gone under the writer.
    j.journal._store.connection.execute("DROP TABLE chunks")
    with pytest.raises(JournalFailed):
        await j.journal.append(Append(lines(b"2")))
    assert isinstance(j.journal.failed.exception(), JournalFailed)
    with pytest.raises(JournalFailed):
        j.journal.append(Append(lines(b"3")))
    with pytest.raises(JournalFailed):
        await j.journal.write(Seal(Sealed(1, (Span(1, 0, 1),), 1), Cursor(2, 0)))


async def test_a_full_disk_refuses_appends_and_keeps_the_rest(opened) -> None:
    j = await opened()
    await j.journal.append(Append(lines(b"1")))
    db = j.journal._store.connection
    (pages,) = db.execute("PRAGMA page_count").fetchone()
    db.execute(f"PRAGMA max_page_count={pages}")
    size = j.journal.bytes
    with pytest.raises(Overloaded, match="disk"):
        await j.journal.append(Append(Records(Layout.LINES, 1, b"x" * 500_000 + b"\n")))
    assert j.journal.bytes == size
    assert not j.journal.failed.done()
    await j.journal.write(Seal(Sealed(1, (Span(1, 0, 1),), 1), Cursor(2, 0)))
    db.execute("PRAGMA max_page_count=1000000")
    await j.journal.append(Append(lines(b"2")))
    assert j.journal.ledger.accepted == 2


async def test_what_is_sealed_while_the_disk_is_full_is_written_when_there_is_space(opened) -> None:
    j = await opened()
    await j.journal.append(Append(lines(b"1")))
    db = j.journal._store.connection
    (pages,) = db.execute("PRAGMA page_count").fetchone()
    db.execute(f"PRAGMA max_page_count={pages}")
    wide = tuple(Span(1, n, 1) for n in range(20_000))
    future = j.journal.write(Seal(Sealed(1, wide, 1), Cursor(2, 0)))
    done, _ = await asyncio.wait({future}, timeout=0.4)
    assert not done
    assert not j.journal.failed.done()
    db.execute("PRAGMA max_page_count=1000000")
    await asyncio.wait_for(future, 60)


async def test_the_wal_is_started_over(opened, tmp_path: Path) -> None:
    def starts() -> bytes:
        """The number in the WAL's head that counts how often it was begun."""
        with (tmp_path / "journal.db-wal").open("rb") as wal:
            return wal.read(16)[12:]

    j = await opened()
    payload = b"x" * 999_999 + b"\n"
    await j.journal.append(Append(Records(Layout.LINES, 1, payload)))
    first, count = starts(), 80
    for _ in range(79):
        await j.journal.append(Append(Records(Layout.LINES, 1, payload)))
    async with asyncio.timeout(60):  # a disk that others use copies 64 MiB slowly
        while starts() == first:
            # A commit behind the copy starts it over; those before it make it larger.
            await asyncio.sleep(0.01 * (count - 79))
            await j.journal.append(Append(lines(b"1")))
            count += 1
    for _ in range(40):
        await j.journal.append(Append(Records(Layout.LINES, 1, payload)))
    wal = (tmp_path / "journal.db-wal").stat().st_size
    assert wal < 110 << 20
    assert (await j.journal.close()).counted == count + 40


async def test_a_batch_that_is_sealed_and_settled_in_one_commit_leaves_no_row(opened) -> None:
    j = await opened()
    records = lines(*[b"%d" % n for n in range(40)])
    await j.journal.append(Append(records))
    written = []
    for n in range(40):  # more than one statement takes
        written.append(j.journal.write(Seal(Sealed(n + 1, (Span(1, n, 1),), 1), Cursor(1, n + 1))))
        written.append(j.journal.write(Settle(n + 1, 1, [], [], [1] if n == 39 else [], 0)))
    await asyncio.gather(*written)
    assert (await j.journal.close()).counted == 0
    again = await opened()
    assert again.recovered.batches == []
