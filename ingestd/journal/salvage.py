"""A damaged journal is built anew from what can still be read of it.

SQLite stops at the first page that makes no sense, wherever a statement meets it: at the start, or
weeks later when a batch is settled. So that neither keeps the daemon from starting for ever:

* Damage that shows at the start (which reads everything but chunks beyond a bound, and counts their
  records and bytes against the ledger) is repaired at once.
* Damage that shows later, to the rest of that count above all, ends the daemon with 75, and leaves
  a mark (`journal.db-damaged`) that makes the next start repair the file.

To repair means: every row that can be read and whose checksum fits goes into a new file under the
same journal id, sealed batches under their numbers; what is missing from the ledger becomes one
dead letter, `damaged`, that stands for so many records; and the old file is set aside, whole.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ingestd.base.bookmark import Bookmark
from ingestd.base.record import Span
from ingestd.journal import bookmarks, letters
from ingestd.journal.interface import Chunk, Cursor, DeadLetter, Ledger, Sealed
from ingestd.journal.store import (
    Meta,
    Store,
    batch_row,
    chunk_row,
    connect,
    read_some,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PROBES_MAX = 20_000
"""Keys tried one by one between the rows that a walk from either end reaches."""
_NOT_DAMAGE = frozenset(
    {
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_AUTH,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_INTERRUPT,
    }
)
_UNREADABLE = (
    sqlite3.Error,
    ValueError,
    TypeError,
    LookupError,
    OverflowError,
    msgspec.MsgspecError,
)
_spans = msgspec.msgpack.Decoder(tuple[Span, ...])


def is_damage(error: BaseException) -> bool:
    """Whether a file's content is at fault, not the disk, the space or another process."""
    code = getattr(error, "sqlite_errorcode", None)
    if code is not None:
        return code & 0xFF not in _NOT_DAMAGE
    return isinstance(error, _UNREADABLE)


def mark(path: Path) -> None:
    """Has the next start repair the journal; without space for that it finds the damage again."""
    with contextlib.suppress(OSError):
        _mark_of(path).touch(mode=0o600)


def marked(path: Path) -> bool:
    """Whether an earlier life met damage."""
    return _mark_of(path).exists()


def _mark_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-damaged")


def repair(path: Path, now: float) -> str:
    """Puts a new journal in place of a damaged one.

    A crash at any moment of it leaves either the old journal in place, or the new one complete
    beside it, which `finish` then moves in.

    Returns:
        Where the old one was moved to.

    Raises:
        sqlite3.Error, OSError: the new file can't be written; the old one is in place.
    """
    building = path.with_name(f"{path.name}.building")
    for suffix in ("", "-wal", "-shm"):
        building.with_name(building.name + suffix).unlink(missing_ok=True)
    store = Store(building)
    try:
        _fill(store, path, now)
        store.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    finally:
        store.close()
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
    while path.with_name(f"{path.name}.damaged-{stamp}").exists():
        stamp += "+"
    building.rename(path.with_name(f"{path.name}.repaired-{stamp}"))
    return finish(path)


def finish(path: Path) -> str:
    """Moves a repaired journal in, the old one out; goes on where a crash ended it."""
    target = ""
    for repaired in sorted(path.parent.glob(f"{path.name}.repaired-*")):
        _sync(path.parent)
        target = str(repaired).replace(".repaired-", ".damaged-")
        for suffix in ("-wal", "-shm", ""):
            with contextlib.suppress(FileNotFoundError):
                path.with_name(path.name + suffix).rename(f"{target}{suffix}")
        _mark_of(path).unlink(missing_ok=True)
        repaired.rename(path)
        _sync(path.parent)
    return target


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# -- what can be read ----------------------------------------------------------------------------


class _Found(NamedTuple):
    journal: str
    meta: Meta | None
    chunks: dict[int, int]
    batches: list[Sealed]


def _fill(store: Store, path: Path, now: float) -> None:
    """Copies everything that can be read, in one transaction."""
    with contextlib.ExitStack() as opened:
        try:
            old = opened.enter_context(contextlib.closing(connect(path)))
            old.execute("PRAGMA writable_schema=ON")  # do not stop at the first odd table
        except sqlite3.Error:
            return  # no journal at all: the new one is empty
        db = store.connection
        db.execute("BEGIN IMMEDIATE")
        found = _Found(*_meta(old), dict(_copy_chunks(old, db)), [])
        found.batches.extend(_copy_batches(old, db, found.chunks))
        for table in ("dead", "damaged", "keys", "failing"):
            _copy_rows(old, db, table)
        _copy_bookmarks(old, db)
        _copy_dead_totals(old, db)
        _settle_meta(db, found, now)
        db.execute("COMMIT")


def _meta(old: sqlite3.Connection) -> tuple[str, Meta | None]:
    try:
        row = old.execute(
            "SELECT journal, accepted, processed, dead, refused,"
            " cursor_chunk, cursor_record, last_chunk, next_batch FROM meta"
        ).fetchone()
        if row and type(row[0]) is str and all(type(n) is int and n >= 0 for n in row[1:]):
            return row[0], Meta(Ledger(*row[1:5]), Cursor(*row[5:7]), row[7], row[8])
    except _UNREADABLE:
        pass
    return "", None


def _keys(old: sqlite3.Connection, table: str) -> Iterator[int]:
    """The rowids that can be reached: up from the first, down from the last, then between."""
    ends: list[int | None] = []
    for order, beyond in (("ASC", ">"), ("DESC", "<")):
        last: int | None = None
        try:
            while True:
                where, bound = ("", ()) if last is None else (f"WHERE rowid {beyond} ?", (last,))
                row = old.execute(
                    f"SELECT rowid FROM {table} {where} ORDER BY rowid {order} LIMIT 1",  # noqa: S608
                    bound,
                ).fetchone()
                if row is None or (ends and ends[0] is not None and row[0] <= ends[0]):
                    return  # that was all of them
                if last is not None and (row[0] <= last if order == "ASC" else row[0] >= last):
                    raise ValueError("the tree leads nowhere")
                last = row[0]
                yield row[0]
        except _UNREADABLE:
            ends.append(last)
    low, high = ends
    if low is not None:
        yield from range(low + 1, min(high or sys.maxsize, low + PROBES_MAX))
    elif high is not None:
        yield from range(max(1, high - PROBES_MAX), high)


def _rows(old: sqlite3.Connection, table: str, columns: str = "*") -> Iterator[tuple[Any, ...]]:
    query = f"SELECT {columns} FROM {table} WHERE rowid = ?"  # noqa: S608
    for key in _keys(old, table):
        try:
            row = old.execute(query, (key,)).fetchone()
        except _UNREADABLE:
            continue
        if row is not None:
            yield row


def _copy_chunks(old: sqlite3.Connection, db: sqlite3.Connection) -> Iterator[tuple[int, int]]:
    for key in _keys(old, "chunks"):
        try:
            chunk: Chunk = read_some(old, [key])[key]
            if not chunk.damaged and chunk.records.count > 0:
                db.execute("INSERT INTO chunks VALUES(?,?,?,?,?,?,?,?)", chunk_row(chunk))
                yield key, chunk.records.count
        except _UNREADABLE:
            continue


def _copy_batches(
    old: sqlite3.Connection, db: sqlite3.Connection, chunks: dict[int, int]
) -> Iterator[Sealed]:
    """Sealed batches keep their numbers, without the records that are lost."""
    columns = "number, count, attempts, due_at, accepted_at, spans"
    for number, _, attempts, due_at, accepted_at, spans in _rows(old, "batches", columns):
        try:
            left = tuple(
                span
                for span in _spans.decode(spans)
                if 0 <= span.first < span.first + span.count <= chunks.get(span.chunk, 0)
            )
            count = sum(span.count for span in left)
            batch = Sealed(number, left, count, max(0, attempts), due_at, accepted_at)
            if left:
                db.execute("INSERT INTO batches VALUES(?,?,?,?,?,?)", batch_row(batch))
                yield batch
        except _UNREADABLE:
            continue


def _copy_rows(old: sqlite3.Connection, db: sqlite3.Connection, table: str) -> None:
    names = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
    if not names:
        return
    places = ",".join("?" * len(names))
    for row in _rows(old, table, ",".join(names)):
        with contextlib.suppress(*_UNREADABLE):
            db.execute(f"INSERT INTO {table} VALUES({places})", row)


def _copy_bookmarks(old: sqlite3.Connection, db: sqlite3.Connection) -> None:
    """Without those that are damaged: what they belong to is read again, rather than left out."""
    for key, state, crc in _rows(old, "bookmarks", "key, state, crc"):
        with contextlib.suppress(*_UNREADABLE, AttributeError):
            bookmark = Bookmark(key, state)
            if bookmarks.checksum(bookmark) == crc:
                bookmarks.put(db, [bookmark], bookmarks.Totals())


def _copy_dead_totals(old: sqlite3.Connection, db: sqlite3.Connection) -> None:
    """Over the life; how many there are now was counted by the trigger as they were copied."""
    with contextlib.suppress(*_UNREADABLE):
        totals = letters.totals(old)
        db.execute(
            "UPDATE dead_totals SET revived=?, readmitted=?, expired=?, purged=?", totals[2:]
        )


# -- the numbers add up again --------------------------------------------------------------------


def _settle_meta(db: sqlite3.Connection, found: _Found, now: float) -> None:
    last = max(found.chunks, default=0)
    ends = [(span.chunk, span.first + span.count) for b in found.batches for span in b.spans]
    cursor = Cursor(*max(ends)) if ends else Cursor(min(found.chunks, default=1), 0)
    ledger, next_batch = Ledger(), 1
    if found.meta is not None:
        ledger, cursor, next_batch = found.meta.ledger, found.meta.cursor, found.meta.next_batch
        last = max(last, found.meta.last_chunk)
    if not 0 <= cursor.record < found.chunks.get(cursor.chunk, 0):
        cursor = Cursor(cursor.chunk + (1 if cursor.record else 0), 0)
    next_batch = max([next_batch, *(batch.number + 1 for batch in found.batches)])
    _drop_done(db, found, cursor)
    pending = sum(batch.count for batch in found.batches) - cursor.record
    pending += sum(count for chunk, count in found.chunks.items() if chunk >= cursor.chunk)
    missing = ledger.pending - pending
    if missing > 0:
        letters.insert(db, [_letter(found.journal, missing, now)])
        ledger = ledger._replace(dead=ledger.dead + missing)
    else:  # the counters were what was damaged
        ledger = ledger._replace(accepted=ledger.accepted - missing)
    db.execute(
        "UPDATE meta SET accepted=?, processed=?, dead=?, refused=?,"
        " cursor_chunk=?, cursor_record=?, last_chunk=?, next_batch=?",
        (*ledger, *cursor, last, next_batch),
    )
    if found.journal:
        db.execute("UPDATE meta SET journal=?", (found.journal,))


def _drop_done(db: sqlite3.Connection, found: _Found, cursor: Cursor) -> None:
    """Chunks that no batch names and that lie before the cursor were done."""
    named = {span.chunk for batch in found.batches for span in batch.spans}
    for chunk in [c for c in found.chunks if c < cursor.chunk and c not in named]:
        db.execute("DELETE FROM chunks WHERE id=?", (chunk,))


def _letter(journal: str, missing: int, now: float) -> DeadLetter:
    error = "the journal was damaged: these records could not be read; the old file is set aside"
    return DeadLetter(f"{journal}.0.0", "damaged", error, "", b"", 0, now, now, missing)
