"""Repair of a damaged journal: it is built anew from all that can still be read.

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
import re
import sqlite3
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ingestd.base.append import SourceOffset
from ingestd.base.files import make_private, sync_folder, tighten
from ingestd.base.record import Span
from ingestd.journal import letter_rows
from ingestd.journal.dead_letters import DeadLetter
from ingestd.journal.interface import Cursor, Ledger, Sealed
from ingestd.journal.sqlite import first_page, letters, offsets, schema
from ingestd.journal.sqlite.store import (
    PAGE_BYTES,
    Meta,
    Store,
    batch_row,
    chunk_row,
    connect,
    read_lineage,
    read_one,
    write_meta,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

PROBES_MAX = 20_000
"""Keys tried one by one between the rows that a walk from either end reaches."""
JUMP = 100_000
"""How far numbers jump where it is not known which ones were used."""
_ID = re.compile(r"[0-9a-f]{12}")
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
_WITH_LINEAGE = 3
"""The first version that has it."""


def is_damage(error: BaseException) -> bool:
    """Returns True if a file's content is at fault, not the disk, the space or another process."""
    code = getattr(error, "sqlite_errorcode", None)
    if code is not None:
        return code & 0xFF not in _NOT_DAMAGE
    return isinstance(error, _UNREADABLE)


def mark(path: Path) -> None:
    """Has the next start repair the journal; without space for that it finds the damage again."""
    with contextlib.suppress(OSError):
        make_private(_mark_of(path))


def marked(path: Path) -> bool:
    """Returns True if an earlier run met damage."""
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
    _unlink(building)
    try:
        with contextlib.closing(Store(building)) as store:
            _fill(store, path, now)
            store.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    except BaseException:
        _unlink(building)  # a half of it would keep the space that the next try needs
        raise
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
    while path.with_name(f"{path.name}.damaged-{stamp}").exists():
        stamp += "+"
    building.rename(path.with_name(f"{path.name}.repaired-{stamp}"))
    return finish(path)


def _unlink(building: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        building.with_name(building.name + suffix).unlink(missing_ok=True)


def finish(path: Path) -> str:
    """Moves a repaired journal in, the old one out; goes on where a crash ended it."""
    target = ""
    for repaired in sorted(path.parent.glob(f"{path.name}.repaired-*")):
        sync_folder(path.parent)
        stamp = repaired.name.removeprefix(f"{path.name}.repaired-")
        aside = path.with_name(f"{path.name}.damaged-{stamp}")
        while path.exists() and aside.exists():  # nothing that was set aside is written over
            aside = aside.with_name(f"{aside.name}+")
        for suffix in ("-wal", "-shm", ""):
            with contextlib.suppress(FileNotFoundError):
                path.with_name(path.name + suffix).rename(f"{aside}{suffix}")
            tighten(aside.with_name(aside.name + suffix))
        _mark_of(path).unlink(missing_ok=True)
        repaired.rename(path)
        sync_folder(path.parent)
        target = str(aside)
    return target


# -- salvage ---------------------------------------------------------------------------------------


class _Salvaged(NamedTuple):
    """Salvaged contents of a journal.

    Attributes:
        journal: its id; empty if no copy of it can be read.
        counters: those of `schema.COUNTERS` that are numbers.
        sound: the checksum over them fits, or their version has none and all are numbers.
        chunks: the records of each chunk.
        batches: what is sealed.
        holes: the tables of chunks and batches of which not every row can be read.
    """

    journal: str
    counters: dict[str, int]
    sound: bool
    chunks: dict[int, int]
    batches: list[Sealed]
    holes: set[str]


def _fill(store: Store, path: Path, now: float) -> None:
    """Copies everything that can be read, in one transaction."""
    with contextlib.ExitStack() as opened:
        opened.enter_context(first_page.mended(path, PAGE_BYTES))
        try:
            old = opened.enter_context(contextlib.closing(connect(path)))
            old.execute("PRAGMA writable_schema=ON")  # do not stop at the first odd table
        except _UNREADABLE:
            return  # no journal at all: the new one is empty
        db = store.connection
        db.execute("BEGIN IMMEDIATE")
        version = _version(old)
        holes: set[str] = set()
        chunks = dict(_copy_chunks(old, db, version, holes))
        found = _Salvaged(*_meta(old, version), chunks, [], holes)
        found.batches.extend(_copy_batches(old, db, version, found))
        _copy_letters(old, db)
        for table in ("damaged", "keys", "failing", "sender_ids", "dedupe_keys"):
            _copy_rows(old, db, table)
        _copy_journeys(old, db)
        _copy_bookmarks(old, db)
        _copy_dead_totals(old, db)
        _settle_meta(db, found, store.id, now)
        db.execute("COMMIT")


def _version(old: sqlite3.Connection) -> int:
    """Of the tables, as far as they tell."""
    with contextlib.suppress(*_UNREADABLE):
        columns = schema.columns(old, "chunks")
        return schema.VERSION if "envelopes" in columns else 2 if "names" in columns else 1
    return schema.VERSION


def _meta(old: sqlite3.Connection, version: int) -> tuple[str, dict[str, int], bool]:
    """The journal's id, from either of its places, the counters that are some, and their word."""
    row: dict[str, Any] = {}
    for column in ("journal", "crc", *schema.COUNTERS):  # one that can't be read takes none along
        with contextlib.suppress(*_UNREADABLE):
            found = old.execute(f"SELECT {column} FROM meta").fetchone()  # noqa: S608
            row |= {} if found is None else {column: found[0]}
    counters = {
        name: row[name] for name in schema.COUNTERS if type(row.get(name)) is int and row[name] >= 0
    }
    journal = row.get("journal", "")
    sound = len(counters) == len(schema.COUNTERS)
    if version > 1 and sound:
        sound = schema.meta_checksum(str(journal), list(counters.values())) == row.get("crc")
    second = ""
    with contextlib.suppress(*_UNREADABLE):
        second = schema.read_identity(old)
    if second or (type(journal) is str and _ID.fullmatch(journal)):
        return second or journal, counters, sound
    return "", counters, sound


def _keys(old: sqlite3.Connection, table: str, holes: set[str]) -> Iterator[int]:
    """The rowids that can be reached: up from the first, down from the last, then between.

    Args:
        old: the damaged journal.
        table: one of its tables.
        holes: gets the name of the table if not all of it can be reached.
    """
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
            holes.add(table)
            ends.append(last)
    low, high = ends
    if low is not None:
        yield from range(low + 1, min(high or sys.maxsize, low + PROBES_MAX))
    elif high is not None:
        yield from range(max(1, high - PROBES_MAX), high)


def _rows(
    old: sqlite3.Connection, table: str, columns: str, holes: set[str] | None = None
) -> Iterator[tuple[Any, ...]]:
    query = f"SELECT {columns} FROM {table} WHERE rowid = ?"  # noqa: S608
    holes = set() if holes is None else holes
    for key in _keys(old, table, holes):
        try:
            row = old.execute(query, (key,)).fetchone()
        except _UNREADABLE:
            holes.add(table)
            continue
        if row is not None:
            yield row


def _copy_chunks(
    old: sqlite3.Connection, db: sqlite3.Connection, version: int, holes: set[str]
) -> Iterator[tuple[int, int]]:
    for key in _keys(old, "chunks", holes):
        try:
            chunk = read_one(old, key, version=version)
            if chunk is not None and not chunk.damaged and chunk.records.count > 0:
                db.execute("INSERT INTO chunks VALUES(?,?,?,?,?,?,?,?,?,?)", chunk_row(chunk))
                yield key, chunk.records.count
            elif chunk is not None:
                holes.add("chunks")
        except _UNREADABLE:
            holes.add("chunks")


def _copy_batches(
    old: sqlite3.Connection, db: sqlite3.Connection, version: int, found: _Salvaged
) -> Iterator[Sealed]:
    """Sealed batches keep their numbers, without the records that are lost."""
    lineage = "lineage" if version >= _WITH_LINEAGE else "x''"
    columns = f"number, count, attempts, due_at, accepted_at, spans, {lineage}"
    for number, said, attempts, due_at, accepted_at, spans, packed in _rows(
        old, "batches", columns, found.holes
    ):
        try:
            left = tuple(
                span
                for span in _spans.decode(spans)
                if 0 <= span.first < span.first + span.count <= found.chunks.get(span.chunk, 0)
            )
            count = sum(span.count for span in left)
            batch = Sealed(
                number, left, count, max(0, attempts), due_at, accepted_at,
                lineage=_lineage(packed),
            )  # fmt: skip
            if count != said:
                found.holes.add("batches")
            if left:
                row = batch_row(batch, time.time())
                db.execute("INSERT INTO batches VALUES(?,?,?,?,?,?,?,?)", row)
                yield batch
        except _UNREADABLE:
            found.holes.add("batches")


def _lineage(packed: bytes) -> tuple[int, ...]:
    """The lineage of a batch; a damaged one is dropped, because the records are whole."""
    try:
        return read_lineage(packed)
    except _UNREADABLE:
        return ()


def _copy_rows(old: sqlite3.Connection, db: sqlite3.Connection, table: str) -> None:
    """A table's rows as they are; columns that an earlier version had not get their defaults."""
    names = schema.columns(db, table)
    with contextlib.suppress(*_UNREADABLE):
        there = schema.columns(old, table)
        names = [name for name in names if name in there] or names
    places = ",".join("?" * len(names))
    into = f"INSERT INTO {table}({','.join(names)}) VALUES({places})"
    for row in _rows(old, table, ",".join(names)):
        with contextlib.suppress(*_UNREADABLE):
            db.execute(into, row)


def _copy_letters(old: sqlite3.Connection, db: sqlite3.Connection) -> None:
    """Dead letters; of a row that does not tell any more what is in it, the bytes are kept."""
    _copy_rows(old, db, "dead")
    for row in letters.groups(db):
        if (damaged := letter_rows.readable(row)) is not row:
            letters.replace(db, row, [damaged])


def _copy_journeys(old: sqlite3.Connection, db: sqlite3.Connection) -> None:
    """Letters on their way between pipelines; what is kept is settled: it is in the old file."""
    from ingestd.journal.sqlite import kept, moves  # noqa: PLC0415  most journals have none

    with contextlib.suppress(*_UNREADABLE):
        if schema.columns(old, "moved"):
            moves.prepare(db)
            for table in ("moving", "arrivals"):
                _copy_rows(old, db, table)
            found = old.execute("SELECT letters, arrived FROM moved").fetchone()
            db.execute("UPDATE moved SET letters = ?, arrived = ?", found)
    with contextlib.suppress(*_UNREADABLE):
        if kept.exist(old):
            kept.prepare(db)
            _copy_rows(old, db, "replaying")
            found = old.execute("SELECT replayed FROM kept_totals").fetchone()
            db.execute("UPDATE kept_totals SET replayed = ?", found)


def _copy_bookmarks(old: sqlite3.Connection, db: sqlite3.Connection) -> None:
    """Without those that are damaged: what they belong to is read again, rather than left out."""
    for key, state, crc in _rows(old, "bookmarks", "key, state, crc"):
        with contextlib.suppress(*_UNREADABLE, AttributeError):
            bookmark = SourceOffset(key, state)
            if offsets.checksum(bookmark) == crc:
                offsets.put(db, [bookmark], offsets.OffsetTotals())


def _copy_dead_totals(old: sqlite3.Connection, db: sqlite3.Connection) -> None:
    """Over the life; how many there are now was counted by the trigger as they were copied."""
    for name in ("revived", "readmitted", "expired", "purged", "dropped"):
        with contextlib.suppress(*_UNREADABLE):
            (number,) = old.execute(f"SELECT {name} FROM dead_totals").fetchone()  # noqa: S608
            if type(number) is int and number >= 0:
                db.execute(f"UPDATE dead_totals SET {name} = ?", (number,))  # noqa: S608
    with contextlib.suppress(*_UNREADABLE):  # a letter's number is never given again
        (last,) = old.execute("SELECT seq FROM sqlite_sequence WHERE name = 'dead'").fetchone()
        db.execute(
            "INSERT INTO sqlite_sequence SELECT 'dead', 0 WHERE NOT EXISTS"
            " (SELECT 1 FROM sqlite_sequence WHERE name = 'dead')"
        )
        db.execute("UPDATE sqlite_sequence SET seq = max(seq, ?) WHERE name = 'dead'", (last,))


# -- counters --------------------------------------------------------------------------------------


def _settle_meta(db: sqlite3.Connection, found: _Salvaged, journal: str, now: float) -> None:
    counters = found.counters
    ledger = Ledger(*(counters.get(name, 0) for name in schema.COUNTERS[:4]))
    cursor = _cursor(found, ledger)
    _drop_done(db, found, cursor)
    pending = _pending(found, cursor)
    missing = ledger.pending - pending
    if missing > 0 and (found.sound or found.holes or _lacks(found, cursor)):
        letters.insert(db, [_letter(found.journal or journal, missing, now)])
        ledger = ledger._replace(dead=ledger.dead + missing)
    else:  # the counters were what was damaged
        ledger = _balanced(ledger, pending, counters)
    last, next_batch = _numbers(found, cursor, now)
    if not any(chunk >= cursor.chunk for chunk in found.chunks):
        cursor = Cursor(last + 1, 0)
    if found.journal:
        journal = found.journal
        db.execute("UPDATE meta SET journal=?", (journal,))
        schema.write_identity(db, journal)
    write_meta(db, journal, Meta(ledger, cursor, last, next_batch))


def _balanced(ledger: Ledger, pending: int, known: Collection[str]) -> Ledger:
    """The ledger with one number corrected: one that is not known, else the accepted ones."""
    for name in ("processed", "dead"):
        others = sum(getattr(ledger, other) for other in ("processed", "dead") if other != name)
        if name not in known and "accepted" in known and ledger.accepted >= others + pending:
            return ledger._replace(**{name: ledger.accepted - others - pending})
    return ledger._replace(accepted=ledger.processed + ledger.dead + pending)


def _cursor(found: _Salvaged, ledger: Ledger) -> Cursor:
    """Finds the first unsealed record, by the counter or by the sealed batches.

    A chunk that no batch names is done before the cursor, and such a one is deleted with the commit
    that ends it: so what is there and is not named lies behind it.
    """
    ends = [(span.chunk, span.first + span.count) for b in found.batches for span in b.spans]
    derived = Cursor(*max(ends)) if ends else Cursor(min(found.chunks, default=1), 0)
    candidates = [_normal(found, derived)]
    if {"cursor_chunk", "cursor_record"} <= found.counters.keys():
        written = Cursor(found.counters["cursor_chunk"], found.counters["cursor_record"])
        if found.sound:
            return _normal(found, written)
        if written >= derived and written.chunk <= max(found.chunks, default=written.chunk) + 1:
            candidates.insert(0, _normal(found, written))
    for candidate in candidates:
        if _pending(found, candidate) == ledger.pending:
            return candidate
    return candidates[0]


def _normal(found: _Salvaged, cursor: Cursor) -> Cursor:
    if 0 <= cursor.record < found.chunks.get(cursor.chunk, 0):
        return cursor
    return Cursor(cursor.chunk + (1 if cursor.record else 0), 0)


def _pending(found: _Salvaged, cursor: Cursor) -> int:
    pending = sum(batch.count for batch in found.batches) - cursor.record
    return pending + sum(count for chunk, count in found.chunks.items() if chunk >= cursor.chunk)


def _lacks(found: _Salvaged, cursor: Cursor) -> bool:
    """Returns True if chunks are missing: their ids have no gap behind the cursor."""
    behind = sum(1 for chunk in found.chunks if chunk >= cursor.chunk)
    last = found.counters.get("last_chunk", 0)
    return cursor.chunk + behind - 1 < last <= cursor.chunk + behind + PROBES_MAX


def _numbers(found: _Salvaged, cursor: Cursor, now: float) -> tuple[int, int]:
    """The last chunk and the next batch; far beyond what can have been used if that is not known.

    Ids that come twice would name other records the second time. Both counters grow by less than
    one in a millisecond over a life, so the time is a number that was never reached.
    """
    last = max([cursor.chunk - 1, *found.chunks])
    next_batch = max([1, *(batch.number + 1 for batch in found.batches)])
    if found.sound:
        return (
            max(last, found.counters["last_chunk"]),
            max(next_batch, found.counters["next_batch"]),
        )
    # Chunks are looked for from the newest one down, so a gap must not be wide while some wait.
    waits = any(chunk >= cursor.chunk for chunk in found.chunks)
    last = last + JUMP if waits else max(last + JUMP, int(now * 1000))
    return last, max(next_batch + JUMP, int(now * 1000))  # no number of a batch is looked for


def _drop_done(db: sqlite3.Connection, found: _Salvaged, cursor: Cursor) -> None:
    """Chunks that no batch names and that lie before the cursor were done."""
    named = {span.chunk for batch in found.batches for span in batch.spans}
    for chunk in [c for c in found.chunks if c < cursor.chunk and c not in named]:
        db.execute("DELETE FROM chunks WHERE id=?", (chunk,))


def _letter(journal: str, missing: int, now: float) -> DeadLetter:
    error = "the journal was damaged: these records could not be read; the old file is set aside"
    return DeadLetter(f"{journal}.0.0", "damaged", error, "", b"", 0, now, now, missing)
