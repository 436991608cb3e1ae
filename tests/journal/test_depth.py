"""What a journal does costs the same however many records are pending; counted, not timed."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ingestd.base.append import Append
from ingestd.base.errors import JournalFailed
from ingestd.base.record import Records, Span
from ingestd.journal.interface import Cursor, Ledger, Seal, Sealed, Settle
from ingestd.journal.sqlite import audit, check, journal, schema, store
from tests.backlog import fill
from tests.peak import peak

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.slow

STEP = 50
"""Instructions of SQLite's machine between two calls of the counter."""


class Work:
    """What was done on the connections that were opened: instructions, and bytes that were read."""

    def __init__(self) -> None:
        self.instructions = 0
        self._read = self._rchar()

    def tick(self) -> int:
        self.instructions += STEP
        return 0

    @staticmethod
    def _rchar() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    @property
    def read(self) -> int:
        return self._rchar() - self._read


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Work]]:
    """Starts to count what all connections to journals do from now on."""
    current: list[Work] = [Work()]
    connect = store.connect

    def counted(path: Path, **options: int) -> sqlite3.Connection:
        connection = connect(path, **options)
        connection.set_progress_handler(lambda: current[0].tick(), STEP)  # noqa: PLW0108
        return connection

    monkeypatch.setattr(store, "connect", counted)
    monkeypatch.setattr(journal, "connect", counted)

    def begin() -> Work:
        current[0] = Work()
        return current[0]

    return begin


async def test_a_start_does_not_read_all_chunks(opened, work, tmp_path: Path) -> None:
    done: dict[int, Work] = {}
    for chunks in (5_000, 50_000):
        fill(tmp_path / "journal.db", chunks=chunks)
        begun = done[chunks] = work()
        journal = (await opened()).journal
        instructions, begun.instructions = begun.instructions, 0
        assert journal.ledger.pending == chunks
        assert journal.bytes == chunks * 125
        await journal.close()
        assert begun.instructions > chunks  # the control: leaving counts every row
        begun.instructions = instructions
        (tmp_path / "journal.db").unlink()
    assert 0 < done[50_000].instructions < done[5_000].instructions * 1.1


async def test_a_start_does_not_read_payloads(opened, work, tmp_path: Path) -> None:
    read = {}
    for chunks in (3_000, 6_000):
        fill(tmp_path / "journal.db", chunks=chunks, size=20_000)
        begun = work()
        journal = (await opened()).journal
        read[chunks] = begun.read
        assert journal.bytes == chunks * 20_000
        await journal.close()
        # Two pages hold a chunk; the count, when it leaves, reads one of them.
        assert begun.read < chunks * 20_000
        (tmp_path / "journal.db").unlink()
    assert read[6_000] < read[3_000] * 1.1


async def test_a_commit_costs_the_same_at_any_depth(opened, work, tmp_path: Path) -> None:
    steps = {}
    for chunks in (100, 50_000):
        fill(tmp_path / "journal.db", chunks=chunks)
        journal = (await opened()).journal
        begun = work()
        for n in range(1, 41):
            await journal.append(Append(Records.lines([b"1"])))
            await journal.read(n, 1)
            await journal.write(Seal(Sealed(n, (Span(n, 0, 1),), 1), Cursor(n + 1, 0)))
            await journal.write(Settle(n, 1, [], [], [n], 125))
        steps[chunks] = begun.instructions
        await journal.close()
        (tmp_path / "journal.db").unlink()
    assert 0 < steps[50_000] < steps[100] * 1.1


async def test_a_long_count_goes_on_after_the_start(opened, tmp_path: Path) -> None:
    fill(tmp_path / "journal.db", chunks=7_000)
    journal = (await opened()).journal
    steps = 1
    while (found := await journal.maintenance.audit()) is None:
        steps += 1
    assert found == 0
    assert steps >= 7_000 // audit.CHUNKS_MAX
    assert (await journal.close()).counted == 7_000


async def through(journal: journal.SqliteJournal) -> int:
    """Counts to the end."""
    while (found := await journal.maintenance.audit()) is None:
        pass
    return found


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE chunks SET count = 2 WHERE id = 2",
        "DELETE FROM chunks WHERE id = 3500",
        "UPDATE chunks SET bytes = bytes + 1 WHERE id = 6999",
        "UPDATE meta SET chunk_bytes = chunk_bytes + 1",
        "UPDATE meta SET accepted = accepted + 1",  # with its checksum
    ],
)
async def test_what_the_first_count_finds_is_damage_also_after_the_start(
    opened, tmp_path: Path, statement: str
) -> None:
    """As damage that shows later: this life ends, and the next one repairs the file."""
    fill(tmp_path / "journal.db", chunks=7_000)
    with closing(sqlite3.connect(tmp_path / "journal.db")) as db, db:
        db.execute(statement)
        counters = db.execute(f"SELECT {', '.join(schema.COUNTERS)} FROM meta").fetchone()
        (name,) = db.execute("SELECT journal FROM meta").fetchone()
        store.write_meta(db, name, store.meta_of(counters))
    journal = (await opened()).journal
    with pytest.raises(JournalFailed, match="do not add up"):
        await through(journal)
    assert isinstance(journal.failed.exception(), JournalFailed)
    await journal.close()
    again = await opened()
    assert again.recovered.set_aside
    assert await through(again.journal) == 0
    ledger = again.journal.ledger
    assert 6_999 <= ledger.pending <= 7_000
    assert ledger.accepted == ledger.pending + ledger.dead


async def test_counting_at_the_end_takes_half_of_the_time_that_is_left(
    opened, tmp_path: Path
) -> None:
    fill(tmp_path / "journal.db", chunks=7_000)
    journal = (await opened()).journal
    now = journal._loop.time()
    assert journal._count_at_last(now) is None
    assert journal._count_at_last(now + 3600) == 7_000


async def test_small_chunks_come_back_a_bounded_number_at_a_time(opened, tmp_path: Path) -> None:
    fill(tmp_path / "journal.db", chunks=20_000, size=3)
    journal = (await opened()).journal
    with peak() as most:
        chunks = await journal.read(1, 1 << 20)
    assert [chunk.id for chunk in chunks] == list(range(1, store.READ_CHUNKS + 1))
    assert most.bytes < 4 << 20


async def test_freed_pages_are_used_again(opened, tmp_path: Path) -> None:
    """A backlog that comes and goes leaves a file as large as the largest one, not as all."""
    journal = (await opened()).journal
    sizes = []
    number = chunk = 0
    for _ in range(4):
        for _ in range(30):
            chunk += 1
            await journal.append(Append(Records.lines([b"x" * 124] * 1000)))
        while number < chunk:
            number += 1
            sealed = Sealed(number, (Span(number, 0, 1000),), 1000)
            await journal.write(Seal(sealed, Cursor(number + 1, 0)))
            await journal.write(Settle(number, 1000, [], [], [number], 125_000))
        sizes.append(journal._store.connection.execute("PRAGMA page_count").fetchone()[0])
        assert journal._store.reusable > 30 * 120_000
    assert journal.bytes == 0
    assert sizes[-1] <= sizes[0] * 1.1


# -- journals of an earlier ingestd --------------------------------------------------------------

EARLIER = """
PRAGMA page_size=16384;
PRAGMA journal_mode=WAL;
CREATE TABLE chunks(
    id INTEGER PRIMARY KEY, accepted_at REAL NOT NULL, count INTEGER NOT NULL,
    bytes INTEGER NOT NULL, layout INTEGER NOT NULL, crc INTEGER NOT NULL,
    sizes BLOB NOT NULL, payload BLOB NOT NULL) STRICT;
CREATE TABLE batches(
    number INTEGER PRIMARY KEY, count INTEGER NOT NULL, attempts INTEGER NOT NULL,
    due_at REAL NOT NULL, accepted_at REAL NOT NULL, spans BLOB NOT NULL) STRICT;
CREATE TABLE damaged(
    id INTEGER PRIMARY KEY, accepted_at REAL NOT NULL, count INTEGER NOT NULL,
    bytes INTEGER NOT NULL, layout INTEGER NOT NULL, crc INTEGER NOT NULL,
    sizes BLOB NOT NULL, payload BLOB NOT NULL) STRICT;
CREATE TABLE keys(
    id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, at REAL NOT NULL, bytes INTEGER NOT NULL,
    fingerprint BLOB NOT NULL, answer BLOB NOT NULL) STRICT;
CREATE TABLE meta(
    one INTEGER PRIMARY KEY CHECK (one = 1), journal TEXT NOT NULL,
    accepted INTEGER NOT NULL, processed INTEGER NOT NULL, dead INTEGER NOT NULL,
    refused INTEGER NOT NULL, cursor_chunk INTEGER NOT NULL, cursor_record INTEGER NOT NULL,
    last_chunk INTEGER NOT NULL, next_batch INTEGER NOT NULL) STRICT;
CREATE TABLE dead(
    id INTEGER PRIMARY KEY AUTOINCREMENT, record TEXT NOT NULL, records INTEGER NOT NULL,
    reason TEXT NOT NULL, error TEXT NOT NULL, traceback TEXT NOT NULL,
    attempts INTEGER NOT NULL, first_at REAL NOT NULL, last_at REAL NOT NULL,
    retry INTEGER NOT NULL DEFAULT 0, bytes INTEGER NOT NULL, payload BLOB NOT NULL) STRICT;
CREATE INDEX dead_retry ON dead(id) WHERE retry = 1;
CREATE TABLE dead_totals(
    one INTEGER PRIMARY KEY CHECK (one = 1), letters INTEGER NOT NULL, bytes INTEGER NOT NULL,
    revived INTEGER NOT NULL, readmitted INTEGER NOT NULL, expired INTEGER NOT NULL,
    purged INTEGER NOT NULL) STRICT;
INSERT INTO dead_totals VALUES(1, 0, 0, 0, 0, 0, 0);
CREATE TRIGGER dead_came AFTER INSERT ON dead BEGIN
    UPDATE dead_totals SET letters = letters + 1, bytes = bytes + new.bytes; END;
CREATE TRIGGER dead_went AFTER DELETE ON dead BEGIN
    UPDATE dead_totals SET letters = letters - 1, bytes = bytes - old.bytes; END;
INSERT INTO meta VALUES(1, '0123456789ab', 3, 0, 0, 0, 1, 0, 2, 1);
PRAGMA application_id=0x696E6764;
PRAGMA user_version=1;
"""


def earlier(path: Path) -> None:
    """A journal as an ingestd made it that kept no sum of bytes: two chunks, three records."""
    with closing(sqlite3.connect(path)) as db:
        db.executescript(EARLIER)
        for number, items in enumerate([[b"1", b"2"], [b"3"]], 1):
            row = store.chunk_row(store.Chunk(number, 1.0, Records.lines(items)))
            db.execute("INSERT INTO chunks VALUES(?,?,?,?,?,?,?,?)", row[:8])
        db.commit()


async def test_a_journal_of_an_earlier_ingestd_goes_on(opened, tmp_path: Path) -> None:
    earlier(tmp_path / "journal.db")
    j = await opened()
    assert j.journal.id == "0123456789ab"
    assert not j.recovered.set_aside
    assert j.journal.bytes == 6
    chunks = await j.journal.read(1, 1 << 20)
    assert [chunk.records.items() for chunk in chunks] == [[b"1", b"2"], [b"3"]]
    await j.journal.write(Seal(Sealed(1, (Span(1, 0, 2),), 2), Cursor(2, 0)))
    await j.journal.write(Settle(1, 2, [], [], [1], 4))
    assert await j.journal.maintenance.audit() == 0
    assert (await j.journal.close()).counted == 1
    again = await opened()
    assert again.journal.bytes == 2


async def test_statements_of_another_process_are_summed_up(opened, tmp_path: Path) -> None:
    j = await opened()
    await j.journal.append(Append(Records.lines([b"1"])))
    await j.journal.close()
    with closing(sqlite3.connect(tmp_path / "journal.db")) as db, db:
        row = store.chunk_row(store.Chunk(2, 1.0, Records.lines([b"22"])))
        db.execute("INSERT INTO chunks VALUES(?,?,?,?,?,?,?,?,?,?)", row)
        db.execute("DELETE FROM chunks WHERE id=?", (1,))
        moved = store.Meta(Ledger(accepted=2, processed=1), Cursor(2, 0), 2, 1)
        store.write_meta(db, j.journal.id, moved)
    again = await opened()
    assert not again.recovered.set_aside
    assert again.journal.bytes == 3


async def test_a_move_that_was_interrupted_is_made_at_the_next_start(
    opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier(tmp_path / "journal.db")
    with monkeypatch.context() as broken:
        broken.setattr(schema, "_VERSION_2", (*schema._VERSION_2, "SELECT no_such_function()"))
        with pytest.raises(sqlite3.Error):
            store.Store(tmp_path / "journal.db")
    with closing(sqlite3.connect(tmp_path / "journal.db")) as db:
        assert "chunk_bytes" not in str(db.execute("SELECT sql FROM sqlite_schema").fetchall())
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
    assert (await opened()).journal.bytes == 6


async def test_verify_compares_the_sum_of_bytes(opened, tmp_path: Path) -> None:
    earlier(tmp_path / "journal.db")
    await (await opened()).journal.close()
    with closing(sqlite3.connect(tmp_path / "journal.db", isolation_level=None)) as db:
        assert list(check.findings(db)) == []
        db.execute("UPDATE meta SET chunk_bytes = 7")
        assert [found.text for found in check.findings(db)] == [
            "the chunks' bytes are summed up as 7, they are 6"
        ]
