"""The state of a log as a SQLite file, and what an entry of the log changes in it.

The file is a cache: each start makes it anew from the log, so it is written without syncs, and the
code of the SQLite journal does all reads. A commit is made in a transaction of it first; the rows
that changed are the entry; once the entry is in the log the transaction is committed, else it is
rolled back. So an entry says exactly what happened, and nothing has to be decided again where it is
read: not which dead letters were requeued, nor which expired.

Two processes change dead letters. `ingestd dead` only marks them in the file, to be requeued or
to be purged; what the daemon then does is in the log, the marks are not.
"""

from __future__ import annotations

import os
from collections.abc import Sequence  # noqa: TC003  msgspec reads it
from typing import TYPE_CHECKING, Any

import msgspec

from ingestd.base.append import Deduplicated, HeldIds, IdempotencyClaim, SourceOffset
from ingestd.base.errors import DataDirError, JournalFailed, UsageError
from ingestd.host.data_dir import FileLock
from ingestd.journal.letter_rows import COLUMNS, LetterRow, split
from ingestd.journal.sqlite import letters, offsets, schema, sender_ids
from ingestd.journal.sqlite.check import SqliteFile
from ingestd.journal.sqlite.dead_letters import SqliteDeadLetters, SqliteDeadLetterStore, purge
from ingestd.journal.sqlite.offline import opened
from ingestd.journal.sqlite.store import Store, Write, change_keys, connect, write_meta

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from ingestd.journal.dead_letters import (
        InvalidQuota,
        LetterFilter,
        MarkedLetters,
    )
    from ingestd.journal.sqlite.check import Finding
    from ingestd.journal.sqlite.store import KeyChange

TO_PURGE = 2
"""The mark of a letter that is to go; 1 is that of one that is to be requeued."""
PART_ROWS = 1000
_WENT = ("revived", "readmitted", "expired", "purged", "dropped")
"""The counters of `dead_totals` that no trigger keeps."""
_TABLES = (
    "batches", "failing", "damaged", "keys", "bookmarks", "sender_ids", "dedupe_keys", "dead",
)  # fmt: skip
_CAPTURE = (
    "CREATE TEMP TABLE letters_gone(first INTEGER, last INTEGER)",
    "CREATE TEMP TABLE letters_came(id INTEGER)",
    """CREATE TEMP TRIGGER note_gone AFTER DELETE ON main.dead BEGIN
    INSERT INTO letters_gone VALUES(old.id - old.letters + 1, old.id); END""",
    """CREATE TEMP TRIGGER note_came AFTER INSERT ON main.dead BEGIN
    INSERT INTO letters_came VALUES(new.id); END""",
)
_LETTERS = f"SELECT {', '.join(COLUMNS)} FROM dead"  # noqa: S608


class Letters(msgspec.Struct, array_like=True):
    """Changes of dead letters by one commit.

    Attributes:
        gone: runs of numbers, first and last, that go before the rows of `came` come.
        came: rows as their table has them.
        last: the newest number ever given.
        went: the counters of `_WENT` after it.
    """

    gone: list[tuple[int, int]]
    came: list[LetterRow]
    last: int
    went: tuple[int, ...]


class LogEntry(msgspec.Struct, array_like=True):
    """One group commit as its log has it: rows as their tables have them.

    Attributes:
        version: of the tables.
        meta: see `schema.CommitRows`.
        chunks: see there, and so on.
        keys: key, time, fingerprint, answer.
        sweep: see `Write`.
        keys_before: see `Write`.
        offsets: key and state.
        ids: principal, ids that came, and how many are kept.
        deduplicated: keys that came, how many are kept, when, and from when on they are kept.
        letters: `None` if it left them alone.
    """

    version: int
    meta: Sequence[int]
    chunks: Sequence[Sequence[Any]]
    batches: Sequence[Sequence[Any]]
    settled: Sequence[tuple[int, int]]
    finished: Sequence[tuple[int, int]]
    failing: Sequence[tuple[int, float, int]]
    postponed: Sequence[tuple[int, float, float, int]]
    damaged: Sequence[tuple[int]]
    keys: list[tuple[str, float, bytes, bytes]]
    sweep: int
    keys_before: float
    offsets: list[tuple[str, bytes]]
    ids: list[tuple[str, list[bytes], int]]
    deduplicated: list[tuple[list[bytes], int, float, float]]
    letters: Letters | None


_encode = msgspec.msgpack.Encoder().encode
_decode_entry = msgspec.msgpack.Decoder(LogEntry).decode
_decode_part = msgspec.msgpack.Decoder(tuple[str, list[list[Any]]]).decode


class State(msgspec.Struct, array_like=True):
    """The numbers of a snapshot that are no rows.

    Attributes:
        version: of the tables.
        journal: its id.
        meta: the counters and their checksum.
        last: the newest number of a dead letter.
        went: see `Letters`.
    """

    version: int
    journal: str
    meta: list[int]
    last: int
    went: tuple[int, ...]


class CacheStore(Store):
    """The writer's side of the cache; see `Store`.

    Args:
        path: the file; what is in it goes.
        invalid: see `Store`.
        publish: puts an entry into the log, given its bytes, the id of its first chunk, or of the
            chunk that is next, its keys and their time; returns once it is durable there.
        committed: called after each commit.
    """

    is_one_statement = False

    def __init__(
        self,
        path: Path,
        invalid: InvalidQuota,
        publish: Callable[[bytes, int, Sequence[IdempotencyClaim], float], None],
        committed: Callable[[], None],
    ) -> None:
        os.truncate(path, 0)
        for suffix in ("-wal", "-shm", "-damaged"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        super().__init__(path, invalid)
        self._publish, self._committed = publish, committed
        self._published = False
        db = self.connection
        db.execute("PRAGMA synchronous=OFF")
        db.execute("PRAGMA wal_autocheckpoint=1000")
        db.execute(f"CREATE INDEX dead_purge ON dead(id) WHERE retry = {TO_PURGE}")

    def write(self, write: Write, *, hurried: bool = False) -> KeyChange:
        """See `Store.write`.

        Raises:
            Overloaded: the log takes nothing now, or not these keys; nothing was applied.
            JournalFailed: the log has the entry and the cache has not, or another owner.
        """
        self._published = False
        try:
            gone = super().write(write, hurried=hurried)
        except Exception as error:
            if self._published:
                problem = f"its cache could not be written: {error}"
                raise JournalFailed(path=self.path, problem=problem) from error
            raise
        self._committed()
        return gone

    def before_commit(
        self, write: Write, rows: schema.CommitRows, others: schema.OtherRows
    ) -> None:
        """Publishes the entry of the transaction."""
        db = self.connection
        if write.requeue_at is not None:
            _purge_marked(db)
        entry = LogEntry(
            schema.VERSION,
            *rows,
            *others,
            [(one.key, write.at, one.fingerprint, one.answer) for one in write.claims],
            write.sweep,
            write.keys_before,
            [(one.key, one.state) for one in write.bookmarks],
            [(one.principal, [*one.new], one.kept_max) for one in write.ids],
            [
                ([*one.keys.new], one.keys.kept_max, one.at, one.kept_from)
                for one in write.deduplicated
            ],
            _letters_changed(db) if _touches_letters(write) else None,
        )
        first = rows.chunks[0][0] if rows.chunks else self.meta.last_chunk + 1
        self._publish(_encode(entry), first, write.claims, write.at)  # type: ignore[arg-type]
        self._published = True

    # -- from the log --------------------------------------------------------------------------

    def begin(self, journal: str) -> None:
        """Makes it the journal of this id."""
        self.id = journal
        self.connection.execute("UPDATE meta SET journal = ?", (journal,))
        write_meta(self.connection, journal, self.meta)
        schema.write_identity(self.connection, journal)

    def restore(self, part: bytes) -> list[list[Any]]:
        """Puts a part of a snapshot in; returns the rows of `pending`, if these are in it."""
        table, rows = _decode_part(part)
        if table == "pending":
            return rows
        if rows:
            places = ",".join("?" * len(rows[0]))
            self.connection.executemany(f"INSERT INTO {table} VALUES({places})", rows)
        return []

    def restored(self, state: State) -> None:
        """Sets the numbers of a snapshot, once all its parts are in."""
        db = self.connection
        self.begin(state.journal)
        schema.CommitRows(state.meta, (), (), (), ()).write(db)
        _set_letter_numbers(db, state.last, state.went)

    def apply(self, data: bytes, pending: Sequence[range] | None) -> int:
        """Applies an entry, in the transaction that is open.

        Args:
            data: the entry.
            pending: it is older than the snapshot: only its chunks with these ids are put in.

        Returns:
            The id of its first chunk, or of the chunk that comes next.

        Raises:
            ValueError: it is of another version.
        """
        entry, db = _decode_entry(data), self.connection
        if entry.version != schema.VERSION:
            raise ValueError(f"an entry has version {entry.version}")
        first: int = entry.chunks[0][0] if entry.chunks else entry.meta[6] + 1
        if pending is not None:
            wanted = [row for row in entry.chunks if any(row[0] in run for run in pending)]
            db.executemany(f"INSERT INTO chunks VALUES({','.join('?' * 10)})", wanted)
            return first
        schema.OtherRows(entry.failing, entry.postponed, entry.damaged).write(db)
        if entry.letters is not None:
            _change_letters(db, entry.letters)
        schema.CommitRows(
            entry.meta, entry.chunks, entry.batches, entry.settled, entry.finished
        ).write(db)
        self._apply_tables(entry)
        return first

    def ready(self) -> None:
        """Ends what is read from the log: from now on commits go into it."""
        for statement in _CAPTURE:
            self.connection.execute(statement)
        self.connection.execute("PRAGMA wal_autocheckpoint=0")
        self.load()

    def _apply_tables(self, entry: LogEntry) -> None:
        db = self.connection
        if entry.keys or entry.sweep:
            at = entry.keys[0][1] if entry.keys else 0.0
            claims = [_claim(*one) for one in entry.keys]
            sweep = Write(claims=claims, at=at, sweep=entry.sweep, keys_before=entry.keys_before)
            change_keys(db, sweep)
        if entry.offsets:
            marks = [SourceOffset(*one) for one in entry.offsets]
            self.bookmarks = offsets.put(db, marks, self.bookmarks)
        if entry.ids:
            held = [HeldIds(who, frozenset(), frozenset(new), n) for who, new, n in entry.ids]
            sender_ids.put(db, held)
        if entry.deduplicated:
            sender_ids.put_keys(
                db,
                [
                    Deduplicated(HeldIds("", frozenset(), frozenset(new), n), at, since, (), 0)
                    for new, n, at, since in entry.deduplicated
                ],
            )


def _claim(key: str, _at: float, fingerprint: bytes, answer: bytes) -> IdempotencyClaim:
    claim = IdempotencyClaim(key, fingerprint)
    claim.answer = answer
    return claim


# -- dead letters ----------------------------------------------------------------------------------


def _touches_letters(write: Write) -> bool:
    if write.invalid or write.requeue_at is not None or write.expire is not None:
        return True
    return any(settle.dead for settle in write.settled)


def _letters_changed(db: sqlite3.Connection) -> Letters:
    """Reads what this transaction has done to dead letters."""
    gone = db.execute("SELECT first, last FROM letters_gone").fetchall()
    query = f"{_LETTERS} WHERE id IN (SELECT id FROM letters_came) ORDER BY id"  # noqa: S608
    rows = db.execute(query)
    came = [LetterRow(*row)._replace(retry=0) for row in rows.fetchall()]
    db.execute("DELETE FROM letters_gone")
    db.execute("DELETE FROM letters_came")
    return Letters(gone, came, *_letter_numbers(db))


def _letter_numbers(db: sqlite3.Connection) -> tuple[int, tuple[int, ...]]:
    row = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'dead'").fetchone()
    went = db.execute(f"SELECT {', '.join(_WENT)} FROM dead_totals").fetchone()  # noqa: S608
    return (0 if row is None else row[0]), went


def _set_letter_numbers(db: sqlite3.Connection, last: int, went: Sequence[int]) -> None:
    db.execute("DELETE FROM sqlite_sequence WHERE name = 'dead'")
    db.execute("INSERT INTO sqlite_sequence(name, seq) VALUES('dead', ?)", (last,))
    changes = ", ".join(f"{name} = ?" for name in _WENT)
    db.execute(f"UPDATE dead_totals SET {changes}", went)  # noqa: S608


def _change_letters(db: sqlite3.Connection, change: Letters) -> None:
    for first, last in change.gone:
        _remove(db, first, last)
    places = ",".join("?" * len(COLUMNS))
    columns = ", ".join(COLUMNS)
    db.executemany(f"INSERT INTO dead({columns}) VALUES({places})", change.came)
    _set_letter_numbers(db, change.last, change.went)


def _remove(db: sqlite3.Connection, first: int, last: int) -> None:
    """Deletes the letters of some numbers, as far as they are there."""
    query = "SELECT id, letters FROM dead WHERE id >= ? AND id - letters < ? ORDER BY id"
    for number, count in db.execute(query, (first, last)).fetchall():
        if first <= number - count + 1 and number <= last:
            db.execute("DELETE FROM dead WHERE id = ?", (number,))
        elif (row := letters.row_of(db, number)) is not None:
            letters.replace(db, row, split(row, range(first, last + 1))[1])


def _purge_marked(db: sqlite3.Connection) -> None:
    query = f"SELECT id, letters FROM dead WHERE retry = {TO_PURGE} ORDER BY id LIMIT ?"  # noqa: S608
    rows = db.execute(query, (letters.REVIVE_RECORDS,)).fetchall()
    if rows:
        db.executemany("DELETE FROM dead WHERE id = ?", [(row[0],) for row in rows])
        db.execute("UPDATE dead_totals SET purged = purged + ?", (sum(row[1] for row in rows),))


def has_to_purge(db: sqlite3.Connection) -> bool:
    """Tells if letters are marked to be purged."""
    query = f"SELECT EXISTS(SELECT 1 FROM dead WHERE retry = {TO_PURGE})"  # noqa: S608
    return bool(db.execute(query).fetchone()[0])


class CacheDeadLetters(SqliteDeadLetters):
    """Dead letters of a log, as commands handle them beside the daemon that owns it."""

    takes_moved = False

    def check_owned(self) -> None:
        """Refuses a change of a cache that nothing reads any more.

        Raises:
            DataDirError: no daemon runs on it.
        """
        try:
            FileLock(self.path, of=self.path).close()
        except DataDirError:
            return
        problem = "its journal is a log that no daemon here owns: start ingestd, then run this"
        raise DataDirError(path=self.path, problem=problem)

    def mark(self, chosen: LetterFilter, last: int, check: Callable[[bytes], str]) -> MarkedLetters:
        """See `DeadLetters.mark`."""
        self.check_owned()
        return super().mark(chosen, last, check)

    def edit(self, number: int, before: bytes, after: bytes) -> bool:
        """See `DeadLetters.edit`."""
        self.check_owned()
        return super().edit(number, before, after)

    def move(
        self,
        chosen: LetterFilter,  # noqa: ARG002
        last: int,  # noqa: ARG002
        check: Callable[[bytes], str],  # noqa: ARG002
        target: str,
    ) -> MarkedLetters:
        """Refuses: two logs have no commit together.

        Raises:
            UsageError: always.
        """
        problem = f"dead letters of a journal in a log can't be moved into {target}"
        raise UsageError(problem=problem)

    def purge(self, chosen: LetterFilter, last: int) -> int:
        """Marks letters, which the daemon purges within moments; see `DeadLetters.purge`."""
        self.check_owned()
        with opened(self.path, write=True) as db:
            return purge(db, chosen, last, mark=TO_PURGE)


class CacheDeadLetterStore(CacheDeadLetters, SqliteDeadLetterStore):
    """See `ingestd.journal.dead_letters.DeadLetterStore`."""

    def check_owned(self) -> None:
        """Does nothing: in the daemon, a descriptor that is closed would drop SQLite's locks."""


class CacheFile(SqliteFile):
    """The cache of a log, as commands see it beside the daemon."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.dead_letters = CacheDeadLetters(path)

    def repair(self, found: Sequence[Finding], now: float) -> Iterator[str]:  # noqa: ARG002
        """Refuses: the next start makes the file anew.

        Raises:
            DataDirError: always.
        """
        raise DataDirError(path=self._path, problem="the next start makes this cache anew")


# -- snapshots -------------------------------------------------------------------------------------


def open_snapshot(path: Path) -> sqlite3.Connection:
    """Opens a connection that sees the cache as it is now, until it is closed."""
    db = connect(path)
    db.execute("BEGIN")
    db.execute("SELECT 1 FROM meta").fetchone()
    return db


def state_of(db: sqlite3.Connection, journal: str) -> bytes:
    """The numbers of a snapshot, packed."""
    meta = db.execute(f"SELECT {', '.join(schema.COUNTERS)}, crc FROM meta").fetchone()  # noqa: S608
    return _encode(State(schema.VERSION, journal, list(meta), *_letter_numbers(db)))


def read_state(packed: bytes) -> State:
    """The inverse of `state_of`.

    Raises:
        ValueError: it is of another version.
    """
    state = msgspec.msgpack.decode(packed, type=State)
    if state.version != schema.VERSION:
        raise ValueError(f"its snapshot has version {state.version}")
    return state


def first_kept(
    db: sqlite3.Connection, marks: Sequence[tuple[int, int]], carried_max: int
) -> tuple[int, int]:
    """The last place in the log that reading can begin at.

    Args:
        db: of the snapshot.
        marks: places: number of a message, and the id of its first chunk; at least one.
        carried_max: bytes of older chunks that the snapshot may carry itself.
    """
    best, size, before = marks[0], 0, 0
    query = "SELECT coalesce(sum(bytes), 0) FROM chunks WHERE id >= ? AND id < ?"
    for place in marks:
        size += db.execute(query, (before, place[1])).fetchone()[0]
        before = place[1]
        if size > carried_max and place is not marks[0]:
            break
        best = place
    return best


def parts(db: sqlite3.Connection, first_chunk: int, part_bytes: int) -> Iterator[bytes]:
    """The parts of a snapshot, each of about `part_bytes` at most, or of one row.

    Args:
        db: of the snapshot.
        first_chunk: older chunks are carried, the others are left in the log.
        part_bytes: about, as rows are not cut.
    """
    for table in _TABLES:
        yield from _packed(table, db.execute(f"SELECT * FROM {table}"), part_bytes)  # noqa: S608
    carried = db.execute("SELECT * FROM chunks WHERE id < ? ORDER BY id", (first_chunk,))
    yield from _packed("chunks", carried, part_bytes)
    left = db.execute("SELECT id FROM chunks WHERE id >= ? ORDER BY id", (first_chunk,))
    yield from _packed("pending", _runs(row[0] for row in left), part_bytes)


def _packed(table: str, rows: Iterable[Sequence[Any]], part_bytes: int) -> Iterator[bytes]:
    part: list[Sequence[Any]] = []
    size = 0
    for row in rows:
        wide = sum(len(value) for value in row if isinstance(value, bytes | str)) + 16 * len(row)
        if part and (size + wide > part_bytes or len(part) >= PART_ROWS):
            yield _encode((table, part))
            part, size = [], 0
        part.append(row)
        size += wide
    if part:
        yield _encode((table, part))


def _runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    first = last = -1
    for number in numbers:
        if number != last + 1:
            if first >= 0:
                yield first, last
            first = number
        last = number
    if first >= 0:
        yield first, last
