"""The tables of a journal, and how those of an earlier version are carried over in place.

A journal is created as version 1 was and then carried over, so both ways end with the same tables.
Each step adds columns and tables and changes no row that holds a record: it takes as long as many
dead letters as there are. All steps together are one transaction, so a crash leaves the old version
or this one.

| version | came with |
| --- | --- |
| 1 | chunks, batches, dead letters, keys, the ledger; later the bytes of all chunks, bookmarks |
| 2 | names of records that are fed again, many dead letters in a row, a checksum over the ledger |
| 3 | envelopes of records and dead letters, the lineage of batches |
"""

from __future__ import annotations

import sqlite3
import zlib
from typing import TYPE_CHECKING, NamedTuple

from ingestd.journal.sqlite import offsets

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

APPLICATION_ID = 0x696E6764  # "ingd"
VERSION = 3
COUNTERS = (
    "accepted", "processed", "dead", "refused",
    "cursor_chunk", "cursor_record", "last_chunk", "next_batch",
)  # fmt: skip
"""The columns of `meta` that move with commits, in the order of its checksum."""

_VERSION_1 = (
    """CREATE TABLE chunks(
    id INTEGER PRIMARY KEY, accepted_at REAL NOT NULL, count INTEGER NOT NULL,
    bytes INTEGER NOT NULL, layout INTEGER NOT NULL, crc INTEGER NOT NULL,
    sizes BLOB NOT NULL, payload BLOB NOT NULL) STRICT""",
    """CREATE TABLE batches(
    number INTEGER PRIMARY KEY, count INTEGER NOT NULL, attempts INTEGER NOT NULL,
    due_at REAL NOT NULL, accepted_at REAL NOT NULL, spans BLOB NOT NULL) STRICT""",
    """CREATE TABLE damaged(
    id INTEGER PRIMARY KEY, accepted_at REAL NOT NULL, count INTEGER NOT NULL,
    bytes INTEGER NOT NULL, layout INTEGER NOT NULL, crc INTEGER NOT NULL,
    sizes BLOB NOT NULL, payload BLOB NOT NULL) STRICT""",
    """CREATE TABLE keys(
    id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, at REAL NOT NULL, bytes INTEGER NOT NULL,
    fingerprint BLOB NOT NULL, answer BLOB NOT NULL) STRICT""",
    """CREATE TABLE meta(
    one INTEGER PRIMARY KEY CHECK (one = 1), journal TEXT NOT NULL,
    accepted INTEGER NOT NULL, processed INTEGER NOT NULL, dead INTEGER NOT NULL,
    refused INTEGER NOT NULL, cursor_chunk INTEGER NOT NULL, cursor_record INTEGER NOT NULL,
    last_chunk INTEGER NOT NULL, next_batch INTEGER NOT NULL) STRICT""",
    """CREATE TABLE dead(
    id INTEGER PRIMARY KEY AUTOINCREMENT, record TEXT NOT NULL, records INTEGER NOT NULL,
    reason TEXT NOT NULL, error TEXT NOT NULL, traceback TEXT NOT NULL,
    attempts INTEGER NOT NULL, first_at REAL NOT NULL, last_at REAL NOT NULL,
    retry INTEGER NOT NULL DEFAULT 0, bytes INTEGER NOT NULL, payload BLOB NOT NULL) STRICT""",
    "CREATE INDEX dead_retry ON dead(id) WHERE retry = 1",
    """CREATE TABLE dead_totals(
    one INTEGER PRIMARY KEY CHECK (one = 1), letters INTEGER NOT NULL, bytes INTEGER NOT NULL,
    revived INTEGER NOT NULL, readmitted INTEGER NOT NULL, expired INTEGER NOT NULL,
    purged INTEGER NOT NULL) STRICT""",
    "INSERT INTO dead_totals VALUES(1, 0, 0, 0, 0, 0, 0)",
)

# Version 1 without it was made before chunks were summed up. Triggers keep the sums: they are exact
# after every commit, whichever process made that, and the row that they are in is written anyway.
_CHUNK_BYTES = (
    "ALTER TABLE meta ADD COLUMN chunk_bytes INTEGER NOT NULL DEFAULT 0",
    "UPDATE meta SET chunk_bytes = (SELECT coalesce(sum(bytes), 0) FROM chunks)",
    """CREATE TRIGGER chunk_came AFTER INSERT ON chunks BEGIN
    UPDATE meta SET chunk_bytes = chunk_bytes + new.bytes; END""",
    """CREATE TRIGGER chunk_went AFTER DELETE ON chunks BEGIN
    UPDATE meta SET chunk_bytes = chunk_bytes - old.bytes; END""",
)

# A row of `dead` holds `letters` letters with the numbers up to its id. What has no record id was
# never accepted: `invalid` has what each principal has of those.
_VERSION_2 = (
    "ALTER TABLE chunks ADD COLUMN names BLOB NOT NULL DEFAULT x''",
    "ALTER TABLE damaged ADD COLUMN names BLOB NOT NULL DEFAULT x''",
    "ALTER TABLE batches ADD COLUMN wait REAL NOT NULL DEFAULT 1e9",
    "ALTER TABLE meta ADD COLUMN crc INTEGER NOT NULL DEFAULT 0",
    """CREATE TABLE IF NOT EXISTS failing(
    number INTEGER PRIMARY KEY, seconds REAL NOT NULL, counted INTEGER NOT NULL) STRICT""",
    """CREATE TABLE identity(
    one INTEGER PRIMARY KEY CHECK (one = 1), journal TEXT NOT NULL, crc INTEGER NOT NULL) STRICT""",
    "ALTER TABLE dead ADD COLUMN letters INTEGER NOT NULL DEFAULT 1",
    "ALTER TABLE dead ADD COLUMN principal TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE dead ADD COLUMN facts BLOB NOT NULL DEFAULT x''",
    "ALTER TABLE dead_totals ADD COLUMN dropped INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE dead_totals ADD COLUMN invalid INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE dead_totals ADD COLUMN invalid_bytes INTEGER NOT NULL DEFAULT 0",
    """CREATE TABLE invalid(
    principal TEXT PRIMARY KEY, letters INTEGER NOT NULL, bytes INTEGER NOT NULL) STRICT""",
    "CREATE INDEX dead_invalid ON dead(principal, id) WHERE record = ''",
    """INSERT INTO invalid SELECT '', count(*), sum(bytes) FROM dead WHERE record = ''
    HAVING count(*) > 0""",
    """UPDATE dead_totals SET invalid = coalesce((SELECT sum(letters) FROM invalid), 0),
    invalid_bytes = coalesce((SELECT sum(bytes) FROM invalid), 0)""",
    "DROP TRIGGER IF EXISTS dead_came",
    "DROP TRIGGER IF EXISTS dead_went",
    """CREATE TRIGGER dead_came AFTER INSERT ON dead BEGIN
    UPDATE dead_totals SET letters = letters + new.letters, bytes = bytes + new.bytes; END""",
    """CREATE TRIGGER dead_went AFTER DELETE ON dead BEGIN
    UPDATE dead_totals SET letters = letters - old.letters, bytes = bytes - old.bytes; END""",
    """CREATE TRIGGER invalid_came AFTER INSERT ON dead WHEN new.record = '' BEGIN
    UPDATE dead_totals SET invalid = invalid + new.letters,
        invalid_bytes = invalid_bytes + new.bytes;
    INSERT INTO invalid VALUES(new.principal, new.letters, new.bytes)
        ON CONFLICT(principal) DO UPDATE
        SET letters = letters + excluded.letters, bytes = bytes + excluded.bytes; END""",
    """CREATE TRIGGER invalid_went AFTER DELETE ON dead WHEN old.record = '' BEGIN
    UPDATE dead_totals SET invalid = invalid - old.letters,
        invalid_bytes = invalid_bytes - old.bytes;
    UPDATE invalid SET letters = letters - old.letters, bytes = bytes - old.bytes
        WHERE principal = old.principal;
    DELETE FROM invalid WHERE principal = old.principal AND letters <= 0; END""",
)

_VERSION_3 = (
    "ALTER TABLE chunks ADD COLUMN envelopes BLOB NOT NULL DEFAULT x''",
    "ALTER TABLE damaged ADD COLUMN envelopes BLOB NOT NULL DEFAULT x''",
    "ALTER TABLE dead ADD COLUMN envelopes BLOB NOT NULL DEFAULT x''",
    "ALTER TABLE batches ADD COLUMN lineage BLOB NOT NULL DEFAULT x''",
)

_META = " ".join(["%s"] * (1 + len(COUNTERS)))


def meta_checksum(journal: str, counters: Sequence[object]) -> int:
    """CRC-32 over the one row that everything hangs on; `counters` as `COUNTERS` names them."""
    return zlib.crc32((_META % (journal, *counters)).encode())


def write_identity(db: sqlite3.Connection, journal: str) -> None:
    """Keeps the journal's id a second time, on a page of its own, with a checksum."""
    db.execute(
        "INSERT OR REPLACE INTO identity VALUES(1, ?, ?)", (journal, zlib.crc32(journal.encode()))
    )


def read_identity(db: sqlite3.Connection) -> str:
    """The id as it is kept a second time; empty if that copy is damaged.

    Raises:
        sqlite3.Error: it can't be read.
    """
    row = db.execute("SELECT journal, crc FROM identity").fetchone()
    if row is None or type(row[0]) is not str or zlib.crc32(row[0].encode()) != row[1]:
        return ""
    return row[0]


def create(db: sqlite3.Connection, journal: str) -> None:
    """Makes all tables, in the transaction that is open."""
    for statement in _VERSION_1:
        db.execute(statement)
    db.execute("INSERT INTO meta VALUES(1, ?, 0, 0, 0, 0, 1, 0, 0, 1)", (journal,))
    _carry_over(db, 1)
    db.execute(f"PRAGMA application_id={APPLICATION_ID}")


def carry_over(db: sqlite3.Connection) -> None:
    """Makes a journal of an earlier version one of this version, in one transaction.

    Raises:
        sqlite3.Error: it is as it was.
    """
    db.execute("BEGIN IMMEDIATE")
    try:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if 0 < version < VERSION:  # no other process did it meanwhile
            _carry_over(db, version)
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _carry_over(db: sqlite3.Connection, version: int) -> None:
    if version == 1:
        _to_version_2(db)
    for statement in _VERSION_3:
        db.execute(statement)
    db.execute(f"PRAGMA user_version={VERSION}")


def _to_version_2(db: sqlite3.Connection) -> None:
    if "chunk_bytes" not in columns(db, "meta"):
        for statement in _CHUNK_BYTES:
            db.execute(statement)
    db.execute(offsets.SCHEMA)
    for statement in _VERSION_2:
        db.execute(statement)
    row = db.execute(f"SELECT journal, {', '.join(COUNTERS)} FROM meta").fetchone()  # noqa: S608
    if row is None:
        raise sqlite3.DatabaseError("the meta row is missing")
    write_identity(db, row[0])
    db.execute("UPDATE meta SET crc = ?", (meta_checksum(row[0], row[1:]),))


def columns(db: sqlite3.Connection, table: str) -> list[str]:
    """The names of a table's columns; none if there is no such table."""
    return [row[1] for row in db.execute(f"PRAGMA table_info({table})")]


# -- commits ---------------------------------------------------------------------------------------
#
# One statement writes a whole commit.
#
# Each statement lets the other threads of the process have the interpreter, and has to wait for it
# again, which beside a busy event loop takes longer than the statement. So the rows of a commit are
# the columns of one row of a view, and triggers put them into their tables. Views and triggers are
# temporary: they belong to the connection and are not in the file.
#
# There are a small view and a large one, because each place in a row costs something even if
# nothing is in it. What does not fit into the large one goes into several rows of it, in one
# transaction.

_CHUNK_COLUMNS = 10
_BATCH_COLUMNS = 8
_META_COLUMNS = (*COUNTERS, "crc")


class _View:
    """A view for the rows of a commit.

    Args:
        name: of it.
        rows: the chunks, and the batches, that fit in.
        runs: the runs of batches, and of chunks, that go.
    """

    def __init__(self, name: str, rows: int, runs: int) -> None:
        self.name, self.rows, self.runs = name, rows, runs
        self._chunks = [_names(f"c{row}", _CHUNK_COLUMNS) for row in range(rows)]
        self._batches = [_names(f"b{row}", _BATCH_COLUMNS) for row in range(rows)]
        self._settled = [_names(f"s{run}", 2) for run in range(runs)]
        self._finished = [_names(f"f{run}", 2) for run in range(runs)]
        parts = (self._chunks, self._batches, self._settled, self._finished)
        self._columns = [f"m_{column}" for column in _META_COLUMNS]
        self._columns += [column for part in parts for row in part for column in row]
        self.insert = f"INSERT INTO {name} VALUES({', '.join('?' * len(self._columns))})"

    def create(self, db: sqlite3.Connection) -> None:
        """Makes it, with its triggers."""
        columns = ", ".join(f"NULL AS {column}" for column in self._columns)
        db.execute(f"CREATE TEMP VIEW {self.name} AS SELECT {columns}")
        for row in self._chunks:
            # One by one: a row that another statement selects would be copied on its way.
            self._trigger(db, row[0], f"INSERT INTO chunks VALUES({_new(row)})", row[0])
        self._trigger(db, "meta", f"UPDATE meta SET {_assigned()}", "m_crc")  # noqa: S608
        for row in self._batches:
            self._trigger(db, row[0], f"INSERT INTO batches VALUES({_new(row)})", row[0])
        for run in self._settled:
            within = "number BETWEEN new.{} AND new.{}".format(*run)
            gone = (f"DELETE FROM {table} WHERE {within}" for table in ("batches", "failing"))  # noqa: S608
            self._trigger(db, run[0], "; ".join(gone), run[0])
        for run in self._finished:
            gone_chunks = "DELETE FROM chunks WHERE id BETWEEN new.{} AND new.{}".format(*run)  # noqa: S608
            self._trigger(db, run[0], gone_chunks, run[0])

    def _trigger(self, db: sqlite3.Connection, name: str, does: str, given: str) -> None:
        db.execute(
            f"CREATE TEMP TRIGGER {self.name}_{name} INSTEAD OF INSERT ON {self.name}"
            f" WHEN new.{given} IS NOT NULL BEGIN {does}; END"
        )


def _names(prefix: str, columns: int) -> list[str]:
    return [f"{prefix}_{column}" for column in range(columns)]


def _new(names: Sequence[str]) -> str:
    return ", ".join(f"new.{name}" for name in names)


def _assigned() -> str:
    return ", ".join(f"{column} = new.m_{column}" for column in _META_COLUMNS)


_SMALL = _View("small_commit", 1, 1)
_LARGE = _View("large_commit", 8, 4)


def prepare_commits(db: sqlite3.Connection) -> None:
    """Makes the views for a connection that writes."""
    for view in (_SMALL, _LARGE):
        view.create(db)


class CommitRows(NamedTuple):
    """The rows that most commits write.

    Attributes:
        meta: the counters of `COUNTERS`, and their checksum.
        chunks: that come.
        batches: that come.
        settled: runs of numbers of batches that go, first and last.
        finished: runs of chunks that go.
    """

    meta: Sequence[int]
    chunks: Sequence[Sequence[object]]
    batches: Sequence[Sequence[object]]
    settled: Sequence[tuple[int, int]]
    finished: Sequence[tuple[int, int]]

    def fits(self, view: _View = _LARGE) -> bool:
        """Tells if one statement writes all of them, which is a transaction by itself."""
        rows, runs = len(self.chunks), len(self.settled)
        rows = max(rows, len(self.batches))
        runs = max(runs, len(self.finished))
        return rows <= view.rows and runs <= view.runs

    def write(self, db: sqlite3.Connection) -> None:
        """Writes all of them, on a connection that was prepared.

        Raises:
            sqlite3.Error: nothing of the last statement was written.
        """
        view = _SMALL if self.fits(_SMALL) else _LARGE
        for row in self._rows(view):
            db.execute(view.insert, row)

    def _rows(self, view: _View) -> Iterator[list[object]]:
        parts = (
            (self.chunks, view.rows, _CHUNK_COLUMNS),
            (self.batches, view.rows, _BATCH_COLUMNS),
            (self.settled, view.runs, 2),
            (self.finished, view.runs, 2),
        )
        number = 0
        while not number or any(len(values) > number * room for values, room, _ in parts):
            row: list[object] = [None] * len(_META_COLUMNS) if number else [*self.meta]
            for values, room, columns in parts:
                some = values[number * room : (number + 1) * room]
                for value in some:
                    row += value
                row += [None] * ((room - len(some)) * columns)
            yield row
            number += 1


class OtherRows(NamedTuple):
    """The rows that commits with failures write beside `CommitRows`, and before them.

    Attributes:
        failing: batch, seconds, counted tries.
        postponed: attempts, due time, wait, batch.
        damaged: chunks that are kept aside.
    """

    failing: Sequence[tuple[int, float, int]] = ()
    postponed: Sequence[tuple[int, float, float, int]] = ()
    damaged: Sequence[tuple[int]] = ()

    def write(self, db: sqlite3.Connection) -> None:
        """Writes all of them, in the transaction that is open."""
        if self.failing:
            db.executemany("INSERT OR REPLACE INTO failing VALUES(?,?,?)", self.failing)
        if self.postponed:
            statement = "UPDATE batches SET attempts=?, due_at=?, wait=? WHERE number=?"
            db.executemany(statement, self.postponed)
        if self.damaged:
            statement = "INSERT OR IGNORE INTO damaged SELECT * FROM chunks WHERE id=?"
            db.executemany(statement, self.damaged)
